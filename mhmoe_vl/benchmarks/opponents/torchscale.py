"""torchscale's X-MoE layer with GShard's gate, as it installs (one-hot masks) or with tutel's dispatcher."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...nn.mh_moe import MultiHeadMoE
from ..one_hot import rank_choices
from ..sizes import Size
from .base import NotHere, library

PIP = "torchscale"
TUTEL_PIP = "git+https://github.com/microsoft/tutel"


def build(layer: MultiHeadMoE, size: Size, device: torch.device, *, with_tutel: bool) -> nn.Module:
    """See the package. The layer wants a process group, so one of a single process is made."""
    modules = [library(f"torchscale.component.xmoe.{name}", PIP) for name in ("moe_layer", "routing")]
    if with_tutel:
        library("tutel", TUTEL_PIP)
    if (size.top_k, size.activation, size.bias) != (2, "gelu", True):
        raise NotHere("torchscale's gate is top-2, its experts have GELU and biases")
    if not dist.is_initialized():
        store = f"file://{tempfile.mkdtemp()}/store"
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl", store, rank=0, world_size=1)
    return _Mixer(layer, size, modules, with_tutel)


class _Mixer(nn.Module):
    def __init__(self, layer: MultiHeadMoE, size: Size, modules: list[Any], with_tutel: bool) -> None:
        super().__init__()
        moe_layer, routing = modules
        feed_forward = library("torchscale.component.feedforward_network", PIP).FeedForwardNetwork
        width, source = size.dim // size.num_subtokens, layer.routed.experts
        gate = routing.Top2Gate(
            width,
            size.num_experts,
            use_fp32=True,
            second_expert_policy="all",
            normalize_gate_prob_before_dropping=True,
        )
        experts = nn.ModuleList(
            feed_forward(width, size.hidden_dim, "gelu", 0.0, 0.0, 1e-5) for _ in range(size.num_experts)
        )
        with torch.no_grad():
            gate.wg.weight.copy_(layer.routed.router.weight)
            for e, expert in enumerate(experts):
                expert.fc1.weight.copy_(source.fc1_weight[e].t())
                expert.fc2.weight.copy_(source.fc2_weight[e].t())
                expert.fc1.bias.copy_(source.fc1_bias[e])
                expert.fc2.bias.copy_(source.fc2_bias[e])
        self.moe = moe_layer.MOELayer(gate, experts, SimpleNamespace(moe_expert_count=size.num_experts))
        self._modules_patched = [(module, "has_tutel", with_tutel) for module in modules]
        if not with_tutel:
            self._modules_patched.append((routing, "fused_cumsum_sub_one", lambda mask: mask.cumsum(0) - 1))

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        with ExitStack() as stack:
            for patched in self._modules_patched:
                stack.enter_context(patch.object(*patched))
            stack.enter_context(patch.object(torch, "histc", _histc))
            self._seen = rows.detach()
            mixed, balance_loss = self.moe(rows.unsqueeze(0))
        return mixed.squeeze(0), balance_loss

    @property
    def experts(self) -> Tensor:
        return self.moe.gate.wg(self._seen).float().softmax(-1).topk(2).indices

    @property
    def kept(self) -> Tensor:
        num_experts = len(self.moe.experts)
        return rank_choices(self.experts, num_experts) < 2 * -(-len(self._seen) // num_experts)

    def weights(self, of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        found = {"router": of(self.moe.gate.wg.weight)}
        for name in ("fc1", "fc2"):
            linears = [getattr(expert, name) for expert in self.moe.experts]
            found[name] = torch.stack([of(linear.weight).t() for linear in linears])
            found[f"{name}_bias"] = torch.stack([of(linear.bias) for linear in linears])
        return found


_torch_histc = torch.histc


def _histc(x: Tensor, **options: Any) -> Tensor:
    """torch's refuses whole numbers on a CPU; torchscale counts them with it."""
    return _torch_histc(x.float(), **options)
