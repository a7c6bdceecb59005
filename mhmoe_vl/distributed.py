"""Data-parallel ranks: who am I, sums, records and tensors between them. Without a process group there is one rank, 0.

Records and settings travel as JSON, weights as raw tensors; nothing is ever pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import errors
from .errors import ConfigError, MhmoeError, TrainingError, describe_os_error, one_line

TIMEOUT = timedelta(minutes=30)
"""How long a collective waits for a lost or hung rank before the job ends."""

GRACE = 5.0
"""Seconds that ranks wait for each other's last words when a collective has failed."""

_alone = False
_store: dist.Store | None = None


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process among the data-parallel ranks; 0 without a process group."""
    return dist.get_rank() if _initialised() else 0


def world_size() -> int:
    """Number of data-parallel ranks; 1 without a process group."""
    return dist.get_world_size() if _initialised() else 1


def is_main() -> bool:
    """Whether this rank writes files and speaks."""
    return rank() == 0


def select_device(name: str) -> torch.device:
    """The device that a configuration names; ``auto`` and ``cuda`` take the GPU of this rank on its node.

    Raises:
        ConfigError: the device does not exist here, or is neither the processor nor a GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        known = device.type in ("cpu", "cuda")
    except RuntimeError:
        known = False
    if not known:
        raise ConfigError(f"train.device: {name!r} is no device to train on (set cpu, cuda, cuda:1 or auto)")
    if device.type == "cpu":
        return device
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    if index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"train.device: cuda:{index} is not among {count} GPUs (set train.device cpu)")
    return torch.device("cuda", index)


def init_process_group(device: torch.device) -> None:
    """Join the ranks that ``torchrun`` started (NCCL on GPUs, gloo else); does nothing in a single process."""
    global _store
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _initialised():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, number, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=number,
        world_size=world,
        timeout=TIMEOUT,
    )
    _store = dist.PrefixStore("last words", store)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    global _store
    _store = None
    if _initialised():
        dist.destroy_process_group()


@contextlib.contextmanager
def lost_ranks_named() -> Iterator[None]:
    """Inside, a collective that fails because another rank ended or hangs becomes one line that names the rank.

    Every rank that fails leaves its last words where the others find them; who says nothing within :data:`GRACE` is
    gone or hangs.

    Raises:
        TrainingError: on the ranks that waited for the lost one.
    """
    try:
        yield
    except Exception as error:
        if world_size() == 1 or _store is None:
            raise
        waited = _is_collective(error)
        words = "" if waited else one_line(str(error) or type(error).__name__, 150)
        lost = _last_words(words)
        if not waited:
            raise
        named = "; ".join(f"rank {number}: {said}" for number, said in lost.items())
        said = named or one_line(error, 100)
        raise TrainingError(f"lost contact with other ranks: {said} (run the same command to go on)") from error


def _is_collective(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _last_words(mine: str) -> dict[int, str]:
    """Leave ``mine`` (empty: this rank only waited), and hear who else ended: words, or silence, by rank."""
    lost: dict[int, str] = {}
    until = time.monotonic() + GRACE
    try:
        _store.set(str(rank()), mine)
        silent = set(range(world_size())) - {rank()}
        while silent and time.monotonic() < until:
            for number in [number for number in silent if _store.check([str(number)])]:
                silent.remove(number)
                if words := _store.get(str(number)).decode(errors="replace"):
                    lost[number] = words
            time.sleep(0.05)
    except (RuntimeError, OSError):  # the store lives with rank 0, where torchrun does not keep it
        silent = {0}
    return lost | dict.fromkeys(sorted(silent), "ended or hangs without a word")


@contextlib.contextmanager
def independent() -> Iterator[None]:
    """Inside, :func:`all_reduce_sum` leaves its argument alone.

    For evaluation: ranks may hold different numbers of batches, so that layers must not wait for each other.
    """
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of ``x`` over ranks, the same shape; its gradient is the sum of all ranks' gradients.

    A loss formed from such a sum is equal on every rank; after data-parallel averaging its gradient is the one
    that a single process with all samples would have. Returns ``x`` itself for one rank.
    """
    return x if world_size() == 1 or _alone else _AllReduceSum.apply(x)


def _wire() -> torch.device:
    """Where collectives of the current process group want their tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def gather_bytes(data: bytes) -> list[bytes]:
    """Every rank's ``data``, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [data]
    sizes = [torch.zeros(1, dtype=torch.int64, device=_wire()) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(data)], device=_wire()))
    longest = max(int(size) for size in sizes)
    mine = torch.zeros(longest, dtype=torch.uint8)
    mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else mine[:0]
    parts = [torch.zeros(longest, dtype=torch.uint8, device=_wire()) for _ in sizes]
    dist.all_gather(parts, mine.to(_wire()))
    return [bytes(part[: int(size)].cpu().numpy()) for part, size in zip(parts, sizes, strict=True)]


def gather_records(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All ranks' records, rank after rank, on every rank.

    They pass through JSON on one rank too, so that tuples are lists and keys are text however many ranks run.
    """
    return [record for part in gather_bytes(json.dumps(records).encode()) for record in json.loads(part)]


def max_over_ranks(value: int) -> int:
    """The largest ``value`` of any rank."""
    if world_size() == 1:
        return value
    largest = torch.tensor(value, device=_wire())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def broadcast_json(value: Any) -> Any:
    """Rank 0's JSON value on every rank (the value of other ranks is not looked at)."""
    return json.loads(gather_bytes(json.dumps(value if is_main() else None).encode())[0])


def broadcast_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rank 0's named CPU tensors on every rank (other ranks pass an empty mapping)."""
    if world_size() == 1:
        return tensors
    header = broadcast_json([[k, str(v.dtype).removeprefix("torch."), list(v.shape)] for k, v in tensors.items()])
    result = {}
    for name, dtype, shape in header:
        value = tensors[name].contiguous() if is_main() else torch.empty(shape, dtype=getattr(torch, dtype))
        value = value.to(_wire())
        dist.broadcast(value, src=0)
        result[name] = value.cpu()
    return result


def on_main(action: Callable[[], Any]) -> Any:
    """The JSON value of ``action``, which only rank 0 runs; an error of ours in it is raised on every rank, and one of
    files and disks as a TrainingError."""
    outcome, raised = None, None
    if is_main():
        try:
            outcome = {"value": action()}
        except BrokenPipeError:
            raise
        except (MhmoeError, OSError) as error:
            raised = error if isinstance(error, MhmoeError) else TrainingError(describe_os_error(error))
            outcome = {"error": type(raised).__name__, "message": str(raised)}
    outcome = broadcast_json(outcome)
    if "error" in outcome:
        raise raised or getattr(errors, outcome["error"])(outcome["message"])
    return outcome["value"]
