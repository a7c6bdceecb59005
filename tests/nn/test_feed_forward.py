"""The dense layer."""

from __future__ import annotations

import pytest
import torch
from nn.reference import feed_forward, parameters_of
from torch import nn

from mhmoe_vl.errors import ConfigError
from mhmoe_vl.nn.feed_forward import FeedForward


@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_reference(activation, bias):
    layer = FeedForward(6, hidden_dim=10, activation=activation, bias=bias).double()
    x, params = torch.randn(2, 3, 6, dtype=torch.float64), parameters_of(layer)
    output = layer(x)
    for b in range(2):
        for n in range(3):
            assert torch.allclose(output.x[b, n], feed_forward(params, "", x[b, n], activation))
    assert output.aux_losses == {} and output.routing is None and output.stats is None


def test_sub_ln_stands_before_the_second_matrix():
    layer = FeedForward(6, sub_ln=True, norm_eps=1e-3)
    plain = nn.Sequential(layer.fc1, nn.GELU(), nn.LayerNorm(24, eps=1e-3), layer.fc2)
    x = torch.randn(4, 6)
    assert torch.allclose(layer(x).x, plain(x))


def test_streams_share_the_weights():
    layer, x = FeedForward(6), torch.randn(5, 6)
    outputs = layer.forward_streams([x[:2], x[2:]]).x
    assert torch.allclose(torch.cat(outputs), layer(x).x, atol=1e-6)


def test_refuses_unknown_activation():
    with pytest.raises(ConfigError, match="'tanh'"):
        FeedForward(6, activation="tanh")
