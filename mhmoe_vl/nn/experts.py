"""The experts' own two (or three) matrices, stacked over experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .dispatch import Path, Plan, choose_path, combine, expert_linear, permute
from .feed_forward import ACTIVATIONS, Activation, check_activation
from .fused_experts import fused_mix, fused_runs


class Experts(nn.Module):
    """E feed-forward networks f_p(x) = W_2 act(W_1 x + b_1) + b_2, side by side.

    With ``swiglu`` f_p(x) = W_2 (silu(W_g x) * W_1 x), as released. Weights are stacked (E, in, out), biases (E, out):
    an idle expert has a zero gradient, not a missing one, and checkpoints do not depend on the number of processes.
    Every expert starts like its own ``nn.Linear`` layers (uniform within 1 / sqrt(in)).

    Args:
        dim: width of a routed row.
        num_experts: E.
        hidden_dim: inner width F of each.
        activation: ``gelu``, ``relu`` or ``swiglu``.
        bias: biases on all matrices.

    Raises:
        ConfigError: unknown activation.
    """

    def __init__(self, dim: int, num_experts: int, hidden_dim: int, *, activation: Activation, bias: bool) -> None:
        super().__init__()
        check_activation(activation)
        self.dim, self.num_experts, self.hidden_dim = dim, num_experts, hidden_dim
        self.activation = activation
        self._matrix("fc1", dim, hidden_dim, bias)
        if activation == "swiglu":
            self._matrix("fc_gate", dim, hidden_dim, bias)
        self._matrix("fc2", hidden_dim, dim, bias)

    def _matrix(self, name: str, in_dim: int, out_dim: int, bias: bool) -> None:
        bound = in_dim**-0.5
        weight = nn.Parameter(torch.empty(self.num_experts, in_dim, out_dim).uniform_(-bound, bound))
        self.register_parameter(f"{name}_weight", weight)
        stacked = nn.Parameter(torch.empty(self.num_experts, out_dim).uniform_(-bound, bound)) if bias else None
        self.register_parameter(f"{name}_bias", stacked)

    def path(self, x: Tensor, num_slots: int) -> Path:
        """The way of dispatch that fits these experts and ``num_slots`` choices of the rows ``x``."""
        biased = self.fc1_bias is not None
        if self.activation == "gelu" and fused_runs(x.device, x.dtype, self.dim, self.hidden_dim, biased):
            return "fused"
        return choose_path(x.device.type, x.dtype, num_slots, self.num_experts, self.dim, self.hidden_dim)

    def mix(self, x: Tensor, gates: Tensor, plan: Plan) -> Tensor:
        """Rows (T, d) through the experts that ``plan`` gives them, added up with ``gates`` (T, K): (T, d)."""
        if plan.path == "fused":
            return fused_mix(x, gates, self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias, plan)
        return combine(self(permute(x, plan), plan), gates, plan)

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        """Slots (P, d) through the experts that ``plan`` gives them: (P, d)."""
        act = ACTIVATIONS[self.activation]
        hidden = expert_linear(x, self.fc1_weight, self.fc1_bias, plan)
        if self.activation == "swiglu":
            hidden = act(expert_linear(x, self.fc_gate_weight, self.fc_gate_bias, plan)) * hidden
        else:
            hidden = act(hidden)
        return expert_linear(hidden, self.fc2_weight, self.fc2_bias, plan)

    def extra_repr(self) -> str:
        return f"{self.num_experts} x ({self.dim} -> {self.hidden_dim} -> {self.dim}), activation={self.activation}"
