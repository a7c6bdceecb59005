"""Where every sub-token goes: the routing of an encoder as arrays by layer and token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..models.encoder import Encoder
from ..nn.dispatch import make_plan, within_capacity
from ..nn.router import Routing

PARTS = ("class", "patch", "text")
"""Kinds of tokens that a trace keeps apart; the first two are the image's."""
_POOLS = ("joint", "image", "text", "pair")
DIGITS = 4
"""Decimals of gates and entropies in :meth:`RoutingTrace.to_dict`."""


@dataclass(frozen=True)
class TokenTrace:
    """The choices that one pool of experts made for one kind of tokens. B samples, N tokens each, S sub-tokens a
    token, K choices a sub-token.

    Where a token is not ``present``, experts are -1 and all else is zero.

    Attributes:
        experts: (B, N, S, K) int16, best first.
        gates: (B, N, S, K) float32, weights of the chosen experts; dropped choices keep theirs.
        kept: (B, N, S, K) bool, False where capacity dropped the choice.
        entropy: (B, N, S) float32, of the router's softmax over all experts, in nats.
        present: (B, N) bool, False for padding and for samples that pass another pool.
        counted: (B, N) bool, the tokens whose rows are counted: those present, but one for each group of tokens
            that a convolution with a stride puts into the same row.
    """

    experts: np.ndarray
    gates: np.ndarray
    kept: np.ndarray
    entropy: np.ndarray
    present: np.ndarray
    counted: np.ndarray

    def divergence(self) -> np.ndarray:
        """(B, N) int64, distinct experts that the sub-tokens of a token reach (paper 1, figures 1 and 7); 0 where the
        token is not present. Dropped choices reach none."""
        reached = np.where(self.kept, self.experts, -1).reshape(*self.present.shape, -1)
        reached = np.sort(reached, axis=-1)
        new = np.diff(reached, axis=-1, prepend=-1) != 0
        return new.sum(-1)

    @classmethod
    def blank(cls, num_samples: int, num_tokens: int, num_subtokens: int, top_k: int) -> TokenTrace:
        """Tokens of which none is present."""
        shape = (num_samples, num_tokens)
        choices = (*shape, num_subtokens, top_k)
        return cls(
            experts=np.full(choices, -1, np.int16),
            gates=np.zeros(choices, np.float32),
            kept=np.zeros(choices, bool),
            entropy=np.zeros(choices[:-1], np.float32),
            present=np.zeros(shape, bool),
            counted=np.zeros(shape, bool),
        )

    def to_dict(self) -> dict[str, Any]:
        """All arrays as nested lists, and :meth:`divergence`."""
        values = {name: rounded(value).tolist() for name, value in vars(self).items()}
        return values | {"divergence": self.divergence().tolist()}


@dataclass(frozen=True)
class LayerTrace:
    """One pool of experts.

    Attributes:
        block: number of its block, from 0.
        pool: ``joint``, ``image``, ``text`` or ``pair``.
        num_experts, top_k, num_subtokens: E, K, S.
        parts: the tokens that passed the pool, by their kind (:data:`PARTS`).
    """

    block: int
    pool: str
    num_experts: int
    top_k: int
    num_subtokens: int
    parts: Mapping[str, TokenTrace]

    @property
    def name(self) -> str:
        """As in :attr:`Encoder.moe_names`."""
        return f"blocks.{self.block}.{self.pool}"

    @property
    def order(self) -> tuple[int, int]:
        """Where it stands: from the bottom, pools of a block in the order of :data:`_POOLS`."""
        return self.block, _POOLS.index(self.pool)

    @property
    def num_rows(self) -> int:
        """Routed rows."""
        return self.num_subtokens * sum(int(part.counted.sum()) for part in self.parts.values())

    def counts(self, *parts: str) -> np.ndarray:
        """(E,) int64, choices of every expert before dropping, of all tokens or of the kinds named. Those of all
        tokens sum to ``num_rows * top_k``."""
        chosen = [self.parts[name] for name in parts or self.parts if name in self.parts]
        total = np.zeros(self.num_experts, np.int64)
        for part in chosen:
            total += np.bincount(part.experts[part.counted].ravel(), minlength=self.num_experts)
        return total

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        sizes = {name: getattr(self, name) for name in ("num_experts", "top_k", "num_subtokens")}
        return {
            "block": self.block,
            "pool": self.pool,
            **sizes,
            "num_rows": self.num_rows,
            "counts": self.counts().tolist(),
            "parts": {name: part.to_dict() for name, part in self.parts.items()},
        }


@dataclass(frozen=True)
class RoutingTrace:
    """The routing of a batch through all pools of experts, bottom first.

    Attributes:
        layers: pools that a token of the batch passed.
        grid: rows and columns of patches; none without images.
        num_images, num_texts, num_pairs: samples; the last ``num_pairs`` of both belong together.
        pieces: per text, a display string per token; empty where none were given.
        capacity_factor: of the rule that ``kept`` follows; none keeps everything.
    """

    layers: tuple[LayerTrace, ...]
    grid: tuple[int, int] | None
    num_images: int
    num_texts: int
    num_pairs: int
    pieces: tuple[tuple[str, ...], ...]
    capacity_factor: float | None

    def divergence(self, part: str) -> np.ndarray:
        """(B, N) float64, mean over layers of :meth:`TokenTrace.divergence`; nan for padding.

        Args:
            part: one of :data:`PARTS`.
        """
        found = [layer.parts[part] for layer in self.layers if part in layer.parts]
        total = sum(tokens.divergence() for tokens in found)
        passed = sum(tokens.present.astype(np.int64) for tokens in found)
        return np.divide(total, passed, out=np.full(np.shape(passed), np.nan), where=passed > 0)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; gates and entropies rounded to :data:`DIGITS`."""
        values = {name: value for name, value in vars(self).items() if name != "layers"}
        values |= {"grid": self.grid and list(self.grid), "pieces": [list(text) for text in self.pieces]}
        return values | {"layers": [layer.to_dict() for layer in self.layers]}


def join_traces(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """Traces of batches of one encoder, one after the other, as one; shorter texts are padded.

    Args:
        traces: with images of one grid. Batches of pairs come last, because the last images and texts are pairs.
    """
    ways = {layer.order: layer for trace in traces for layer in trace.layers}
    layers = [_join_layers(ways[way], traces) for way in sorted(ways)]
    counts = {name: sum(getattr(trace, name) for trace in traces) for name in ("num_images", "num_texts", "num_pairs")}
    return replace(
        traces[0],
        layers=tuple(layers),
        grid=next((trace.grid for trace in traces if trace.grid), None),
        pieces=tuple(text for trace in traces for text in trace.pieces),
        **counts,
    )


def _join_layers(like: LayerTrace, traces: Sequence[RoutingTrace]) -> LayerTrace:
    """The pool ``like`` in all traces; samples that do not pass it are not present in it."""
    parts = {}
    for name in PARTS:
        found = [_part_of(trace, like, name) for trace in traces]
        length = max((part.present.shape[1] for part in found if part is not None), default=0)
        if length:
            blanks = [
                TokenTrace.blank(_num_samples(trace, name), length, like.num_subtokens, like.top_k) for trace in traces
            ]
            for part, blank in zip(found, blanks, strict=True):
                for field, values in vars(part).items() if part is not None else ():
                    getattr(blank, field)[:, : values.shape[1]] = values
            fields = TokenTrace.__dataclass_fields__
            parts[name] = TokenTrace(*(np.concatenate([getattr(blank, field) for blank in blanks]) for field in fields))
    return replace(like, parts=parts)


def _part_of(trace: RoutingTrace, like: LayerTrace, part: str) -> TokenTrace | None:
    return next((layer.parts.get(part) for layer in trace.layers if layer.name == like.name), None)


def _num_samples(trace: RoutingTrace, part: str) -> int:
    return trace.num_texts if part == "text" else trace.num_images


# ------------------------------------------------------------------------------------------- tracing
def check_capacity(factor: float | None, name: str) -> None:
    """Refuse a capacity factor that is not positive; ``name`` is what the user calls it."""
    if factor is not None and not 0 < factor < float("inf"):
        raise ConfigError(f"{name}: {factor} is not positive (raise it, or leave it out to drop nothing)")


def trace_routing(
    model: nn.Module,
    image: Tensor | None = None,
    text: Tensor | None = None,
    *,
    text_padding: Tensor | None = None,
    num_pairs: int | None = None,
    pieces: Sequence[Sequence[str]] = (),
    capacity_factor: float | None = None,
) -> RoutingTrace:
    """Run ``model`` in evaluation on images, texts or pairs and keep where every sub-token went.

    Args:
        model: an encoder, or a model that holds one; left in the mode in which it came.
        image: ``(I, 3, H, W)``, normalised; H and W any multiples of the patch size.
        text: ``(T, L)`` int64 ids.
        text_padding: ``(T, L)`` bool, True = padding.
        num_pairs: as for :meth:`Encoder.forward`; all are pairs when both are given.
        pieces: per text, a display string per token.
        capacity_factor: mark what the training rule would drop of this batch (see
            :class:`~mhmoe_vl.nn.moe.RoutedExperts`), each layer as it is without drops below. None drops nothing, as
            evaluation does.

    Raises:
        ConfigError: no encoder, no layer of experts, nothing to encode, or inputs that do not fit.
    """
    encoder = find_encoder(model)
    if image is None and text is None:
        raise ConfigError("trace_routing: neither image nor text (give one)")
    check_capacity(capacity_factor, "capacity_factor")
    with _evaluation(encoder), torch.no_grad():
        output = encoder(image, text, text_padding=text_padding, num_pairs=num_pairs, return_routing=True)
    if num_pairs is None:
        num_pairs = len(image) if image is not None and text is not None else 0
    present = {}
    if image is not None:
        present["image"] = np.ones(output.image.shape[:2], bool)
    if text is not None:
        shown = torch.ones_like(text, dtype=torch.bool) if text_padding is None else ~text_padding
        present["text"] = shown.cpu().numpy()
    layers = []
    for name, routing in zip(encoder.moe_names, output.routing, strict=True):
        layer = _layer_trace(encoder, name, routing, present, num_pairs, capacity_factor)
        layers += [layer] if layer.parts else []
    size = encoder.patch_size
    return RoutingTrace(
        layers=tuple(layers),
        grid=None if image is None else (image.shape[-2] // size, image.shape[-1] // size),
        num_images=0 if image is None else len(image),
        num_texts=0 if text is None else len(text),
        num_pairs=num_pairs,
        pieces=tuple(tuple(row) for row in pieces),
        capacity_factor=capacity_factor,
    )


def find_encoder(model: nn.Module) -> Encoder:
    """The encoder with layers of experts that ``model`` is or holds.

    Raises:
        ConfigError: there is none.
    """
    encoder = next((module for module in model.modules() if isinstance(module, Encoder)), None)
    if encoder is None:
        raise ConfigError(f"model: {type(model).__name__} holds no Encoder (give one, or a model with one)")
    if not encoder.moe_names:
        raise ConfigError("model: dense, there is nothing to route (choose one with ffn.kind moe or mh_moe)")
    return encoder


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is in evaluation; afterwards every module is as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _layer_trace(
    encoder: Encoder,
    name: str,
    routing: Routing,
    present: Mapping[str, np.ndarray],
    num_pairs: int,
    capacity_factor: float | None,
) -> LayerTrace:
    """The rows of the pool ``name`` by sample and token."""
    _, block, pool = name.split(".")
    layers = encoder.blocks[int(block)].ffn
    routed, stride = layers[pool].routed, getattr(layers[pool], "window", (1, 1))[1]
    num_subtokens = getattr(layers[pool], "num_subtokens", 1)
    columns = {
        "experts": routing.experts.to(torch.int16),
        "gates": routing.gates.float(),
        "kept": _kept(routing.experts, routed.num_experts, capacity_factor),
        "entropy": torch.special.entr(routing.probabilities).sum(-1).float(),
    }
    parts: dict[str, TokenTrace] = {}
    for stream, modality in enumerate(encoder.modalities if pool in ("joint", "pair") else (pool,)):
        if modality in present and bool((routing.stream == stream).any()):
            chosen = (routing.stream == stream).nonzero().squeeze(1)
            rows = {key: value[chosen].cpu().numpy() for key, value in columns.items()}
            place = routing.token[chosen].cpu().numpy(), routing.subtoken[chosen].cpu().numpy()
            alone = len(present[modality]) - num_pairs if "pair" in layers else None
            samples = slice(alone, None) if pool == "pair" else slice(alone)
            tokens = _by_token(rows, *place, present[modality], samples, num_subtokens, stride)
            parts |= _split(modality, tokens)
    return LayerTrace(int(block), pool, routed.num_experts, routed.top_k, num_subtokens, parts)


def _kept(experts: Tensor, num_experts: int, capacity_factor: float | None) -> Tensor:
    """Which of the choices (T, K) the training rule keeps."""
    if capacity_factor is None:
        return torch.ones_like(experts, dtype=torch.bool)
    return within_capacity(make_plan(experts, num_experts, "grouped"), experts, capacity_factor)


def _by_token(
    rows: Mapping[str, np.ndarray],
    position: np.ndarray,
    subtoken: np.ndarray,
    present: np.ndarray,
    samples: slice,
    num_subtokens: int,
    stride: int,
) -> TokenTrace:
    """Rows put where their tokens are; tokens that a convolution joins into one row each get a copy of it.

    Args:
        rows: arrays (T, ...) by name.
        position: (T,) place in the flattened positions of ``samples``, ``ceil(N / stride)`` each.
        subtoken: (T,).
        present: (B, N), False for padding.
        samples: those that pass the pool.
        num_subtokens, stride: of the layer.
    """
    passing = np.zeros_like(present)
    passing[samples] = present[samples]
    tokens = TokenTrace.blank(*present.shape, num_subtokens, rows["experts"].shape[1])
    tokens.present[:] = passing
    tokens.counted[:] = _first_of_groups(passing, stride)
    num_positions = -(-present.shape[1] // stride)
    for name, values in rows.items():
        laid = np.zeros((len(present[samples]) * num_positions, num_subtokens, *values.shape[1:]), values.dtype)
        laid[position, subtoken] = values
        laid = laid.reshape(-1, num_positions, *laid.shape[1:])[:, np.arange(present.shape[1]) // stride]
        getattr(tokens, name)[passing] = laid[passing[samples]]
    return tokens


def _first_of_groups(present: np.ndarray, size: int) -> np.ndarray:
    """The first token present of every ``size`` neighbours; (B, N) bool."""
    filled = np.pad(present, ((0, 0), (0, -present.shape[1] % size))).reshape(len(present), -1, size)
    first = filled & (filled.cumsum(-1) == 1)
    return first.reshape(len(present), -1)[:, : present.shape[1]]


def _split(modality: str, tokens: TokenTrace) -> dict[str, TokenTrace]:
    """A modality's tokens by kind: an image's class token apart from its patches."""
    if modality == "text":
        return {"text": tokens}
    spans = {"class": slice(0, 1), "patch": slice(1, None)}
    return {kind: TokenTrace(*(v[:, span] for v in vars(tokens).values())) for kind, span in spans.items()}


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 as float64 of few decimals, which JSON writes short; others as they are."""
    return np.round(values.astype(np.float64), DIGITS) if values.dtype == np.float32 else values
