from __future__ import annotations

import pytest
import torch
from torch import nn

from mhmoe_vl.errors import ConfigError
from mhmoe_vl.nn.attention import MultiwayAttention, attend

DIM, HEADS = 12, 3


def slow_attend(q, k, v, padding=None, causal=False):
    """Softmax attention, one query at a time; the queries are those of the last keys."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                scores = torch.stack([torch.dot(q[b, h, i], key) for key in k[b, h]]) / q.shape[-1] ** 0.5
                if padding is not None:
                    scores = scores.masked_fill(padding[b], -torch.inf)
                if causal:
                    scores[k.shape[2] - q.shape[2] + i + 1 :] = -torch.inf
                out[b, h, i] = scores.softmax(0) @ v[b, h]
    return out


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=generator) for _ in range(3)]


PADDING = torch.tensor([[False, False, True, False, True], [False] * 5])


@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize("train", [False, True])
def test_attend_equals_a_loop_over_queries(qkv, padding, train):
    q, k, v = (x.requires_grad_(train) for x in qkv)
    torch.testing.assert_close(attend(q, k, v, padding), slow_attend(q, k, v, padding))


@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("num_queries", [1, 2, 5])
def test_causal_attention_hides_later_keys(qkv, padding, train, num_queries):
    q, k, v = (x.requires_grad_(train) for x in qkv)
    q = q[:, :, -num_queries:]
    got, want = attend(q, k, v, padding, causal=True), slow_attend(q, k, v, padding, causal=True)
    torch.testing.assert_close(got, want)


def test_no_queries_get_nothing(qkv):
    q, k, v = qkv
    assert attend(q[:, :, :0], k, v, PADDING).shape == (2, 3, 0, 4)


def test_gradients_equal_the_loop(qkv):
    q, k, v = (x.requires_grad_() for x in qkv)
    got = torch.autograd.grad(attend(q, k, v, PADDING).square().sum(), (q, k, v))
    want = torch.autograd.grad(slow_attend(q, k, v, PADDING).square().sum(), (q, k, v))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("train", [False, True])
def test_a_row_without_keys_is_finite(dtype, train):
    q, k, v = (torch.randn(1, 2, 3, 8).to(dtype).requires_grad_(train) for _ in range(3))
    assert attend(q, k, -50 * v, torch.ones(1, 3, dtype=torch.bool)).isfinite().all()


def make(shared=False, sub_ln=False, modalities=("image", "text")):
    torch.manual_seed(0)
    attention = MultiwayAttention(DIM, num_heads=HEADS, modalities=modalities, shared=shared, sub_ln=sub_ln).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return attention


def torch_attention(attention):
    """torch's layer with the weights of ``attention``, which all modalities share."""
    reference = nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()
    projections = [attention.q_proj.joint, attention.k_proj.joint, attention.v_proj.joint]
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        reference.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        reference.out_proj.weight.copy_(attention.out_proj.joint.weight)
        reference.out_proj.bias.copy_(attention.out_proj.joint.bias)
    return reference


def test_equals_torch_multihead_attention():
    attention = make(shared=True)
    reference = torch_attention(attention)
    image, text = torch.randn(3, 5, DIM).double(), torch.randn(4, 7, DIM).double()
    padding = torch.zeros(4, 7, dtype=torch.bool)
    padding[2:, 4:] = True
    got = attention({"image": image, "text": text}, {"text": padding}, 2)

    alone_image = reference(image[:1], image[:1], image[:1])[0]
    alone_text = reference(text[:2], text[:2], text[:2], key_padding_mask=padding[:2])[0]
    pair = torch.cat([image[1:], text[2:]], dim=1)
    pair_padding = torch.cat([torch.zeros(2, 5, dtype=torch.bool), padding[2:]], dim=1)
    joined = reference(pair, pair, pair, key_padding_mask=pair_padding)[0]
    torch.testing.assert_close(got["image"], torch.cat([alone_image, joined[:, :5]]))
    torch.testing.assert_close(got["text"], torch.cat([alone_text, joined[:, 5:]]))


def test_causal_text_equals_torch_multihead_attention_with_its_mask():
    attention = make(shared=True)
    reference = torch_attention(attention)
    image, text = torch.randn(3, 5, DIM).double(), torch.randn(4, 7, DIM).double()
    padding = torch.zeros(4, 7, dtype=torch.bool)
    padding[1:3, 4:] = True
    got = attention({"image": image, "text": text}, {"text": padding}, 2, causal_text=True)

    later = torch.ones(7, 7, dtype=torch.bool).triu(1)
    alone = reference(text[:2], text[:2], text[:2], key_padding_mask=padding[:2], attn_mask=later)[0]
    hidden = torch.zeros(12, 12, dtype=torch.bool)
    hidden[:5, 5:], hidden[5:, 5:] = True, later
    pair = torch.cat([image[1:], text[2:]], dim=1)
    pair_padding = torch.cat([torch.zeros(2, 5, dtype=torch.bool), padding[2:]], dim=1)
    joined = reference(pair, pair, pair, key_padding_mask=pair_padding, attn_mask=hidden)[0]
    torch.testing.assert_close(got["image"], reference(image, image, image)[0])
    torch.testing.assert_close(joined[:, :5], got["image"][1:])
    torch.testing.assert_close(got["text"], torch.cat([alone, joined[:, 5:]]))


def test_branches_use_their_own_projections():
    attention = make()
    xs = {"image": torch.randn(1, 5, DIM).double(), "text": torch.randn(1, 4, DIM).double()}
    before = attention(xs, {}, 0)
    with torch.no_grad():
        attention.v_proj.image.weight.zero_()
    after = attention(xs, {}, 0)
    assert torch.equal(before["text"], after["text"])
    assert not torch.equal(before["image"], after["image"])


def test_sub_ln_normalises_what_the_output_projection_reads():
    attention = make(sub_ln=True)
    seen = []
    attention.out_proj["image"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    nn.init.ones_(attention.inner_norm["image"].weight)
    nn.init.zeros_(attention.inner_norm["image"].bias)
    attention({"image": torch.randn(2, 5, DIM).double(), "text": torch.randn(0, 1, DIM).double()}, {}, 0)
    torch.testing.assert_close(seen[0].var(-1, unbiased=False), torch.ones(2, 5).double(), rtol=1e-2, atol=0)


def test_initial_value_and_output_projections_carry_the_gain():
    torch.manual_seed(0)
    attention = MultiwayAttention(256, num_heads=4, modalities=("image",), init_gain=2.0)
    xavier = (2 / (256 + 256)) ** 0.5
    for name, gain in (("q_proj", 1), ("k_proj", 1), ("v_proj", 2), ("out_proj", 2)):
        linear = attention.get_submodule(name)["image"]
        assert linear.weight.std().item() == pytest.approx(gain * xavier, rel=0.02)
        assert not linear.bias.any()


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="num_heads: 5 does not divide the width 12"):
        MultiwayAttention(12, num_heads=5, modalities=("image",))
