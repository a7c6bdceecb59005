"""NLVR2: a tiny run on pairs, a run on drawn pictures, and what must be refused."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_finetune import ENCODER, annotated, finetune, settings, write_nlvr2
from tiny_world import COLORS, write_settings

from mhmoe_vl import cli, commands
from mhmoe_vl.config import EncoderConfig, RunConfig, validate
from mhmoe_vl.models.factory import build_encoder
from mhmoe_vl.tasks.nlvr2 import NLVR2Model
from mhmoe_vl.tasks.pair_batch import PairBatch


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_nlvr2(tmp_path_factory.mktemp("nlvr2"))


def test_it_learns_and_its_file_has_the_same_score(world, tmp_path):
    assert (
        finetune("nlvr2", "--config", write_settings(tmp_path / "c.yaml", settings("nlvr2", world, tmp_path / "run")))
        == 0
    )
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["accuracy/baseline"] == 0.5
    assert summary["accuracy/after"] > 0.9
    csv = tmp_path / "run/predictions/nlvr2_predictions.csv"
    arguments = ["--predictions", csv, "--annotations", world / "dev.json", "--json", tmp_path / "scores.json"]
    assert commands.main(["score", "nlvr2", "--check", *map(str, arguments)]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert scores["accuracy"] == pytest.approx(max(line["accuracy"] for line in lines if line["split"] == "val"))


def test_whole_sentences_are_held_out(world, tmp_path):
    config = write_settings(
        tmp_path / "c.yaml", settings("nlvr2", world, tmp_path / "run", val=None, val_fraction=0.25)
    )
    assert finetune("nlvr2", "--config", config, "--train.steps", 1) == 0
    split = json.loads((tmp_path / "run/recorded/split.json").read_text())
    assert (len(split["validation"]), split["validation_examples"], split["training_examples"]) == (6, 24, 72)


@pytest.mark.parametrize("pictures", ["boxes", "whole"])
def test_drawn_pictures(world, tmp_path, pictures):
    drawn = annotated("drawn.json", "drawn")
    values = settings("nlvr2", world, tmp_path / "run", train=drawn, val=drawn, pictures=pictures, batch_size=4)
    assert finetune("nlvr2", "--config", write_settings(tmp_path / "c.yaml", values), "--train.steps", 2) == 0


def test_the_boxes_of_a_drawn_picture_in_their_order(world, tmp_path):
    drawn = annotated("drawn.json", "drawn")
    values = validate(RunConfig, settings("nlvr2", world, tmp_path, train=drawn, val=drawn, pictures="boxes"))
    batch = cli.build_task(values).dataset("val")[0]
    found = batch.images.float().mean((2, 3)).view(3, 8, 3)
    wanted = torch.tensor([COLORS[color] for color in ("red", "blue", "green")]).float()
    torch.testing.assert_close(found, wanted[:, None].expand(3, 8, 3), rtol=0, atol=0.5)


def test_a_pair_is_two_passes_by_the_same_weights():
    torch.manual_seed(0)
    model = NLVR2Model(build_encoder(validate(EncoderConfig, ENCODER)), num_pictures=2).double().eval()
    left, right, text = torch.randn(3, 3, 32, 32).double(), torch.randn(3, 3, 32, 32).double(), torch.arange(15)
    text, padding = text.view(3, 5), torch.zeros(3, 5, dtype=torch.bool)
    records = [{"id": str(i)} for i in range(3)]
    logits = model(PairBatch(torch.cat([left, right]), text, padding, torch.zeros(3), records)).values["logits"]
    parts = []
    for images in (left, right):
        features = model.encoder(images, text)
        parts += [features.image[:, 0], features.text[:, 0]]
    torch.testing.assert_close(logits, model.head(torch.cat(parts, 1)), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pictures": "boxes"}, "has 2 pictures, task.pictures boxes takes 1 (set it to pair)"),
        ({"val": annotated("drawn.json", "drawn")}, "has 1 pictures, task.pictures pair takes 2"),
        ({"val": annotated("dev.json", "drawn")}, "pictures missing: dev-0-0-img0.png"),
        ({"max_text_len": 40}, "max_text_len: 40 with encoder.max_text_len 16"),
    ],
)
def test_mistakes_are_one_line_before_training(world, tmp_path, capsys, change, message):
    assert (
        finetune(
            "nlvr2",
            "--config",
            write_settings(tmp_path / "c.yaml", settings("nlvr2", world, tmp_path / "run", **change)),
        )
        == 2
    )
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()
