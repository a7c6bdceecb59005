"""Modality routing of the multiway Transformer: which weights an image token and a text token pass.

The tokens of a batch travel as *streams*, a mapping from modality to tensor: ``{"image": (I, N, D), "text":
(T, L, D)}``. So no modality is padded to the length of the other. One that a batch lacks is an empty tensor: its
parameters then get zero gradients, and every rank makes the same collective calls. The last ``num_pairs`` images and
texts belong together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .feed_forward import FFNOutput
from .ffn import build_ffn

MODALITIES = ("image", "text")
"""In the order in which the tokens of a pair are concatenated."""

Streams = dict[str, Tensor]
"""Tensors by modality, in the order of :data:`MODALITIES`."""


def split_pairs(streams: Mapping[str, Tensor], num_pairs: int) -> tuple[Streams, Streams]:
    """The samples that stand alone, and the last ``num_pairs`` of every stream."""
    alone = {name: x[: len(x) - num_pairs] for name, x in streams.items()}
    paired = {name: x[len(x) - num_pairs :] for name, x in streams.items()}
    return alone, paired


def join_pairs(alone: Streams, paired: Streams) -> Streams:
    """The inverse of :func:`split_pairs`."""
    return {name: torch.cat([alone[name], paired[name]]) for name in alone}


class Multiway(nn.ModuleDict):
    """One copy of a module per modality, or one named ``joint`` for all.

    Args:
        make: builds one copy.
        modalities: names to build copies for.
        shared: build a single copy that every modality passes.
    """

    def __init__(self, make: Callable[[], nn.Module], modalities: Iterable[str], *, shared: bool) -> None:
        super().__init__({name: make() for name in (("joint",) if shared else modalities)})

    def forward(self, xs: Streams) -> Streams:
        """Every stream through its copy."""
        return {name: self["joint" if "joint" in self else name](x) for name, x in xs.items()}


class MultiwayFFN(nn.ModuleDict):
    """The feed-forward layers of a block: ``joint`` or one per modality, and optionally ``pair``.

    A layer that several streams pass sees them together (``forward_streams``), so a joint pool of experts routes
    images and texts with one balance loss.

    Args:
        dim: token width D.
        ffn: ``kind`` and options of :func:`~.ffn.build_ffn`.
        modalities: streams to expect.
        joint: one layer for all modalities instead of one each.
        pair: one more layer, for both modalities of image-text pairs (BEiT-3's vision-language experts).
    """

    def __init__(
        self, dim: int, *, ffn: Mapping[str, Any], modalities: Sequence[str], joint: bool, pair: bool = False
    ) -> None:
        names = (*(("joint",) if joint else modalities), *(("pair",) if pair else ()))
        super().__init__({name: build_ffn(dim, **ffn) for name in names})

    def forward(
        self, xs: Streams, paddings: Streams, num_pairs: int, *, return_routing: bool = False
    ) -> tuple[Streams, list[FFNOutput]]:
        """The streams after their layers, and what each layer returned, in the order of the layers.

        Args:
            xs: tokens.
            paddings: bool masks, True = padding, of the streams that have them.
            num_pairs: how many of the last images and texts belong together.
            return_routing: ask sparse layers for their :class:`~.router.Routing`.
        """
        if "pair" not in self:
            return self._by_modality(xs, paddings, return_routing)
        xs_alone, xs_paired = split_pairs(xs, num_pairs)
        paddings_alone, paddings_paired = split_pairs(paddings, num_pairs)
        alone, outputs = self._by_modality(xs_alone, paddings_alone, return_routing)
        paired, output = _through(self["pair"], xs_paired, paddings_paired, return_routing)
        return join_pairs(alone, paired), [*outputs, output]

    def _by_modality(self, xs: Streams, paddings: Streams, return_routing: bool) -> tuple[Streams, list[FFNOutput]]:
        if "joint" in self:
            ys, output = _through(self["joint"], xs, paddings, return_routing)
            return ys, [output]
        ys, outputs = {}, []
        for name, x in xs.items():
            y, output = _through(self[name], {name: x}, paddings, return_routing)
            ys |= y
            outputs.append(output)
        return ys, outputs


def _through(layer: nn.Module, xs: Streams, paddings: Streams, return_routing: bool) -> tuple[Streams, FFNOutput]:
    output = layer.forward_streams(
        list(xs.values()), [paddings.get(name) for name in xs], return_routing=return_routing
    )
    return dict(zip(xs, output.x, strict=True)), output
