"""Order, steps and evaluation batches: pure functions that no count of processes changes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_vl.data import loader
from mhmoe_vl.data.loader import (
    StepDataset,
    StreamedShards,
    eval_batches,
    sample_at,
    sample_order,
    sample_rng,
    step_loader,
    stream_seed,
)
from mhmoe_vl.data.shards import BadSample, Sample, ShardSet
from mhmoe_vl.errors import ConfigError, DataError

Pack = Callable[..., list[Path]]
GOLDEN_ORDER = [0, 2, 3, 7, 5, 8, 1, 6, 4]
GOLDEN_DRAWS = [677, 725, 765, 790]


@dataclass
class Batch:
    examples: dict[str, list]
    bad: dict[str, int] = field(default_factory=dict)


def draw(sample: Sample, rng: np.random.Generator) -> tuple[str, float]:
    return sample.key, rng.random()


def numbered(count: int) -> list[Sample]:
    return [Sample(str(i), {"txt": str(i).encode()}, "list", i) for i in range(count)]


def steps(streams: dict, first: int, last: int, **options: int) -> list[list[Batch]]:
    dataset = StepDataset(streams, Batch, seed=5, **options)
    return [dataset[step] for step in range(first, last)]


# ------------------------------------------------------------------------------------------------ order
@given(st.lists(st.integers(0, 9), max_size=60), st.integers(0, 2**40), st.integers(0, 5))
def test_an_epoch_visits_every_sample_once(sizes: list[int], seed: int, epoch: int) -> None:
    order = sample_order(sizes, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(sum(sizes)))
    assert np.array_equal(order, sample_order(sizes, seed, epoch))


def test_epochs_and_seeds_differ_and_shards_stay_near() -> None:
    sizes = [10] * 100
    orders = [sample_order(sizes, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    assert all((a != b).mean() > 0.9 for a, b in [(orders[0], orders[1]), (orders[0], orders[2])])
    for start in range(0, 1000, 160):
        assert len(set(orders[0][start : start + 160] // 10)) <= 16
    shuffled = np.mean([np.corrcoef(np.arange(160), order[:160] // 10)[0, 1] for order in orders])
    assert abs(shuffled) < 0.3


def test_order_of_a_released_version_stays() -> None:
    assert sample_order([3, 2, 4], 0, 0).tolist() == GOLDEN_ORDER
    assert sample_rng(1, 2, 3).integers(0, 1000, 4).tolist() == GOLDEN_DRAWS


def test_a_position_counts_over_epochs() -> None:
    sizes = [3, 2, 4]
    visits = [sample_at(sizes, 7, position) for position in range(27)]
    assert visits == [(epoch, index) for epoch in range(3) for index in sample_order(sizes, 7, epoch).tolist()]


def test_draws_belong_to_seed_epoch_and_sample() -> None:
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    values = [sample_rng(*place).random() for place in places]
    assert len(set(values)) == 4
    assert values == [sample_rng(*place).random() for place in places]
    assert stream_seed(0, "images") != stream_seed(0, "pairs")


# ------------------------------------------------------------------------------------------------ steps
def test_epochs_are_covered_exactly_whatever_the_ranks_parts_and_workers(packed: Pack) -> None:
    source = ShardSet([str(path) for path in packed(30, 7)])
    streams = {"images": (source, 12, draw), "texts": (numbered(9), 8, draw)}
    reference = steps(streams, 0, 15)
    for world, accumulate, workers in [(1, 1, 2), (2, 1, 0), (1, 2, 1), (2, 2, 0), (4, 2, 0), (1, 8, 0), (3, 1, 0)]:
        seen = [{name: [] for name in streams} for _ in range(15)]
        for rank in range(world):
            dataset = StepDataset(streams, Batch, seed=5, accumulate=accumulate, rank=rank, world=world)
            for step, parts in enumerate(step_loader(dataset, 0, 15, workers)):
                assert len(parts) == accumulate
                for batch in parts:
                    for name in streams:
                        seen[step][name] += batch.examples[name]
        for step, (batch,) in enumerate(reference):
            assert {name: sorted(seen[step][name]) for name in streams} == {
                name: sorted(batch.examples[name]) for name in streams
            }
    visited = [key for (batch,) in reference for key, _ in batch.examples["images"]]
    assert len(visited) == 180
    for epoch in range(6):
        assert sorted(visited[30 * epoch : 30 * epoch + 30]) == [f"{i:05d}" for i in range(30)]


def test_one_process_with_two_parts_sees_what_two_ranks_see() -> None:
    streams = {"texts": (numbered(20), 7, draw)}
    parts = [batch.examples for batch in steps(streams, 3, 4, accumulate=2)[0]]
    ranks = [steps(streams, 3, 4, rank=rank, world=2)[0][0].examples for rank in range(2)]
    assert parts == ranks
    assert [len(part["texts"]) for part in parts] == [3, 4]


def test_a_step_is_the_same_alone_and_after_others(packed: Pack) -> None:
    streams = {"pairs": (ShardSet([str(path) for path in packed(10, 4)]), 4, draw)}
    assert steps(streams, 0, 9)[6:] == steps(streams, 6, 9)
    dataset = StepDataset(streams, Batch, seed=5)
    assert list(step_loader(dataset, 6, 9, 2)) == steps(streams, 6, 9)


def test_workers_leave_torchs_random_state_alone() -> None:
    dataset = StepDataset({"texts": (numbered(8), 2, draw)}, Batch)
    before = torch.get_rng_state()
    assert len(list(step_loader(dataset, 0, 3, 1))) == len(step_loader(dataset, 0, 3, 0)) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_a_set_smaller_than_a_batch_comes_round() -> None:
    (batch,) = steps({"texts": (numbered(3), 7, draw)}, 0, 1)[0]
    keys = [key for key, _ in batch.examples["texts"]]
    assert sorted(keys[:3]) == sorted(keys[3:6]) == ["0", "1", "2"]
    assert len(set(batch.examples["texts"])) == 7


def test_bad_samples_are_left_out_counted_and_named(packed: Pack, caplog: pytest.LogCaptureFixture) -> None:
    (path,) = packed(10, 10)
    source = ShardSet([str(path)])
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)

    def transform(sample: Sample, rng: np.random.Generator) -> str:
        if sample.key == "00004":
            raise BadSample("picture of 0 x 0 pixels", reason="image size")
        if sample.key == "00007":
            sample.text("cls")
        return sample.key

    with caplog.at_level(logging.WARNING):
        ((first, second),) = steps({"pairs": (source, 10, transform)}, 0, 1, accumulate=2)
    assert sorted(first.examples["pairs"] + second.examples["pairs"]) == [f"{i:05d}" for i in (1, 2, 3, 5, 6, 8, 9)]
    assert sum((first.bad | {}).values()) + sum(second.bad.values()) == 3
    assert {**first.bad, **second.bad} == {"checksum": 1, "image size": 1, "missing text": 1}
    assert f"{path}:00004: picture of 0 x 0 pixels" in caplog.text
    assert f"{path}:00000.jpg: differs from the manifest" in caplog.text


def test_streams_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"texts.batch_size: 3 is less than 2 ranks x 2 accumulated parts"):
        StepDataset({"texts": (numbered(9), 3, draw)}, Batch, accumulate=2, world=2)
    with pytest.raises(ConfigError, match="texts: no samples"):
        StepDataset({"texts": ([], 3, draw)}, Batch)


# ---------------------------------------------------------------------------------------------- workers
def _raise(sample: Sample, rng: np.random.Generator) -> None:
    raise DataError("x.json:3: two words (mend it)")


def _bug(sample: Sample, rng: np.random.Generator) -> None:
    raise RuntimeError("a bug")


def _die(sample: Sample, rng: np.random.Generator) -> None:
    if multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_in_a_worker_stay_one_line(workers: int) -> None:
    dataset = StepDataset({"texts": (numbered(8), 2, _raise)}, Batch)
    with pytest.raises(DataError, match=r"^x.json:3: two words \(mend it\)$"):
        list(step_loader(dataset, 0, 3, workers))
    dataset = StepDataset({"texts": (numbered(8), 2, _bug)}, Batch)
    with pytest.raises(RuntimeError, match="a bug"):
        list(step_loader(dataset, 0, 3, workers))


def test_a_worker_is_silent_when_the_trainer_ends_while_it_hands_over_a_tensor(capsys: pytest.CaptureFixture[str]):
    """Only of that: other errors in a worker's threads are still shown."""
    for error in (EOFError(), ConnectionResetError(), multiprocessing.AuthenticationError()):
        loader._unless_other_side_is_gone(type(error), error, None)
    assert capsys.readouterr().err == ""
    loader._unless_other_side_is_gone(ValueError, ValueError("bug"), None)
    assert "ValueError: bug" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dead_worker_is_named() -> None:
    dataset = StepDataset({"texts": (numbered(8), 2, _die)}, Batch)
    with pytest.raises(DataError, match=r"data worker 0 of 1, .*lower num_workers"):
        list(step_loader(dataset, 0, 3, 1))


# ------------------------------------------------------------------------------------------- streamed shards
def test_streamed_shards_are_a_source_like_others(packed: Pack, server: ThreadingHTTPServer) -> None:
    names = [path.name for path in packed(30, 7, manifests=False)]
    streams = {"pairs": (StreamedShards([f"{server.url}/shards/{name}" for name in names]), 6, draw)}
    reference = steps(streams, 0, 10)
    visited = [key for (batch,) in reference for key, _ in batch.examples["pairs"]]
    assert sorted(visited[:30]) == sorted(visited[30:]) == [f"{i:05d}" for i in range(30)]
    assert visited[:30] != visited[30:] != sorted(visited[30:])
    assert steps(streams, 7, 10) == reference[7:]
    assert list(step_loader(StepDataset(streams, Batch, seed=5), 0, 10, 2)) == reference
    ranks = [steps(streams, 0, 10, rank=rank, world=2) for rank in range(2)]
    halves = zip(*ranks, strict=True)
    assert [a.examples["pairs"] + b.examples["pairs"] for (a,), (b,) in halves] == [
        batch.examples["pairs"] for (batch,) in reference
    ]


def test_streamed_shards_count_what_is_lost(packed: Pack) -> None:
    paths = packed(12, 4, manifests=False)
    paths[1].write_bytes(paths[1].read_bytes()[:3000])
    streams = {"pairs": (StreamedShards([str(path) for path in paths]), 9, draw)}
    ((batch,),) = steps(streams, 0, 1)
    assert len(batch.examples["pairs"]) == 8
    assert batch.bad == {"truncated": 1}


def test_streamed_shards_without_samples_end(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(10240))
    streams = {"pairs": (StreamedShards([str(tmp_path / "a.tar")]), 9, draw)}
    with pytest.raises(DataError, match="no samples in 1 shards"):
        steps(streams, 0, 1)


# ---------------------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize(("world", "batch_size"), [(1, 4), (2, 4), (3, 1), (4, 100), (12, 2)])
def test_evaluation_takes_every_sample_once(packed: Pack, world: int, batch_size: int) -> None:
    source = ShardSet([str(path) for path in packed(10, 4)])
    shares = [eval_batches(source, draw, batch_size, list, seed=3, rank=rank, world=world) for rank in range(world)]
    seen = [example for share in shares for batch in share for example in batch]
    assert sorted(seen) == [(f"{i:05d}", sample_rng(3, 0, i).random()) for i in range(10)]
    for share in shares:
        assert share.num_samples == 10
        assert len(list(share)) == len(share)
        assert list(step_loader(share, 0, len(share), 0)) == list(share)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_stops_evaluation(packed: Pack, workers: int) -> None:
    (path,) = packed(10, 10)
    source = ShardSet([str(path)])
    path.write_bytes(path.read_bytes()[:5000])
    batches = eval_batches(source, draw, 4, list)
    with pytest.raises(BadSample, match=r"shard-000000.tar:\d{5}.\w+: the shard ends before it") as caught:
        list(step_loader(batches, 0, len(batches), workers))
    assert caught.value.reason == "truncated"


def test_evaluation_needs_an_index(packed: Pack) -> None:
    with pytest.raises(ConfigError, match="evaluation needs a manifest"):
        eval_batches(StreamedShards([str(packed()[0])]), draw, 4, list)
