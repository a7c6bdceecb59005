"""Mixup and CutMix against timm's, against a case by hand, and over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
import timm.data
import torch
from torch.nn import functional as F

from mhmoe_vl.data.loader import StepDataset, sample_rng
from mhmoe_vl.data.mixing import Mix, MixedSteps, Mixing
from mhmoe_vl.data.sample import BadSample
from mhmoe_vl.errors import ConfigError

ON = Mixing(mixup=0.8, cutmix=1.0, prob=1.0, switch_prob=0.5)
NEIGHBOURS = torch.tensor([1, 0, 3, 2, 5, 4])
AS_TIMM = [0, 2, 4, 5, 3, 1]  # in this order timm's "from the end" is a neighbour


@dataclass(frozen=True)
class Batch:
    examples: list[dict]
    mix: Mix | None = None
    bad: dict[str, int] = field(default_factory=dict)


def collate(streams):
    return Batch(streams["a"])


def example(sample: int, rng: np.random.Generator) -> dict:
    if sample < 0:
        raise BadSample("bad", reason="bad", shard="a")
    return {"value": sample, "draw": rng.random()}


def steps(source, batch_size: int = 8, mixing: Mixing = ON, **place: int) -> MixedSteps:
    return MixedSteps({"a": (source, batch_size, example)}, collate, mixing=mixing, img_size=(32, 32), **place)


@pytest.mark.parametrize("cut", [False, True])
def test_pictures_and_targets_are_those_of_timm(monkeypatch, cut):
    images, labels = torch.randn(6, 3, 32, 40), torch.tensor([0, 3, 2, 2, 1, 0])
    mix = Mixing(0.8, 1.0, prob=1.0, switch_prob=float(cut)).draw(np.random.default_rng(5), (32, 40))
    assert (mix.box is not None) == cut and 0.05 < mix.share < 0.95
    theirs = timm.data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=4)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (mix.share, cut))
    monkeypatch.setattr("timm.data.mixup.cutmix_bbox_and_lam", lambda *_, **__: (mix.box, mix.share))
    wanted, targets = theirs(images[AS_TIMM].clone(), labels[AS_TIMM])
    torch.testing.assert_close(mix.pictures(images, NEIGHBOURS)[AS_TIMM], wanted, rtol=0, atol=1e-6)
    logits = torch.randn(6, 4)
    entropy = partial(F.cross_entropy, logits[AS_TIMM], label_smoothing=0.1)
    ours = mix.share * entropy(labels[AS_TIMM]) + (1 - mix.share) * entropy(labels[NEIGHBOURS][AS_TIMM])
    torch.testing.assert_close(ours, F.cross_entropy(logits[AS_TIMM], targets))


def test_a_case_by_hand():
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4), torch.full((3, 4, 4), 7.0)])
    mates = torch.tensor([1, 0, 2])
    added = Mix(0.75, None).pictures(images, mates)
    assert [picture.unique().tolist() for picture in added] == [[0.25], [0.75], [7.0]]
    cut = Mix(1 - 2 / 16, (1, 3, 2, 3)).pictures(images, mates)
    assert cut[0, 0].tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert (cut[1, 0] == 0).sum() == 2 and (cut[2] == 7).all()
    assert images[0].sum() == 0  # the originals stay


def test_draws_have_the_stated_shares():
    drawn = [Mixing(0.8, 1.0, prob=0.7, switch_prob=0.4).draw(np.random.default_rng(n), (32, 32)) for n in range(2000)]
    plain = np.mean([mix.share == 1 and mix.box is None for mix in drawn])
    cut = [mix for mix in drawn if mix.box is not None]
    assert abs(plain - 0.3) < 0.04 and abs(len(cut) / 2000 - 0.28) < 0.04
    for mix in cut:
        top, bottom, left, right = mix.box
        assert mix.share == pytest.approx(1 - (bottom - top) * (right - left) / 1024)
    only = [
        Mixing(mixup, cutmix, 1.0, 0.5).draw(np.random.default_rng(0), (8, 8)).box for mixup, cutmix in [(1, 0), (0, 1)]
    ]
    assert only[0] is None and only[1] is not None


def test_the_same_pairs_and_mix_on_any_number_of_ranks_and_parts():
    whole = steps(range(40))
    mixes = [whole[step][0].mix for step in range(6)]
    assert len({mix.share for mix in mixes}) == 6 and mixes == [steps(range(40))[step][0].mix for step in range(6)]
    for step in range(6):
        parts = [part for rank in range(2) for part in steps(range(40), rank=rank, world=2)[step]]
        accumulated = steps(range(40), accumulate=4)[step]
        for pieces in (parts, accumulated):
            assert all(part.mix == mixes[step] for part in pieces)
            assert [e for part in pieces for e in part.examples] == whole[step][0].examples


def test_what_is_not_mixed_is_as_without_mixing():
    plain = StepDataset({"a": (range(40), 8, example)}, collate)[3][0].examples
    assert [{n: e[n] for n in ("value", "draw")} for e in steps(range(40))[3][0].examples] == plain
    assert sample_rng(0, 0, 1).random() != sample_rng(0, 0, 2).random()


def test_a_picture_whose_neighbour_is_bad_stays_alone_on_any_rank():
    source = [-1 if number % 7 == 3 else number for number in range(40)]
    whole = [e for step in range(5) for e in steps(source)[step][0].examples]
    alone = [e["value"] for e in whole if not e["paired"]]
    assert 3 <= len(alone) <= 6 and len(whole) == 40 - 6
    split = [e for step in range(5) for part in steps(source, accumulate=4)[step] for e in part.examples]
    assert split == whole


@pytest.mark.parametrize(("batch_size", "place"), [(7, {}), (10, {"world": 2}), (8, {"accumulate": 8})])
def test_batches_that_do_not_hold_whole_pairs_are_refused(batch_size, place):
    with pytest.raises(ConfigError, match=rf"task\.batch_size: {batch_size} is no multiple of"):
        steps(range(40), batch_size, **place)


def test_nothing_is_drawn_from_the_global_generators():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    [ON.draw(np.random.default_rng(n), (8, 8)) for n in range(20)]
    assert np.array_equal(np.random.get_state()[1], before)
