"""Experts in other people's models: any FFN variant in place of the MLPs of a timm ViT or an open_clip tower."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..nn.ffn import FFN_VARIANTS, FFNOutput, build_ffn
from ..nn.router import Routing

_log = logging.getLogger(__name__)
_FIRST_AND_LAST = (("fc1", "fc2"), ("fc1_x", "fc2"), ("c_fc", "c_proj"))
"""Names of an MLP's first and last matrix: timm's Mlp and relatives, its SwiGLU, open_clip's Sequential."""


class TensorFFN(nn.Module):
    """An FFN variant that returns a plain tensor, as the blocks of other libraries expect.

    The auxiliary losses that a call leaves behind are read by :func:`collect_aux_losses`.

    Args:
        ffn: layer of the FFN contract, returning ``FFNOutput``.
        sequence_first: inputs come as ``(N, B, D)``; they reach ``ffn`` as ``(B, N, D)``.
    """

    def __init__(self, ffn: nn.Module, *, sequence_first: bool = False) -> None:
        super().__init__()
        self.ffn, self.sequence_first = ffn, sequence_first

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., D)`` to the same shape."""
        if self.sequence_first:
            return self.ffn(x.transpose(0, 1)).x.transpose(0, 1)
        return self.ffn(x).x

    @property
    def c_fc(self) -> SimpleNamespace:
        """What open_clip looks at to learn a tower's dtype: an object with a ``weight``."""
        return SimpleNamespace(weight=next(self.ffn.parameters()))


def replace_mlps(model: nn.Module, every: int = 2, kind: str = "mh_moe", **ffn_options: Any) -> nn.Module:
    """Put an FFN variant in place of every ``every``-th block's MLP, in place.

    Blocks are counted from 1 within their list, so ``every=2`` of 12 blocks replaces the 2nd, 4th, ... 12th, as
    the paper places its expert layers. Known MLPs are timm's (``fc1``/``fc2``, SwiGLU included) and open_clip's
    (``c_fc``/``c_proj``); those outside numbered blocks, such as a pooling head's, stay. New layers take device and
    dtype of the old ones, fresh weights, and no dropout. How many were replaced is logged (level INFO). The auxiliary
    losses of a forward are gathered by :func:`collect_aux_losses`.

    Args:
        model: a timm Vision Transformer, an open_clip model or tower, or anything built from their blocks.
        every: distance between replaced blocks; 1 replaces all.
        kind: ``dense``, ``moe`` or ``mh_moe``.
        ffn_options: of that variant, e.g. ``num_experts=8, num_subtokens=4``; ``hidden_dim`` is 4 times the width
            unless given.

    Returns:
        ``model`` itself.

    Raises:
        ConfigError: no MLP was found to replace, or an option does not fit.
    """
    if every < 1:
        raise ConfigError(f"every: {every} is not a distance between blocks (give 1 or more)")
    # Build all before touching the model: an option that does not fit leaves it as it was.
    layers = {name: _replacement(model, name, kind, ffn_options) for name in _chosen(model, every)}
    if not layers:
        raise ConfigError(
            f"{type(model).__name__}: no MLP to replace in blocks {every}, {2 * every}, ..."
            " (lower every, or give a model of timm blocks with fc1/fc2 or open_clip blocks with c_fc/c_proj)"
        )
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    _log.info("%s: replaced %d MLPs by %s: %s", type(model).__name__, len(layers), kind, ", ".join(layers))
    return model


def _chosen(model: nn.Module, every: int) -> list[str]:
    """Names of the MLPs in every ``every``-th block of each list of blocks."""
    ours = (TensorFFN, *FFN_VARIANTS.values())
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, ours))
    position: Counter[str] = Counter()
    chosen = []
    for name, module in model.named_modules():
        blocks = re.match(r"(?:(.*)\.)?\d+\.", name)
        if blocks is None or name.startswith(inside):
            continue
        # A replaced block keeps its place in the count, so that a second call goes on where the first left off.
        is_mlp = _ends(module) is not None
        if is_mlp or isinstance(module, TensorFFN):
            position[blocks[1] or ""] += 1
            if is_mlp and not isinstance(module, ours) and position[blocks[1] or ""] % every == 0:
                chosen.append(name)
    return chosen


def _ends(module: nn.Module) -> tuple[nn.Linear, nn.Linear] | None:
    """First and last matrix of an MLP; none when ``module`` is no known MLP."""
    for names in _FIRST_AND_LAST:
        first, last = (module._modules.get(name) for name in names)
        if isinstance(first, nn.Linear) and isinstance(last, nn.Linear) and first.in_features == last.out_features:
            return first, last
    return None


def _replacement(model: nn.Module, name: str, kind: str, options: dict[str, Any]) -> TensorFFN:
    first, _ = _ends(model.get_submodule(name))
    block = model.get_submodule(name.rpartition(".")[0])
    sequence_first = any(isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in block.children())
    layer = TensorFFN(build_ffn(first.in_features, kind=kind, **options), sequence_first=sequence_first)
    return layer.to(first.weight.device, first.weight.dtype).train(block.training)


class AuxLosses:
    """What the expert layers of a model said during :func:`collect_aux_losses`.

    Attributes:
        routing: one ``Routing`` per layer call, in order; empty unless asked for.
    """

    def __init__(self) -> None:
        self.routing: list[Routing] = []
        self._losses: dict[str, list[Tensor]] = {"balance_loss": [], "z_loss": []}

    def _add(self, output: FFNOutput) -> None:
        for name, values in self._losses.items():
            values.append(output.aux_losses.get(name, torch.zeros((), device=output.x.device)))
        if output.routing is not None:
            self.routing.append(output.routing)

    def _mean(self, name: str) -> Tensor:
        if not self._losses[name]:
            raise ConfigError(f"{name}: no replaced layer has run (call the model inside collect_aux_losses)")
        return torch.stack(self._losses[name]).mean()

    @property
    def balance_loss(self) -> Tensor:
        """Mean balance loss over all layer calls, 1 at perfect balance; the paper adds 0.01 of it. 0 when dense."""
        return self._mean("balance_loss")

    @property
    def z_loss(self) -> Tensor:
        """Mean squared log-sum-exp of the router's logits over all layer calls. 0 when dense."""
        return self._mean("z_loss")


@contextmanager
def collect_aux_losses(model: nn.Module, routing: bool = False) -> Iterator[AuxLosses]:
    """Gather the auxiliary losses of the layers that :func:`replace_mlps` put into ``model``.

    ::

        with collect_aux_losses(model) as losses:
            loss = criterion(model(images), labels)
        (loss + 0.01 * losses.balance_loss).backward()

    Use one context per training step: losses of all forwards inside are averaged and keep their graphs. The hooks
    that listen are gone afterwards. Not for gradient checkpointing, which runs layers twice.

    Args:
        model: holds replaced layers.
        routing: gather the ``Routing`` of every call too.

    Raises:
        ConfigError: ``model`` holds no replaced layer.
    """
    layers = [module.ffn for module in model.modules() if isinstance(module, TensorFFN)]
    if not layers:
        raise ConfigError(f"{type(model).__name__}: holds no replaced layers (call replace_mlps first)")
    losses = AuxLosses()

    def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "return_routing": routing}

    def listen(module: nn.Module, args: tuple[Any, ...], output: FFNOutput) -> None:
        losses._add(output)

    handles = [layer.register_forward_pre_hook(ask, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(listen) for layer in layers]
    try:
        yield losses
    finally:
        for handle in handles:
            handle.remove()
