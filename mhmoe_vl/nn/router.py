"""Routers: which experts see a row, and how their outputs are weighted.

Routers compute in float32 (float64 for float64 rows) also under autocast: a logit rounded to bfloat16 changes choices.
Their weights are never zero at the start, where all experts would tie and the first ``top_k`` would take every row.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_whole
from ..errors import ConfigError

Gate = Literal["softmax", "sigmoid"]

DEFAULT_ROUTER: Mapping[str, Any] = MappingProxyType({"kind": "linear", "gate": "softmax"})
"""Options of the router that layers build when none is named."""


class RoutingStats(NamedTuple):
    """Counts of one forward call on this rank, detached and cheap.

    Attributes:
        load: (num_streams, E) int64, choices (all ``top_k`` of every row) that went to each expert, before dropping.
        entropy: () float32, mean entropy of the router's softmax over all experts, in nats; 0 without rows.
        dropped: () int64, choices dropped by capacity.
        num_rows: () int64, routed rows, T.
    """

    load: Tensor
    entropy: Tensor
    dropped: Tensor
    num_rows: Tensor


@dataclass(frozen=True)
class Routing:
    """Every choice of one forward call.

    Attributes:
        logits: (T, E) the router's scores.
        probabilities: (T, E) softmax of the logits over all experts, whatever the gate.
        experts: (T, K) int64, chosen experts, best first.
        gates: (T, K) weights of the chosen experts, after any renormalisation; dropped choices keep theirs here.
        kept: (T, K) bool, False where capacity dropped the choice.
        stream: (T,) int64, number of the input tensor that the row came from.
        token: (T,) int64, position in that stream's ``x.reshape(-1, D)`` (of the convolved tokens where the layer
            splits by convolution).
        subtoken: (T,) int64, position among the sub-tokens of that token; 0 where tokens are not split.
    """

    logits: Tensor
    probabilities: Tensor
    experts: Tensor
    gates: Tensor
    kept: Tensor
    stream: Tensor
    token: Tensor
    subtoken: Tensor


class Choice(NamedTuple):
    """The experts chosen for T rows of several streams, and sums over rows that losses and statistics take.

    Attributes:
        experts: (T, K) int64, best first.
        gates: (T, K) their weights.
        load: (num_streams, E), choices that went to each expert.
        first_load: (num_streams, E), first choices.
        probabilities: (num_streams or 1, E) sums of the balance logits' softmax: of each stream, or of all rows.
        squares: () sum of logsumexp(logits)^2.
        entropy: () sum of the softmax's entropies in nats.
    """

    experts: Tensor
    gates: Tensor
    load: Tensor
    first_load: Tensor
    probabilities: Tensor
    squares: Tensor
    entropy: Tensor


class RouterScores(NamedTuple):
    """Logits for choosing and mixing, and those that the balance loss takes; both (T, E), often the same tensor."""

    logits: Tensor
    balance_logits: Tensor


class Router(nn.Module, ABC):
    """Scores of all experts for every row.

    Args:
        gate: ``softmax`` over all experts (X-MoE and both MH-MoE papers) or one ``sigmoid`` per expert (X-MoE).

    Raises:
        ConfigError: unknown gate.
    """

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        if gate not in ("softmax", "sigmoid"):
            raise ConfigError(f"ffn.router: gate {gate!r} is unknown (choose softmax or sigmoid)")
        self.gate = gate

    def forward(self, rows: Tensor) -> RouterScores:
        """Scores of ``rows`` (T, d), computed outside autocast."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        with _no_autocast(rows.device.type):
            return self.score(rows)

    @abstractmethod
    def score(self, rows: Tensor) -> RouterScores:
        """The scores; ``rows`` are float32 or float64 and autocast is off."""

    def gates(self, logits: Tensor) -> Tensor:
        """Weights of all experts (T, E): softmax or sigmoid of the logits."""
        return logits.softmax(-1) if self.gate == "softmax" else logits.sigmoid()

    def extra_repr(self) -> str:
        return f"gate={self.gate}"


class LinearRouter(Router):
    """logits = x W^T without bias (MH-MoE paper 1 Eq. 4 with e_p the rows of W; the usual SMoE router).

    Args:
        row_dim: width of a routed row.
        num_experts: rows of the weight.
        gate: see :class:`Router`.
    """

    def __init__(self, row_dim: int, num_experts: int, *, gate: Gate = "softmax") -> None:
        super().__init__(gate)
        self.weight = nn.Parameter(torch.empty(num_experts, row_dim))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def score(self, rows: Tensor) -> RouterScores:
        logits = F.linear(rows, self.weight.to(rows.dtype))
        return RouterScores(logits, logits)

    def extra_repr(self) -> str:
        return f"row_dim={self.weight.shape[1]}, num_experts={self.weight.shape[0]}, gate={self.gate}"


class CosineRouter(Router):
    """X-MoE's router: logits = cos(W x, e_p) / tau in a space of ``dim`` axes (arXiv 2204.09179).

    The temperature tau is learned (kept positive as exp of a parameter), but the balance loss takes
    softmax(cos / tau_0) with the fixed first value tau_0. Expert embeddings start orthogonal with gain 0.32, as
    released; their length does not matter because they are normalised.

    The released MH-MoE code differs from the X-MoE paper: it normalises the expert embeddings only and divides by no
    temperature. ``normalize_rows=False, learned_temperature=False, initial_temperature=1.0`` is that form. Our default
    is the paper's.

    Args:
        row_dim: width of a routed row.
        num_experts: expert embeddings.
        gate: see :class:`Router`.
        dim: axes of the space in which rows and experts are compared.
        initial_temperature: tau_0 > 0; None means 0.3 for softmax and 0.07 for sigmoid.
        learned_temperature: train tau.
        normalize_rows: normalise W x too.

    Raises:
        ConfigError: unknown gate, or a width or temperature that is not positive.
    """

    def __init__(
        self,
        row_dim: int,
        num_experts: int,
        *,
        gate: Gate = "softmax",
        dim: int = 16,
        initial_temperature: float | None = None,
        learned_temperature: bool = True,
        normalize_rows: bool = True,
    ) -> None:
        super().__init__(gate)
        check_whole("ffn.router: dim", dim)
        if initial_temperature is None:
            initial_temperature = 0.3 if gate == "softmax" else 0.07
        if not initial_temperature > 0:
            raise ConfigError(f"ffn.router: initial_temperature {initial_temperature} is not positive (raise it)")
        self.initial_temperature = initial_temperature
        self.normalize_rows = normalize_rows
        self.proj = nn.Linear(row_dim, dim, bias=False)
        self.embedding = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.orthogonal_(self.embedding, gain=0.32)
        start = torch.tensor(initial_temperature).log()
        self.log_temperature = nn.Parameter(start) if learned_temperature else None

    def score(self, rows: Tensor) -> RouterScores:
        projected = F.linear(rows, self.proj.weight.to(rows.dtype))
        if self.normalize_rows:
            projected = F.normalize(projected, dim=-1, eps=1e-4)
        cosines = F.linear(projected, F.normalize(self.embedding.to(rows.dtype), dim=-1, eps=1e-4))
        fixed = cosines / self.initial_temperature
        if self.log_temperature is None:
            return RouterScores(fixed, fixed)
        return RouterScores(cosines / self.log_temperature.to(rows.dtype).exp(), fixed)

    def extra_repr(self) -> str:
        shown = f"num_experts={self.embedding.shape[0]}, gate={self.gate}, normalize_rows={self.normalize_rows}"
        return f"{shown}, initial_temperature={self.initial_temperature}"


ROUTERS: dict[str, type[Router]] = {"linear": LinearRouter, "cosine": CosineRouter}


def build_router(row_dim: int, num_experts: int, router: Mapping[str, Any]) -> Router:
    """The router that ``router`` names by ``kind``; what else it holds are options of that router's constructor.

    Raises:
        ConfigError: no mapping, missing or unknown kind, unknown option, or a value that the router refuses.
    """
    kinds = ", ".join(ROUTERS)
    if not isinstance(router, Mapping) or "kind" not in router:
        raise ConfigError(f"ffn: router {router!r} is not a mapping with a kind (choose a kind from {kinds})")
    kind, options = router["kind"], {name: value for name, value in router.items() if name != "kind"}
    if kind not in ROUTERS:
        raise ConfigError(f"ffn.router: kind {kind!r} is unknown (choose from {kinds})")
    try:
        return ROUTERS[kind](row_dim, num_experts, **options)
    except TypeError as error:
        given = ", ".join(options)
        raise ConfigError(f"ffn.router: {given} are not all options of kind {kind!r} (remove the odd one)") from error


def choose_experts(
    logits: Tensor, gates: Tensor, top_k: int, *, normalize: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The ``top_k`` best experts of every row and their weights, both (T, K), best first.

    Args:
        logits: (T, E).
        gates: (T, E) weights made from the logits.
        normalize: divide a row's chosen gates by their sum. Ignored for ``top_k`` 1, where the gate would become the
            constant 1 and the router would learn nothing from the task. Both papers' equations and the released code
            keep raw gates.
        bias: (E,) added to the gates for choosing only, never for mixing; None chooses by the logits, which do not
            saturate.
    """
    scores = logits if bias is None else gates + bias
    experts = _best(scores.detach(), top_k)
    chosen = gates.gather(-1, experts)
    if normalize and top_k > 1:
        chosen = chosen / chosen.sum(-1, keepdim=True).clamp_min(torch.finfo(chosen.dtype).tiny)
    return experts, chosen


def _best(scores: Tensor, top_k: int) -> Tensor:
    """Where the ``top_k`` largest of every row are, (T, K), largest first. For one or two of them passes over the rows
    are faster than ``topk``: up to twice on a CPU, five times on an H100."""
    if top_k > 2:
        return scores.topk(top_k, dim=-1).indices
    best = scores.max(-1, keepdim=True).indices
    if top_k == 1:
        return best
    return torch.cat([best, scores.scatter(-1, best, -torch.inf).max(-1, keepdim=True).indices], -1)


def count_experts(experts: Tensor, num_experts: int) -> Tensor:
    """How often each expert stands in ``experts`` (any shape): (E,) int64, without waiting for the device."""
    flat = experts.reshape(-1)
    return flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager[None]:
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else contextlib.nullcontext()
