from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mhmoe_vl.config import (
    CosineRouterConfig,
    DenseConfig,
    EncoderConfig,
    LinearRouterConfig,
    MHMoEConfig,
    MoEConfig,
    ParityConfig,
)
from mhmoe_vl.errors import ConfigError
from mhmoe_vl.models.encoder import Encoder
from mhmoe_vl.nn.ffn import build_ffn
from mhmoe_vl.parity import (
    PARTS,
    WIDTH_STEP,
    count_encoder,
    count_ffn,
    difference,
    image_tokens,
    resolve,
    solve_ffn,
    total,
)

SWIGLU = {"activation": "swiglu", "bias": False}
BASELINE = ParityConfig(num_experts=8, hidden_dim=768, top_k=1)
LAYERS = [
    DenseConfig(),
    DenseConfig(hidden_dim=40, activation="relu", bias=False),
    DenseConfig(hidden_dim=40, sub_ln=True),
    DenseConfig(hidden_dim=40, sub_ln=True, **SWIGLU),
    DenseConfig(activation="swiglu"),
    MoEConfig(num_experts=5),
    MoEConfig(num_experts=5, hidden_dim=16, top_k=3, balance_bias_rate=0.1),
    MoEConfig(num_experts=4, hidden_dim=16, **SWIGLU),
    MoEConfig(num_experts=4, hidden_dim=16, activation="swiglu", num_shared_experts=2),
    MoEConfig(num_experts=4, hidden_dim=16, num_shared_experts=1, shared_hidden_dim=24, bias=False),
    MoEConfig(num_experts=4, hidden_dim=16, router=CosineRouterConfig(dim=6)),
    MoEConfig(num_experts=4, hidden_dim=16, router=CosineRouterConfig(learned_temperature=False, gate="sigmoid")),
    MHMoEConfig(num_experts=5, hidden_dim=16),
    MHMoEConfig(num_experts=5, hidden_dim=16, num_subtokens=1, top_k=1, router=CosineRouterConfig(dim=6)),
    MHMoEConfig(num_experts=5, hidden_dim=16, num_subtokens=3, head_layers=0, merge_layers=0, subtoken_residual=True),
    MHMoEConfig(num_experts=5, hidden_dim=16, head_layers=3, merge_layers=2, **SWIGLU),
    MHMoEConfig(num_experts=5, hidden_dim=16, num_shared_experts=1, router=LinearRouterConfig(gate="sigmoid")),
    MHMoEConfig(num_experts=5, hidden_dim=16, conv_kernel=3),
    MHMoEConfig(num_experts=5, hidden_dim=16, conv_kernel=3, conv_stride=2, top_k=1),
]
ENCODERS = [
    {},
    {"modalities": ("image",)},
    {"modalities": ("text",), "final_norm": False},
    {"ffn": MoEConfig(num_experts=3), "expert_pool": "per_modality"},
    {"ffn": MoEConfig(num_experts=3), "multiway": "shared_attention", "vl_ffn_layers": 1},
    {"ffn": MHMoEConfig(num_experts=3, hidden_dim=16), "multiway": "shared", "attention_sub_ln": False},
    {"ffn": MHMoEConfig(num_experts=3, hidden_dim=16, num_shared_experts=1), "dense_ffn": DenseConfig(hidden_dim=40)},
    {"ffn": MHMoEConfig(num_experts=3, hidden_dim=16, conv_kernel=3, conv_stride=2), "moe_every": 1},
    {"multiway": "shared_attention", "vl_ffn_layers": 2, "ffn": DenseConfig(**SWIGLU), "img_size": (16, 24)},
]


def short(value):
    """A test's name: the fields that were set."""
    fields = value.model_dump(exclude_unset=True) if hasattr(value, "model_dump") else value
    return ",".join(f"{k}={short(v)}" for k, v in fields.items()) if isinstance(fields, dict) else str(fields)


@pytest.fixture
def split_path(monkeypatch):
    """Experts multiplied one by one: no rows added to fill tiles, and only operators that the counter knows."""
    monkeypatch.setattr("mhmoe_vl.nn.experts.choose_path", lambda *args: "split")


def num_parameters(module):
    return sum(p.numel() for p in module.parameters())


def measured_flops(run):
    # The counter does not know the fused attention of CPUs.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def encoder_config(**changes):
    small = {"embed_dim": 24, "depth": 2, "img_size": 16, "patch_size": 8, "vocab_size": 50, "max_text_len": 9}
    return EncoderConfig(**(small | changes))


@pytest.mark.parametrize("ffn", LAYERS, ids=short)
def test_layer_formulas_equal_the_built_layer(ffn, split_path):
    layer = build_ffn(24, **ffn.model_dump())
    xs = [torch.randn(1, 7, 24), torch.randn(1, 4, 24)]
    cost = total(count_ffn(ffn, 24, [7, 4]))
    assert cost.parameters == num_parameters(layer)
    assert cost.flops == measured_flops(lambda: layer.forward_streams(xs))


@pytest.mark.parametrize("ffn", LAYERS, ids=short)
def test_parts_of_a_layer_are_its_modules(ffn):
    layer = build_ffn(24, **ffn.model_dump())
    parts = count_ffn(ffn, 24)
    if ffn.kind == "dense":
        assert list(parts) == ["dense_ffn"]
        return
    assert parts["experts"].parameters == num_parameters(layer.routed.experts)
    assert parts["router"].parameters == num_parameters(layer.routed.router)
    assert ("shared_experts" in parts) == bool(ffn.num_shared_experts)
    if ffn.kind == "mh_moe":
        assert parts["head_merge"].parameters == num_parameters(layer.head_proj) + num_parameters(layer.merge_proj)


def test_active_parameters_are_those_a_token_reaches():
    routed = count_ffn(MoEConfig(num_experts=8, hidden_dim=10, top_k=2, bias=False), 6)["experts"]
    assert (routed.parameters, routed.active) == (8 * 2 * 6 * 10, 2 * 2 * 6 * 10)
    # Three sub-tokens with two choices each meet six experts of two-wide rows, or all there are.
    for num_experts, reached in ((8, 6), (4, 4)):
        ffn = MHMoEConfig(num_experts=num_experts, hidden_dim=10, top_k=2, num_subtokens=3, bias=False)
        assert count_ffn(ffn, 6)["experts"].active == reached * 2 * 2 * 10


@pytest.mark.parametrize("inputs", ["pair", "image", "text"])
@pytest.mark.parametrize("changes", ENCODERS, ids=short)
def test_encoder_formulas_equal_the_built_encoder(changes, inputs, split_path):
    config = encoder_config(**changes)
    wanted = {"image", "text"} if inputs == "pair" else {inputs}
    if not wanted <= set(config.modalities):
        with pytest.raises(ConfigError, match=inputs):
            count_encoder(config, inputs=inputs, text_len=5)
        return
    encoder = Encoder(**config.model_dump()).eval()
    images = torch.randn(1, 3, *encoder.img_size) if "image" in wanted else None
    text = torch.randint(50, (1, 5)) if "text" in wanted else None
    parts = count_encoder(config, inputs=inputs, text_len=5)
    assert list(parts) == [part for part in PARTS if part in parts]
    assert total(parts).parameters == num_parameters(encoder)
    assert total(parts).flops == measured_flops(lambda: encoder(images, text))


def test_grouped_products_count_the_same_once_the_counter_knows_them():
    def grouped_mm(rows, weights, *args, out_shape=None, **options):
        return 2 * rows[0] * rows[1] * weights[-1]

    ffn = MHMoEConfig(num_experts=5, hidden_dim=16, num_subtokens=2, bias=False)
    layer, x = build_ffn(32, **ffn.model_dump()), torch.randn(1, 7, 32)
    known = {torch.ops.aten._grouped_mm: grouped_mm}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=known) as counter:
        layer(x)
    assert torch.ops.aten._grouped_mm in counter.get_flop_counts()["Global"]
    assert counter.get_total_flops() == total(count_ffn(ffn, 32, [7])).flops


def test_parts_of_the_encoder_add_up():
    config = encoder_config(ffn=MHMoEConfig(num_experts=3, hidden_dim=16))
    encoder = Encoder(**config.model_dump())
    parts = count_encoder(config, text_len=5)
    assert parts["patch_embed"].parameters == num_parameters(encoder.image_embed.proj)
    assert parts["attention"].parameters + parts["norms"].parameters == sum(
        num_parameters(m) for block in encoder.blocks for m in (block.attn, block.norm1, block.norm2)
    ) + num_parameters(encoder.norm)
    assert parts["dense_ffn"].parameters == num_parameters(encoder.blocks[0].ffn)
    tokens = image_tokens(config) + 5
    assert parts["router"].flops == 2 * tokens * 24 * 3
    assert parts["head_merge"].flops == 2 * 2 * tokens * 24 * 24


def test_beit3_base_has_its_published_number_of_parameters():
    # 276,510,730 with both heads, of which four rows of positions are fairseq's unused offset.
    base = EncoderConfig(embed_dim=768, depth=12, num_heads=12)
    assert total(count_encoder(base, num_codes=8192)).parameters == 276_510_730 - 4 * 768
    assert total(count_encoder(base)).parameters == 220_987_392 - 4 * 768


def test_vit_tiny_has_the_flops_of_its_single_branch():
    # timm's vit_tiny_patch16_224 measures 2.507 GFLOPs with a head of 1000 classes on the class token.
    tiny = EncoderConfig(embed_dim=192, depth=12, num_heads=3, modalities=("image",), attention_sub_ln=False)
    measured = total(count_encoder(tiny, inputs="image")).flops + 2 * 192 * 1000
    assert measured / 1e9 == pytest.approx(2.507, abs=1e-3)


def paper2_hidden_dim(d, F, top_k, matrices=2):
    """Paper 2, equation 8: the inner width that gives an MoE's FLOPs with top-1, routers left out."""
    return (F - 2 * d / matrices) / top_k


def paper2_num_experts(d, F, E, h, width, matrices=2):
    """Paper 2, equation 9, m d F E = 2 d^2 + m (d / h) F' E', solved for E'."""
    return (matrices * d * F * E - 2 * d * d) * h / (matrices * d * width)


def paper1_beta(E):
    """Paper 1's factor on the inner width 4 h d that pays for head and merge layer."""
    return 1 - 1 / (4 * E)


def test_published_settings_of_paper_2():
    assert paper2_hidden_dim(768, 2048, top_k=2, matrices=3) == 768
    assert paper2_hidden_dim(768, 2048, top_k=3, matrices=3) == 512
    for h, width, experts in ((2, 768, 41.3), (3, 512, 93.0)):
        found = paper2_num_experts(768, 2048, 8, h, width, matrices=3)
        assert found == pytest.approx(experts, abs=0.04)
    # Its example with two matrices: d_moe = 4 d, k = 1, h = 3 gives d_mh = 3 d and 4 E - 1 experts.
    assert paper2_hidden_dim(768, 3072, top_k=1) == 3 * 768
    assert paper2_num_experts(768, 3072, 8, h=3, width=2304) == pytest.approx(31)


@pytest.mark.parametrize(("h", "top_k", "width", "experts"), [(2, 2, 768, 41.3), (3, 3, 512, 93.0)])
def test_solver_comes_near_paper_2_where_routers_are_cheap(h, top_k, width, experts):
    baseline = ParityConfig(num_experts=8, hidden_dim=2048, **SWIGLU)
    ffn = MHMoEConfig(num_experts="parity", hidden_dim="parity", num_subtokens=h, top_k=top_k, **SWIGLU)
    solved = solve_ffn(ffn, 768, baseline)
    assert solved.hidden_dim == pytest.approx(width, rel=0.03)
    assert solved.num_experts == pytest.approx(experts, rel=0.04)
    fixed_width = solve_ffn(ffn.model_copy(update={"hidden_dim": width}), 768, baseline)
    assert fixed_width.num_experts == round(experts)


@pytest.mark.parametrize(("num_experts", "beta"), [(8, 31 / 32), (16, 63 / 64), (32, 127 / 128)])
def test_beta_of_paper_1(num_experts, beta):
    assert paper1_beta(num_experts) == beta
    baseline = ParityConfig(num_experts=num_experts, bias=False, rule="parameters")
    ffn = MHMoEConfig(num_experts=num_experts, hidden_dim="parity", num_subtokens=4, top_k=1, bias=False)
    # The inner width was beta * 4 h d; the solver counts routers and the biases of head and merge layer too.
    assert solve_ffn(ffn, 768, baseline).hidden_dim == pytest.approx(beta * 4 * 4 * 768, abs=WIDTH_STEP)


TINY = {
    "dense": DenseConfig(hidden_dim="parity", sub_ln=True),
    "fine-grained": MoEConfig(num_experts=16, hidden_dim="parity", top_k=2),
    "X-MoE": MoEConfig(num_experts=8, hidden_dim="parity", router=CosineRouterConfig()),
    "MH h=2": MHMoEConfig(num_experts="parity", hidden_dim="parity", num_subtokens=2, top_k=2),
    "MH h=4, k=2": MHMoEConfig(num_experts="parity", hidden_dim="parity", num_subtokens=4, top_k=2),
    "MH h=4, k=4": MHMoEConfig(num_experts="parity", hidden_dim="parity", num_subtokens=4, top_k=4),
}


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_keep_parity_with_the_baseline(name):
    solved = resolve(EncoderConfig(embed_dim=192, ffn=TINY[name]), BASELINE)
    assert solved.ffn.hidden_dim % WIDTH_STEP == 0
    found = difference(solved, BASELINE)
    assert abs(found["layer"].flops) < 1
    assert abs(found["encoder"].flops) < 0.4
    if name != "dense":
        assert abs(found["layer"].parameters) < 1
        assert abs(found["encoder"].parameters) < 0.4


def test_differences_are_in_percent_of_the_baseline():
    config = encoder_config(ffn=MoEConfig(num_experts=4, hidden_dim=16, bias=False), moe_every=1)
    baseline = ParityConfig(num_experts=2, hidden_dim=16, bias=False)
    experts, router = 2 * 2 * 24 * 16, 2 * 24
    found = difference(config, baseline, text_len=5)
    assert found["layer"].parameters == pytest.approx(100)
    assert found["layer"].flops == pytest.approx(100 * router / (router + experts / 2))
    more = total(count_encoder(config, text_len=5)).parameters - 2 * (experts + router)
    assert found["encoder"].parameters == pytest.approx(100 * 2 * (experts + router) / more)


@settings(max_examples=60, deadline=None)
@given(
    dim=st.sampled_from([96, 192, 384]),
    h=st.sampled_from([1, 2, 3, 4]),
    top_k=st.integers(1, 3),
    num_experts=st.integers(4, 16),
    activation=st.sampled_from(["gelu", "swiglu"]),
    cosine=st.booleans(),
)
def test_no_neighbour_of_a_solution_is_better(dim, h, top_k, num_experts, activation, cosine):
    baseline = ParityConfig(num_experts=num_experts, activation=activation)
    router = CosineRouterConfig() if cosine else LinearRouterConfig()
    ffn = MHMoEConfig(
        num_experts="parity", hidden_dim="parity", num_subtokens=h, top_k=top_k, activation=activation, router=router
    )
    target = total(count_ffn(MoEConfig(num_experts=num_experts, activation=activation), dim))

    def worst(width, count):
        cost = total(count_ffn(ffn.model_copy(update={"hidden_dim": width, "num_experts": count}), dim))
        return max(abs(cost.flops / target.flops - 1), abs(cost.parameters / target.parameters - 1))

    solved = solve_ffn(ffn, dim, baseline)
    best = worst(solved.hidden_dim, solved.num_experts)
    assert best <= 0.1
    for width in (-8, 0, 8):
        for count in (-2, -1, 0, 1, 2):
            near = solved.hidden_dim + width, solved.num_experts + count
            parts = count_ffn(ffn.model_copy(update={"hidden_dim": near[0], "num_experts": near[1]}), dim)
            if near[0] > 0 and near[1] >= top_k and parts["router"].flops < parts["experts"].flops:
                assert worst(*near) >= best - 1e-12


def test_of_two_solutions_the_one_with_the_cheap_router_is_taken():
    # 993 experts of width 48 come nearer, but most of their FLOPs would be the router's.
    ffn = MHMoEConfig(num_experts="parity", hidden_dim="parity", num_subtokens=2, top_k=2)
    solved = solve_ffn(ffn, 192, ParityConfig(num_experts=32, hidden_dim=768))
    assert (solved.hidden_dim, solved.num_experts) == (248, 196)


def test_one_unknown_is_solved_for_its_own_measure():
    target = total(count_ffn(MoEConfig(num_experts=8, hidden_dim=768), 192))

    def miss(ffn, measure, **change):
        cost = total(count_ffn(ffn.model_copy(update={k: getattr(ffn, k) + v for k, v in change.items()}), 192))
        return abs(getattr(cost, measure) - getattr(target, measure))

    ffn = solve_ffn(MHMoEConfig(num_experts=40, hidden_dim="parity", num_subtokens=2), 192, BASELINE)
    assert miss(ffn, "flops") == min(miss(ffn, "flops", hidden_dim=change) for change in (-8, 0, 8))
    ffn = solve_ffn(MHMoEConfig(num_experts="parity", hidden_dim=400, num_subtokens=2), 192, BASELINE)
    assert miss(ffn, "parameters") == min(miss(ffn, "parameters", num_experts=change) for change in (-1, 0, 1))


def test_shared_experts_on_both_sides_change_nothing():
    shared = {"num_shared_experts": 1, "shared_hidden_dim": 768}
    ffn = MHMoEConfig(num_experts="parity", hidden_dim=280, num_subtokens=2)
    with_shared = solve_ffn(ffn.model_copy(update=shared), 192, BASELINE.model_copy(update=shared))
    assert with_shared.num_experts == solve_ffn(ffn, 192, BASELINE).num_experts
    # Alone, it has to be paid for by routed experts.
    assert solve_ffn(ffn.model_copy(update=shared), 192, BASELINE).num_experts < with_shared.num_experts


def test_numbers_are_left_alone():
    config = encoder_config(ffn=MHMoEConfig(num_experts=5))
    assert resolve(config, None) == config
    assert resolve(config, BASELINE) == config


@pytest.mark.parametrize(
    ("ffn", "parity", "words"),
    [
        (MHMoEConfig(hidden_dim="parity"), None, "encoder.ffn: 'parity' without a baseline"),
        # Head and merge layer alone cost more than the baseline: the width would be negative.
        (MHMoEConfig(hidden_dim="parity"), {"hidden_dim": 64}, "no hidden_dim gives mh_moe the baseline's 52224 FLOPs"),
        (MHMoEConfig(hidden_dim="parity", num_experts="parity"), {"hidden_dim": 64}, "nearest is hidden_dim 8"),
        (MoEConfig(hidden_dim=4000, num_experts="parity", top_k=3), {"hidden_dim": 64}, "nearest is num_experts 3"),
        (MHMoEConfig(num_experts="parity"), {"rule": "parameters"}, "num_experts: 'parity' does not go with"),
        (MHMoEConfig(hidden_dim="parity", num_subtokens=5), {}, "num_subtokens 5 does not divide the width 192"),
    ],
    ids=short,
)
def test_impossible_parity_names_the_values(ffn, parity, words):
    with pytest.raises(ConfigError, match=words):
        resolve(EncoderConfig(embed_dim=192, ffn=ffn), None if parity is None else ParityConfig(**parity))


def test_text_longer_than_its_positions_is_refused():
    with pytest.raises(ConfigError, match="text_len: 10 tokens for 9"):
        count_encoder(encoder_config(), text_len=10)


def test_module_imports_without_torch():
    code = "import sys, mhmoe_vl.parity; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
