"""What the adapters share."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

from ...nn.moe import RoutedExperts


class NotHere(Exception):
    """A contender that cannot run here; the message says why."""


def library(name: str, pip: str) -> ModuleType:
    """A module of an optional library.

    Raises:
        NotHere: it is missing; the message has the pip line.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotHere(f"{name.split('.')[0]} is missing ({error}): pip install {pip}") from error


def needs_gpu(device: torch.device, name: str) -> None:
    """Raises NotHere on a CPU."""
    if device.type != "cuda":
        raise NotHere(f"{name} needs a GPU")


class Mixer(nn.Module, ABC):
    """A linear router of ours in front of a library's experts.

    Args:
        routed: gives the router's weight and ``top_k``.

    Attributes:
        experts, kept: (T, K) choices of the last call.
    """

    def __init__(self, routed: RoutedExperts) -> None:
        super().__init__()
        self.router, self.top_k = routed.router.weight, routed.top_k

    def choose(self, rows: Tensor) -> Tensor:
        """Gates (T, K), which sum to 1 in every row; ``experts`` and ``kept`` are set."""
        with torch.autocast(rows.device.type, enabled=False):
            probabilities = (rows.float() @ self.router.t()).softmax(-1)
        self.experts = probabilities.detach().topk(self.top_k).indices
        self.kept = torch.ones_like(self.experts, dtype=torch.bool)
        gates = probabilities.gather(1, self.experts)
        return gates / gates.sum(-1, keepdim=True)

    @abstractmethod
    def weights(self, of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        """``of`` of every parameter, by the reference's names and in its shapes."""
