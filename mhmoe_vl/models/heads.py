"""Output heads of the fine-tuning tasks, under the names of the published BEiT-3 checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, one_line

_STD = 0.02
_NAME_BYTES = 255


class Pooler(nn.Module):
    """``tanh(W LN(x))`` of the first token, ``(B, N, D)`` to ``(B, D)``; of image tokens the class token.

    Args:
        dim: token width D.
        norm_eps: epsilon of the LayerNorm.
    """

    def __init__(self, dim: int, *, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.dense = start(nn.Linear(dim, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """The pooled features."""
        return self.dense(self.norm(tokens[:, 0])).tanh()


def answer_head(dim: int, num_answers: int, *, norm_eps: float) -> nn.Sequential:
    """BEiT-3's VQA head: D -> 2D, LayerNorm, GELU, 2D -> answers.

    Every answer starts with the probability 1 / answers, not 1/2: otherwise the first steps teach all layers below to
    push all answers down, and saturate the pooler.
    """
    norm = nn.LayerNorm(2 * dim, eps=norm_eps)
    last = start(nn.Linear(2 * dim, num_answers))
    nn.init.constant_(last.bias, -math.log(max(1, num_answers - 1)))
    return nn.Sequential(start(nn.Linear(dim, 2 * dim)), norm, nn.GELU(), last)


class StatementHead(nn.Module):
    """BEiT-3's NLVR2 head: LayerNorm, linear to 2D, LayerNorm, GELU, linear to false and true.

    The published code starts the linear layers 1,000 times smaller. That is a saddle point where statement and pictures
    tell the truth only together: neither layer gets a gradient before the other one has grown.

    Args:
        dim: token width D.
        num_features: features of width D that come in, concatenated.
        norm_eps: epsilon of the LayerNorms.
    """

    def __init__(self, dim: int, num_features: int, *, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(num_features * dim, eps=norm_eps)
        self.dense1 = start(nn.Linear(num_features * dim, 2 * dim))
        self.norm2 = nn.LayerNorm(2 * dim, eps=norm_eps)
        self.dense2 = start(nn.Linear(2 * dim, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, 2)`` of ``(B, num_features * D)``."""
        return self.dense2(nn.functional.gelu(self.norm2(self.dense1(self.norm1(x)))))


def start(linear: nn.Linear) -> nn.Linear:
    """Fill a head's linear layer as BEiT-3 does (normal with 0.02, cut at 2, zero bias) and return it."""
    nn.init.trunc_normal_(linear.weight, std=_STD)
    nn.init.zeros_(linear.bias)
    return linear


class ClassNames(nn.Module):
    """The names of a head's classes in their order: saved with the weights, and compared when weights are loaded.

    Args:
        names: at most 255 bytes each.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        rows = [list(name.encode().ljust(_NAME_BYTES, b"\0")) for name in names]
        self.register_buffer("names", torch.tensor(rows, dtype=torch.uint8))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        saved = state_dict.get(f"{prefix}names")
        if saved is not None and saved.shape == self.names.shape:
            differ = (saved.cpu() != self.names.cpu()).any(1).nonzero().flatten().tolist()
            if differ:
                theirs, ours = (_name(names[differ[0]]) for names in (saved, self.names))
                raise CheckpointError(
                    f"{prefix}names: class {differ[0]} is {theirs!r} in the weights and {ours!r} in the data;"
                    f" {len(differ)} classes differ (give task.classes in the order of the weights)"
                )
        super()._load_from_state_dict(state_dict, prefix, *others)


def _name(row: Tensor) -> str:
    return one_line(bytes(row.tolist()).rstrip(b"\0").decode(errors="replace"), 60)


class ClassList(nn.Module):
    """The hash of a head's classes: saved with the weights, and compared when weights are loaded.

    Args:
        sha256: in hexadecimal.
        layer: name in the model of the layer whose outputs the classes are.
    """

    def __init__(self, sha256: str, layer: str) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("sha256", torch.tensor(list(bytes.fromhex(sha256)), dtype=torch.uint8))

    def differs(self, saved: Tensor | None) -> bool:
        """Whether a saved hash is that of another list; none is not."""
        return saved is not None and not torch.equal(saved.cpu(), self.sha256.cpu())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        saved = state_dict.get(f"{prefix}sha256")
        if self.differs(saved):
            ours, theirs = (bytes(value.tolist()).hex()[:12] for value in (self.sha256.cpu(), saved.cpu()))
            raise CheckpointError(
                f"{prefix}sha256: weights were trained for the list of classes {theirs}..., this one is {ours}..."
                " (give the list that their run recorded)"
            )
        super()._load_from_state_dict(state_dict, prefix, *others)
