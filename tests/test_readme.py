"""The code in README runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_world import settings, write_settings, write_world

from mhmoe_vl import cli

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def block(containing: str) -> str:
    [found] = [text for text in BLOCKS if containing in text]
    return found


def test_every_block_is_tried_here():
    assert len(BLOCKS) == 2


def test_layer_in_another_model():
    images, labels = torch.rand(2, 3, 224, 224), torch.tensor([1, 2])
    names = {"images": images, "labels": labels, "criterion": torch.nn.functional.cross_entropy}
    exec(block("replace_mlps"), names)
    routers = [p for name, p in names["model"].named_parameters() if "router" in name]
    assert len(routers) == 6
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in routers)


def test_features_of_a_picture_and_a_caption(tmp_path):
    world = write_world(tmp_path / "world")
    file = write_settings(tmp_path / "a.yaml", settings(world, tmp_path / "run", train={"steps": 1}))
    with pytest.raises(SystemExit):
        cli.run("masked_modeling", "", "", ["--config", str(file)])
    Image.new("RGB", (50, 40), "red").save(tmp_path / "photo.jpg")
    text = block("load_pretrained")
    names: dict = {}
    exec(
        text.replace("out/demo/pretrain", str(tmp_path / "run")).replace("photo.jpg", str(tmp_path / "photo.jpg")),
        names,
    )
    output = names["output"]
    assert output.image.shape == (1, 17, 32)
    assert output.text.shape[0] == 1 and output.text.shape[2] == 32
    assert not output.image.requires_grad
