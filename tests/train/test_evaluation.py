from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from torch.utils.data import ConcatDataset
from toy_task import ToyTask, in_ranks, samples

from mhmoe_vl import distributed
from mhmoe_vl.data.loader import eval_batches
from mhmoe_vl.errors import DataError
from mhmoe_vl.train import evaluation


def test_records_are_unique_and_sorted_and_the_model_is_as_before():
    task = ToyTask(dropout=0.5)
    model = task.model(None)
    batches = [samples([5, 2]), samples([2, 9]), samples([1])]
    records = evaluation.predict(task, model, batches, torch.device("cpu"), nullcontext)
    assert [record["id"] for record in records] == [1, 2, 5, 9]
    assert model.training and model.calls == 0
    alone = [evaluation.predict(task, model, [samples([i])], torch.device("cpu"), nullcontext)[0] for i in (1, 2, 5, 9)]
    assert [r["error"] for r in alone] == pytest.approx([r["error"] for r in records], rel=1e-6)  # no dropout


def test_a_stop_ends_it_early():
    task = ToyTask()
    answers = iter([False, True])
    batches = [samples([1]), samples([2])]
    found = evaluation.predict(task, task.model(None), batches, torch.device("cpu"), nullcontext, lambda: next(answers))
    assert len(found) == 1


def predict_numbers(*sets, batch_size=2, stopped=lambda: False, **place):
    """Ids of the records of sets of numbers, one set or several in a row."""
    parts = [eval_batches(numbers, lambda number, rng: number, batch_size, samples, **place) for numbers in sets]
    task = ToyTask()
    batches = ConcatDataset(parts) if len(parts) > 1 else parts[0]
    records = evaluation.predict(task, task.model(None), batches, torch.device("cpu"), nullcontext, stopped)
    return [record["id"] for record in records]


def test_a_split_that_lost_samples_is_refused():
    assert predict_numbers([5, 2, 9]) == [2, 5, 9]
    assert predict_numbers([5, 2, 9], [1, 3]) == [1, 2, 3, 5, 9]
    with pytest.raises(DataError, match=r"evaluation: 2 different predictions for 3 samples \(every sample"):
        predict_numbers([5, 2, 2])
    with pytest.raises(DataError, match="4 different predictions for 5 samples"):
        predict_numbers([5, 2, 9], [1, 2])
    answers = iter([False, True])
    assert predict_numbers([5, 2, 9], stopped=lambda: next(answers)) == [2, 5]


def test_what_does_not_say_its_size_is_not_held_to_one():
    task = ToyTask()
    unsaid = ConcatDataset([[samples([1, 2])], eval_batches([3, 2], lambda number, rng: number, 2, samples)])
    records = evaluation.predict(task, task.model(None), unsaid, torch.device("cpu"), nullcontext)
    assert [record["id"] for record in records] == [1, 2, 3]


def test_ranks_agree_on_whether_samples_were_lost():
    def check():
        torch.set_num_threads(1)
        distributed.init_process_group(torch.device("cpu"))
        place = {"rank": distributed.rank(), "world": distributed.world_size()}
        assert predict_numbers([5, 2, 9], **place) == [2, 5, 9]
        assert predict_numbers([5], **place) == [5]
        with pytest.raises(DataError, match="2 different predictions for 3 samples"):
            predict_numbers([5, 2, 5], **place)
        on_second = distributed.rank() == 1
        assert predict_numbers([5, 2, 9], stopped=lambda: on_second, **place) == [5, 9]
        distributed.shutdown()

    assert in_ranks(check) == [0, 0]


def test_other_predictions_are_removed_but_the_best(tmp_path):
    paths = [evaluation.predictions_path(tmp_path, step) for step in (1, 2, 3)]
    evaluation.write_predictions(paths[0], [])
    evaluation.write_predictions(paths[1], [], keep=[paths[0]])
    evaluation.write_predictions(paths[2], [{"id": 1, "text": "é"}], keep=[paths[0]])
    assert sorted((tmp_path / "predictions").iterdir()) == [paths[0], paths[2]]
    assert json.loads(paths[2].read_text()) == {"id": 1, "text": "é"}
