"""What is timed: our layers and their paths, dense floors, one-hot dispatch, and other libraries' layers.

Every contender is a module ``x (T, D) -> (y (T, D), balance loss or none)`` that can say which problem it solved, so
that it can be held against :mod:`~mhmoe_vl.benchmarks.reference`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.mh_moe import MultiHeadMoE
from ..nn.moe import MoE
from . import reference
from .one_hot import OneHotExperts
from .opponents import OPPONENTS, build_opponent
from .sizes import Case, Size

BALANCE_WEIGHT = 0.01
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
"""Largest error over largest value, of the output and of every gradient."""

Of = Callable[[nn.Parameter], Tensor]


class Contender(nn.Module, ABC):
    """Sub-classes define the layer, its choices and its weights.

    Attributes:
        num_subtokens: pieces of a token.
        balance_weight: of the balance loss in the objective.
    """

    num_subtokens = 1
    balance_weight = BALANCE_WEIGHT

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output and balance loss."""

    @abstractmethod
    def choices(self, x: Tensor) -> dict[str, Any]:
        """``experts``, ``kept`` and ``gates`` of :func:`~mhmoe_vl.benchmarks.reference.solve`."""

    @abstractmethod
    def weights(self, of: Of) -> dict[str, Tensor]:
        """``of`` of every parameter, by the reference's names and in its shapes."""


class Ours(Contender):
    """A layer of ours.

    Args:
        layer: the layer.
        path: way of dispatch; none lets the layer choose.
    """

    def __init__(self, layer: MultiHeadMoE | MoE, *, path: str | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.num_subtokens = getattr(layer, "num_subtokens", 1)
        if layer.routed.balance_bias is not None:  # such layers report the balance loss but do not train it
            self.balance_weight = 0.0
        if path is not None:
            layer.routed.experts.path = lambda x, num_slots: path

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        output = self.layer(x)
        return output.x, output.aux_losses["balance_loss"]

    def choices(self, x: Tensor) -> dict[str, Any]:
        routing = self.layer(x, return_routing=True).routing
        return {"experts": routing.experts, "kept": routing.kept, "gates": None}

    def weights(self, of: Of) -> dict[str, Tensor]:
        layer, router, experts = self.layer, self.layer.routed.router, self.layer.routed.experts
        found = {}
        if isinstance(layer, MultiHeadMoE):
            found |= _linear("head", layer.head_proj, of) | _linear("merge", layer.merge_proj, of)
        if hasattr(router, "embedding"):
            found |= {"router_proj": of(router.proj.weight), "router_embedding": of(router.embedding)}
            found["router_log_temperature"] = of(router.log_temperature)
        else:
            found["router"] = of(router.weight)
        return found | {name.replace("_weight", ""): of(p) for name, p in experts.named_parameters()}


class Dense(Contender):
    """One feed-forward network for all pieces of all tokens, each taken ``top_k`` times and added up, between the head
    and merge layers of ``layer``: the arithmetic of MH-MoE without routing.

    With one piece it is what an ideal top-k MoE of whole tokens costs (*thick*), with ``num_subtokens`` of them the
    floor of any dispatch here (*thin*): MH-MoE's matrices and its hidden activations.
    """

    def __init__(self, size: Size, layer: MultiHeadMoE, *, num_subtokens: int) -> None:
        super().__init__()
        self.num_subtokens, self.top_k, self.balance_weight = num_subtokens, size.top_k, 0.0
        self.head, self.merge = layer.head_proj, layer.merge_proj
        width = size.dim // num_subtokens
        self.fc1, self.fc2 = nn.Linear(width, size.hidden_dim), nn.Linear(size.hidden_dim, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = self.head(x).view(len(x) * self.num_subtokens, -1)
        out = self.mix(rows.repeat(self.top_k, 1))
        return self.merge(sum(out.chunk(self.top_k)).view(x.shape)), None

    def mix(self, rows: Tensor) -> Tensor:
        """The network itself."""
        return self.fc2(F.gelu(self.fc1(rows)))

    def choices(self, x: Tensor) -> dict[str, Any]:
        experts = torch.zeros(len(x) * self.num_subtokens, self.top_k, dtype=torch.int64, device=x.device)
        return {"experts": experts, "kept": torch.ones_like(experts, dtype=torch.bool), "gates": experts + 1.0}

    def weights(self, of: Of) -> dict[str, Tensor]:
        found = _linear("head", self.head, of) | _linear("merge", self.merge, of)
        for name in ("fc1", "fc2"):
            linear = getattr(self, name)
            found |= {name: of(linear.weight).t().unsqueeze(0), f"{name}_bias": of(linear.bias).unsqueeze(0)}
        return found


class Between(Contender):
    """Another way to mix rows, between the head and merge layers of ``layer``.

    Args:
        layer: gives head and merge layer.
        mixer: rows (T, d) -> (rows, balance loss or none); after a call its ``experts`` and ``kept`` are the choices
            made. ``weights(of)``, where it has it, is that of :class:`Contender` for router and experts.
    """

    def __init__(self, layer: MultiHeadMoE, mixer: nn.Module) -> None:
        super().__init__()
        self.head, self.merge, self.mixer = layer.head_proj, layer.merge_proj, mixer
        self.num_subtokens = layer.num_subtokens

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        mixed, balance_loss = self.mixer(self.head(x).view(len(x) * self.num_subtokens, -1))
        return self.merge(mixed.view(x.shape)), balance_loss

    def choices(self, x: Tensor) -> dict[str, Any]:
        self(x)
        return {"experts": self.mixer.experts, "kept": self.mixer.kept, "gates": None}

    def weights(self, of: Of) -> dict[str, Tensor]:
        return _linear("head", self.head, of) | _linear("merge", self.merge, of) | self.mixer.weights(of)


def _linear(name: str, linear: nn.Linear, of: Of) -> dict[str, Tensor]:
    return {name: of(linear.weight), f"{name}_bias": of(linear.bias)}


# ---------------------------------------------------------------------------------------------- building
def _layer(size: Size, kind: type = MultiHeadMoE, **options: Any) -> Any:
    options |= {"num_subtokens": size.num_subtokens} if kind is MultiHeadMoE else {}
    return kind(
        size.dim,
        num_experts=size.num_experts,
        hidden_dim=size.hidden_dim,
        top_k=size.top_k,
        activation=size.activation,
        bias=size.bias,
        **options,
    )


def _skewed(size: Size, favourite: int | None) -> Contender:
    """Every row's choices hold ``favourite``, so with top-2 half of all choices do; none has the same bias at zero."""
    layer = _layer(size, balance_bias_rate=1e-9)
    if favourite is not None:
        layer.routed.balance_bias[favourite] = 10.0
    return Ours(layer)


BUILDERS: dict[str, Callable[[Size], Contender]] = {
    "mh_moe": lambda size: Ours(_layer(size)),
    "grouped": lambda size: Ours(_layer(size), path="grouped"),
    "split": lambda size: Ours(_layer(size), path="split"),
    "filled": lambda size: Ours(_layer(size), path="filled"),
    "tiles": lambda size: Ours(_layer(size), path="tiles"),
    "cosine": lambda size: Ours(_layer(size, router={"kind": "cosine"})),
    "moe": lambda size: Ours(_layer(size, MoE)),
    "xmoe": lambda size: Ours(_layer(size, MoE, router={"kind": "cosine"})),
    "balanced": lambda size: _skewed(size, None),
    "skewed": lambda size: _skewed(size, 0),
    "thick": lambda size: Dense(size, _layer(size), num_subtokens=1),
    "thin": lambda size: Dense(size, _layer(size), num_subtokens=size.num_subtokens),
    "one_hot": lambda size: _between(size, lambda layer: OneHotExperts(layer.routed)),
}


def _between(size: Size, make: Callable[[MultiHeadMoE], nn.Module]) -> Contender:
    layer = _layer(size)
    return Between(layer, make(layer))


def build(case: Case, device: torch.device) -> Contender:
    """The contender of a case, its weights drawn from seed 0.

    Raises:
        NotHere: its library is missing or cannot do this on ``device``; the message says why.
    """
    torch.manual_seed(0)
    if case.contender in OPPONENTS:
        return _between(case.size, lambda layer: build_opponent(case.contender, layer, case.size, device)).to(device)
    return BUILDERS[case.contender](case.size).to(device)


# ------------------------------------------------------------------------------------------ running, checking
class Run:
    """A contender with inputs: its forward and its forward and backward pass, under autocast where ``dtype`` is
    bfloat16, as in training.

    Args:
        case: contender and size.
        dtype: of the arithmetic; weights are float32.
        device: where.
    """

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        self.contender = build(case, device)
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(1)
        shape = (case.size.tokens, case.size.dim)
        self.x = torch.randn(shape, generator=self.generator).to(device).requires_grad_()
        self.grad_y = torch.randn(shape, generator=self.generator).to(device)
        self.parameters = list(self.contender.parameters())

    def renew(self) -> None:
        """Draws the next input: in training no two batches give the experts the same numbers of rows, and a library
        that keeps something for every such number pays for it."""
        self.x.data.copy_(torch.randn(self.x.shape, generator=self.generator))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @torch.no_grad()
    def forward(self) -> None:
        """Output only, in training mode."""
        with self._autocast():
            self.contender(self.x)

    def forward_backward(self) -> tuple[Tensor, dict[int, Tensor]]:
        """Output and gradients, by the identity of what they belong to."""
        with self._autocast():
            y, balance_loss = self.contender(self.x)
        outputs, grads = [y], [self.grad_y.to(y.dtype)]
        if balance_loss is not None and balance_loss.requires_grad:
            outputs, grads = [y, balance_loss], [*grads, torch.full_like(balance_loss, self.contender.balance_weight)]
        inputs = [self.x, *self.parameters]
        found = torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
        return y.detach(), {id(p): g for p, g in zip(inputs, found, strict=True) if g is not None}

    def error(self) -> float:
        """Largest error of the output and of any gradient against the loop in float64, each over its largest value."""
        contender = self.contender
        with torch.no_grad(), self._autocast():
            choices = contender.choices(self.x)
        y, grads = self.forward_backward()
        answer = reference.solve(
            contender.weights(lambda p: p.detach()),
            self.x,
            self.grad_y,
            num_subtokens=contender.num_subtokens,
            balance_weight=contender.balance_weight,
            **choices,
        )
        mine = contender.weights(lambda p: grads[id(p)]) | {"x": grads[id(self.x)]}
        errors = [reference.largest_error(mine[name], answer.grads[name]) for name in answer.grads if name in mine]
        return max([reference.largest_error(y, answer.y), *errors])
