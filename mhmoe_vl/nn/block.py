"""A pre-norm Transformer block with sub-LN (Magneto) for streams of images and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from .attention import MultiwayAttention, xavier_
from .cache import KeyValueCache
from .feed_forward import FeedForward, FFNOutput
from .multiway import Multiway, MultiwayFFN, Streams
from .windows import Windows


class PairDropPath(nn.Module):
    """Stochastic depth per sample, where the image and the text of a pair are dropped together.

    Args:
        rate: probability of dropping; what is kept is divided by ``1 - rate``.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, xs: Streams, num_pairs: int) -> Streams:
        """The streams, whole samples zeroed in training."""
        if not self.training or self.rate == 0:
            return xs
        # One draw per sample, a pair being one sample: all images first, then the texts that stand alone.
        first = next(iter(xs.values()))
        num_images, num_texts = (len(xs[name]) if name in xs else 0 for name in ("image", "text"))
        keep = first.new_empty(num_images + num_texts - num_pairs, 1, 1).bernoulli_(1 - self.rate)
        if self.rate < 1:
            keep = keep / (1 - self.rate)
        images = keep[:num_images]
        factors = {"image": images, "text": torch.cat([keep[num_images:], images[num_images - num_pairs :]])}
        return {name: x * factors[name] for name, x in xs.items()}


class Block(nn.Module):
    """``x + attention(norm1(x))``, then ``x + ffn(norm2(x))``.

    Attention and dense feed-forward layers start from Magneto's initialisation: Xavier-normal, times ``init_gain``
    on value, output and feed-forward matrices. Layers of experts keep their own.

    Args:
        dim: token width D.
        num_heads: attention heads.
        modalities: streams to build branches for.
        shared: one set of attention weights and norms for all modalities.
        attention_sub_ln: LayerNorm before the attention's output projection.
        ffn: ``kind`` and options of the feed-forward layers.
        joint_ffn: one feed-forward layer for all modalities instead of one each.
        pair_ffn: one more feed-forward layer, for pairs.
        dropout: rate on the output of both sub-layers.
        drop_path: rate of dropping a sub-layer for a whole sample.
        norm_eps: epsilon of every LayerNorm.
        init_gain: Magneto's factor for sub-LN, ``sqrt(ln(2 * depth))``.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        modalities: Sequence[str],
        shared: bool,
        attention_sub_ln: bool,
        ffn: Mapping[str, Any],
        joint_ffn: bool,
        pair_ffn: bool,
        dropout: float,
        drop_path: float,
        norm_eps: float,
        init_gain: float,
    ) -> None:
        super().__init__()
        norm = partial(Multiway, partial(nn.LayerNorm, dim, norm_eps), modalities, shared=shared)
        self.norm1 = norm()
        self.attn = MultiwayAttention(
            dim,
            num_heads=num_heads,
            modalities=modalities,
            shared=shared,
            sub_ln=attention_sub_ln,
            norm_eps=norm_eps,
            init_gain=init_gain if attention_sub_ln else 1.0,
        )
        self.norm2 = norm()
        options = {**ffn, "norm_eps": norm_eps} if ffn["kind"] == "dense" else ffn
        self.ffn = MultiwayFFN(dim, ffn=options, modalities=modalities, joint=joint_ffn, pair=pair_ffn)
        for layer in self.ffn.values():
            if isinstance(layer, FeedForward):
                for linear in layer.children():
                    if isinstance(linear, nn.Linear):
                        xavier_(linear, init_gain if ffn["sub_ln"] else 1.0)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = PairDropPath(drop_path)

    def forward(
        self,
        xs: Streams,
        paddings: Streams,
        num_pairs: int,
        return_routing: bool = False,
        causal_text: bool = False,
        cache: KeyValueCache | None = None,
        windows: Windows | None = None,
    ) -> tuple[Streams, list[FFNOutput]]:
        """The streams after the block, and what its layers of experts returned (their ``x`` left out).

        Args:
            xs: tokens, ``(B, N, D)`` per modality.
            paddings: ``(B, N)`` bool masks, True = padding, of the streams that have them.
            num_pairs: how many of the last images and texts belong together.
            return_routing: ask layers of experts for their routing.
            causal_text, cache: see :meth:`MultiwayAttention.forward`.
            windows: let image tokens attend inside these only; for images that stand alone, without class token.
        """
        ys = self.norm1(xs)
        if windows is None:
            ys = self.attn(ys, paddings, num_pairs, causal_text, cache)
        else:
            ys = self._attend_in_windows(ys, paddings, windows)
        xs = self._add(xs, ys, num_pairs)
        ys, outputs = self.ffn(self.norm2(xs), paddings, num_pairs, return_routing=return_routing)
        pools = [FFNOutput((), *output[1:]) for output in outputs if output.stats is not None]
        return self._add(xs, ys, num_pairs), pools

    def _attend_in_windows(self, xs: Streams, paddings: Streams, windows: Windows) -> Streams:
        hidden = windows.cut_padding(paddings.get("image"), xs["image"])
        paddings = paddings if hidden is None else paddings | {"image": hidden}
        ys = self.attn(xs | {"image": windows.cut(xs["image"])}, paddings, 0)
        return ys | {"image": windows.join(ys["image"])}

    def _add(self, xs: Streams, ys: Streams, num_pairs: int) -> Streams:
        ys = self.drop_path({name: self.dropout(y) for name, y in ys.items()}, num_pairs)
        return {name: x + ys[name] for name, x in xs.items()}
