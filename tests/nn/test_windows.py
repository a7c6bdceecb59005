"""Windows over a map of tokens: cut and join, padding, and attention in them against a plain loop."""

from __future__ import annotations

import pytest
import torch

from mhmoe_vl.nn.attention import MultiwayAttention, attend
from mhmoe_vl.nn.windows import Windows


@pytest.mark.parametrize(("grid", "size"), [((4, 6), 2), ((5, 7), 3), ((2, 3), 4), ((1, 1), 1)])
def test_windows_hold_their_part_of_the_map_and_join_to_it_again(grid, size):
    windows, (rows, columns) = Windows(grid, size), grid
    x = torch.arange(2.0 * rows * columns).reshape(2, rows * columns, 1)
    cut = windows.cut(x, fill=-1.0)
    maps, number = x.reshape(2, rows, columns), 0
    for sample in range(2):
        for top in range(0, rows, size):
            for left in range(0, columns, size):
                wanted = torch.full((size, size), -1.0)
                part = maps[sample, top : top + size, left : left + size]
                wanted[: part.shape[0], : part.shape[1]] = part
                assert torch.equal(cut[number].reshape(size, size), wanted)
                number += 1
    assert number == len(cut)
    assert torch.equal(windows.join(cut), x)


def test_what_is_filled_up_is_padding():
    tokens = torch.zeros(2, 6, 4)
    assert Windows((2, 3), 1).cut_padding(None, tokens) is None
    hidden = Windows((2, 3), 2).cut_padding(None, tokens)
    assert hidden.tolist() == [[False] * 4, [False, True, False, True]] * 2
    given = torch.tensor([[False] * 5 + [True]] * 2)
    assert Windows((2, 3), 2).cut_padding(given, tokens)[1].tolist() == [False, True, True, True]


def test_attention_in_windows_is_attention_over_each_part_of_the_map():
    torch.manual_seed(0)
    layer = MultiwayAttention(8, num_heads=2, modalities=("image",), sub_ln=False).double()
    x, windows = torch.randn(1, 15, 8, dtype=torch.float64), Windows((3, 5), 2)
    xs = {"image": windows.cut(x)}
    ours = windows.join(layer(xs, {"image": windows.cut_padding(None, x)}, 0)["image"]).reshape(3, 5, 8)
    q, k, v = (p({"image": x})["image"].reshape(3, 5, 2, 4) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    for row in range(3):
        for column in range(5):
            top, left = row // 2 * 2, column // 2 * 2
            keys, values = (t[top : top + 2, left : left + 2].flatten(0, 1).transpose(0, 1)[None] for t in (k, v))
            y = attend(q[row, column][None, :, None], keys, values).transpose(1, 2).flatten(2)
            assert torch.allclose(layer.out_proj({"image": y})["image"][0, 0], ours[row, column], atol=1e-12)
