"""Multi-head self-attention over images, texts and image-text pairs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_heads
from .cache import KeyValueCache
from .multiway import Multiway, Streams, join_pairs, split_pairs


def xavier_(linear: nn.Linear, gain: float = 1.0) -> nn.Linear:
    """Fill a linear layer with Xavier-normal weights (``gain`` times) and zero biases, and return it."""
    nn.init.xavier_normal_(linear.weight, gain=gain)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """``softmax(q kᵀ / √head_dim) v``, keys marked as padding left out, and with ``causal`` later ones.

    A query whose keys are all padding gets their mean, never NaN. On CPU the products are written out while
    gradients are needed (the fused kernel is slower there to train), and where there are no queries.

    Args:
        q, k, v: ``(B, H, N, head_dim)``; keys and values may have another N.
        padding: ``(B, N_keys)`` bool, True = padding.
        causal: the queries stand at the places of the last keys, and see those up to their own.
    """
    hidden = None if padding is None else padding[:, None, None, :]
    if causal:
        num_queries, num_keys = q.shape[2], k.shape[2]
        later = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).triu(1 + num_keys - num_queries)
        hidden = later if hidden is None else hidden | later
    bias = None
    if hidden is not None:
        # Finite, so that a row without any key stays finite; halved, so that adding a score cannot overflow.
        lowest = torch.finfo(q.dtype).min / 2
        bias = torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, lowest)
    needs_gradient = q.requires_grad or k.requires_grad or v.requires_grad
    if q.numel() == 0 or (q.device.type == "cpu" and needs_gradient):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return (scores if bias is None else scores + bias).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class MultiwayAttention(nn.Module):
    """Self-attention whose projections are per modality or shared; only pairs see both modalities.

    The keys and values of a pair are those of its image, then of its text. Initialisation is Magneto's (Wang et
    al. 2022): Xavier-normal, value and output projections times ``init_gain``.

    Args:
        dim: token width D.
        num_heads: attention heads; must divide ``dim``.
        modalities: streams to build projections for.
        shared: one set of projections for all modalities.
        sub_ln: LayerNorm before the output projection (Magneto's sub-LN).
        norm_eps: epsilon of that LayerNorm.
        init_gain: factor on the initial value and output projections.

    Raises:
        ConfigError: ``dim`` is no multiple of ``num_heads``.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        modalities: Sequence[str],
        shared: bool = False,
        sub_ln: bool = True,
        norm_eps: float = 1e-5,
        init_gain: float = 1.0,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        projection = partial(self._projections, dim, modalities, shared)
        self.q_proj = projection(1.0)
        self.k_proj = projection(1.0)
        self.v_proj = projection(init_gain)
        self.inner_norm = Multiway(partial(nn.LayerNorm, dim, norm_eps), modalities, shared=shared) if sub_ln else None
        self.out_proj = projection(init_gain)

    @staticmethod
    def _projections(dim: int, modalities: Sequence[str], shared: bool, gain: float) -> Multiway:
        return Multiway(lambda: xavier_(nn.Linear(dim, dim), gain), modalities, shared=shared)

    def forward(
        self,
        xs: Streams,
        paddings: Streams,
        num_pairs: int,
        causal_text: bool = False,
        cache: KeyValueCache | None = None,
    ) -> Streams:
        """Attend within each sample, and across the two halves of each pair.

        Args:
            xs: tokens, ``(B, N, D)`` per modality.
            paddings: ``(B, N)`` bool masks, True = padding, of the streams that have them.
            num_pairs: how many of the last images and texts belong together.
            causal_text: images see no text, and a text token none that comes later.
            cache: what else there is to see, of earlier tokens; this call's are added.
        """
        q, k, v = (
            {name: self._heads(x) for name, x in project(xs).items()}
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            k, v = cache.extend(self, k, v)
        parts = [split_pairs(streams, num_pairs) for streams in (q, k, v, paddings)]
        (q_alone, q_paired), (k_alone, k_paired), (v_alone, v_paired), (masks_alone, masks_paired) = parts
        ys = {
            name: attend(
                q_alone[name],
                k_alone[name],
                v_alone[name],
                masks_alone.get(name),
                causal=causal_text and name == "text",
            )
            for name in xs
        }
        if num_pairs:
            ys = join_pairs(ys, _attend_pairs(q_paired, k_paired, v_paired, masks_paired, causal_text))
        ys = {name: y.transpose(1, 2).flatten(2) for name, y in ys.items()}
        if self.inner_norm is not None:
            ys = self.inner_norm(ys)
        return self.out_proj(ys)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def _attend_pairs(q: Streams, k: Streams, v: Streams, paddings: Streams, causal_text: bool) -> Streams:
    joined_q, joined_k, joined_v = (torch.cat(list(parts.values()), dim=2) for parts in (q, k, v))
    padding = None
    if paddings:
        blank = {name: x.new_zeros(len(x), x.shape[2], dtype=torch.bool) for name, x in k.items()}
        padding = torch.cat(list((blank | paddings).values()), dim=1)
    if causal_text:
        image = attend(q["image"], k["image"], v["image"], paddings.get("image"))
        return {"image": image, "text": attend(q["text"], joined_k, joined_v, padding, causal=True)}
    y = attend(joined_q, joined_k, joined_v, padding)
    return dict(zip(q, y.split([x.shape[2] for x in q.values()], dim=2), strict=True))
