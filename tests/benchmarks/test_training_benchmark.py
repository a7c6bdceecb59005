"""The benchmark of steps, loader and heads: what it times is right, and its goals find their numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mhmoe_vl import parity
from mhmoe_vl.benchmarks import training
from mhmoe_vl.benchmarks.goals import goal_rows
from mhmoe_vl.benchmarks.loading import difference, make_loaders, write_pictures
from mhmoe_vl.benchmarks.step import SIZES, StepSize, drawn_batch, encoder_section, make_heads, make_step, step_flops
from mhmoe_vl.config import ParityConfig
from mhmoe_vl.data.manifest import manifest_path
from mhmoe_vl.data.sample import BadSample

CPU = torch.device("cpu")
SMALL = {"embed_dim": 64, "num_heads": 2, "depth": 2, "img_size": 64, "vocab_size": 100, "max_text_len": 24}
MINI = StepSize("beit3_tiny_patch16_224", SMALL, 256, 3, 24)


@pytest.mark.parametrize("variant", ["dense", "mh_moe"])
def test_a_step_learns_its_batch(variant):
    """Random targets of one batch can be learnt by heart; at the start they are guessed."""
    step = make_step(MINI, variant, "float32", CPU)
    losses = [step() for _ in range(8)]
    guessed = 2 * math.log(8192) + 2 * math.log(100)
    assert losses[0] == pytest.approx(guessed, rel=0.1)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", SIZES)
def test_variants_are_at_parity(name):
    """Equal FLOPs but for the router's share; the dense model has its named width."""
    size = SIZES[name]
    baseline = ParityConfig(num_experts=8, hidden_dim=size.expert_dim, top_k=1)
    flops = {}
    for variant in ("dense", "mh_moe"):
        encoder = parity.resolve(encoder_section(size, variant), baseline)
        flops[variant] = parity.total(parity.count_encoder(encoder, inputs="pair", text_len=size.text_len)).flops
    assert flops["mh_moe"] == pytest.approx(flops["dense"], rel=0.01)
    assert parity.resolve(encoder_section(size, "dense"), baseline).ffn.hidden_dim == pytest.approx(
        size.expert_dim, 0.01
    )


def test_operations_of_a_step_are_those_that_torch_counts():
    step = make_step(MINI, "dense", "float32", CPU)
    with FlopCounterMode(display=False) as counter:
        step()
    assert step_flops(MINI, "dense") == counter.get_total_flops()


def test_drawn_batches_hide_equally_many_places_of_every_sample():
    section = encoder_section(MINI, "dense")
    batch = drawn_batch(section, MINI)
    assert batch.images.shape == (6, 3, 64, 64) and batch.text.shape == (6, 24)
    assert set(batch.image_mask.sum(1).tolist()) == {round(0.4 * 16)}
    assert torch.equal(batch.image_positions, batch.image_mask.flatten().nonzero().flatten())
    assert [(term, kind, len(range(*rows.indices(10**6)))) for term, kind, rows in batch.terms()] == [
        ("images", "image", 18), ("pairs_image", "image", 18), ("texts", "text", 12), ("pairs_text", "text", 12)
    ]  # fmt: skip


def test_heads_at_masked_positions_have_the_loss_of_all():
    heads = make_heads(tokens=60, dim=16, vocab_size=50, device=CPU, dtype=torch.float32)
    assert heads["masked"]() == pytest.approx(heads["all"](), rel=1e-6)


def test_both_loaders_give_the_same_crops_and_ours_checks_them(tmp_path):
    shard = write_pictures(tmp_path, 3, size=(150, 200))
    assert manifest_path(shard).exists()
    loaders = make_loaders(shard)
    ours, pil = loaders["ours"](), loaders["pil"]()
    assert all(crop.dtype == torch.uint8 and crop.shape == (3, 224, 224) for crop in ours)
    assert all(crop.dtype == torch.float32 for crop in pil)
    assert max(difference(a, b) for a, b in zip(ours, pil, strict=True)) < training.MOST_DIFFERENCE
    assert difference(ours[0], pil[1]) > 10
    damaged = bytearray(shard.read_bytes())
    damaged[2000] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(BadSample, match="differs from the manifest"):
        make_loaders(shard)["ours"]()


def test_crops_that_differ_are_not_timed(monkeypatch):
    monkeypatch.setattr(training, "difference", lambda a, b: 40.0)
    with pytest.raises(training.TrainingError, match=r"crops differ by 40\.0 levels"):
        training.measure_loader(2, 1, lambda: 0.0)


def test_the_tool_measures_every_goal(tool, monkeypatch, tmp_path, capsys):
    for name in SIZES:
        monkeypatch.setitem(SIZES, name, replace(MINI, samples=1))
    monkeypatch.setattr(training, "HEADS", {"tokens": 60, "dim": 16, "vocab_size": 50})
    options = ["--rounds", "2", "--threads", "1", "--clock", "cpu", "--pictures", "2", "--dtype", "float32", "bfloat16"]
    assert tool("benchmark_training", *options, "--json", tmp_path / "a.json") == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert [row["number"] for row in found["goals"]] == [10, 10, 11, 12, 13, 13]
    assert all(row["measured"] for row in found["goals"])
    assert found["goals"] == goal_rows(training.GOALS, found)
    printed = capsys.readouterr().out
    assert "images a second and core" in printed and "| mh_moe bfloat16" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parts", "all"], "invalid choice: 'all'"),
        (["--pictures", "0"], "--pictures: 0"),
        (["--depth", "0"], "--depth"),
    ],
)
def test_mistakes_are_one_line(tool, capsys, arguments, words):
    assert tool("benchmark_training", *arguments) == 2
    assert words in capsys.readouterr().err
