from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from toy_task import ToyTask, samples

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


def test_other_predictions_are_removed_but_the_best(tmp_path):
    paths = [evaluation.predictions_path(tmp_path, step) for step in (1, 2, 3)]
    evaluation.write_predictions(paths[0], [])
    evaluation.write_predictions(paths[1], [], keep=[paths[0]])
    evaluation.write_predictions(paths[2], [{"id": 1, "text": "é"}], keep=[paths[0]])
    assert sorted((tmp_path / "predictions").iterdir()) == [paths[0], paths[2]]
    assert json.loads(paths[2].read_text()) == {"id": 1, "text": "é"}
