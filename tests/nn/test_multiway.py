from __future__ import annotations

import pytest
import torch
from torch import nn

from mhmoe_vl.nn.multiway import Multiway, MultiwayFFN, join_pairs, split_pairs

DIM = 8
DENSE = {"kind": "dense", "hidden_dim": 16}
EXPERTS = {"kind": "moe", "num_experts": 3, "hidden_dim": 6, "top_k": 2}
MODALITIES = ("image", "text")


def streams():
    torch.manual_seed(1)
    return {"image": torch.randn(3, 5, DIM), "text": torch.randn(4, 6, DIM)}


def test_pairs_are_the_last_samples():
    xs = streams()
    alone, paired = split_pairs(xs, 2)
    assert [len(alone[m]) for m in MODALITIES] == [1, 2]
    assert torch.equal(paired["text"], xs["text"][2:])
    joined = join_pairs(alone, paired)
    assert all(torch.equal(joined[m], xs[m]) for m in MODALITIES)


def test_one_copy_per_modality_or_one_for_all():
    torch.manual_seed(0)
    apart = Multiway(lambda: nn.Linear(DIM, DIM), MODALITIES, shared=False)
    shared = Multiway(lambda: nn.Linear(DIM, DIM), MODALITIES, shared=True)
    assert list(apart) == ["image", "text"] and list(shared) == ["joint"]
    xs = streams()
    for name in MODALITIES:
        assert torch.equal(apart(xs)[name], apart[name](xs[name]))
        assert torch.equal(shared(xs)[name], shared["joint"](xs[name]))


@pytest.mark.parametrize("ffn", [DENSE, EXPERTS])
def test_layers_per_modality_equal_each_layer_alone(ffn):
    torch.manual_seed(0)
    layers = MultiwayFFN(DIM, ffn=ffn, modalities=MODALITIES, joint=False)
    xs = streams()
    padding = torch.zeros(4, 6, dtype=torch.bool)
    padding[0, 3:] = True
    ys, outputs = layers(xs, {"text": padding}, 2)
    torch.testing.assert_close(ys["image"], layers["image"](xs["image"]).x)
    want = layers["text"](xs["text"], padding)
    torch.testing.assert_close(ys["text"], want.x)
    assert len(outputs) == 2
    if ffn is EXPERTS:
        assert [int(output.stats.num_rows) for output in outputs] == [15, 4 * 6 - 3]
        torch.testing.assert_close(outputs[1].aux_losses, want.aux_losses)


def test_a_joint_pool_routes_both_modalities_with_one_loss():
    torch.manual_seed(0)
    layers = MultiwayFFN(DIM, ffn=EXPERTS, modalities=MODALITIES, joint=True)
    xs = streams()
    ys, [output] = layers(xs, {}, 2, return_routing=True)
    rows = torch.cat([xs["image"].flatten(0, 1), xs["text"].flatten(0, 1)])
    alone = layers["joint"](rows)
    torch.testing.assert_close(torch.cat([ys[m].flatten(0, 1) for m in MODALITIES]), alone.x)
    torch.testing.assert_close(output.aux_losses, alone.aux_losses)
    assert output.stats.load.shape == (2, 3)
    assert output.routing.stream.bincount().tolist() == [15, 24]


@pytest.mark.parametrize("ffn", [DENSE, EXPERTS])
def test_the_pair_layer_sees_pairs_and_only_them(ffn):
    torch.manual_seed(0)
    layers = MultiwayFFN(DIM, ffn=ffn, modalities=MODALITIES, joint=False, pair=True)
    xs = streams()
    ys, outputs = layers(xs, {}, 2)
    torch.testing.assert_close(ys["image"][:1], layers["image"](xs["image"][:1]).x)
    torch.testing.assert_close(ys["text"][:2], layers["text"](xs["text"][:2]).x)
    pairs = layers["pair"].forward_streams([xs["image"][1:], xs["text"][2:]])
    torch.testing.assert_close(ys["image"][1:], pairs.x[0])
    torch.testing.assert_close(ys["text"][2:], pairs.x[1])
    assert len(outputs) == 3


def test_every_pool_answers_even_without_rows():
    layers = MultiwayFFN(DIM, ffn=EXPERTS, modalities=MODALITIES, joint=False, pair=True)
    xs = {"image": torch.randn(2, 5, DIM), "text": torch.zeros(0, 1, DIM)}
    ys, outputs = layers(xs, {}, 0)
    assert ys["text"].shape == (0, 1, DIM)
    assert [int(output.stats.num_rows) for output in outputs] == [10, 0, 0]
    assert outputs[1].aux_losses["balance_loss"].item() == 0
