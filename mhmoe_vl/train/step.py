"""One update of the weights, from the parts of one batch on every rank."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import distributed
from ..config import RunConfig
from ..tasks.base import Batch, Task
from . import optim
from .log import RoutingTotals
from .system import uses_bfloat16


class Autocast:
    """Makes the context that models run in: bfloat16 where ``precision`` and ``device`` have it."""

    def __init__(self, precision: str, device: torch.device) -> None:
        self.device, self.enabled = device, uses_bfloat16(precision, device)

    def __call__(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.enabled)


class Counts(NamedTuple):
    """What a step's parts hold, summed over ranks: targets by loss term, samples by part, bad samples, pictures, and
    texts that were cut."""

    targets: dict[str, int]
    samples: list[int]
    bad: int
    images: int
    texts_cut: int


class Step(NamedTuple):
    """What an update did: the numbers of its log line (empty when not asked for), and what kept it from being made
    (empty when it was): losses, routers by layer and rank, gradients by parameter."""

    values: dict[str, Any]
    not_finite: list[str]


class Trainer:
    """A model with its optimizer and moving average, and how a batch changes them.

    Attributes:
        model: the weights; ``ema`` their moving average, or none.
        optimizer: AdamW over the model's trainable parameters.
        autocast: makes the context that the model runs in.
    """

    def __init__(self, task: Task, model: nn.Module, config: RunConfig, device: torch.device) -> None:
        self.task, self.config, self.device = task, config, device
        self.model = model.to(device)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = optim.build_optimizer(self.model, config.optim)
        self.ema = ModelEmaV3(self.model, decay=config.train.ema_decay) if config.train.ema_decay else None
        self.autocast: Callable[[], AbstractContextManager] = Autocast(config.train.precision, device)
        self.aux_weights = {"balance_loss": config.optim.balance_loss_weight, "z_loss": config.optim.z_loss_weight}
        self.network = model

    def distribute(self) -> None:
        """Compile the model if asked to, and average gradients over ranks; once the weights are in their places."""
        if self.config.train.compile:
            self.model.compile()
        self.network = _data_parallel(self.model)

    def count(self, parts: list[Batch]) -> Counts:
        """What all ranks' ``parts`` hold together."""
        terms = [self.task.num_targets(part) for part in parts]
        names = sorted(terms[0])
        mine = [sum(term[name] for term in terms) for name in names]
        mine += [len(part) for part in parts]
        mine += [sum(sum(part.bad.values()) for part in parts), sum(_num_images(part) for part in parts)]
        mine += [sum(getattr(part, "texts_cut", 0) for part in parts)]
        totals = distributed.all_reduce_sum(torch.tensor(mine, device=self.device)).tolist()
        targets = dict(zip(names, totals[: len(names)], strict=True))
        return Counts(targets, totals[len(names) : -3], *totals[-3:])

    def update(self, step: int, parts: list[Batch], counts: Counts, *, logged: bool) -> Step:
        """Update ``step`` from this rank's ``parts``; left out on all ranks when any loss or gradient is not finite:
        weights, buffers and optimizer state are then as before."""
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        parts = [part for part, samples in zip(parts, counts.samples, strict=True) if samples]
        stats = []
        sums = torch.zeros(len(counts.targets) + len(self.aux_weights), device=self.device)
        for number, part in enumerate(parts):
            alone = number < len(parts) - 1 and self.network is not self.model
            with self.network.no_sync() if alone else nullcontext():
                part_sums, part_stats = self._backward(part, counts.targets, len(parts))
            sums += part_sums
            stats.append(part_stats)
        self._complete_gradients()
        norm = optim.gradient_norm(self.parameters)
        # Nothing, or NaN where this rank alone sees a bad gradient, so that all ranks decide alike.
        totals = distributed.all_reduce_sum(torch.cat([sums, 0 * norm[None]]))
        lr = optim.learning_rate(step, self.config.train.steps, self.config.optim)
        losses = totals[:-1]
        finite = bool(parts) and bool(torch.isfinite(totals).all())
        if finite:
            optim.clip_gradients(self.parameters, norm, self.config.optim.clip_grad)
            optim.set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update(self.model)
        named = self._named(losses.tolist(), list(counts.targets)) if logged or not finite else {}
        not_finite = [] if finite else self._not_finite(named, stats)
        if not finite:
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        self.optimizer.zero_grad()
        if not logged:
            return Step({}, not_finite)
        routing = RoutingTotals()
        for part_stats in stats:
            routing.add(part_stats)
        return Step(named | {"grad_norm": float(norm), "lr": lr} | routing.values(), not_finite)

    def _not_finite(self, losses: dict[str, float], stats: list[dict[str, Any]]) -> list[str]:
        """What is not finite, over all ranks: routers first, then losses, then gradients."""
        pools = {name for part in stats for name, pool in part.items() if not torch.isfinite(pool.entropy)}
        mine = [{"pool": name, "rank": distributed.rank()} for name in sorted(pools)]
        routers = [f"router of {found['pool']} (rank {found['rank']})" for found in distributed.gather_records(mine)]
        terms = [name for name, value in losses.items() if name != "loss" and not math.isfinite(value)]
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        gradients = [p for p in self.parameters if not torch.isfinite(p.grad).all()]
        found = routers + terms + [f"gradient of {names[id(parameter)]}" for parameter in gradients]
        return found or (["norm of all gradients"] if stats else ["no samples"])

    def _backward(self, part: Batch, targets: dict[str, int], num_parts: int) -> tuple[Tensor, dict[str, Any]]:
        """Add a part's gradients. Gives its share of each loss term, in the order of ``targets``, then of
        ``aux_weights``, and its routing statistics.

        Terms are divided by the targets of all ranks and parts. Data-parallel training averages gradients over ranks,
        so terms are multiplied by the number of ranks; auxiliary losses are equal on all ranks as they are.
        """
        world = distributed.world_size()
        batch = self.task.prepare(part, self.device)
        with self.autocast():
            output = self.network(batch)
            terms = self.task.loss(output, batch)
        shares = {name: value.float() / max(1, targets[name]) for name, value in terms.items()}
        aux = {name: value.float() / num_parts for name, value in output.aux_losses.items()}
        objective = world * sum(shares.values()) + sum(self.aux_weights[name] * value for name, value in aux.items())
        # Plus nothing of each output: an absent term then has a zero gradient, and no rank waits for another.
        objective = objective + sum(v.flatten()[:0].sum() for v in output.values.values() if v.requires_grad)
        if isinstance(objective, Tensor) and objective.requires_grad:
            objective.backward()
        zero = torch.zeros((), device=self.device)
        values = [shares.get(name, zero) for name in targets]
        values += [aux.get(name, zero) / world for name in self.aux_weights]
        return torch.stack([value.detach() for value in values]), output.stats

    def _complete_gradients(self) -> None:
        """A parameter that no part of this step has used gets a zero gradient, on one rank as on many."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _named(self, losses: list[float], terms: list[str]) -> dict[str, float]:
        """``loss``, ``loss/<term>``, ``balance_loss`` and ``z_loss``."""
        parts = dict(zip([*terms, *self.aux_weights], losses, strict=True))
        total = sum(value * self.aux_weights.get(name, 1.0) for name, value in parts.items())
        return {"loss": total} | {f"loss/{n}" if n in terms else n: value for n, value in parts.items()}


def _data_parallel(model: nn.Module) -> nn.Module:
    """``model`` with gradients averaged over ranks; itself for one rank.

    A model in which some parameters take no part in some batches says so with ``find_unused_parameters = True``. The
    averaging has a process group of its own: layers exchange statistics in the backward pass as well, in an order that
    depends on what a rank's batch holds.
    """
    if distributed.world_size() == 1:
        return model
    # torch 2.14 renamed the option and warns of the old name.
    known = inspect.signature(DistributedDataParallel).parameters
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(
        model,
        process_group=dist.new_group(),
        gradient_as_bucket_view=True,
        find_unused_parameters=getattr(model, "find_unused_parameters", False),
        **{sync_buffers: False},
    )


def _num_images(batch: Batch) -> int:
    images = getattr(batch, "images", None)
    return 0 if images is None else len(images)
