"""Learning rate, parameter groups and AdamW, with a state that travels as named tensors."""

from __future__ import annotations

import math

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..config import OptimConfig
from ..errors import CheckpointError, ConfigError


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of update ``step`` (from 0) of ``steps``; a pure function.

    Linear warm-up ``lr * (step + 1) / warmup_steps``, then cosine or linear decay that reaches ``min_lr`` at the last
    update, or for ``steps`` a tenth of ``lr`` from 8/9 of all updates on and a hundredth from 26/27 on (ViTDet's).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "steps":
        return config.lr * 0.1 ** ((9 * step >= 8 * steps) + (27 * step >= 26 * steps))
    done = min(1.0, (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps))
    left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.min_lr + (config.lr - config.min_lr) * left


def param_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """timm's parameter groups: no weight decay for vectors and for what any submodule's ``no_weight_decay()`` names.

    With ``layer_decay`` below 1 each group has an ``lr_scale``, by the model's ``group_matcher()``. A
    ``head_lr_factor`` multiplies the ``lr_scale`` of parameters below the submodule ``head``, as BEiT-3's
    optim_factory.py does: a pooler before it learns as its layer does.

    Raises:
        ConfigError: layer decay is asked of a model that does not say which layers it has, or a factor for the head
            of one that has none.
    """
    groups = _decay_groups(model, config)
    return groups if config.head_lr_factor == 1 else _part_head(model, groups, config.head_lr_factor)


def _decay_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    spared = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name in getattr(module, "no_weight_decay", set)()
    }
    if config.layer_decay == 1:
        return param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=spared)
    if not hasattr(model, "group_matcher"):
        who = f"{type(model).__name__}, which has no group_matcher"
        raise ConfigError(f"optim.layer_decay: {config.layer_decay} for {who} (set it to 1)")
    return param_groups_layer_decay(model, config.weight_decay, spared, layer_decay=config.layer_decay)


def _part_head(model: nn.Module, groups: list[dict], factor: float) -> list[dict]:
    """Each group as two: what is below ``head``, with ``factor`` times the ``lr_scale``, and the rest."""
    head = {id(parameter) for name, parameter in model.named_parameters() if name.startswith("head.")}
    if not head:
        who = f"{type(model).__name__}, which has no parameters in a submodule head"
        raise ConfigError(f"optim.head_lr_factor: {factor} for {who} (set it to 1)")
    parted = []
    for group in groups:
        scale = group.get("lr_scale", 1.0)
        inside = [parameter for parameter in group["params"] if id(parameter) in head]
        outside = [parameter for parameter in group["params"] if id(parameter) not in head]
        parted += [
            group | {"params": outside, "lr_scale": scale},
            group | {"params": inside, "lr_scale": scale * factor},
        ]
    return [group for group in parted if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
    """AdamW over :func:`param_groups`, in one fused kernel where torch has it for the device."""
    groups = param_groups(model, config)
    options = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    try:
        return AdamW(groups, **options, fused=True)
    except RuntimeError:
        return AdamW(groups, **options)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Give every group ``lr`` times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def _names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Parameter names in the order in which the optimizer numbers them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``<parameter name>:<key>`` tensors."""
    names, state = _names(model, optimizer), optimizer.state_dict()["state"]
    return {f"{names[index]}:{key}": value for index, entry in state.items() for key, value in entry.items()}


def load_optimizer_tensors(model: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` gave.

    Raises:
        CheckpointError: a tensor belongs to no parameter or has another shape.
    """
    numbers = {name: index for index, name in enumerate(_names(model, optimizer))}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    state: dict[int, dict[str, Tensor]] = {}
    for place, value in tensors.items():
        name, _, key = place.rpartition(":")
        if name not in numbers or (value.ndim and value.shape != shapes[name]):
            shape = tuple(value.shape)
            raise CheckpointError(f"optimizer state {place!r} {shape} fits no parameter (take another checkpoint)")
        state.setdefault(numbers[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Norm of all gradients together."""
    return torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])


def clip_gradients(parameters: list[nn.Parameter], norm: Tensor, most: float | None) -> None:
    """Scale gradients whose norm together is ``norm`` down to at most ``most``, if that is given."""
    if most is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
