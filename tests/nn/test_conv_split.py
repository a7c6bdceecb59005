"""Head and merge layer as convolutions: shapes, what windows see, sequences without tokens."""

from __future__ import annotations

import pytest
import torch

from mhmoe_vl.nn.conv_split import ConvHead, ConvMerge, hide_padding
from mhmoe_vl.nn.ffn import build_ffn

SIZES = [(1, 1), (3, 1), (3, 2), (4, 2), (5, 5)]


@pytest.mark.parametrize(("kernel", "stride"), SIZES)
@pytest.mark.parametrize("num_tokens", [0, 1, 4, 7])
def test_positions_are_strides_begun(kernel, stride, num_tokens):
    head, merge = ConvHead(6, kernel, stride), ConvMerge(6, kernel, stride)
    positions = head(torch.randn(2, num_tokens, 6))
    assert positions.shape == (2, -(-num_tokens // stride), 6)
    assert merge(positions).shape == (2, stride * positions.shape[1], 6)


@pytest.mark.parametrize(("kernel", "stride"), SIZES)
def test_merge_is_the_transpose_of_head(kernel, stride):
    """<head(x), y> = <x, merge(y)> for equal weights without biases."""
    head, merge = ConvHead(4, kernel, stride).double(), ConvMerge(4, kernel, stride).double()
    with torch.no_grad():
        head.bias.zero_()
        merge.bias.zero_()
        merge.weight.copy_(head.weight)
    x = torch.randn(1, 3 * stride, 4, dtype=torch.float64)
    y = torch.randn(1, 3, 4, dtype=torch.float64)
    torch.testing.assert_close((head(x) * y).sum(), (x * merge(y)).sum())


def test_padding_by_hand():
    x = torch.ones(1, 5, 1)
    padding = torch.tensor([[False, False, True, True, True]])
    [seen, other], [by_position, none] = hide_padding([x, x], [padding, None], 3, 2)
    assert seen.flatten().tolist() == [1, 1, 0, 0, 0] and other is x and none is None
    assert by_position.tolist() == [[False, True, True]]
    [_], [by_position] = hide_padding([x], [padding.flip(1)], 3, 2)
    assert by_position.tolist() == [[True, False, False]], "one token that counts is enough"
    assert hide_padding([x], [padding], 1, 1) == ([x], [padding]), "nothing to hide from windows of one token"


def test_without_tokens_all_gradients_are_zero():
    layer = build_ffn(8, kind="mh_moe", hidden_dim=4, conv_kernel=4, conv_stride=2)
    x = torch.randn(2, 0, 8, requires_grad=True)
    output = layer(x)
    assert output.x.shape == (2, 0, 8) and output.stats.num_rows == 0
    (output.x.sum() + sum(output.aux_losses.values())).backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
