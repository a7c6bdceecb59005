"""Traces: the map of a router that is known, counts against the layers' own, and nothing changed by looking."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from known_router import WORD, drawn_colors, known_choices, known_encoder, picture

from mhmoe_vl.analysis import trace as trace_module
from mhmoe_vl.analysis.trace import join_traces, trace_routing
from mhmoe_vl.config import EncoderConfig
from mhmoe_vl.data.transforms import ImageTransform
from mhmoe_vl.errors import ConfigError
from mhmoe_vl.models.classifier import ImageClassifier
from mhmoe_vl.models.factory import build_encoder
from mhmoe_vl.nn import moe

MOE = {"kind": "moe", "num_experts": 4, "hidden_dim": 8}
MH_MOE = {**MOE, "kind": "mh_moe", "num_subtokens": 4, "top_k": 2}
LAYERS = {
    "smoe": MOE,
    "xmoe": {**MOE, "router": {"kind": "cosine", "dim": 4}},
    "fine_grained": {**MOE, "num_experts": 300, "hidden_dim": 2, "top_k": 3},
    "shared": {**MOE, "num_shared_experts": 1},
    "mh_moe": MH_MOE,
    "one_subtoken": {**MH_MOE, "num_subtokens": 1},
    "eight_subtokens": {**MH_MOE, "num_subtokens": 8},
    "conv": {**MH_MOE, "conv_kernel": 3, "conv_stride": 2},
}
POOLS = {
    "joint": {},
    "per_modality": {"expert_pool": "per_modality"},
    "pair": {"multiway": "shared_attention", "vl_ffn_layers": 1},
}


def encoder_with(ffn: dict, **changes):
    sizes = {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 64, "patch_size": 16}
    values = {**sizes, "vocab_size": 50, "max_text_len": 9, "ffn": ffn, **changes}
    torch.manual_seed(0)
    return build_encoder(EncoderConfig.model_validate(values))


def inputs(kind: str, num_pairs: int | None = None) -> dict:
    torch.manual_seed(1)
    given = {}
    if kind in ("images", "pairs"):
        given["image"] = torch.randn(3, 3, 48, 80)  # neither square nor the size that positions are stored for
    if kind in ("texts", "pairs"):
        padding = torch.zeros(3, 7, dtype=torch.bool)
        padding[0, 4:] = padding[2, 6:] = True
        given |= {"text": torch.randint(0, 50, (3, 7)), "text_padding": padding}
    return given | ({"num_pairs": num_pairs} if kind == "pairs" else {})


# ------------------------------------------------------------------------------------------ known router
def test_a_known_router_gives_exactly_its_map():
    colors = np.stack([drawn_colors(0), drawn_colors(1)])
    shown = [ImageTransform(32)(picture(c), None) / 127.5 - 1 for c in colors]
    trace = trace_routing(known_encoder(), torch.stack(shown))
    assert [layer.name for layer in trace.layers] == ["blocks.0.joint", "blocks.1.joint"]
    assert trace.grid == (4, 4)
    for number, picture_colors in enumerate(colors):
        experts, gates = known_choices(picture_colors)
        for block, layer in enumerate(trace.layers):
            patches = layer.parts["patch"]
            assert (patches.experts[number] == experts[block]).all()
            np.testing.assert_allclose(patches.gates[number], gates[block], atol=1e-6)
            assert layer.parts["class"].experts[number, 0].tolist() == [
                [[3, 0], [0, 1]], [[0, 3], [3, 2]],
            ][block]  # fmt: skip


def test_a_known_router_takes_words_as_it_must():
    text = torch.tensor([[5, 6, 7], [8, 9, 0]])
    trace = trace_routing(known_encoder(), text=text, text_padding=torch.tensor([[False] * 3, [False, False, True]]))
    found = trace.layers[1].parts["text"]
    assert (found.experts[0] == [[3 - axis for axis in WORD]] * 2).all()
    assert found.present.tolist() == [[True, True, True], [True, True, False]]
    assert (found.experts[1, 2] == -1).all() and not found.gates[1, 2].any() and not found.kept[1, 2].any()


# ------------------------------------------------------------------------------------------------- counts
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("layer", LAYERS)
def test_counts_are_those_of_the_layers(layer, pool):
    encoder = encoder_with(LAYERS[layer], **POOLS[pool]).eval()
    for kind, num_pairs in (("images", None), ("texts", None), ("pairs", None), ("pairs", 1)):
        given = inputs(kind, num_pairs)
        trace = trace_routing(encoder, **given)
        with torch.no_grad():
            output = encoder(given.pop("image", None), given.pop("text", None), **given)
        stats = {n: s for n, s in zip(encoder.moe_names, output.stats, strict=True) if s.num_rows}
        assert [found.name for found in trace.layers] == list(stats)
        for found in trace.layers:
            assert found.num_rows == int(stats[found.name].num_rows)
            assert found.counts().tolist() == stats[found.name].load.sum(0).tolist()
            assert found.counts().sum() == found.num_rows * found.top_k
            load = dict(zip(("image", "text"), stats[found.name].load, strict=False))
            if found.pool in ("joint", "pair"):
                assert found.counts("class", "patch").tolist() == load["image"].tolist()
                assert found.counts("text").tolist() == load["text"].tolist()


def test_where_a_stride_joins_tokens_each_gets_a_copy_and_one_counts():
    trace = trace_routing(encoder_with(LAYERS["conv"]), **inputs("images"))
    for layer in trace.layers:
        tokens = np.concatenate([layer.parts[part].experts for part in ("class", "patch")], 1)
        counted = np.concatenate([layer.parts[part].counted for part in ("class", "patch")], 1)
        assert (tokens[:, 0::2] == tokens[:, 1::2]).all()
        assert counted[:, 0::2].all() and not counted[:, 1::2].any()


# ---------------------------------------------------------------------------------------------- divergence
def test_divergence_by_hand():
    tokens = trace_module.TokenTrace.blank(1, 4, 2, 2)
    tokens.experts[0, :3] = [[[0, 1], [1, 0]], [[2, 3], [0, 1]], [[2, 2], [2, 2]]]
    tokens.kept[0, :3] = True
    tokens.kept[0, 1, 0, 1] = False  # expert 3 is dropped
    assert tokens.divergence().tolist() == [[2, 3, 1, 0]]


def test_divergence_is_the_mean_over_layers():
    trace = trace_routing(encoder_with(MH_MOE), **inputs("pairs"))
    for part in trace_module.PARTS:
        wanted = np.mean([layer.parts[part].divergence() for layer in trace.layers], 0)
        present = trace.layers[0].parts[part].present
        np.testing.assert_allclose(trace.divergence(part)[present], wanted[present])
        assert np.isnan(trace.divergence(part)[~present]).all()


# ------------------------------------------------------------------------------------------------ capacity
@pytest.mark.parametrize("ffn", [MH_MOE, MOE, LAYERS["conv"]], ids=["mh_moe", "moe", "conv"])
def test_capacity_marks_what_training_drops(ffn):
    """The first pool sees the same rows in training, because nothing was dropped below it."""
    given = inputs("pairs")
    plain = trace_routing(encoder_with(ffn), **given)
    trace = trace_routing(encoder_with(ffn), capacity_factor=0.7, **given)
    training = encoder_with({**ffn, "capacity_factor": 0.7}).train()
    images, text = given.pop("image"), given.pop("text")
    routing = training(images, text, **given, return_routing=True).routing[0]
    first = trace.layers[0]
    kept = [first.parts[part].kept[first.parts[part].counted] for part in ("text",)]
    is_text = (routing.stream == 1).numpy()
    assert (np.concatenate(kept).reshape(-1, first.top_k) == routing.kept.numpy()[is_text]).all()
    dropped = sum(int((~part.kept[part.counted]).sum()) for part in first.parts.values())
    assert dropped == int((~routing.kept).sum()) > 0
    assert (plain.layers[-1].counts() == trace.layers[-1].counts()).all()
    assert all(part.kept[part.present].all() for layer in plain.layers for part in layer.parts.values())


# -------------------------------------------------------------------------------------- nothing is changed
def test_tracing_changes_no_bit_and_costs_nothing_when_not_asked(monkeypatch):
    encoder = encoder_with({**MH_MOE, "balance_bias_rate": 0.1}).train()
    encoder.blocks[0].eval()
    modes = [module.training for module in encoder.modules()]
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    random_state = torch.get_rng_state()
    trace_routing(encoder, **inputs("pairs"))
    trace_routing(encoder, **inputs("pairs"), capacity_factor=0.5)
    torch.set_rng_state(random_state)
    assert [module.training for module in encoder.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    given = inputs("pairs")
    given = {"images": given.pop("image"), **given}
    asked = encoder.eval()(**given, return_routing=True)
    monkeypatch.setattr(moe, "locate_rows", None)  # not called unless asked
    monkeypatch.setattr(moe, "Routing", None)
    plain = encoder(**given)
    assert torch.equal(asked.image, plain.image) and torch.equal(asked.text, plain.text)
    assert plain.routing is None


def test_a_model_that_holds_an_encoder(tmp_path):
    encoder = encoder_with(MOE, modalities=("image",), final_norm=False)
    model = ImageClassifier(encoder, num_classes=3)
    trace = trace_routing(model, **inputs("images"))
    assert trace.to_dict() == trace_routing(encoder, **inputs("images")).to_dict()


# --------------------------------------------------------------------------------------------- many batches
@pytest.mark.parametrize("pool", POOLS)
def test_joined_batches_are_the_trace_of_all(pool):
    encoder = encoder_with(MH_MOE, **POOLS[pool])
    given = inputs("pairs")
    whole = trace_routing(encoder, **given, pieces=[["x"] * 4, ["y"] * 7, ["z"] * 6])
    parts = []
    for i, length in enumerate((4, 7, 6)):
        one = {name: value[i : i + 1] for name, value in given.items() if value is not None}
        one |= {name: one[name][:, :length] for name in ("text", "text_padding")}
        parts.append(trace_routing(encoder, **one, pieces=[["xyz"[i]] * length]))
    joined = join_traces(parts)
    assert joined.pieces == whole.pieces and joined.num_pairs == 3 and joined.grid == (3, 5)
    for found, wanted in zip(joined.layers, whole.layers, strict=True):
        assert found.name == wanted.name
        for part, tokens in wanted.parts.items():
            assert (found.parts[part].experts == tokens.experts).all()
            assert (found.parts[part].present == tokens.present).all()
            np.testing.assert_allclose(found.parts[part].gates, tokens.gates, atol=1e-5)


def test_joined_kinds_stand_beside_each_other():
    encoder = encoder_with(MH_MOE, expert_pool="per_modality")
    traces = [trace_routing(encoder, **inputs(kind)) for kind in ("images", "texts", "pairs")]
    joined = join_traces(traces)
    assert (joined.num_images, joined.num_texts, joined.num_pairs) == (6, 6, 3)
    for layer in joined.layers:
        alone = [found for trace in traces for found in trace.layers if found.name == layer.name]
        assert (layer.counts() == sum(found.counts() for found in alone)).all()
        assert all(len(tokens.present) == 6 for tokens in layer.parts.values())


def test_as_json():
    trace = trace_routing(encoder_with(MH_MOE), **inputs("pairs"), pieces=[["a"] * 7] * 3)
    values = json.loads(json.dumps(trace.to_dict(), allow_nan=False))
    found = values["layers"][1]
    assert (values["grid"], found["block"], found["pool"], found["num_subtokens"]) == ([3, 5], 3, "joint", 4)
    tokens = trace.layers[1].parts["patch"]
    assert found["parts"]["patch"]["experts"] == tokens.experts.tolist()
    assert found["parts"]["patch"]["divergence"] == tokens.divergence().tolist()
    np.testing.assert_allclose(found["parts"]["patch"]["gates"], tokens.gates, atol=5.1e-5)
    assert found["counts"] == trace.layers[1].counts().tolist()


# -------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        (lambda: encoder_with({"kind": "dense"}), inputs("images"), "model: dense, there is nothing to route"),
        (lambda: torch.nn.Linear(2, 2), inputs("images"), "model: Linear holds no Encoder"),
        (lambda: encoder_with(MOE), {}, "neither image nor text"),
        (lambda: encoder_with(MOE), {**inputs("images"), "capacity_factor": 0.0}, "capacity_factor: 0.0"),
        (lambda: encoder_with(MOE, modalities=("image",)), inputs("texts"), "modalities: image only, got text"),
    ],
)
def test_what_cannot_be_traced_is_one_line(model, given, words):
    with pytest.raises(ConfigError, match=words) as raised:
        trace_routing(model(), **given)
    assert "\n" not in str(raised.value)
