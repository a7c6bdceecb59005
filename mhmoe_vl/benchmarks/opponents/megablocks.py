"""MegaBlocks' dropless layer with its own router: block-sparse or grouped products. GPU only."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.mh_moe import MultiHeadMoE
from ..sizes import Size
from .base import NotHere, library, needs_gpu

PIP = "megablocks"


def build(layer: MultiHeadMoE, size: Size, device: torch.device) -> nn.Module:
    """See the package. Its experts have no biases of their own."""
    arguments, dmoe = (library(f"megablocks.layers.{name}", PIP) for name in ("arguments", "dmoe"))
    needs_gpu(device, "megablocks")
    if (size.activation, size.bias) != ("gelu", False):
        raise NotHere("megablocks' experts have no biases; those with GELU are compared")
    options = arguments.Arguments(
        hidden_size=size.dim // size.num_subtokens,
        ffn_hidden_size=size.hidden_dim,
        moe_num_experts=size.num_experts,
        moe_top_k=size.top_k,
        moe_normalize_expert_weights=1,
        activation_fn=F.gelu,
        bias=False,
        return_bias=False,
        fp16=False,
        bf16=False,
        device=device,
    )
    return _Mixer(layer, size, dmoe.dMoE(options))


class _Mixer(nn.Module):
    def __init__(self, layer: MultiHeadMoE, size: Size, moe: nn.Module) -> None:
        super().__init__()
        self.moe, self.size, source = moe, size, layer.routed.experts
        with torch.no_grad():
            moe.router.layer.weight.copy_(layer.routed.router.weight)
            moe.experts.mlp.w1.copy_(source.fc1_weight.transpose(1, 2).flatten(0, 1))
            moe.experts.mlp.w2.copy_(source.fc2_weight.flatten(0, 1))

    def forward(self, rows: Tensor) -> tuple[Tensor, None]:
        self.experts = self.moe.router.layer(rows.detach()).topk(self.size.top_k).indices
        self.kept = torch.ones_like(self.experts, dtype=torch.bool)
        mixed = self.moe(rows.unsqueeze(0))
        return (mixed[0] if isinstance(mixed, tuple) else mixed).squeeze(0), None

    def weights(self, of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        shape = (self.size.num_experts, self.size.hidden_dim, -1)
        fc1, fc2 = (of(w).view(shape) for w in (self.moe.experts.mlp.w1, self.moe.experts.mlp.w2))
        return {"router": of(self.moe.router.layer.weight), "fc1": fc1.transpose(1, 2), "fc2": fc2}
