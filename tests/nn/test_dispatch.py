"""The layout of choices in slots, and the gathers that carry rows there and back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_vl.nn import dispatch
from mhmoe_vl.nn.dispatch import ROUND, TILE, choose_path, combine, expert_linear, make_plan, permute, within_capacity

PATHS = ["grouped", "filled", "split", "tiles"]


@st.composite
def choices(draw):
    """Chosen experts (T, K), distinct in each row, and E; often skewed."""
    E = draw(st.integers(1, 40))
    K = draw(st.integers(1, min(E, 4)))
    T = draw(st.sampled_from([0, 1, 2, 7, 64, 150]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    skew = torch.linspace(0, draw(st.sampled_from([0.0, 3.0, 50.0])), E)
    return (torch.rand(T, E, generator=g) + skew).topk(K).indices, E


@settings(max_examples=80, deadline=None)
@given(choices(), st.sampled_from(PATHS), st.floats(0.05, 3))
def test_every_choice_has_one_slot(drawn, path, factor):
    experts, E = drawn
    T, K = experts.shape
    plan = make_plan(experts, E, path)
    counts = experts.flatten().bincount(minlength=E)
    slots = plan.slot.flatten()
    assert len(set(slots.tolist())) == T * K, "slots are distinct"
    assert torch.equal(plan.expert[plan.slot].t(), experts), "each slot belongs to the expert chosen"
    assert torch.equal(plan.row[plan.slot], torch.arange(T).expand(K, T)), "each slot copies the row that chose"
    assert torch.equal(plan.choice[slots], torch.arange(T * K)), "choice inverts slot"
    assert (plan.choice == T * K).sum() == len(plan.row) - T * K
    assert torch.equal(plan.expert, plan.expert.sort().values), "slots of an expert are adjacent"
    sizes = torch.diff(plan.ends, prepend=plan.ends.new_zeros(1))
    assert plan.sizes == sizes.tolist()
    if path == "tiles":
        assert torch.equal(sizes[:-1], ((counts + TILE - 1) // TILE * TILE)[:-1])
        assert all(size % TILE == 0 for size in plan.sizes)
    elif path == "filled":
        assert all(size % ROUND == 0 for size in plan.sizes)
        assert all(count <= size <= max(count + ROUND - 1, 1.125 * count)
                   for size, count in zip(plan.sizes, counts.tolist(), strict=True))  # fmt: skip
    else:
        assert torch.equal(sizes.long(), counts)
    capacity, seen, kept = math.ceil(factor * T * K / E - 1e-9), [0] * E, within_capacity(plan, experts, factor)
    for k in range(K):
        for t in range(T):
            assert kept[t, k] == (seen[experts[t, k]] < capacity), "first choices first, then row order"
            seen[experts[t, k]] += 1
    dropped = (counts - capacity).clamp_min(0).sum()
    assert kept.sum() + dropped == T * K, "counts and drops make up all choices"


@settings(max_examples=40, deadline=None)
@given(choices(), st.sampled_from(PATHS))
def test_gathers_and_their_gradients(drawn, path):
    """permute and combine against index_select and index_add, gradients included."""
    experts, E = drawn
    T, K = experts.shape
    plan = make_plan(experts, E, path)
    x = torch.randn(T, 3, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    scale = torch.arange(1, E + 1, dtype=torch.float64)
    out = combine(permute(x, plan) * scale[plan.expert].unsqueeze(1), gates, plan)
    wanted = (x.unsqueeze(1) * (gates * scale[experts]).unsqueeze(-1)).sum(1)
    assert torch.allclose(out, wanted)
    weights = torch.randn(T, 3, dtype=torch.float64)
    actual = torch.autograd.grad((out * weights).sum(), [x, gates])
    expected = torch.autograd.grad((wanted * weights).sum(), [x, gates])
    assert all(torch.allclose(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("path", "most"), [("filled", 70), ("tiles", 70)])
def test_few_shapes_of_products(path, most):
    """Whatever the routing, products come in few shapes: on a CPU every new one builds a kernel."""
    plans = [make_plan(torch.zeros(rows, 1, dtype=torch.int64), 1, path) for rows in range(0, 20_000, 7)]
    shapes = {plan.sizes[0] for plan in plans}
    assert len(shapes) <= most
    assert all(max(plan.sizes[0], TILE) <= 1.13 * rows + TILE + 8 * TILE * (path == "tiles")
               for plan, rows in zip(plans, range(0, 20_000, 7), strict=True))  # fmt: skip


def test_first_choices_rank_before_second_ones():
    experts = torch.tensor([[0, 1], [1, 0], [0, 1]])
    plan = make_plan(experts, 2, "grouped")
    for capacity, kept in [(1, [[1, 0], [1, 0], [0, 0]]), (2, [[1, 1], [1, 0], [1, 0]])]:
        assert within_capacity(plan, experts, capacity / 3).tolist() == kept


@pytest.mark.parametrize(
    ("device", "dtype", "slots", "experts", "in_dim", "hidden_dim", "path"),
    [
        ("cpu", torch.float32, 12_608, 8, 192, 768, "grouped"),
        ("cuda", torch.bfloat16, 12_608, 128, 192, 768, "grouped"),
        ("cpu", torch.bfloat16, 12_608, 8, 192, 768, "filled"),
        ("cpu", torch.float16, 12_608, 128, 48, 192, "filled"),
        ("cpu", torch.bfloat16, 12_608, 128, 48, 192, "tiles"),
        ("cpu", torch.bfloat16, 126_080, 128, 48, 192, "filled"),
        ("cuda", torch.bfloat16, 12_608, 128, 48, 192, "grouped"),
        ("cpu", torch.float64, 12_608, 8, 192, 768, "split"),
        ("cpu", torch.float32, 12_608, 8, 6, 768, "split"),
        ("cuda", torch.bfloat16, 12_608, 8, 12, 768, "split"),
        ("cuda", torch.bfloat16, 12_608, 2048, 48, 64, "split"),
    ],
)
def test_choice_of_path(device, dtype, slots, experts, in_dim, hidden_dim, path):
    assert choose_path(device, dtype, slots, experts, in_dim, hidden_dim) == path


@pytest.mark.parametrize("bias", [False, True])
def test_without_rows_no_grouped_product_is_called(monkeypatch, bias):
    def refuse(*args, **options):  # as some GPUs do
        raise RuntimeError("no rows")

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", refuse)
    plan = make_plan(torch.zeros(0, 2, dtype=torch.int64), 3, "grouped")
    x, weight = torch.zeros(0, 8, requires_grad=True), torch.randn(3, 8, 4, requires_grad=True)
    biases = torch.randn(3, 4, requires_grad=True) if bias else None
    y = expert_linear(x, weight, biases, plan)
    assert y.shape == (0, 4)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in (weight, biases) if p is not None)


def test_split_without_grouped_products(monkeypatch):
    class Older:
        linear = staticmethod(torch.nn.functional.linear)

    monkeypatch.setattr(dispatch, "F", Older)
    assert choose_path("cpu", torch.float32, 100, 8, 192, 768) == "split"
