"""The table of variants: options, refusals, initialisation, parameter counts of the papers."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import nn

from mhmoe_vl import config
from mhmoe_vl.errors import ConfigError
from mhmoe_vl.nn.ffn import FFN_VARIANTS, build_ffn
from mhmoe_vl.nn.router import ROUTERS

SECTIONS = {"dense": config.DenseConfig, "moe": config.MoEConfig, "mh_moe": config.MHMoEConfig}
ROUTER_SECTIONS = {"linear": config.LinearRouterConfig, "cosine": config.CosineRouterConfig}
CLASSES = [(FFN_VARIANTS[kind], section) for kind, section in SECTIONS.items()]
CLASSES += [(ROUTERS[kind], section) for kind, section in ROUTER_SECTIONS.items()]


@pytest.mark.parametrize(("layer", "section"), CLASSES)
def test_names_and_defaults_are_the_schema_s(layer, section):
    keywords = [p for p in inspect.signature(layer).parameters.values() if p.kind == p.KEYWORD_ONLY]
    given = {p.name: dict(p.default) if p.name == "router" else p.default for p in keywords if p.name != "norm_eps"}
    expected = section().model_dump()
    assert expected.pop("kind")
    assert given == expected


def test_dense_norm_eps_is_the_encoder_s():
    default = inspect.signature(FFN_VARIANTS["dense"]).parameters["norm_eps"].default
    assert default == config.EncoderConfig().norm_eps


@pytest.mark.parametrize("kind", SECTIONS)
def test_builds_from_a_section(kind):
    layer = build_ffn(16, **SECTIONS[kind]().model_dump())
    assert layer(torch.randn(2, 3, 16)).x.shape == (2, 3, 16)
    assert repr(layer)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(kind="mixture"), ("'mixture'", "dense, moe, mh_moe")),
        (dict(kind="mh_moe", num_subtokens=5), ("5", "48")),
        (dict(kind="mh_moe", num_subtokens=0), ("num_subtokens 0",)),
        (dict(kind="moe", capacity_factor=0.0), ("capacity_factor 0.0",)),
        (dict(kind="moe", top_k=9), ("9", "8")),
        (dict(kind="moe", top_k=0), ("0", "8")),
        (dict(kind="mh_moe", heads=4), ("heads", "num_subtokens")),
        (dict(kind="mh_moe", num_heads=4), ("num_heads", "num_subtokens")),
        (dict(kind="moe", num_expert=4), ("num_expert", "num_experts")),
        (dict(kind="mh_moe", conv_kernel=3, head_layers=2), ("conv_kernel 3", "head_layers 2")),
        (dict(kind="mh_moe", conv_kernel=3, merge_layers=0), ("conv_kernel 3", "merge_layers 0")),
        (dict(kind="mh_moe", conv_kernel=2, conv_stride=3), ("conv_kernel 2", "conv_stride 3")),
        (dict(kind="mh_moe", conv_stride=2), ("conv_stride 2", "conv_kernel")),
        (dict(kind="mh_moe", head_layers=4), ("head_layers 4",)),
        (dict(kind="mh_moe", head_layers=-1), ("head_layers -1",)),
        (dict(kind="mh_moe", num_subtokens=-4), ("num_subtokens -4",)),
        (dict(kind="mh_moe", conv_stride=0), ("conv_stride 0",)),
        (dict(kind="mh_moe", conv_kernel=0), ("conv_kernel 0",)),
        (dict(kind="mh_moe", conv_kernel=3, conv_stride=-1), ("conv_stride -1",)),
        (dict(kind="moe", num_experts=0), ("num_experts 0",)),
        (dict(kind="mh_moe", num_experts="parity"), ("num_experts 'parity'",)),
        (dict(kind="moe", top_k="2"), ("top_k '2'",)),
        (dict(kind="moe", num_shared_experts=-1), ("num_shared_experts -1",)),
        (dict(kind="mh_moe", num_shared_experts=1, shared_hidden_dim=0), ("shared_hidden_dim 0",)),
        (dict(kind="moe", balance_bias_rate=-0.1), ("balance_bias_rate -0.1",)),
        (dict(kind="mh_moe", router={"dim": 4}), ("router {'dim': 4}", "kind")),
        (dict(kind="dense", activation="tanh"), ("'tanh'",)),
        (dict(kind="mh_moe", activation="tanh"), ("'tanh'",)),
        (dict(kind="moe", activation="tanh"), ("'tanh'",)),
        (dict(kind="moe", balance_share="most"), ("'most'",)),
        (dict(kind="moe", router={"kind": "linear", "dim": 4}), ("dim", "'linear'")),
    ],
)
def test_refuses_at_construction(options, words):
    with pytest.raises(ConfigError) as error:
        build_ffn(48, **options)
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message


@pytest.mark.parametrize("kind", SECTIONS)
@pytest.mark.parametrize("value", [-4, 0, 2.5, "parity"])
def test_refuses_inner_widths(kind, value):
    with pytest.raises(ConfigError, match=f"hidden_dim {value!r} is not a whole number from 1 up"):
        build_ffn(48, kind=kind, hidden_dim=value)


def test_experts_start_like_linear_layers():
    torch.manual_seed(0)
    experts = build_ffn(64, kind="moe", hidden_dim=256).routed.experts
    for name, in_dim in (("fc1", 64), ("fc2", 256)):
        linear = nn.Linear(in_dim, 320 - in_dim)
        for mine, theirs in ((f"{name}_weight", linear.weight), (f"{name}_bias", linear.bias)):
            stacked = getattr(experts, mine)
            assert stacked.abs().max().item() == pytest.approx(in_dim**-0.5, rel=0.02)
            assert stacked.std(dim=tuple(range(1, stacked.dim()))).sub(theirs.std()).abs().max() < 0.25 * theirs.std()
    assert not torch.equal(experts.fc1_weight[0], experts.fc1_weight[1])


@pytest.mark.parametrize("conv", [{}, {"conv_kernel": 3}])
def test_head_and_merge_start_as_in_paper_1(conv):
    torch.manual_seed(0)
    layer = build_ffn(64, kind="mh_moe", **conv)
    fan = 2 * 64 * conv.get("conv_kernel", 1)
    assert layer.head_proj.weight.abs().max().item() == pytest.approx(math.sqrt(6 / fan / 2), rel=0.02)
    assert layer.merge_proj.weight.abs().max().item() == pytest.approx(math.sqrt(6 / fan), rel=0.02)
    assert layer.head_proj.bias.any() and not layer.merge_proj.bias.any()


def test_no_weight_decay_names_real_parameters_with_odd_shapes():
    layer = build_ffn(16, kind="mh_moe", activation="swiglu", router={"kind": "cosine"}, num_shared_experts=1)
    names = layer.no_weight_decay()
    assert names == {f"routed.experts.{m}_bias" for m in ("fc1", "fc2", "fc_gate")} | {"routed.router.log_temperature"}
    assert names <= {name for name, _ in layer.named_parameters()}
    assert build_ffn(16, kind="dense").no_weight_decay() == set()


def counts(**options):
    """Parameters of a layer in millions: (in experts, elsewhere); nothing is allocated."""
    with torch.device("meta"):
        layer = build_ffn(768, **options)
    experts = sum(p.numel() for p in layer.routed.experts.parameters())
    return experts / 1e6, sum(p.numel() for p in layer.parameters()) / 1e6 - experts / 1e6


PAPER_1 = {  # experts: X-MoE's in expert layers and in all, MH-MoE's, MH-MoE's inner width
    8: (227, 361, 213, 354, 11525),
    16: (454, 588, 430, 571, 11634),
    32: (908, 1042, 898, 1039, 12148),
    64: (1815, 1949, 1797, 1938, 12155),
    128: (3631, 3765, 3624, 3765, 12256),
    256: (7263, 7397, 7230, 7371, 12226),
}


@pytest.mark.parametrize("num_experts", PAPER_1)
def test_parameter_counts_of_paper_1(num_experts):
    """Paper 1 (v1) Table 11, English: six expert layers of width 768, X-MoE inner 3072, MH-MoE with four sub-tokens and
    inner widths that follow from the table (it does not print them). The 134M of the rest are the table's.

    The table's multimodal rows are left out: they do not grow from zero with the number of experts (29.7M per expert
    over an offset of the whole dense model), so where the experts sit in that encoder cannot be recovered.
    """
    x_moe, x_moe_total, mh_moe, mh_moe_total, inner = PAPER_1[num_experts]
    cosine = {"kind": "cosine", "dim": 16}
    experts, rest = counts(kind="moe", num_experts=num_experts, hidden_dim=3072, router=cosine)
    assert 6 * experts == pytest.approx(x_moe, rel=0.01)
    assert 134 + 6 * (experts + rest) == pytest.approx(x_moe_total, rel=0.01)
    router = {"kind": "cosine", "dim": 4}
    experts, rest = counts(kind="mh_moe", num_experts=num_experts, hidden_dim=inner, router=router)
    assert 6 * experts == pytest.approx(mh_moe, rel=0.01)
    assert 6 * rest == pytest.approx(7.08, rel=0.01), "head and merge layers: 141M - 134M"
    assert 134 + 6 * (experts + rest) == pytest.approx(mh_moe_total, rel=0.01)


@pytest.mark.parametrize(
    ("options", "millions"),
    [
        (dict(kind="moe", num_experts=8, hidden_dim=2048, top_k=1), 37.75),
        (dict(kind="moe", num_experts=16, hidden_dim=1024, top_k=2), 37.75),
        (dict(kind="mh_moe", num_experts=40, hidden_dim=768, top_k=2, num_subtokens=2), 36.57),
        (dict(kind="mh_moe", num_experts=96, hidden_dim=512, top_k=3, num_subtokens=3), 38.93),
    ],
)
def test_parameter_counts_of_paper_2(options, millions):
    """Paper 2, section 5: SwiGLU experts without biases, per layer."""
    assert sum(counts(activation="swiglu", bias=False, **options)) == pytest.approx(millions, rel=0.01)
