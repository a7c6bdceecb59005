from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mhmoe_vl.nn.block import Block, PairDropPath

DENSE = {"kind": "dense", "hidden_dim": 24, "activation": "gelu", "bias": True, "sub_ln": True}
EXPERTS = {"kind": "moe", "num_experts": 4, "hidden_dim": 6, "top_k": 2}


def block(ffn=DENSE, **options):
    torch.manual_seed(0)
    values = {
        "num_heads": 2,
        "modalities": ("image", "text"),
        "shared": False,
        "attention_sub_ln": True,
        "joint_ffn": False,
        "pair_ffn": False,
        "dropout": 0.0,
        "drop_path": 0.0,
        "norm_eps": 1e-5,
        "init_gain": 1.0,
    }
    return Block(12, ffn=ffn, **(values | options)).double()


def streams(images=3, texts=4):
    return {"image": torch.randn(images, 5, 12).double(), "text": torch.randn(texts, 6, 12).double()}


def test_equals_the_formula_of_pre_norm_with_sub_ln():
    layer = block(init_gain=2.0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    xs = streams()
    got, pools = layer(xs, {}, 0)
    assert pools == []
    for name, x in xs.items():
        attention = layer.attn
        norm = F.layer_norm(x, (12,), layer.norm1[name].weight, layer.norm1[name].bias)
        q, k, v = (p[name](norm).unflatten(2, (2, 6)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(6)).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
        inner = attention.inner_norm[name]
        x = x + attention.out_proj[name](F.layer_norm(mixed, (12,), inner.weight, inner.bias))
        norm = F.layer_norm(x, (12,), layer.norm2[name].weight, layer.norm2[name].bias)
        ffn = layer.ffn[name]
        hidden = F.layer_norm(F.gelu(ffn.fc1(norm)), (24,), ffn.ffn_norm.weight, ffn.ffn_norm.bias)
        torch.testing.assert_close(got[name], x + ffn.fc2(hidden))


def test_dense_layers_start_from_magneto_and_experts_from_their_own():
    gain = math.sqrt(math.log(2 * 12))
    wide = {"num_heads": 4, "init_gain": gain}
    torch.manual_seed(0)
    layer = Block(128, ffn=DENSE | {"hidden_dim": 512}, **(_defaults() | wide))
    xavier = (2 / (128 + 512)) ** 0.5
    for linear in (layer.ffn["image"].fc1, layer.ffn["image"].fc2):
        assert linear.weight.std().item() == pytest.approx(gain * xavier, rel=0.02)
        assert not linear.bias.any()
    plain = Block(128, ffn=DENSE | {"hidden_dim": 512, "sub_ln": False}, **(_defaults() | wide))
    assert plain.ffn["image"].fc1.weight.std().item() == pytest.approx(xavier, rel=0.02)


def _defaults():
    return {
        "modalities": ("image",),
        "shared": False,
        "attention_sub_ln": True,
        "joint_ffn": False,
        "pair_ffn": False,
        "dropout": 0.0,
        "drop_path": 0.0,
        "norm_eps": 1e-5,
    }


def test_experts_report_without_their_output():
    _, [pool] = block(EXPERTS, joint_ffn=True)(streams(), {}, 2, True)
    assert pool.x == () and pool.routing is not None
    assert int(pool.stats.num_rows) == 3 * 5 + 4 * 6


def test_drop_path_drops_a_pair_together_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = PairDropPath(0.25)
    xs = {"image": torch.ones(3, 2, 4), "text": torch.ones(4, 5, 4)}
    runs = [drop(xs, 2) for _ in range(400)]
    images, texts = (torch.stack([run[name][:, 0, 0] for run in runs]) for name in ("image", "text"))
    assert torch.equal(images[:, 1:], texts[:, 2:])
    independent = torch.cat([images, texts[:, :2]], dim=1)
    assert independent.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert independent.mean(0).tolist() == pytest.approx([1.0] * 5, abs=0.1)
    correlation = torch.corrcoef(independent.T) - torch.eye(5)
    assert correlation.abs().max() < 0.2
    assert all((run["text"] == run["text"][:, :1, :1]).all() for run in runs)


def test_drop_path_rests_in_evaluation_and_drops_all_at_rate_one():
    xs = streams()
    assert PairDropPath(0.5).eval()(xs, 1) is xs
    assert not PairDropPath(1.0)(xs, 1)["image"].any()


def test_drop_path_of_rate_one_leaves_the_residual():
    xs = streams()
    ys, _ = block(drop_path=1.0).train()(xs, {}, 2)
    assert torch.equal(ys["text"], xs["text"])


def test_dropout_acts_on_both_sub_layers_in_training_only():
    layer, xs = block(dropout=0.999999), streams()
    torch.testing.assert_close(layer.train()(xs, {}, 1)[0]["image"], xs["image"])
    assert not torch.allclose(layer.eval()(xs, {}, 1)[0]["image"], xs["image"])
