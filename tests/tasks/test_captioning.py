"""Captioning: a tiny run from end to end, what is hidden, which tokens the loss leaves out, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_finetune import annotated, finetune, settings, write_captions
from tiny_world import write_settings
from torch.nn import functional as F

from mhmoe_vl import cli, commands, config
from mhmoe_vl.tasks.base import ModelOutput
from mhmoe_vl.tasks.captioning import NOT_HIDDEN, CaptionBatch, hide


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_captions(tmp_path_factory.mktemp("captions"))


def test_it_learns_to_write(world, tmp_path):
    path = write_settings(tmp_path / "c.yaml", settings("captioning", world, tmp_path / "run", label_smoothing=0.0))
    assert finetune("captioning", "--config", path, "--train.steps", 250, "--train.log_every", 50) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["CIDEr/after"] > 3 * summary["CIDEr/baseline"]
    records = [json.loads(x) for x in (tmp_path / "run/predictions/val_step-00000250.jsonl").read_text().splitlines()]
    assert len(records) == 8
    right = sum(record["caption"] in record["references"] for record in records)
    assert right >= 6, records


def test_karpathys_split_and_the_results_file(world, tmp_path):
    karpathy = annotated("dataset_coco.json")
    values = settings("captioning", world, tmp_path / "run", train=karpathy, test=karpathy, num_beams=1)
    assert finetune("captioning", "--config", write_settings(tmp_path / "c.yaml", values), "--train.steps", 2) == 0
    split = json.loads((tmp_path / "run/recorded/split.json").read_text())
    assert (split["validation_examples"], split["training_examples"]) == (8, 56)
    assert finetune("captioning", "--eval", tmp_path / "run", "--split", "test") == 0
    results = json.loads((tmp_path / "run/predictions/test/captions_results.json").read_text())
    assert [entry["image_id"] for entry in results] == [36, 37, 38, 39]


def test_the_results_file_passes_the_check(world, tmp_path):
    values = settings("captioning", world, tmp_path / "run", val=annotated("coco.json"))
    assert finetune("captioning", "--config", write_settings(tmp_path / "c.yaml", values), "--train.steps", 2) == 0
    out = tmp_path / "scores.json"
    predictions = tmp_path / "run/predictions/captions_results.json"
    arguments = ["--predictions", predictions, "--annotations", world / "coco.json", "--json", out]
    assert commands.main(["score", "captions", *map(str, arguments)]) == 0
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    scores = json.loads(out.read_text())
    assert {name: scores[name] for name in ("Bleu_4", "ROUGE_L", "CIDEr")} == pytest.approx(
        {name: last[name] for name in ("Bleu_4", "ROUGE_L", "CIDEr")}
    )


def test_what_is_hidden():
    ids = np.arange(100, 111)
    shares = np.zeros(3)
    for seed in range(400):
        shown, targets = hide(ids, 0.7, 7, 50, np.random.default_rng(seed))
        hidden = targets != NOT_HIDDEN
        assert hidden.sum() == 7 and not hidden[0]
        assert np.array_equal(targets[hidden], ids[hidden]) and np.array_equal(shown[~hidden], ids[~hidden])
        shares += [(shown[hidden] == 7).mean(), (shown[hidden] == ids[hidden]).mean(), (shown[hidden] < 50).mean()]
    assert shares[:2] / 400 == pytest.approx([0.8, 0.1], abs=0.02)
    assert hide(np.array([1, 2]), 0.01, 7, 50, np.random.default_rng(0))[1].tolist() == [NOT_HIDDEN, 2]


def test_the_worst_tokens_are_left_out(world, tmp_path):
    values = config.validate(
        config.RunConfig, settings("captioning", world, tmp_path, drop_worst_ratio=0.4, drop_worst_after=2)
    )
    task = cli.build_task(values)
    steps = task.dataset("train")
    assert [steps[step][0].drop for step in (0, 1, 2, 3)] == [0, 0, 0.4, 0.4]
    targets = torch.tensor([[NOT_HIDDEN, 1, 2], [3, 0, 1]])
    batch = CaptionBatch(torch.empty(2, 3, 32, 32), targets, targets < 0, targets, [{}, {}], drop=0.4)
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    rows = F.cross_entropy(logits, torch.tensor([1, 2, 3, 0, 1]), label_smoothing=0.1, reduction="none")
    assert task.num_targets(batch) == {"caption": 3}
    found = task.loss(ModelOutput({"logits": logits}, {}, {}), batch)["caption"]
    assert found == pytest.approx(float(rows.sort().values[:3].sum()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": annotated("none.json")}, "none.json: No such file"),
        ({"val": annotated("coco.json", "nowhere")}, "nowhere: No such file or directory"),
        ({"max_text_len": 40}, "max_text_len: 40 with encoder.max_text_len 16"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
    ],
)
def test_mistakes_are_one_line_before_training(world, tmp_path, capsys, change, message):
    assert (
        finetune(
            "captioning",
            "--config",
            write_settings(tmp_path / "c.yaml", settings("captioning", world, tmp_path / "run", **change)),
        )
        == 2
    )
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()
