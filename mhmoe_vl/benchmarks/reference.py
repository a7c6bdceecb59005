"""MH-MoE as a loop over experts in float64: what every contender must equal before it is timed.

It shares no code with the layers. The choice of experts is given, because a float32 router and a float64 one may
differ at ties within rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
"""``head`` and ``merge`` (out, in) with ``head_bias`` and ``merge_bias``; ``router`` (E, d), or for a cosine router
``router_proj`` (R, d), ``router_embedding`` (E, R) and ``router_log_temperature`` (); ``fc1`` (E, d, F), ``fc2``
(E, F, d), with ``fc_gate``, ``fc1_bias``, ``fc2_bias`` where there are any. Head and merge may be left out."""

START_TEMPERATURE = 0.3
"""that the balance loss of a cosine router keeps"""


class Answer(NamedTuple):
    """Output (T, D), balance loss, and the gradients of input and weights by name."""

    y: Tensor
    balance_loss: Tensor
    grads: dict[str, Tensor]


def solve(
    weights: Weights,
    x: Tensor,
    grad_y: Tensor,
    *,
    num_subtokens: int,
    experts: Tensor,
    kept: Tensor,
    gates: Tensor | None,
    balance_weight: float,
) -> Answer:
    """Output and all gradients of ``sum(y * grad_y) + balance_weight * balance_loss``.

    Args:
        weights: see :data:`Weights`.
        x, grad_y: (T, D).
        num_subtokens: pieces of a token.
        experts, kept: (rows, K) choices, and whether capacity kept each.
        gates: (rows, K) fixed weights of the choices; none computes them by router, softmax and division by the sum of
            the chosen.
        balance_weight: of the balance loss over first choices.
    """
    p = {name: value.detach().double().requires_grad_() for name, value in weights.items()}
    source = x.detach().double().requires_grad_()
    rows = _linear(p, "head", source).reshape(len(x) * num_subtokens, -1)
    balance = rows.new_zeros(())
    if gates is None:
        logits, balance_logits = _logits(p, rows)
        probabilities = _softmax(logits)
        chosen = torch.stack([probabilities[torch.arange(len(rows)), column] for column in experts.t()], 1)
        gates = chosen / chosen.sum(-1, keepdim=True)
        shares = torch.stack([(experts[:, 0] == e).double().mean() for e in range(logits.shape[1])])
        balance = logits.shape[1] * (shares * _softmax(balance_logits).mean(0)).sum()
    places, outputs = [], []
    for e in range(len(p["fc1"])):
        for k in range(experts.shape[1]):
            [mine] = torch.where((experts[:, k] == e) & kept[:, k])
            places.append(mine)
            outputs.append(gates[mine, k : k + 1].double() * _expert(p, e, rows[mine]))
    mixed = torch.zeros_like(rows).index_add(0, torch.cat(places), torch.cat(outputs))
    y = _linear(p, "merge", mixed.reshape(x.shape))
    used = {"x": source} | p
    objective = (y * grad_y.double()).sum() + balance_weight * balance
    grads = torch.autograd.grad(objective, list(used.values()), allow_unused=True)
    return Answer(y.detach(), balance.detach(), {n: g for n, g in zip(used, grads, strict=True) if g is not None})


def _linear(p: Weights, name: str, x: Tensor) -> Tensor:
    return x @ p[name].t() + p[f"{name}_bias"] if name in p else x


def _softmax(logits: Tensor) -> Tensor:
    return logits.exp() / logits.exp().sum(-1, keepdim=True)


def _logits(p: Weights, rows: Tensor) -> tuple[Tensor, Tensor]:
    """For choosing, and for the balance loss."""
    if "router" in p:
        logits = rows @ p["router"].t()
        return logits, logits
    projected, embedding = rows @ p["router_proj"].t(), p["router_embedding"]
    lengths = projected.norm(dim=1, keepdim=True) * embedding.norm(dim=1)
    cosines = projected @ embedding.t() / lengths
    return cosines / p["router_log_temperature"].exp(), cosines / START_TEMPERATURE


def _expert(p: Weights, e: int, x: Tensor) -> Tensor:
    def matrix(name: str, v: Tensor) -> Tensor:
        y = v @ p[name][e]
        return y + p[f"{name}_bias"][e] if f"{name}_bias" in p else y

    if "fc_gate" in p:
        gate = matrix("fc_gate", x)
        return matrix("fc2", gate / (1 + (-gate).exp()) * matrix("fc1", x))
    hidden = matrix("fc1", x)
    return matrix("fc2", 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5)))


def largest_error(mine: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest value."""
    scale = float(reference.abs().max()) or 1.0
    return float((mine.double().cpu() - reference.cpu()).abs().max()) / scale
