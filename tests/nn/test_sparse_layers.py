"""MoE and MultiHeadMoE against the nested-loop reference: outputs, losses and every gradient."""

from __future__ import annotations

import pytest
import torch
from nn.reference import parameters_of, sparse_layer

from mhmoe_vl.nn.ffn import build_ffn

COSINE = {"kind": "cosine", "dim": 5}
VARIANTS = {
    "switch": dict(kind="moe", num_experts=4, hidden_dim=10, top_k=1),
    "moe": dict(kind="moe", num_experts=5, hidden_dim=10, top_k=2, activation="relu"),
    "raw gates": dict(kind="moe", num_experts=5, hidden_dim=10, top_k=2, normalize_gates=False),
    "all experts": dict(kind="moe", num_experts=3, hidden_dim=8, top_k=3, activation="swiglu", bias=False),
    "one expert": dict(kind="moe", num_experts=1, hidden_dim=8, top_k=1),
    "x-moe": dict(kind="moe", num_experts=6, hidden_dim=8, top_k=1, router=COSINE),
    "x-moe sigmoid": dict(kind="moe", num_experts=6, hidden_dim=8, top_k=2, router={**COSINE, "gate": "sigmoid"}),
    "sigmoid": dict(kind="moe", num_experts=6, hidden_dim=8, top_k=2, router={"kind": "linear", "gate": "sigmoid"}),
    "released cosine": dict(
        kind="mh_moe",
        num_experts=6,
        hidden_dim=8,
        router={**COSINE, "normalize_rows": False, "learned_temperature": False, "initial_temperature": 1.0},
    ),
    "shared": dict(kind="moe", num_experts=4, hidden_dim=8, num_shared_experts=2, shared_hidden_dim=6, top_k=2),
    "all choices counted": dict(kind="moe", num_experts=4, hidden_dim=8, top_k=2, balance_share="all"),
    "per modality": dict(kind="mh_moe", num_experts=4, hidden_dim=8, balance_per_modality=True, balance_share="all"),
    "mh-moe": dict(kind="mh_moe", num_experts=5, hidden_dim=10),
    "mh-moe swiglu": dict(kind="mh_moe", num_experts=5, hidden_dim=10, activation="swiglu", num_shared_experts=1),
    "mh-moe 3 pieces": dict(kind="mh_moe", num_subtokens=3, num_experts=5, hidden_dim=10, top_k=3),
    "residual": dict(kind="mh_moe", num_experts=5, hidden_dim=10, subtoken_residual=True, normalize_gates=False),
    "no head": dict(kind="mh_moe", num_experts=5, hidden_dim=10, head_layers=0, merge_layers=0),
    "deep head": dict(kind="mh_moe", num_experts=5, hidden_dim=10, head_layers=3, merge_layers=2),
    "conv": dict(kind="mh_moe", num_experts=5, hidden_dim=10, conv_kernel=3),
    "conv, stride": dict(kind="mh_moe", num_experts=5, hidden_dim=10, conv_kernel=4, conv_stride=2),
    "conv, windows apart": dict(
        kind="mh_moe", num_experts=5, hidden_dim=10, conv_kernel=3, conv_stride=3, subtoken_residual=True
    ),
}
DIM = 12


def build(name, dtype=torch.float64):
    """A variant with weights large enough that every term of the layer matters."""
    layer = build_ffn(DIM, **VARIANTS[name]).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.5)
    return layer


def reference(layer, name, streams, paddings, **changes):
    options = {k: v for k, v in VARIANTS[name].items() if k != "kind"}
    if VARIANTS[name]["kind"] == "mh_moe":
        options = {"num_subtokens": 4, "top_k": 2, **options}
    params = parameters_of(layer)
    inputs = [x.detach().double().requires_grad_() for x in streams]
    return params, inputs, sparse_layer(params, inputs, paddings, **{**options, **changes})


def random_streams(seed, dtype=torch.float64):
    """An image stream without padding and a text stream with it, of random sizes."""
    g = torch.Generator().manual_seed(seed)
    B, N, M, L = (int(torch.randint(1, 6, (), generator=g)) for _ in range(4))
    image, text = torch.randn(B, N, DIM, generator=g), torch.randn(M, L, DIM, generator=g)
    lengths = torch.randint(0, L + 1, (M, 1), generator=g)
    return [image.to(dtype), text.to(dtype)], [None, torch.arange(L) >= lengths]


def objective(outputs, balance_loss, z_loss):
    """A scalar that weighs every output differently, and both losses."""
    g = torch.Generator().manual_seed(0)
    weighted = sum((y.double() * torch.randn(y.shape, generator=g, dtype=torch.float64)).sum() for y in outputs)
    return weighted + 0.7 * balance_loss.double() + 0.3 * z_loss.double()


def assert_close(actual, expected, tolerance, what):
    scale = max(expected.abs().max().item(), 1e-3) if expected.numel() else 1.0
    error = (actual.double() - expected).abs().max().item() if expected.numel() else 0.0
    assert actual.shape == expected.shape, what
    assert error <= tolerance * scale, f"{what}: error {error:.2e} at values up to {scale:.2e}"


def compare(layer, name, streams, paddings, tolerance, *, same_choices=False, **changes):
    """Runs layer and reference, compares outputs, losses, choices and gradients, and returns the layer's output."""
    xs = [x.clone().requires_grad_() for x in streams]
    output = layer.forward_streams(xs, paddings, return_routing=True)
    choices = output.routing.experts.tolist() if same_choices else None
    params, inputs, expected = reference(layer, name, streams, paddings, choices=choices, **changes)
    assert output.routing.experts.tolist() == expected.experts
    assert output.routing.kept.tolist() == expected.kept
    for actual, wanted in zip(output.x, expected.outputs, strict=True):
        assert_close(actual, wanted, tolerance, "output")
    assert_close(output.aux_losses["balance_loss"], expected.balance_loss.double(), tolerance, "balance loss")
    assert_close(output.aux_losses["z_loss"], expected.z_loss.double(), tolerance, "z-loss")
    objective(output.x, **output.aux_losses).backward()
    value = objective(expected.outputs, expected.balance_loss, expected.z_loss)
    value = value + 0 * sum(p.sum() for p in params.values())  # a graph also where no row is routed
    wanted = torch.autograd.grad(value, [*inputs, *params.values()], allow_unused=True, materialize_grads=True)
    for x, grad in zip(xs, wanted, strict=False):
        assert_close(x.grad, grad, tolerance, "gradient of the input")
    for (key, parameter), grad in zip(layer.named_parameters(), wanted[len(xs) :], strict=True):
        assert parameter.grad is not None, key
        assert_close(parameter.grad, grad, tolerance, f"gradient of {key}")
    return output


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_variant_equals_reference(name, seed):
    torch.manual_seed(seed)
    compare(build(name), name, *random_streams(seed), 1e-9)


@pytest.mark.parametrize("path", ["grouped", "filled", "split", "tiles"])
@pytest.mark.parametrize("name", ["switch", "mh-moe", "mh-moe swiglu", "all experts"])
@pytest.mark.parametrize("rows", [0, 1, 200])
def test_paths_equal_reference_in_float32(monkeypatch, path, name, rows):
    check_path(monkeypatch, path, name, rows)


@pytest.mark.parametrize(("path", "name"), [("grouped", "mh-moe"), ("split", "switch"), ("tiles", "mh-moe")])
def test_paths_equal_reference_with_many_rows(monkeypatch, path, name):
    check_path(monkeypatch, path, name, 1000)


def check_path(monkeypatch, path, name, rows):
    torch.manual_seed(rows)
    monkeypatch.setattr("mhmoe_vl.nn.experts.choose_path", lambda *_: path)
    options = {**VARIANTS[name], "hidden_dim": 12}  # the widths of grouped products: multiples of 16 bytes
    if VARIANTS[name]["kind"] == "mh_moe":
        options["num_subtokens"] = 3
        rows = -(-rows // 3)
    monkeypatch.setitem(VARIANTS, name, options)
    compare(build(name, torch.float32), name, [torch.randn(1, rows, DIM)], [None], 1e-5, same_choices=True)


@pytest.mark.parametrize("path", ["grouped", "filled", "split", "tiles"])
@pytest.mark.parametrize("skew", ["one expert", "ties"])
def test_skewed_choices(monkeypatch, path, skew):
    """All rows to one expert; and equal logits, where any choice of distinct experts is right."""
    monkeypatch.setattr("mhmoe_vl.nn.experts.choose_path", lambda *_: path)
    monkeypatch.setitem(VARIANTS, "skew", dict(kind="moe", num_experts=6, hidden_dim=8, top_k=2, activation="relu"))
    torch.manual_seed(0)
    layer = build("skew", torch.float32)
    with torch.no_grad():
        layer.routed.router.weight.zero_()
        if skew == "one expert":
            layer.routed.router.weight[4] = 5.0
            layer.routed.router.weight[1] = 4.0
    x = torch.rand(2, 40, DIM)
    output = compare(layer, "skew", [x], [None], 1e-5, same_choices=True)
    experts = output.routing.experts
    assert all(len(set(row)) == 2 for row in experts.tolist())
    if skew == "one expert":
        assert experts.tolist() == [[4, 1]] * 80
        assert output.stats.load.tolist() == [[0, 80, 0, 0, 80, 0]]


@pytest.mark.parametrize("path", ["grouped", "filled", "split", "tiles"])
def test_repeats_bit_for_bit(monkeypatch, path):
    monkeypatch.setattr("mhmoe_vl.nn.experts.choose_path", lambda *_: path)
    torch.manual_seed(0)
    layer, x = build_ffn(16, kind="mh_moe", hidden_dim=32), torch.randn(2, 50, 16)

    def run():
        layer.zero_grad()
        output = layer(x)
        (output.x.square().sum() + output.aux_losses["balance_loss"]).backward()
        return [output.x, *(p.grad.clone() for p in layer.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("path", ["grouped", "filled", "split", "tiles"])
def test_bfloat16_autocast(monkeypatch, path):
    """Same choices as in float32, outputs and float32 gradients within bfloat16's rounding."""
    monkeypatch.setattr("mhmoe_vl.nn.experts.choose_path", lambda *_: path)
    torch.manual_seed(0)
    layer, x = build_ffn(16, kind="moe", hidden_dim=32, top_k=2, normalize_gates=False), torch.randn(2, 60, 16)
    found = []
    for enabled in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = layer(x, return_routing=True)
        assert output.x.dtype == (torch.bfloat16 if enabled else torch.float32)
        output.x.float().square().sum().backward()
        found.append((output, [p.grad.clone() for p in layer.parameters()]))
    (plain, wanted), (cast, grads) = found
    assert torch.equal(plain.routing.experts, cast.routing.experts)
    assert torch.equal(plain.routing.gates, cast.routing.gates)
    assert_close(cast.x, plain.x.double(), 2e-2, "output")
    for (name, _), grad, full in zip(layer.named_parameters(), grads, wanted, strict=True):
        assert grad.dtype == torch.float32
        assert_close(grad, full.double(), 2e-2, f"gradient of {name}")


@pytest.mark.parametrize("kind", ["moe", "mh_moe"])
def test_nothing_to_route(kind):
    """Only padding: losses are exactly 0, every parameter has a zero gradient but for what padding itself passes."""
    layer = build_ffn(DIM, kind=kind, hidden_dim=8, top_k=2)
    x = torch.randn(2, 3, DIM, requires_grad=True)
    output = layer(x, torch.ones(2, 3, dtype=torch.bool), return_routing=True)
    assert output.routing.experts.shape == (0, 2)
    assert output.stats.num_rows == 0 and output.stats.entropy == 0
    assert output.aux_losses["balance_loss"] == 0 and output.aux_losses["z_loss"] == 0
    (output.x.sum() + sum(output.aux_losses.values())).backward()
    routed = {name: p.grad for name, p in layer.named_parameters() if name.startswith("routed")}
    assert all(grad is not None and not grad.any() for grad in routed.values())


@pytest.mark.parametrize("name", ["moe", "x-moe", "mh-moe", "conv, stride"])
def test_padding_content_does_not_matter(name):
    torch.manual_seed(0)
    layer = build(name)
    (_, text), (_, padding) = random_streams(5)
    assert padding.any() and not padding.all()
    other = text.masked_fill(padding.unsqueeze(-1), 9.0)
    first, second = layer(text, padding), layer(other, padding)
    assert torch.equal(first.x[~padding], second.x[~padding])
    assert first.aux_losses == second.aux_losses


@pytest.mark.parametrize("name", ["moe", "mh-moe", "conv", "conv, stride", "conv, windows apart"])
def test_sample_alone_equals_sample_in_batch(name):
    """Dropless layers treat every sample alone: in any order, and with or without padding behind it."""
    torch.manual_seed(0)
    layer, x = build(name), torch.randn(4, 7, DIM, dtype=torch.float64)
    lengths = [7, 5, 3, 1]
    padding = torch.arange(7) >= torch.tensor(lengths).unsqueeze(1)
    whole = layer(x, padding).x
    turned = layer(x.flip(0), padding.flip(0)).x.flip(0)
    assert torch.allclose(whole[~padding], turned[~padding], atol=1e-12)
    for b, length in enumerate(lengths):
        assert torch.allclose(layer(x[b : b + 1, :length]).x[0], whole[b, :length], atol=1e-12)


def test_routing_names_every_row():
    torch.manual_seed(0)
    layer = build_ffn(DIM, kind="mh_moe", hidden_dim=8, num_subtokens=2, head_layers=0)
    xs, paddings = random_streams(5, torch.float32)
    output = layer.forward_streams(xs, paddings, return_routing=True)
    r = output.routing
    for t in range(len(r.stream)):
        token = xs[r.stream[t]].reshape(-1, DIM)[r.token[t]]
        row = token[6 * r.subtoken[t] : 6 * (r.subtoken[t] + 1)]
        assert torch.allclose(layer.routed.router.weight @ row, r.logits[t], atol=1e-5)
    assert len(r.stream) == 2 * (xs[0].shape[:2].numel() + int((~paddings[1]).sum()))
    assert torch.allclose(r.gates.sum(-1), torch.ones(len(r.stream)))
    for stream, load in enumerate(output.stats.load):
        assert load.tolist() == r.experts[r.stream == stream].flatten().bincount(minlength=8).tolist()


def test_one_subtoken_without_projections_is_moe():
    torch.manual_seed(0)
    moe = build_ffn(DIM, kind="moe", hidden_dim=8, top_k=2, num_shared_experts=1)
    options = dict(num_subtokens=1, head_layers=0, merge_layers=0, num_shared_experts=1)
    multi = build_ffn(DIM, kind="mh_moe", hidden_dim=8, **options)
    multi.load_state_dict(moe.state_dict())
    x = torch.randn(2, 5, DIM)
    first, second = moe(x), multi(x)
    assert torch.equal(first.x, second.x)
    assert first.aux_losses == second.aux_losses


def test_accepts_any_leading_axes():
    layer, x = build_ffn(DIM, kind="mh_moe", hidden_dim=8), torch.randn(2, 3, 2, DIM)
    assert torch.allclose(layer(x).x.reshape(-1, DIM), layer(x.reshape(-1, DIM)).x, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, at graph breaks
def test_compiled_equals_eager():
    torch.manual_seed(0)
    layer = build_ffn(16, kind="mh_moe", hidden_dim=32, router={"kind": "cosine"}, balance_bias_rate=0.01)
    x, padding = torch.randn(2, 9, 16), torch.arange(9) >= torch.tensor([[9], [4]])
    found = []
    for call in (layer, torch.compile(layer, backend="aot_eager")):
        layer.zero_grad()
        layer.routed.balance_bias.zero_()
        output = call(x, padding)
        (output.x.square().sum() + output.aux_losses["z_loss"]).backward()
        found.append([output.x, layer.routed.balance_bias.clone(), *(p.grad.clone() for p in layer.parameters())])
    assert found[0][1].any()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
