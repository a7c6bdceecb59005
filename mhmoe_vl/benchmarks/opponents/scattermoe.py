"""ScatterMoE's gated experts: Triton products that read and write rows in place. GPU only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...nn.mh_moe import MultiHeadMoE
from ..sizes import Size
from .base import Mixer, NotHere, library, needs_gpu

PIP = "git+https://github.com/shawntan/scattermoe"


def build(layer: MultiHeadMoE, size: Size, device: torch.device) -> nn.Module:
    """See the package."""
    mlp = library("scattermoe.mlp", PIP)
    needs_gpu(device, "scattermoe")
    if (size.activation, size.bias) != ("swiglu", False):
        raise NotHere("scattermoe's experts have no biases; its gated ones are compared")
    width = size.dim // size.num_subtokens
    return _Mixer(layer, mlp.GLUMLP(width, size.hidden_dim, size.num_experts, size.top_k, activation=nn.SiLU()))


class _Mixer(Mixer):
    def __init__(self, layer: MultiHeadMoE, experts: nn.Module) -> None:
        super().__init__(layer.routed)
        source, self.theirs = layer.routed.experts, experts
        with torch.no_grad():
            joined = torch.cat([source.fc1_weight, source.fc_gate_weight], 2)  # the gate is the second half
            experts.experts.weight.copy_(joined.transpose(1, 2))
            experts.output_experts.weight.copy_(source.fc2_weight.transpose(1, 2))

    def forward(self, rows: Tensor) -> tuple[Tensor, None]:
        gates = self.choose(rows)
        return self.theirs(rows, gates.to(rows.dtype), self.experts), None

    def weights(self, of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        up, gate = of(self.theirs.experts.weight).transpose(1, 2).chunk(2, 2)
        down = of(self.theirs.output_experts.weight).transpose(1, 2)
        return {"router": of(self.router), "fc_gate": gate, "fc1": up, "fc2": down}
