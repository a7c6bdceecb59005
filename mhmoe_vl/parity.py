"""Parameters and FLOPs of every FFN variant and of the encoder, in closed form, and widths that make two models equal.

FLOPs are 2 x multiply-adds of matrix products and convolutions, attention's two products over all pairs of tokens
included, as ``torch.utils.flop_counter`` counts them in a forward pass. Not counted: norms, activations, softmax,
biases, residuals, embedding look-ups, sorting and gathering of rows, the balance loss. Nothing is dropped and no token
is padding. Parameters are those that train; buffers are left out.

This module imports no torch, so that ``tools/count.py`` answers at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from .config import CosineRouterConfig, DenseConfig, MHMoEConfig, MoEConfig, ParityConfig, RouterConfig
from .errors import ConfigError

PARTS = (
    "patch_embed",
    "embeddings",
    "attention",
    "dense_ffn",
    "experts",
    "shared_experts",
    "head_merge",
    "router",
    "norms",
    "heads",
)
"""Where parameters and FLOPs go, in the order of reports. ``heads`` are the task's output layers."""

WIDTH_STEP = 8
"""Solved widths are multiples of this: grouped products in 16 bits want rows of 16 bytes."""

TEXT_LEN = 64
"""Text tokens per pair unless given: BEiT-3's padding length for image-text tasks."""


@dataclass(frozen=True)
class Cost:
    """Parameters, those that one token uses, and FLOPs of a forward pass.

    Attributes:
        parameters: all.
        active: without the experts that a token leaves out; a token of S sub-tokens reaches at most ``S * top_k``
            of them. In an encoder the branches of both modalities count.
        flops: 2 x multiply-adds.
    """

    parameters: int = 0
    active: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.active + other.active, self.flops + other.flops)


Parts = dict[str, Cost]


class Difference(NamedTuple):
    """How far something lies above (or, negative, below) the baseline, in percent."""

    flops: float
    parameters: float


def total(parts: Mapping[str, Cost]) -> Cost:
    """Sum over parts."""
    return sum(parts.values(), Cost())


def _add(costs: Iterable[Mapping[str, Cost]]) -> Parts:
    """Sum of several counts, part by part."""
    result: Parts = {}
    for parts in costs:
        for name, cost in parts.items():
            result[name] = result.get(name, Cost()) + cost
    return result


# ------------------------------------------------------------------------------------------- layers
def _linear(dim_in: int, dim_out: int, rows: int, *, bias: bool = True) -> Cost:
    parameters = dim_in * dim_out + bias * dim_out
    return Cost(parameters, parameters, 2 * rows * dim_in * dim_out)


def _norm(dim: int) -> Cost:
    return Cost(2 * dim, 2 * dim, 0)


def _mlp(dim: int, hidden_dim: int, rows: int, *, activation: str, bias: bool) -> Cost:
    """Two matrices, or three for SwiGLU (gate, value, output)."""
    first = _linear(dim, hidden_dim, rows, bias=bias)
    gate = first if activation == "swiglu" else Cost()
    return first + gate + _linear(hidden_dim, dim, rows, bias=bias)


def _repeat(cost: Cost, copies: int, active: int) -> Cost:
    """``copies`` alike, of which a token uses ``active`` and which together do the FLOPs of ``cost``."""
    return Cost(copies * cost.parameters, active * cost.active, cost.flops)


def count_ffn(ffn: DenseConfig | MoEConfig, dim: int, lengths: Sequence[int] = (1,)) -> Parts:
    """Cost of one FFN layer by part.

    Args:
        ffn: a section with numbers in it (no ``parity``).
        dim: width of a token.
        lengths: tokens of each sequence that goes through; only convolutional splitting sees more than their sum.

    Raises:
        ConfigError: ``dim`` cannot be cut into the sub-tokens.
    """
    tokens = sum(lengths)
    hidden_dim = 4 * dim if ffn.hidden_dim is None else ffn.hidden_dim
    mlp = partial(_mlp, activation=ffn.activation, bias=ffn.bias)
    if isinstance(ffn, DenseConfig):
        return {"dense_ffn": mlp(dim, hidden_dim, tokens) + (_norm(hidden_dim) if ffn.sub_ln else Cost())}
    num_subtokens = ffn.num_subtokens if isinstance(ffn, MHMoEConfig) else 1
    if dim % num_subtokens:
        raise ConfigError(f"num_subtokens: {num_subtokens} does not divide the width {dim} (choose a divisor)")
    rows = num_subtokens * sum(_split_length(ffn, length) for length in lengths)
    chosen = min(ffn.num_experts, num_subtokens * ffn.top_k)
    expert = mlp(dim // num_subtokens, hidden_dim, rows * ffn.top_k)
    parts = {
        "experts": _repeat(expert, ffn.num_experts, chosen),
        "router": _router(ffn.router, dim // num_subtokens, ffn.num_experts, rows),
    }
    if isinstance(ffn, MHMoEConfig):
        parts["head_merge"] = _head_merge(ffn, dim, lengths)
    if ffn.num_shared_experts:
        shared_dim = hidden_dim if ffn.shared_hidden_dim is None else ffn.shared_hidden_dim
        shared = mlp(dim, shared_dim, tokens * ffn.num_shared_experts)
        parts["shared_experts"] = _repeat(shared, ffn.num_shared_experts, ffn.num_shared_experts)
    return parts


def _split_length(ffn: MoEConfig, length: int) -> int:
    """Positions that a sequence has between head and merge layer."""
    if isinstance(ffn, MHMoEConfig) and ffn.conv_kernel is not None:
        return -(-length // ffn.conv_stride)
    return length


def _head_merge(ffn: MHMoEConfig, dim: int, lengths: Sequence[int]) -> Cost:
    if ffn.conv_kernel is None:
        return sum([_linear(dim, dim, sum(lengths))] * (ffn.head_layers + ffn.merge_layers), Cost())
    # A Conv1d and its transpose: every output (input) position meets the kernel's dim x dim matrices.
    positions = sum(_split_length(ffn, length) for length in lengths)
    one = _linear(dim * ffn.conv_kernel, dim, positions)
    return one + one


def _router(router: RouterConfig, dim: int, num_experts: int, rows: int) -> Cost:
    if not isinstance(router, CosineRouterConfig):
        return _linear(dim, num_experts, rows, bias=False)
    compared = _linear(dim, router.dim, rows, bias=False) + _linear(router.dim, num_experts, rows, bias=False)
    learned = int(router.learned_temperature)
    return compared + Cost(learned, learned, 0)


# ------------------------------------------------------------------------------------------ solving
def baseline_layer(parity: ParityConfig) -> MoEConfig:
    """The baseline as an FFN section: whole tokens, linear router."""
    return MoEConfig(**parity.model_dump(exclude={"rule"}))


def layer_difference(
    ffn: DenseConfig | MoEConfig, dim: int, parity: ParityConfig, lengths: Sequence[int] = (1,)
) -> Difference:
    """How far one layer lies from the baseline layer, in percent."""
    return _difference(count_ffn(ffn, dim, lengths), count_ffn(baseline_layer(parity), dim, lengths))


def _difference(parts: Mapping[str, Cost], baseline: Mapping[str, Cost]) -> Difference:
    ours, theirs = total(parts), total(baseline)
    return Difference(
        100 * (ours.flops / theirs.flops - 1),
        100 * (ours.parameters / theirs.parameters - 1),
    )


def solve_ffn(
    ffn: DenseConfig | MoEConfig, dim: int, parity: ParityConfig, lengths: Sequence[int] = (1,)
) -> DenseConfig | MoEConfig:
    """``ffn`` with numbers in place of ``parity``, so that the layer costs what the baseline layer costs.

    Rule ``flops_and_parameters`` (paper 2's idea, with routers, biases and shared experts counted): when both width
    and count are unknown, the pair whose larger relative difference is smallest; the width alone is solved for equal
    FLOPs, the count alone for equal parameters. The equations have two solutions; the one is taken whose router costs
    less than its experts. Rule ``parameters`` (paper 1's beta): equal parameters through the width alone. Widths are
    multiples of :data:`WIDTH_STEP`, so a difference remains: see :func:`layer_difference`.

    Raises:
        ConfigError: no width above 0 or no count of at least ``top_k`` does it, or the rule does not fit.
    """
    unknown = [name for name in ("hidden_dim", "num_experts") if getattr(ffn, name, None) == "parity"]
    if not unknown:
        return ffn
    if parity.rule == "parameters" and "num_experts" in unknown:
        raise ConfigError("ffn.num_experts: 'parity' does not go with parity.rule 'parameters' (give a number)")
    if len(unknown) == 2:
        compared = ("flops", "parameters")
    else:
        compared = ("flops",) if unknown == ["hidden_dim"] and parity.rule != "parameters" else ("parameters",)
    differences = partial(_differences, compared, dim=dim, lengths=lengths, parity=parity)
    if len(unknown) == 2:
        most = 2 * (parity.hidden_dim or 4 * dim) * parity.top_k
        settings = [ffn.model_copy(update={"hidden_dim": w}) for w in range(WIDTH_STEP, most, WIDTH_STEP)]
        found = [near for setting in settings for near in _balanced(setting, "num_experts", 1, differences)]
        found = [near for near in found if _router_is_cheaper(near, dim)]
    else:
        found = _balanced(ffn, unknown[0], WIDTH_STEP if unknown == ["hidden_dim"] else 1, differences)
    possible = [near for near in found if near.hidden_dim != 0 and getattr(near, "num_experts", 1) >= getattr(near, "top_k", 1)]
