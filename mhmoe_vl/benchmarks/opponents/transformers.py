"""Hugging Face transformers' experts (Mixtral's class) with its grouped products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...nn.mh_moe import MultiHeadMoE
from ..sizes import Size
from .base import Mixer, NotHere, library

PIP = "transformers"


def build(layer: MultiHeadMoE, size: Size, device: torch.device) -> nn.Module:
    """See the package. ``grouped_mm`` is the library's implementation for large inputs."""
    modeling = library("transformers.models.mixtral.modeling_mixtral", PIP)
    if (size.activation, size.bias) != ("swiglu", False):
        raise NotHere("transformers' experts are SwiGLU without biases")
    config = library("transformers", PIP).MixtralConfig(
        hidden_size=size.dim // size.num_subtokens,
        intermediate_size=size.hidden_dim,
        num_local_experts=size.num_experts,
        num_experts_per_tok=size.top_k,
        hidden_act="silu",
    )
    config._experts_implementation = "grouped_mm"
    return _Mixer(layer, modeling.MixtralExperts(config))


class _Mixer(Mixer):
    def __init__(self, layer: MultiHeadMoE, experts: nn.Module) -> None:
        super().__init__(layer.routed)
        source, self.theirs = layer.routed.experts, experts
        with torch.no_grad():
            joined = torch.cat([source.fc_gate_weight, source.fc1_weight], 2)
            experts.gate_up_proj.copy_(joined.transpose(1, 2))
            experts.down_proj.copy_(source.fc2_weight.transpose(1, 2))

    def forward(self, rows: Tensor) -> tuple[Tensor, None]:
        gates = self.choose(rows)
        return self.theirs(rows, self.experts, gates.to(rows.dtype)), None

    def weights(self, of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        gate, up = of(self.theirs.gate_up_proj).transpose(1, 2).chunk(2, 2)
        return {"router": of(self.router), "fc_gate": gate, "fc1": up, "fc2": of(self.theirs.down_proj).transpose(1, 2)}
