"""Mixture of experts over whole tokens, and the machinery that every sparse layer is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import check_experts, check_whole, inner_width
from ..distributed import all_reduce_sum
from ..errors import ConfigError
from .dispatch import gather_rows, locate_rows, make_plan, scatter_rows, within_capacity
from .experts import Experts
from .feed_forward import Activation, FeedForward, FFNLayer, FFNOutput
from .fused_choice import fused_choice, fused_choice_runs
from .router import (
    DEFAULT_ROUTER,
    Choice,
    RouterScores,
    Routing,
    RoutingStats,
    build_router,
    choose_experts,
    count_experts,
)

BalanceShare = Literal["first", "all"]


class RoutedExperts(nn.Module):
    """Router and experts over rows of sub-tokens: what MoE and MH-MoE share.

    o = sum over the chosen p of g_p f_p(x) (paper 1 Eqs. 4-5; paper 2 Eqs. 2-3), with ``residual`` x + that sum.

    *Balance loss* (paper 1 Eq. 8, written as the released code computes it): E sum_p c_p P_p, where c_p is the share
    of rows whose first choice is p (``balance_share`` ``all``: the share of all choices) and P_p the mean over rows of
    the router's softmax over all experts, never of the renormalised gates; 1 at perfect balance. X-MoE's router takes
    its fixed first temperature here; a sigmoid gate takes the softmax of the same logits. With
    ``balance_per_modality`` the loss is formed for each stream alone and averaged over the streams that have rows.
    *z-loss*: mean over rows of logsumexp(logits)^2. In training both are formed from sums over the rows of all ranks
    (so every rank must call the layer equally often, with no rows if need be, and for ``balance_per_modality`` with
    the same number of streams); in evaluation from this rank's rows, as ranks may then have unequal numbers of
    batches. Without rows both are 0.

    *Bias balancing* (``balance_bias_rate`` > 0): the buffer ``balance_bias`` is added to the gates for choosing only.
    Each time a gradient reaches the router, the bias of every expert with less than the mean load (all choices, all
    ranks) grows by the rate and that of every one with more shrinks by it. The balance loss is then still reported but
    carries no gradient.

    *Capacity* (``capacity_factor``): in training an expert takes at most ceil(capacity_factor K T / E) choices of this
    call on this rank; all first choices come before second ones, each in row order. A dropped choice adds zero (its
    product is computed all the same), and the row's other gates stay as they are. The released code: K ceil(T / E),
    that is a factor of 1; we drop nothing by default.

    Args:
        row_dim: width of a row.
        residual: add each row to its experts' sum.
        Others: see :class:`MoE`; ``hidden_dim`` is a number here.
    """

    def __init__(
        self,
        row_dim: int,
        *,
        num_experts: int,
        hidden_dim: int,
        top_k: int,
        activation: Activation,
        bias: bool,
        router: Mapping[str, Any],
        normalize_gates: bool,
        capacity_factor: float | None,
        balance_share: BalanceShare,
        balance_per_modality: bool,
        balance_bias_rate: float,
        residual: bool = False,
    ) -> None:
        super().__init__()
        check_experts(num_experts, top_k)
        if capacity_factor is not None and not capacity_factor > 0:
            raise ConfigError(f"ffn: capacity_factor {capacity_factor} is not positive (raise it; none drops nothing)")
        if balance_share not in ("first", "all"):
            raise ConfigError(f"ffn: balance_share {balance_share!r} is unknown (choose first or all)")
        if not balance_bias_rate >= 0:
            raise ConfigError(f"ffn: balance_bias_rate {balance_bias_rate} is negative (0 is off)")
        self.num_experts, self.top_k = num_experts, top_k
        self.normalize_gates, self.residual = normalize_gates, residual
        self.capacity_factor = capacity_factor
        self.balance_share, self.balance_per_modality = balance_share, balance_per_modality
        self.balance_bias_rate = balance_bias_rate
        self.router = build_router(row_dim, num_experts, router)
        self.experts = Experts(row_dim, num_experts, hidden_dim, activation=activation, bias=bias)
        self.register_buffer("balance_bias", torch.zeros(num_experts) if balance_bias_rate else None)

    # torch.compile leaves this part alone: its stand-in for grouped products refuses float32, and the number of rows
    # depends on the padding.
    @torch.compiler.disable
    def forward(
        self, subtokens: Sequence[Tensor], paddings: Sequence[Tensor | None], *, return_routing: bool = False
    ) -> FFNOutput:
        """Mixes the experts' outputs.

        Args:
            subtokens: streams of sub-tokens (..., S, d).
            paddings: for every stream bool (...) or None; padding is not routed and comes out as zero.
            return_routing: return every choice too.
        """
        rows = gather_rows(subtokens, paddings)
        scores = self.router(rows.x)
        choice = self._choose(scores, rows.sizes)
        mixed, kept = self._mix(rows.x, choice.experts, choice.gates)
        aux_losses = self._aux_losses(choice, rows.sizes)
        stats = self._stats(choice, kept)
        if self.balance_bias is not None and self.training and scores.logits.requires_grad:
            self._follow_load(scores.logits, stats.load.sum(0))
        outputs = scatter_rows(mixed, rows, subtokens)
        routing = None
        if return_routing:
            kept = torch.ones_like(choice.experts, dtype=torch.bool) if kept is None else kept
            probabilities, where = scores.logits.softmax(-1), locate_rows(rows, subtokens)
            routing = Routing(scores.logits, probabilities, choice.experts, choice.gates, kept, *where)
        return FFNOutput(outputs, aux_losses, routing, stats)

    def _choose(self, scores: RouterScores, sizes: Sequence[int]) -> Choice:
        """Experts of every row, and the sums over the rows of the streams, ``sizes`` of them."""
        logits, alike = scores.logits, scores.balance_logits is scores.logits
        if alike and self.router.gate == "softmax" and self.balance_bias is None and fused_choice_runs(logits):
            return fused_choice(logits, sizes, self.top_k, normalize=self.normalize_gates)
        probabilities = logits.softmax(-1)
        weights = probabilities if self.router.gate == "softmax" else self.router.gates(logits)
        experts, gates = choose_experts(
            logits, weights, self.top_k, normalize=self.normalize_gates, bias=self.balance_bias
        )
        if self.router.gate == "sigmoid":  # which makes finite gates of infinite logits: such a row must be seen
            gates = gates + 0 * probabilities[:, :1].detach()
        load, first_load = (
            torch.stack([count_experts(part, self.num_experts) for part in counted.split(sizes)])
            for counted in (experts, experts[:, :1])
        )
        log_sums = logits.logsumexp(-1)
        # -sum p log p of a row is logsumexp - p . logits: no logarithm of every probability.
        entropy = log_sums.detach().sum() - torch.dot(probabilities.detach().flatten(), logits.detach().flatten())
        balanced = probabilities if alike else scores.balance_logits.softmax(-1)
        groups = sizes if self.balance_per_modality else [len(experts)]
        sums = torch.stack([part.sum(0) for part in balanced.split(groups)])
        return Choice(experts, gates, load, first_load, sums, log_sums.square().sum(), entropy)

    def _mix(self, x: Tensor, experts: Tensor, gates: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows through their experts, (T, d), and which choices capacity kept, (T, K); None: all."""
        x = x.to(_compute_dtype(x))
        plan, kept = make_plan(experts, self.num_experts, self.experts.path(x, experts.numel())), None
        if self.training and self.capacity_factor is not None:
            kept = within_capacity(plan, experts, self.capacity_factor)
            gates = gates * kept
        mixed = self.experts.mix(x, gates, plan)
        return (x + mixed if self.residual else mixed), kept

    @torch.no_grad()
    def _stats(self, choice: Choice, kept: Tensor | None) -> RoutingStats:
        load, num_rows = choice.load.long(), len(choice.experts)
        dropped = torch.zeros_like(load[0, 0]) if kept is None else (~kept).sum()
        entropy = (choice.entropy / max(num_rows, 1)).float()
        return RoutingStats(load, entropy, dropped, torch.full_like(dropped, num_rows))

    def _aux_losses(self, choice: Choice, sizes: Sequence[int]) -> dict[str, Tensor]:
        """Balance loss and z-loss; all sums over rows go through one reduction over ranks."""
        E, probabilities = self.num_experts, choice.probabilities
        load = choice.first_load if self.balance_share == "first" else choice.load
        if not self.balance_per_modality:
            load, probabilities, sizes = load.sum(0), probabilities.sum(0), [sum(sizes)]
        num_rows = [probabilities.new_full((1,), size) for size in sizes]  # a tensor made of a list waits for a GPU
        flat = torch.cat([load.flatten(), probabilities.flatten(), choice.squares.view(1), *num_rows])
        flat = all_reduce_sum(flat) if self.training else flat
        load, total, z_sum, num_rows = flat.split([len(sizes) * E, len(sizes) * E, 1, len(sizes)])
        balance = self._balance_loss(load.view(-1, E), total.view(-1, E), num_rows.unsqueeze(1))
        return {
            "balance_loss": balance if self.balance_bias is None else balance.detach(),
            "z_loss": z_sum.squeeze(0) / num_rows.sum().clamp_min(1),
        }

    def _balance_loss(self, load: Tensor, total: Tensor, num_rows: Tensor) -> Tensor:
        """From counted choices and sums of probabilities, (groups, E), and rows, (groups, 1); groups are the streams
        or all of them together."""
        choices = num_rows if self.balance_share == "first" else num_rows * self.top_k
        per_group = self.num_experts * (load / choices.clamp_min(1) * total / num_rows.clamp_min(1)).sum(-1)
        return per_group.sum() / (num_rows > 0).sum().clamp_min(1)

    def _follow_load(self, logits: Tensor, load: Tensor) -> None:
        """Arranges that ``balance_bias`` moves against ``load`` (E,) when the backward pass reaches the router: once
        for every pass that trains, also where activations are recomputed."""
        load = all_reduce_sum(load.to(self.balance_bias.dtype))
        step = self.balance_bias_rate * torch.sign(load.mean() - load)
        logits.register_hook(lambda grad: self._move_bias(step))

    def _move_bias(self, step: Tensor) -> None:
        self.balance_bias.add_(step)

    def no_weight_decay(self) -> set[str]:
        """Biases of experts, which have two axes, and the router's temperature, which has none."""
        return {name for name, _ in self.named_parameters() if name.endswith(("_bias", "log_temperature"))}

    def extra_repr(self) -> str:
        shown = f"top_k={self.top_k}, normalize_gates={self.normalize_gates}, residual={self.residual}"
        return f"{shown}, capacity_factor={self.capacity_factor}, balance_bias_rate={self.balance_bias_rate}"


class SparseLayer(FFNLayer):
    """A layer with :class:`RoutedExperts` as ``routed`` and, beside them, shared experts that see every whole token."""

    routed: RoutedExperts

    def _build_shared(
        self, dim: int, num_shared: int, hidden_dim: int | None, activation: Activation, bias: bool
    ) -> None:
        """``hidden_dim`` None means that of the routed experts."""
        check_whole("ffn: num_shared_experts", num_shared, least=0)
        hidden_dim = self.routed.experts.hidden_dim if hidden_dim is None else hidden_dim
        check_whole("ffn: shared_hidden_dim", hidden_dim)
        options = {"hidden_dim": hidden_dim, "activation": activation, "bias": bias}
        self.shared_experts = nn.ModuleList(FeedForward(dim, **options) for _ in range(num_shared))

    def add_shared(self, y: Tensor, x: Tensor) -> Tensor:
        """``y`` plus the outputs of all shared experts for the tokens ``x``."""
        for expert in self.shared_experts:
            y = y + expert.transform(x)
        return y

    def no_weight_decay(self) -> set[str]:
        """See :meth:`RoutedExperts.no_weight_decay`."""
        return {f"routed.{name}" for name in self.routed.no_weight_decay()}


class MoE(SparseLayer):
    """Sparse mixture of experts: y = sum over the ``top_k`` chosen p of g_p f_p(x), plus shared experts.

    ``router: {kind: cosine}`` makes it X-MoE. Fine-grained MoE is more and narrower experts with a larger ``top_k``.
    Paper 1 (Eq. 2) prints the token itself as a term of the sum; its code and paper 2 do not have it, and neither do
    we: the block's residual is the only one.

    Args:
        dim: width of a token.
        num_experts: E.
        hidden_dim: inner width of an expert; None means 4 ``dim``.
        top_k: experts chosen per token.
        activation: ``gelu``, ``relu`` or ``swiglu``, of experts.
        bias: biases on the experts' matrices.
        router: ``{"kind": "linear" | "cosine", ...}``, the options of :class:`~mhmoe_vl.nn.router.LinearRouter` or
            :class:`~mhmoe_vl.nn.router.CosineRouter`.
        normalize_gates: divide the gates of the chosen experts by their sum (our default; the papers' equations and
            the released code keep raw ones). Never done for ``top_k`` 1.
        num_shared_experts: experts that every token passes.
        shared_hidden_dim: inner width of a shared expert; None means ``hidden_dim``.
        capacity_factor: see :class:`RoutedExperts`; None drops nothing.
        balance_share: ``first`` or ``all``, the choices that the balance loss counts.
        balance_per_modality: form the balance loss for every stream alone.
        balance_bias_rate: step of bias balancing; 0 is off.

    Raises:
        ConfigError: values that are impossible or do not fit each other.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_experts: int = 8,
        hidden_dim: int | None = None,
        top_k: int = 1,
        activation: Activation = "gelu",
        bias: bool = True,
        router: Mapping[str, Any] = DEFAULT_ROUTER,
        normalize_gates: bool = True,
        num_shared_experts: int = 0,
        shared_hidden_dim: int | None = None,
        capacity_factor: float | None = None,
        balance_share: BalanceShare = "first",
        balance_per_modality: bool = False,
        balance_bias_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.routed = RoutedExperts(
            dim,
            num_experts=num_experts,
            hidden_dim=inner_width(dim, hidden_dim),
            top_k=top_k,
            activation=activation,
            bias=bias,
            router=router,
            normalize_gates=normalize_gates,
            capacity_factor=capacity_factor,
            balance_share=balance_share,
            balance_per_modality=balance_per_modality,
            balance_bias_rate=balance_bias_rate,
        )
        self._build_shared(dim, num_shared_experts, shared_hidden_dim, activation, bias)

    def forward_streams(
        self,
        xs: Sequence[Tensor],
        paddings: Sequence[Tensor | None] | None = None,
        *,
        return_routing: bool = False,
    ) -> FFNOutput:
        """See :class:`~mhmoe_vl.nn.feed_forward.FFNLayer`. Padding comes out as the shared experts' share alone."""
        rows = [x.unsqueeze(-2) for x in xs]
        mixed = self.routed(rows, paddings or [None] * len(xs), return_routing=return_routing)
        ys = [self.add_shared(y.squeeze(-2), x) for y, x in zip(mixed.x, xs, strict=True)]
        return FFNOutput(ys, *mixed[1:])


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which experts multiply: autocast's where it is on, else that of ``x``."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)
