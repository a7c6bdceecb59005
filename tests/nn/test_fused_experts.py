"""The fused kernels in Triton's interpreter, on a CPU: against experts one by one in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mhmoe_vl.nn import fused_experts
from mhmoe_vl.nn.dispatch import make_plan
from mhmoe_vl.nn.experts import Experts
from mhmoe_vl.nn.fused_experts import Launch, Tiles, fused_mix, fused_runs, split_width

pytest.importorskip("triton")


@pytest.fixture
def interpreted(monkeypatch):
    """Tiles of a size that the interpreter, which conftest.py switches on, gets through."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernels themselves are tested")
    for width in fused_experts.LAUNCHES:
        monkeypatch.setitem(fused_experts.LAUNCHES, width, Launch(*[Tiles(16, 16, 4, 2)] * 3))


def draw(T, d, E, hidden, K, dtype, *, bias=True, skew=False):
    """Rows, gates and weights that need gradients, and choices."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).requires_grad_()

    experts = torch.rand(T, E, generator=generator).topk(K, 1).indices
    if skew:
        experts[:, 0], experts[:, 1:] = 1, 0
    x = normal(T, d).detach().to(dtype).requires_grad_()
    b1, b2 = (normal(E, hidden), normal(E, d)) if bias else (None, None)
    gates, w1, w2 = normal(T, K), normal(E, d, hidden, scale=d**-0.5), normal(E, hidden, d, scale=hidden**-0.5)
    return [x, gates, w1, b1, w2, b2], experts


def one_by_one(x, gates, w1, b1, w2, b2, experts):
    """The definition: every expert on its own rows."""
    out = torch.zeros_like(x)
    for k in range(experts.shape[1]):
        for e in range(len(w1)):
            mine = experts[:, k] == e
            hidden = F.gelu(x[mine] @ w1[e] + (0 if b1 is None else b1[e]))
            answer = hidden @ w2[e] + (0 if b2 is None else b2[e])
            out = out.index_put((mine.nonzero().squeeze(1),), gates[mine, k : k + 1] * answer, accumulate=True)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "dtype", "options", "limit"),
    [
        ((20, 48, 7, 24, 2), torch.float32, {}, 1e-5),  # width 32 + 16, half a tile of hidden units, idle experts
        ((20, 32, 3, 32, 1), torch.float16, {"bias": False}, 2e-3),
        ((300, 16, 3, 16, 2), torch.float32, {"skew": True}, 1e-5),  # an expert with more than one chunk
    ],
)
def test_output_and_gradients_are_those_of_the_experts_one_by_one(interpreted, sizes, dtype, options, limit):
    inputs, experts = draw(*sizes, dtype, **options)
    plan = make_plan(experts, sizes[2], "fused")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fused_mix(*inputs, plan)
    if sizes[-1] > 1:  # else there are as many slots as rows
        assert all(len(tensor) != len(plan.row) for tensor in saved), "nothing of the slots is kept"
    live = [tensor for tensor in inputs if tensor is not None]
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = [y, *torch.autograd.grad(y, live, grad)]
    exact = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in inputs]
    answer = one_by_one(*exact, experts)
    wanted = [answer, *torch.autograd.grad(answer, [t for t in exact if t is not None], grad.double())]
    for mine, true in zip(found, wanted, strict=True):
        assert (mine.double() - true).abs().max() <= limit * true.abs().max()
    assert [g.dtype for g in found[1:]] == [tensor.dtype for tensor in live]


@pytest.mark.slow
def test_the_probe_measures_the_kernels(interpreted, monkeypatch):
    device = torch.device("cpu")
    assert fused_experts._probe_error(device, torch.float16, 32, 32, True) < 5e-3
    monkeypatch.setattr(fused_experts.F, "gelu", F.relu)
    assert fused_experts._probe_error(device, torch.float16, 32, 32, True) > 0.05, "another function is noticed"


def test_kernels_that_fail_are_not_used_and_one_warning_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    device = torch.device("cuda", 77)
    fused_experts._probe.cache_clear()
    with pytest.warns(UserWarning, match=r"fused kernels for experts 192 x 768 are not used: \w+") as said:
        assert not fused_runs(device, torch.bfloat16, 192, 768, True)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    assert not fused_runs(device, torch.bfloat16, 192, 768, True), "asked once"
    fused_experts._probe.cache_clear()


def test_where_the_kernels_are_not_asked(monkeypatch):
    monkeypatch.setattr(fused_experts, "_probe", lambda *args: True)
    gpu = torch.device("cuda")
    assert fused_runs(gpu, torch.bfloat16, 192, 768, True)
    assert not fused_runs(torch.device("cpu"), torch.bfloat16, 192, 768, True)
    assert not fused_runs(gpu, torch.float32, 192, 768, True)
    assert not fused_runs(gpu, torch.bfloat16, 200, 768, True)
    x = torch.zeros(1, 192, dtype=torch.bfloat16)
    assert Experts(192, 2, 8, activation="gelu", bias=True).path(x, 8) != "fused"


@pytest.mark.parametrize(
    ("width", "parts"),
    [
        (192, (128, 64)), (256, (256, 0)), (48, (32, 16)), (16, (16, 0)), (160, (128, 32)),
        (8, None), (24, None), (224, None), (320, None),
    ],
)  # fmt: skip
def test_widths_that_are_one_or_two_powers_of_two(width, parts):
    assert split_width(width) == parts
