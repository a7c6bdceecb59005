"""Experts by one-hot masks and capacity (GShard, arXiv 2006.16668): what the first MoE layers did, to compare with.

Masks (T, E, C) say which row stands at which place of which expert; products with them carry the rows there and back.
Their size grows with the square of T. Rows beyond an expert's capacity are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.moe import RoutedExperts


def rank_choices(experts: Tensor, num_experts: int) -> Tensor:
    """How many choices of the same expert come before each of ``experts`` (T, K): first choices first, then by row."""
    masks = F.one_hot(experts.t().flatten(), num_experts)
    places = ((masks.cumsum(0) - 1) * masks).sum(1)
    return places.view(experts.shape[1], -1).t()


class OneHotExperts(nn.Module):
    """Top-k of E experts over rows.

    Args:
        routed: whose router (linear, softmax) and experts (GELU, with biases) these are.

    Attributes:
        experts, kept: (T, K) the choices of the last call, and whether capacity kept each.
    """

    def __init__(self, routed: RoutedExperts) -> None:
        super().__init__()
        self.router, self.top_k = routed.router.weight, routed.top_k
        self.fc1, self.fc1_bias = routed.experts.fc1_weight, routed.experts.fc1_bias
        self.fc2, self.fc2_bias = routed.experts.fc2_weight, routed.experts.fc2_bias

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (T, d) mixed, and the balance loss. An expert has K ceil(T / E) places."""
        T, E = len(rows), len(self.router)
        capacity = self.top_k * math.ceil(T / E)
        with torch.autocast(rows.device.type, enabled=False):
            probabilities = (rows.float() @ self.router.t()).softmax(-1)
        chosen = probabilities.detach().topk(self.top_k).indices
        gates = probabilities.gather(1, chosen)
        gates = gates / gates.sum(-1, keepdim=True)
        places = rank_choices(chosen, E)
        self.experts, self.kept = chosen, places < capacity
        combine = 0.0
        for k in range(self.top_k):
            place = F.one_hot(places[:, k].clamp_max(capacity - 1), capacity) * self.kept[:, k : k + 1]
            combine = combine + (gates[:, k : k + 1] * F.one_hot(chosen[:, k], E)).unsqueeze(2) * place.unsqueeze(1)
        dispatch = (combine > 0).to(rows.dtype).flatten(1)
        slots = (dispatch.t() @ rows).view(E, capacity, -1)
        hidden = F.gelu(torch.baddbmm(self.fc1_bias.unsqueeze(1), slots, self.fc1))
        out = torch.baddbmm(self.fc2_bias.unsqueeze(1), hidden, self.fc2)
        share = F.one_hot(chosen[:, 0], E).to(probabilities.dtype).mean(0)
        return combine.flatten(1).to(out.dtype) @ out.flatten(0, 1), E * (share * probabilities.mean(0)).sum()

    def weights(self, of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        """``of`` of every parameter by name."""
        return {name: of(parameter) for name, parameter in self.named_parameters()}
