"""The order of samples, and batches made from it.

Everything here is a pure function of numbers: the order of samples of (seed, epoch), the crop and mask of a sample of
(seed, epoch, sample), the content of a step of its number. So any count of ranks, workers or accumulated parts sees
the same samples at the same step, and to resume is to continue counting.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import AuthenticationError
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import ConfigError, DataError, MhmoeError, one_line
from .sample import BadSample, Sample
from .shards import NoIndexError, ShardSet, stream_samples

SHARD_WINDOW = 16
"""Shards whose samples are mixed with each other in one epoch."""
STREAM_BLOCK = 256
"""Samples mixed with each other where shards can only be streamed."""
WORKER_TIMEOUT = 300.0
LOGGED_BAD_SAMPLES = 20

Transform = Callable[[Sample, np.random.Generator], Any]
logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------ order
def sample_order(sizes: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits the samples: a permutation of ``range(sum(sizes))``, int64.

    Shards are permuted, then samples are permuted inside windows of 16 consecutive shards of that order, so that few
    shards are open at a time.

    Args:
        sizes: samples per shard.
        seed: of the run.
        epoch: from 0.
    """
    rng = np.random.default_rng([seed, epoch])
    starts = np.cumsum([0, *sizes])
    shards = rng.permutation(len(sizes))
    windows = [shards[first : first + SHARD_WINDOW] for first in range(0, len(shards), SHARD_WINDOW)]
    parts = [
        rng.permutation(np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in window]))
        for window in windows
    ]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


@functools.lru_cache(maxsize=8)
def _cached_order(sizes: tuple[int, ...], seed: int, epoch: int) -> np.ndarray:
    return sample_order(sizes, seed, epoch)


def sample_at(sizes: Sequence[int], seed: int, position: int) -> tuple[int, int]:
    """(epoch, sample number) at a position counted over all epochs."""
    epoch, offset = divmod(position, sum(sizes))
    return epoch, int(_cached_order(tuple(sizes), seed, epoch)[offset])


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator for crop, augmentation and mask of one sample in one epoch."""
    return np.random.default_rng([seed, epoch, index, 1])


def stream_seed(seed: int, name: str) -> int:
    """A seed for one of several streams, so that equal shards in two streams are not visited in step."""
    return int(np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0])


# ---------------------------------------------------------------------------------------------- sources
class StreamedShards:
    """Shards that can only be streamed, as a source for :class:`StepDataset`; remote shards without a manifest.

    An epoch passes the shards once, permuted by (seed, epoch), samples mixed inside blocks of 256. Positions are
    reached by reading up to them, from the first epoch on, because nobody knows how long an epoch is; every process
    reads the whole stream and keeps its share. A shard that is lost to a network failure shifts the positions after it.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = list(urls)
        self._iterator: Iterator[tuple[int, int, Sample | BadSample]] | None = None
        self._owner, self._seed, self._next = 0, 0, 0

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_iterator": None}

    def draw(self, seed: int, position: int) -> tuple[int, int, Sample | BadSample]:
        """(epoch, number in the epoch, sample) at a position; the sample is an error where it could not be read."""
        # A forked process must not share its parent's half-read file.
        if (os.getpid(), seed) != (self._owner, self._seed) or self._iterator is None or position < self._next:
            self._iterator, self._owner, self._seed, self._next = self._all(seed), os.getpid(), seed, 0
        for _ in range(position - self._next):
            next(self._iterator)
        self._next = position + 1
        return next(self._iterator)

    def _all(self, seed: int) -> Iterator[tuple[int, int, Sample | BadSample]]:
        epoch = 0
        while True:
            number = -1
            for number, item in enumerate(self._epoch(seed, epoch)):
                yield epoch, number, item
            if number < 0:
                raise DataError(f"{self.urls[0]}: no samples in {len(self.urls)} shards (check the shards)")
            epoch += 1

    def _epoch(self, seed: int, epoch: int) -> Iterator[Sample | BadSample]:
        rng = np.random.default_rng([seed, epoch])
        block: list[Sample | BadSample] = []
        for sample in stream_samples([self.urls[i] for i in rng.permutation(len(self.urls))], block.append):
            block.append(sample)
            while len(block) >= STREAM_BLOCK:
                full, block[:] = block[:STREAM_BLOCK], block[STREAM_BLOCK:]
                yield from (full[i] for i in rng.permutation(STREAM_BLOCK))
        yield from (block[i] for i in rng.permutation(len(block)))


Source = ShardSet | StreamedShards | Sequence[Sample]


def open_shards(urls: Sequence[str]) -> ShardSet | StreamedShards:
    """Random access where there is an index, streaming where there is none."""
    try:
        return ShardSet(urls)
    except NoIndexError as error:
        logger.warning("%s: read as a stream", error)
        return StreamedShards(urls)


def draw(source: Source, seed: int, position: int) -> tuple[int, int, Sample | BadSample]:
    """(epoch, number, sample) at a position of the training order; the sample is an error where it is bad."""
    if isinstance(source, StreamedShards):
        return source.draw(seed, position)
    epoch, index = sample_at(source.sizes if isinstance(source, ShardSet) else [len(source)], seed, position)
    try:
        return epoch, index, source[index]
    except BadSample as error:
        return epoch, index, error


# ---------------------------------------------------------------------------------------------- batches
class Stream(NamedTuple):
    """One stream of a step: where samples come from, how many a step takes over all ranks, what becomes of each."""

    source: Source
    batch_size: int
    transform: Transform


class StepDataset(Dataset):
    """Maps the number of an optimizer step to this rank's batches for it, one per accumulated part.

    Step *t* of a stream with batch size *b* takes positions ``t*b .. (t+1)*b`` of the endless order (epoch after
    epoch; a set smaller than a batch just comes round). They are cut into ``accumulate * world`` neighbouring pieces of
    equal size (give or take one), and part *a* of rank *r* takes piece ``a * world + r``.

    Args:
        streams: by name; each stream has an order of its own.
        collate: makes a batch of ``{stream: [transformed samples]}``; lists may be empty. The batch has a dict
            ``bad``, which is filled with the samples left out, by reason.
        seed: of the run.
        accumulate: parts per step.
        rank: this process.
        world: number of processes.

    Raises:
        ConfigError: a stream is empty, or a step has fewer samples than pieces.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream | tuple[Source, int, Transform]],
        collate: Callable[[dict[str, list[Any]]], Any],
        *,
        seed: int = 0,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.streams = {name: Stream(*stream) for name, stream in streams.items()}
        self.collate, self.seed, self.accumulate, self.rank, self.world = collate, seed, accumulate, rank, world
        self._logged = 0
        for name, stream in self.streams.items():
            if not isinstance(stream.source, StreamedShards) and len(stream.source) == 0:
                raise ConfigError(f"{name}: no samples (name shards that hold some)")
            if stream.batch_size < accumulate * world:
                parts = f"{world} ranks x {accumulate} accumulated parts"
                raise ConfigError(f"{name}.batch_size: {stream.batch_size} is less than {parts} (raise it)")

    def __getitem__(self, step: int) -> list[Any]:
        return [self._part(step, part * self.world + self.rank) for part in range(self.accumulate)]

    def positions(self, name: str, step: int, piece: int) -> range:
        """The positions in a stream's order that one piece of a step takes."""
        size, pieces = self.streams[name].batch_size, self.accumulate * self.world
        return range(step * size + piece * size // pieces, step * size + (piece + 1) * size // pieces)

    def _part(self, step: int, piece: int) -> Any:
        bad: Counter[str] = Counter()
        examples = {name: self._examples(name, self.positions(name, step, piece), bad) for name in self.streams}
        batch = self.collate(examples)
        batch.bad.update(bad)
        return batch

    def _examples(self, name: str, positions: range, bad: Counter[str]) -> list[Any]:
        source, _, transform = self.streams[name]
        seed = stream_seed(self.seed, name)
        examples = []
        for position in positions:
            epoch, index, sample = draw(source, seed, position)
            try:
                examples.append(_transformed(sample, transform, sample_rng(seed, epoch, index)))
            except BadSample as error:
                bad[error.reason] += 1
                self._log(error)
        return examples

    def _log(self, error: BadSample) -> None:
        if self._logged < LOGGED_BAD_SAMPLES:
            self._logged += 1
            logger.warning("left out: %s", error)


def _transformed(sample: Sample | BadSample, transform: Transform, rng: np.random.Generator) -> Any:
    if isinstance(sample, BadSample):
        raise sample
    try:
        return transform(sample, rng)
    except BadSample as error:
        if error.shard:
            raise
        raise sample.bad(error.reason, str(error)) from error


class EvalBatches(Dataset):
    """Batches of this rank's share of a set, in order; see :func:`eval_batches`."""

    def __init__(
        self,
        source: Source,
        transform: Transform,
        batch_size: int,
        collate: Callable[[list[Any]], Any],
        seed: int,
        rank: int,
        world: int,
    ) -> None:
        if isinstance(source, StreamedShards):
            raise ConfigError(f"{source.urls[0]}: evaluation needs a manifest beside it (run mhmoe-vl make-manifest)")
        self.source, self.transform, self.batch_size, self.collate = source, transform, batch_size, collate
        self.seed = seed
        self.indices = range(rank, len(source), world)

    @property
    def num_samples(self) -> int:
        """Samples of the whole set, those of other ranks included."""
        return len(self.source)

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __getitem__(self, number: int) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        indices = self.indices[number * self.batch_size : (number + 1) * self.batch_size]
        examples = [
            _transformed(self.source[index], self.transform, sample_rng(self.seed, 0, index)) for index in indices
        ]
        return self.collate(examples)

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))


def eval_batches(
    source: Source,
    transform: Transform,
    batch_size: int,
    collate: Callable[[list[Any]], Any],
    *,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
) -> EvalBatches:
    """Every sample of a set exactly once over all ranks: rank *r* takes samples ``r, r + world, ...`` in order.

    Masks and the like are drawn from ``(seed, 0, sample)``, so they are the same in every evaluation. A bad sample is
    an error: a smaller test set is another test set.

    Raises:
        ConfigError: the source can only be streamed.
        BadSample: on reading, for any sample that cannot be used.
    """
    return EvalBatches(source, transform, batch_size, collate, seed, rank, world)


# ---------------------------------------------------------------------------------------------- workers
class _Caught(Dataset):
    """Hands errors of ours over as values: raised in a worker they would arrive with a page of traceback."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, number: int) -> Any:
        try:
            return self.dataset[number]
        except MhmoeError as error:
            return error


class Loader:
    """The items of a dataset by number, prepared by other processes; see :func:`step_loader`."""

    def __init__(self, dataset: Dataset, numbers: Sequence[int], num_workers: int) -> None:
        self.numbers = numbers
        self._loader = DataLoader(
            _Caught(dataset),
            sampler=numbers,
            batch_size=None,
            num_workers=num_workers,
            timeout=WORKER_TIMEOUT if num_workers else 0,
            collate_fn=_unchanged,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # or it would draw from torch's own, which must be restored on resume
        )

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Any]:
        for item in _named_failures(self._loader, self.numbers):
            if isinstance(item, MhmoeError):
                raise item
            yield item


def _unchanged(item: Any) -> Any:
    return item


def _begin_worker(worker: int) -> None:
    """Signals to the whole group, such as Ctrl-C, are for the process that trains: it needs its workers for the step
    under way, and ends them itself. When it ends while a worker hands it a tensor, it is the one to say why."""
    os.setpgid(0, 0)
    sys.excepthook = _unless_other_side_is_gone


def _unless_other_side_is_gone(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What multiprocessing's thread that serves tensors calls on an error; torch passes a worker's own errors on."""
    if not issubclass(kind, (OSError, EOFError, AuthenticationError)):
        sys.__excepthook__(kind, error, trace)


@contextlib.contextmanager
def dead_workers_named() -> Iterator[None]:
    """Inside, the death of a data worker, which torch tells of wherever the program just is, becomes a line.

    Raises:
        DataError: naming the process and what ended it.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        what = one_line(error, 150)
        raise DataError(f"data worker: {what} (lower num_workers, or look for too little memory)") from error


def _named_failures(loader: DataLoader, numbers: Sequence[int]) -> Iterator[Any]:
    """The items; the death or silence of a worker becomes a line, an exception in one passes as it is."""
    items = iter(loader)
    for place, number in enumerate(numbers):
        try:
            item = next(items)
        except (RuntimeError, ConnectionError, EOFError) as error:
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader"):
                raise
            dead = [worker for worker, process in enumerate(getattr(items, "_workers", [])) if process.exitcode]
            worker = dead[0] if dead else place % max(1, loader.num_workers)  # numbers go round the workers
            who = f"data worker {worker} of {loader.num_workers}, waiting for {number}"
            what = one_line(error or type(error).__name__, 120)
            raise DataError(f"{who}: {what} (lower num_workers, or look for too little memory)") from error
        yield item


def step_loader(dataset: StepDataset | EvalBatches, start: int, stop: int, num_workers: int) -> Loader:
    """Steps ``start .. stop`` in order, prepared ahead by ``num_workers`` processes; 0 prepares them in this one.

    The batches do not depend on ``num_workers``. :class:`EvalBatches` can be given as well, with ``0, len(batches)``.

    Raises:
        DataError: while iterating, when a worker dies or gives no sign for five minutes.
    """
    return Loader(dataset, range(start, stop), num_workers)
