"""Rows to experts and back: one sort, one gather there, one gather per choice back.

Choices are laid out in *slots*, all slots of an expert adjacent. Several ways multiply the slots with their experts'
matrices; :func:`choose_path` names the rule. No (T, E, C) mask is ever made, and gradients of rows are gathered, not
scattered and added, so results repeat bit for bit. Gathers are ``index_select``: on a CPU several times faster than
indexing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Path = Literal["grouped", "filled", "split", "tiles", "fused"]

TILE = 64
"""rows of a tile"""

ROUND = 16
"""slots that the path ``filled`` gives an expert are a multiple of this"""


class Rows(NamedTuple):
    """The routed rows of several streams, one after the other: all sub-tokens of all tokens that are not padding.

    Attributes:
        x: (T, d).
        tokens: per stream, positions of its tokens in the flattened stream; None means all of them.
        sizes: per stream, its number of rows.
    """

    x: Tensor
    tokens: list[Tensor | None]
    sizes: list[int]


def gather_rows(subtokens: Sequence[Tensor], paddings: Sequence[Tensor | None]) -> Rows:
    """All streams (..., S, d) as one tensor of rows, padding left out. A GPU waits once for each mask of padding."""
    parts, tokens = [], []
    for x, padding in zip(subtokens, paddings, strict=True):
        flat = x.reshape(-1, *x.shape[-2:])
        kept = None if padding is None else (~padding.reshape(-1)).nonzero().squeeze(1)
        parts.append((flat if kept is None else flat.index_select(0, kept)).flatten(0, 1))
        tokens.append(kept)
    return Rows(parts[0] if len(parts) == 1 else torch.cat(parts), tokens, [len(part) for part in parts])


def scatter_rows(x: Tensor, rows: Rows, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of :func:`gather_rows` for the outputs ``x`` (T, d); padding becomes zero."""
    streams = []
    for part, tokens, stream in zip(x.split(rows.sizes), rows.tokens, like, strict=True):
        part = part.view(-1, *stream.shape[-2:])
        if tokens is not None:
            part = part.new_zeros(stream.shape[:-2].numel(), *stream.shape[-2:]).index_copy(0, tokens, part)
        streams.append(part.view(stream.shape))
    return streams


def locate_rows(rows: Rows, subtokens: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Stream, token and sub-token number of every row: three (T,) int64."""
    streams, tokens, pieces = [], [], []
    for number, (kept, x) in enumerate(zip(rows.tokens, subtokens, strict=True)):
        S = x.shape[-2]
        token = torch.arange(x.shape[:-2].numel(), device=x.device) if kept is None else kept
        streams.append(token.new_full((len(token) * S,), number))
        tokens.append(token.repeat_interleave(S))
        pieces.append(torch.arange(S, device=x.device).repeat(len(token)))
    return torch.cat(streams), torch.cat(tokens), torch.cat(pieces)


@dataclass(frozen=True)
class Plan:
    """Where every choice goes. R = T K choices; P slots, P = R but on the paths ``filled`` and ``tiles``.

    Attributes:
        path: how slots meet their experts' matrices.
        row: (P,) int64, row that a slot copies (row 0 for slots that only fill up).
        slot: (K, T) int64, slot of every choice.
        choice: (P,) int64, flat index into (K, T) of a slot's choice; R for slots that only fill up.
        expert: (P,) int32, expert of a slot.
        ends: (E,) int32, slots of experts 0..e together.
        sizes: slots of each expert on the host; on a CPU and on the path ``split``.
    """

    path: Path
    row: Tensor
    slot: Tensor
    choice: Tensor
    expert: Tensor
    ends: Tensor
    sizes: list[int]


def choose_path(
    device_type: str, dtype: torch.dtype, num_slots: int, num_experts: int, in_dim: int, hidden_dim: int
) -> Path:
    """The way to multiply.

    * ``tiles`` for thin experts with few slots in bfloat16 on a CPU: grouped products are a loop over experts there,
      and its toll of about 0.1 ms a product is more than copying matrices for tiles. The bound on products an expert
      was measured: tiles take 0.5 of the time at an eighth of it, 1.1 at the double. In float32 they lose.
    * ``grouped`` (``F.grouped_mm``) elsewhere, if it takes the type and both widths: rows of matrices must be
      multiples of 16 bytes, float64 is refused, and so are 1,024 experts on a GPU.
    * ``filled``, the same with round numbers of slots, for 16-bit types on a CPU: there every new number of rows
      builds a kernel first, for 1 to 13 ms where the product takes 0.1.
    * ``split``, a loop over experts, for all the rest. It must know the sizes, so a GPU waits for it.
    """
    on_cpu = device_type == "cpu"
    if on_cpu and dtype == torch.bfloat16 and num_slots / num_experts * in_dim * hidden_dim <= 2**22:
        return "tiles"
    widths_fit = all(width * dtype.itemsize % 16 == 0 for width in (in_dim, hidden_dim))
    types_fit = dtype in (torch.float32, torch.bfloat16, torch.float16)
    if hasattr(F, "grouped_mm") and types_fit and widths_fit and num_experts < 1024:
        return "filled" if on_cpu and dtype.itemsize == 2 else "grouped"
    return "split"


def make_plan(experts: Tensor, num_experts: int, path: Path) -> Plan:
    """The layout of the choices ``experts`` (T, K) in slots."""
    T, K = experts.shape
    # Short keys: a GPU's radix sort passes over them a quarter as often.
    keys = experts.t().reshape(-1).to(torch.int16 if num_experts < 2**15 else torch.int64)
    expert, choice = keys.sort(stable=True)
    numbers = torch.arange(num_experts, dtype=keys.dtype, device=keys.device)
    ends = torch.searchsorted(expert, numbers, right=True, out_int32=True)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist() if path == "split" or keys.device.type == "cpu" else []
    if path in ("filled", "tiles"):
        return _fill(choice, expert.long(), ends.long(), sizes, experts, path)
    slot = torch.empty_like(choice).scatter_(0, choice, torch.arange(K * T, device=keys.device))
    return Plan(path, choice % max(T, 1), slot.view(K, T), choice, expert.int(), ends, sizes)


def within_capacity(plan: Plan, experts: Tensor, capacity_factor: float) -> Tensor:
    """Which choices (T, K) fit: those with fewer than ceil(capacity_factor K T / E) of the same expert before them,
    first choices first, then in row order."""
    starts = F.pad(plan.ends[:-1], (1, 0))
    # The small step down keeps products such as 1.1 * 10 from being rounded up past a whole number.
    capacity = math.ceil(capacity_factor * experts.numel() / len(plan.ends) - 1e-9)
    return plan.slot.t() - starts[experts] < capacity


def _fill(choice: Tensor, expert: Tensor, ends: Tensor, sizes: list[int], experts: Tensor, path: Path) -> Plan:
    """Slots of every expert, sorted by ``expert``, filled up to round numbers or to whole tiles, a round number of
    them. CPU only."""
    if path == "filled":
        filled = [_round_up(size, ROUND) for size in sizes]
    else:
        filled = [-(-size // TILE) * TILE for size in sizes]
        num_tiles = sum(filled) // TILE
        filled[-1] += (_round_up(num_tiles, 1) - num_tiles) * TILE
    (T, K), num_slots = experts.shape, sum(filled)
    starts, new_ends = F.pad(ends[:-1], (1, 0)), torch.tensor(filled).cumsum(0)
    moved = torch.arange(K * T) + (F.pad(new_ends[:-1], (1, 0)) - starts)[expert]
    slot_choice = choice.new_full((num_slots,), K * T).scatter_(0, moved, choice)
    row = torch.where(slot_choice < K * T, slot_choice % max(T, 1), 0)
    slot_expert = torch.searchsorted(new_ends, torch.arange(num_slots), right=True, out_int32=True)
    slot = torch.empty_like(choice).scatter_(0, choice, moved)
    return Plan(path, row, slot.view(K, T), slot_choice, slot_expert, new_ends.int(), filled)


def _round_up(size: int, step: int) -> int:
    """The next multiple of ``step``, and of an eighth of the power of two below: at most eight sizes an octave."""
    step = max(step, 1 << max(size.bit_length() - 4, 0))
    return -(-size // step) * step


def _gather_sum(y: Tensor, slot: Tensor, weights: Tensor | None) -> Tensor:
    """sum_k weights[t, k] y[slot[k, t]]: slots (P, d) to rows (T, d); no weights are ones."""
    if y.device.type == "cpu":  # one pass instead of two for every choice
        return F.embedding_bag(slot.t(), y, per_sample_weights=weights, mode="sum")
    out = y.index_select(0, slot[0])
    out = out if weights is None else out.mul_(weights[:, :1])
    for k in range(1, len(slot)):
        part = y.index_select(0, slot[k])
        out = out.add_(part) if weights is None else out.addcmul_(part, weights[:, k : k + 1])
    return out


class _Permute(Function):
    """Rows (T, d) copied to slots (P, d). The gradient of a row is the sum over its choices."""

    @staticmethod
    def forward(ctx, rows: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return rows.index_select(0, plan.row)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _gather_sum(grad, ctx.plan.slot, None), None


class _Combine(Function):
    """out[t] = sum_k gates[t, k] y[slot[k, t]]: slots (P, d) and gates (T, K) to rows (T, d)."""

    @staticmethod
    def forward(ctx, y: Tensor, gates: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(y, gates)
        return _gather_sum(y, plan.slot, gates.to(y.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        plan, (y, gates) = ctx.plan, ctx.saved_tensors
        # The appended zero is the weight of slots that only fill up.
        weights = torch.cat([gates.t().reshape(-1), gates.new_zeros(1)]).to(y.dtype)
        grad_y = grad.index_select(0, plan.row)
        dots = (y * grad_y).sum(-1, dtype=gates.dtype)
        return grad_y.mul_(weights[plan.choice].unsqueeze(1)), dots[plan.slot].t(), None


class _GroupBias(Function):
    """y = x + bias[expert of the slot]; on a CPU ``x`` is overwritten, one expert after the other: half the memory
    traffic. Elsewhere the gradient of the bias is a grouped product with ones: exact order, float32 sums also for
    bfloat16."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        if not plan.sizes:
            return bias.index_select(0, plan.expert).add_(x)
        for rows, row in zip(x.split(plan.sizes), bias.unbind(0), strict=True):
            rows.add_(row)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        if ctx.plan.sizes:
            return grad, torch.stack([part.sum(0) for part in grad.split(ctx.plan.sizes)]), None
        ones = grad.new_ones(len(grad), 16 // grad.itemsize)
        return grad, F.grouped_mm(ones.t(), grad.contiguous(), offs=ctx.plan.ends)[:, 0], None


class _TileWeights(Function):
    """A copy of its expert's matrix (or bias) for every tile, in ``dtype``; gradients are added in the weights' own."""

    @staticmethod
    def forward(ctx, weight: Tensor, expert: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(expert)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        return weight.to(dtype).index_select(0, expert)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (expert,) = ctx.saved_tensors
        total = torch.zeros(ctx.shape, dtype=ctx.dtype, device=grad.device)
        return total.index_add_(0, expert, grad.to(ctx.dtype)), None, None


def permute(rows: Tensor, plan: Plan) -> Tensor:
    """Rows (T, d) in the order of the slots: (P, d)."""
    return _Permute.apply(rows, plan)


def combine(y: Tensor, gates: Tensor, plan: Plan) -> Tensor:
    """Weighted sum of every row's experts: slots (P, d) and gates (T, K) to (T, d)."""
    return _Combine.apply(y, gates, plan)


def expert_linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """Every slot times its expert's matrix: x (P, in), weight (E, in, out), bias (E, out) -> (P, out).

    Weights are cast to the type of ``x``: autocast does not know grouped products.
    """
    if len(x) == 0:  # grouped products refuse this on a GPU; any expert leads to zero gradients for all
        return F.linear(x, weight[0].t().to(x.dtype), None if bias is None else bias[0].to(x.dtype))
    if plan.path == "tiles":
        tile_expert = plan.expert[::TILE]
        tiles, tile_weight = x.view(-1, TILE, x.shape[1]), _TileWeights.apply(weight, tile_expert, x.dtype)
        if bias is None:
            return torch.bmm(tiles, tile_weight).flatten(0, 1)
        tile_bias = _TileWeights.apply(bias, tile_expert, x.dtype).unsqueeze(1)
        return torch.baddbmm(tile_bias, tiles, tile_weight).flatten(0, 1)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if plan.path in ("grouped", "filled"):
        y = F.grouped_mm(x, weight, offs=plan.ends)
        return y if bias is None else _GroupBias.apply(y, bias, plan)
    biases = [None] * len(weight) if bias is None else bias.unbind(0)
    parts = zip(x.split(plan.sizes), weight.unbind(0), biases, strict=True)
    return torch.cat([F.linear(rows, w.t(), b) for rows, w, b in parts])
