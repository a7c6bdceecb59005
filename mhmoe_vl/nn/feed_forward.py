"""The dense feed-forward layer, and the interface that it shares with the sparse ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import inner_width
from ..errors import ConfigError
from .router import Routing, RoutingStats

Activation = Literal["gelu", "relu", "swiglu"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "swiglu": F.silu}
"""Non-linearity by name; for ``swiglu`` the one of the gate: silu(x W_gate) * (x W_1)."""


class FFNOutput(NamedTuple):
    """What every feed-forward layer returns.

    Attributes:
        x: the output, shaped as the input; a list of them from ``forward_streams``.
        aux_losses: ``balance_loss`` and ``z_loss``, means over the routed rows (of all ranks, in training); empty when
            the layer is dense.
        routing: every choice made, when asked for.
        stats: counts and entropy of this call, None when dense.
    """

    x: Any
    aux_losses: dict[str, Tensor]
    routing: Routing | None
    stats: RoutingStats | None


class FFNLayer(nn.Module, ABC):
    """A feed-forward layer over one tensor of tokens or several; sub-classes define :meth:`forward_streams`."""

    def forward(self, x: Tensor, padding: Tensor | None = None, *, return_routing: bool = False) -> FFNOutput:
        """One stream.

        Args:
            x: tokens (..., D); (B, N, D) where the layer convolves.
            padding: bool, shaped as ``x`` without its last axis; True marks padding.
            return_routing: return every choice of the router too.
        """
        output = self.forward_streams([x], [padding], return_routing=return_routing)
        return FFNOutput(output.x[0], *output[1:])  # torch 2.11's compiler stumbles over _replace

    @abstractmethod
    def forward_streams(
        self,
        xs: Sequence[Tensor],
        paddings: Sequence[Tensor | None] | None = None,
        *,
        return_routing: bool = False,
    ) -> FFNOutput:
        """Several streams of tokens through the same weights; by convention stream 0 is image and 1 is text."""

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must leave alone although they have more than one axis, or none."""
        return set()


def check_activation(activation: str) -> None:
    """Raises ConfigError for an unknown activation."""
    if activation not in ACTIVATIONS:
        raise ConfigError(f"ffn: activation {activation!r} is unknown (choose from {', '.join(ACTIVATIONS)})")


class FeedForward(FFNLayer):
    """Two matrices with a non-linearity between them, row by row.

    y = W_2 LN(act(W_1 x)); with ``swiglu`` y = W_2 LN(silu(W_g x) * W_1 x). The LayerNorm over the inner width
    (sub-LN, Magneto and BEiT-3) is there with ``sub_ln`` only. Padding is computed like any other row.

    Args:
        dim: width of a token.
        hidden_dim: inner width; None means 4 ``dim``.
        activation: ``gelu``, ``relu`` or ``swiglu`` (a third matrix ``fc_gate``).
        bias: biases on all matrices.
        sub_ln: LayerNorm before the second matrix.
        norm_eps: epsilon of that LayerNorm.

    Raises:
        ConfigError: unknown activation, or an inner width below 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden_dim: int | None = None,
        activation: Activation = "gelu",
        bias: bool = True,
        sub_ln: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        check_activation(activation)
        hidden_dim = inner_width(dim, hidden_dim)
        self.activation = activation
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.fc_gate = nn.Linear(dim, hidden_dim, bias=bias) if activation == "swiglu" else None
        self.ffn_norm = nn.LayerNorm(hidden_dim, eps=norm_eps) if sub_ln else nn.Identity()
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)

    def transform(self, x: Tensor) -> Tensor:
        """The layer as a plain function: (..., D) -> (..., D)."""
        act = ACTIVATIONS[self.activation]
        hidden = act(self.fc1(x)) if self.fc_gate is None else act(self.fc_gate(x)) * self.fc1(x)
        return self.fc2(self.ffn_norm(hidden))

    def forward_streams(
        self,
        xs: Sequence[Tensor],
        paddings: Sequence[Tensor | None] | None = None,
        *,
        return_routing: bool = False,
    ) -> FFNOutput:
        """See :class:`FFNLayer`; nothing is routed, so there are no losses, routing or stats."""
        return FFNOutput([self.transform(x) for x in xs], {}, None, None)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
