"""NLVR2: a tiny run on pairs, a run on drawn pictures, and what must be refused."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_world import COLORS, write_settings

from mhmoe_vl import cli, commands
from mhmoe_vl.config import EncoderConfig, validate
from mhmoe_vl.models.factory import build_encoder
from mhmoe_vl.tasks.nlvr2 import NLVR2Model
from mhmoe_vl.tasks.pair_batch import PairBatch

ENCODER = {
    "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8, "vocab_size": 49410,
    "max_text_len": 16, "ffn": {"kind": "mh_moe", "num_experts": 4, "hidden_dim": 16, "top_k": 2, "num_subtokens": 4},
}  # fmt: skip


def picture(colors: list[str], size: tuple[int, int]) -> bytes:
    pixels = np.full((*size, 3), 128, np.uint8)
    for number, color in enumerate(colors):
        pixels[:, number * 150 : number * 150 + 100] = COLORS[color]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Sentences "the left one is <colour>" with four picture pairs each, half of them true; and three drawn boxes."""
    folder, rng = tmp_path_factory.mktemp("nlvr2"), np.random.default_rng(0)
    (folder / "images").mkdir()
    (folder / "drawn").mkdir()
    for split, count in (("train", 24), ("dev", 8)):
        lines = []
        for sentence in range(count):
            color = list(COLORS)[sentence % 2]
            other = list(COLORS)[1 - sentence % 2]
            for pair in range(4):
                left = color if pair < 2 else other
                for side, shown in enumerate((left, str(rng.choice(list(COLORS))))):
                    name = f"{split}-{sentence}-{pair}-img{side}.png"
                    (folder / "images" / name).write_bytes(picture([shown], (32, 32)))
                about = {"sentence": f"the left one is {color}", "label": str(pair < 2)}
                lines.append({"identifier": f"{split}-{sentence}-{pair}-0", **about})
        (folder / f"{split}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = []
    for number in range(8):
        (folder / "drawn" / f"dev-{number}-0-0.png").write_bytes(picture(["red", "blue", "green"], (100, 400)))
        lines.append({"identifier": f"{number}-0", "sentence": "a blue box", "label": "true"})
    (folder / "drawn.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def settings(world, out, **task):
    return {
        "output_dir": str(out),
        "encoder": ENCODER,
        "task": {
            "kind": "nlvr2", "data_dir": str(world), "train": {"annotations": "train.json", "images": "images"},
            "val": {"annotations": "dev.json", "images": "images"}, "batch_size": 16, "max_text_len": 10,
            "augment": {"min_crop": 1.0, "flip": 0.0, "color_jitter": 0.0}, **task,
        },
        "optim": {"lr": 5e-3, "warmup_steps": 2},
        "train": {
            "steps": 60, "log_every": 20, "num_workers": 0, "threads": 1, "precision": "float32", "device": "cpu",
        },
    }  # fmt: skip


def finetune(config, *arguments) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.run("nlvr2", "", "", ["--config", str(config), *map(str, arguments)])
    return stopped.value.code


def test_it_learns_and_its_file_has_the_same_score(world, tmp_path):
    assert finetune(write_settings(tmp_path / "c.yaml", settings(world, tmp_path / "run"))) == 0
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
    config = write_settings(tmp_path / "c.yaml", settings(world, tmp_path / "run", val=None, val_fraction=0.25))
    assert finetune(config, "--train.steps", 1) == 0
    split = json.loads((tmp_path / "run/recorded/split.json").read_text())
    assert (len(split["validation_sentences"]), split["validation_examples"], split["training_examples"]) == (6, 24, 72)


@pytest.mark.parametrize("pictures", ["boxes", "whole"])
def test_drawn_pictures(world, tmp_path, pictures):
    drawn = {"annotations": "drawn.json", "images": "drawn"}
    values = settings(world, tmp_path / "run", train=drawn, val=drawn, pictures=pictures, batch_size=4)
    assert finetune(write_settings(tmp_path / "c.yaml", values), "--train.steps", 2) == 0


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
        ({"val": {"annotations": "drawn.json", "images": "drawn"}}, "has 1 pictures, task.pictures pair takes 2"),
        ({"val": {"annotations": "dev.json", "images": "drawn"}}, "pictures missing: dev-0-0-img0.png"),
        ({"max_text_len": 40}, "max_text_len: 40 with encoder.max_text_len 16"),
    ],
)
def test_mistakes_are_one_line_before_training(world, tmp_path, capsys, change, message):
    assert finetune(write_settings(tmp_path / "c.yaml", settings(world, tmp_path / "run", **change))) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()
