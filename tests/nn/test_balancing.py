"""Balance loss, z-loss, capacity and bias balancing, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mhmoe_vl.nn.moe import MoE

EVEN = (0.75, 0.25)


def layer_with_logits(probabilities, *, shift=0.0, **options):
    """An MoE, and tokens whose router probabilities are the given rows (logits are their logarithms plus shift)."""
    logits = torch.tensor(probabilities).log() + shift
    E = logits.shape[1]
    layer = MoE(E, num_experts=E, hidden_dim=4, **options)
    with torch.no_grad():
        layer.routed.router.weight.copy_(torch.eye(E))
    return layer, logits


def test_balance_loss_by_hand():
    """Shares (3/4, 1/4), mean probabilities (0.625, 0.375): 2 (0.75 * 0.625 + 0.25 * 0.375) = 1.125."""
    layer, x = layer_with_logits([EVEN, EVEN, EVEN, EVEN[::-1]])
    output = layer(x)
    assert output.aux_losses["balance_loss"].item() == pytest.approx(1.125)
    assert output.aux_losses["z_loss"].item() == pytest.approx(0.0, abs=1e-6)
    assert output.stats.entropy.item() == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert output.stats.load.tolist() == [[3, 1]]


def test_balance_loss_per_modality_by_hand():
    """Each stream alone: 2 * 1 * 0.75 = 1.5, though both together are even. A stream without rows does not count."""
    layer, x = layer_with_logits([EVEN, EVEN[::-1]], balance_per_modality=True)
    together, _ = layer_with_logits([EVEN, EVEN[::-1]])
    streams = [x[:1], x[1:]]
    assert together.forward_streams(streams).aux_losses["balance_loss"].item() == pytest.approx(1.0)
    assert layer.forward_streams(streams).aux_losses["balance_loss"].item() == pytest.approx(1.5)
    assert layer.forward_streams([x[:1], x[:0]]).aux_losses["balance_loss"].item() == pytest.approx(1.5)


def test_all_choices_counted_by_hand():
    """Both experts of two are always chosen: shares 1/2 each, loss 1, although first choices are skewed (1.5)."""
    for share, loss in (("first", 1.5), ("all", 1.0)):
        layer, x = layer_with_logits([EVEN, EVEN], top_k=2, balance_share=share)
        assert layer(x).aux_losses["balance_loss"].item() == pytest.approx(loss)


def test_balance_loss_is_one_when_even_and_num_experts_when_collapsed():
    even, x = layer_with_logits((torch.eye(4) * 0.6 + 0.1).tolist())
    assert even(x).aux_losses["balance_loss"].item() == pytest.approx(1.0)
    collapsed, x = layer_with_logits([(1.0, 1e-30, 1e-30, 1e-30)] * 5)
    assert collapsed(x).aux_losses["balance_loss"].item() == pytest.approx(4.0)


def test_z_loss_by_hand():
    layer, x = layer_with_logits([EVEN, EVEN], shift=2.0)
    assert layer(x).aux_losses["z_loss"].item() == pytest.approx(4.0)


def test_balance_loss_pulls_towards_balance():
    layer, x = layer_with_logits([EVEN, EVEN, EVEN, EVEN[::-1]])
    x.requires_grad_()
    layer(x).aux_losses["balance_loss"].backward()
    assert (x.grad[:, 0] > 0).all() and (x.grad[:, 1] < 0).all(), "descent lowers the fuller expert's logits"


@pytest.mark.parametrize("router", [{"kind": "linear"}, {"kind": "cosine"}, {"kind": "linear", "gate": "sigmoid"}])
def test_router_learns_from_the_task_with_one_choice(router):
    torch.manual_seed(0)
    layer = MoE(8, num_experts=4, hidden_dim=8, top_k=1, router=router)
    layer(torch.randn(20, 8)).x.square().sum().backward()
    for name, parameter in layer.routed.router.named_parameters():
        assert parameter.grad.abs().max() > 1e-6, name


def test_capacity_by_hand():
    """Five tokens, two experts, k = 2, factor 0.6: capacity ceil(0.6 * 2 * 5 / 2) = 3.

    First choices 0 0 0 0 1: the fourth 0 is dropped. Second choices 1 1 1 1 0: expert 1 has served token 4 and has
    room for two more (tokens 0 and 1); expert 0 is full."""
    layer, x = layer_with_logits([EVEN] * 4 + [EVEN[::-1]], top_k=2, capacity_factor=0.6)
    routing = layer(x, return_routing=True).routing
    assert routing.kept.tolist() == [[True, True], [True, True], [True, False], [False, False], [True, False]]
    output = layer(x)
    assert output.stats.dropped == 4 and output.stats.num_rows == 5
    assert output.stats.load.tolist() == [[5, 5]], "load counts before dropping"
    assert not output.x[3].any(), "a token without experts gets zero"
    dropless = layer.eval()(x, return_routing=True)
    assert dropless.stats.dropped == 0 and dropless.routing.kept.all()
    assert torch.allclose(output.x[:2], dropless.x[:2]), "kept gates are as they were"
    single = layer_with_logits([EVEN] * 4, top_k=1, capacity_factor=1.0)[0].train()
    assert single(x[:4]).stats.dropped == 2


def test_capacity_is_not_rounded_up_past_a_whole_number():
    """1.1 * 10 is 11.000000000000002 in floating point; the capacity of one expert is 11 all the same."""
    layer = MoE(4, num_experts=1, hidden_dim=4, capacity_factor=1.1)
    assert layer(torch.randn(10, 4)).stats.dropped == 0
    small = MoE(4, num_experts=1, hidden_dim=4, capacity_factor=0.7)
    assert small(torch.randn(10, 4)).stats.dropped == 3


def skewed_layer(**options):
    torch.manual_seed(0)
    layer = MoE(8, num_experts=8, hidden_dim=4, top_k=2, **options)
    x = torch.randn(400, 8) + 1.0
    return layer, x


def test_bias_balancing_evens_a_skewed_router():
    layer, x = skewed_layer(balance_bias_rate=0.002)
    before = layer(x).stats.load.max() / (400 * 2 / 8)
    for _ in range(200):
        layer(x).x.sum().backward()
    after = layer(x).stats.load.max() / (400 * 2 / 8)
    assert before > 2 and after < 1.3
    assert not layer(x).aux_losses["balance_loss"].requires_grad, "no auxiliary loss when the bias balances"
    assert layer.state_dict()["routed.balance_bias"].any()


def test_bias_moves_once_per_backward_pass():
    layer, x = skewed_layer(balance_bias_rate=0.01)
    bias = layer.routed.balance_bias
    layer(x)
    layer.eval()(x).x.sum().backward()
    with torch.no_grad():
        layer.train()(x)
    assert not bias.any(), "only training moves it"
    load = layer(x).stats.load[0].float()
    for reentrant in (False, True):
        bias.zero_()
        y = checkpoint(lambda v: layer(v).x, x.clone().requires_grad_(), use_reentrant=reentrant)
        y.sum().backward()
        assert torch.allclose(bias, 0.01 * torch.sign(load.mean() - load))
