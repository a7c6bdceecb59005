"""The fused choice of experts in Triton's interpreter: as the layer's stock operations, gradients included."""

from __future__ import annotations

import pytest
import torch

from mhmoe_vl.nn import moe
from mhmoe_vl.nn.ffn import build_ffn
from mhmoe_vl.nn.fused_choice import fused_choice, fused_choice_runs

pytest.importorskip("triton")


@pytest.fixture
def interpreted(monkeypatch):
    """The layer takes the kernels, which run in the interpreter that conftest.py switches on."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernels themselves are tested")

    def switch(on: bool) -> None:
        monkeypatch.setattr(moe, "fused_choice_runs", lambda logits: on)

    return switch


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": 5, "top_k": 2},
        {"num_experts": 5, "top_k": 1},
        {"num_experts": 40, "top_k": 3, "balance_share": "all"},
        {"num_experts": 6, "top_k": 2, "normalize_gates": False, "balance_per_modality": True},
        {"num_experts": 6, "top_k": 2, "router": {"kind": "cosine", "learned_temperature": False}},
    ],
)
def test_a_layer_gives_the_numbers_of_stock_operations(interpreted, options):
    torch.manual_seed(0)
    layer = build_ffn(32, kind="mh_moe", hidden_dim=8, **options)
    with torch.no_grad():
        for parameter in layer.routed.router.parameters():
            parameter.mul_(3)
    xs = [torch.randn(2, 9, 32, requires_grad=True), torch.randn(1, 7, 32, requires_grad=True)]
    paddings = [None, torch.tensor([[0, 0, 0, 0, 0, 1, 1]], dtype=torch.bool)]
    weights = [torch.randn(x.shape) for x in xs]
    found = []
    for on in (False, True):
        interpreted(on)
        output = layer.forward_streams(xs, paddings, return_routing=True)
        losses = output.aux_losses
        loss = sum((y * w).sum() for y, w in zip(output.x, weights, strict=True))
        loss = loss + 2 * losses["balance_loss"] + 0.3 * losses["z_loss"]
        grads = torch.autograd.grad(loss, [*xs, *layer.parameters()])
        found.append([*output.x, *losses.values(), *output.stats, output.routing.experts, output.routing.gates, *grads])
    for stock, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, stock, rtol=2e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter calculates with numpy
def test_rows_that_are_not_finite_choose_real_experts_once(interpreted):
    logits = torch.randn(6, 3)
    logits[0] = torch.nan
    logits[1, 1] = torch.inf
    logits[2] = -torch.inf
    logits[3, 2] = torch.nan
    choice = fused_choice(logits, [6], 3, normalize=True)
    assert [sorted(row) for row in choice.experts.tolist()] == [[0, 1, 2]] * 6
    assert choice.load.tolist() == [[6, 6, 6]]
    assert not choice.gates[[0, 1, 2, 3]].isfinite().all(1).any(), "seen in the output"
    assert choice.gates[4:].isfinite().all()


def test_where_it_runs(monkeypatch):
    assert not fused_choice_runs(torch.zeros(3, 4))
    logits = torch.zeros(3, 4, device="meta")
    assert not fused_choice_runs(logits)
