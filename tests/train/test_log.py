from __future__ import annotations

import json
import math

import pytest
import torch
from toy_task import ToyStats

from mhmoe_vl.train.log import RoutingTotals, RunLog


def new_log(run_dir, **options):
    return RunLog(run_dir, **{"steps": 10, "tensorboard": False, **options})


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_lines_keep_full_precision_and_are_strict_json(tmp_path, capsys):
    log = new_log(tmp_path)
    log.write(3, "train", {"loss": 0.1 + 0.2, "grad_norm": math.inf, "load/a": [0.5, math.nan], "note": "x"})
    line = lines(tmp_path)[0]
    assert line.pop("time")
    assert line == {
        "step": 3, "split": "train", "loss": 0.1 + 0.2, "grad_norm": None, "load/a": [0.5, None], "note": "x"
    }  # fmt: skip
    assert capsys.readouterr().out == "train step 3/10  loss 0.3  grad_norm inf\n"


def test_cut_drops_what_a_resumed_run_writes_again(tmp_path):
    log = new_log(tmp_path)
    log.cut(5, 5)  # nothing there yet
    for step in range(6):
        if step % 2 == 0:
            log.write(step, "val", {"error": step})
        log.write(step + 1, "train", {"loss": step})
    with log.path.open("a") as file:
        file.write('{"step": 1, "split": "train", "lo')
    log.cut(4, 2)
    assert [(line["split"], line["step"]) for line in lines(tmp_path)] == [
        ("val", 0), ("train", 1), ("train", 2), ("val", 2), ("train", 3), ("train", 4)
    ]  # fmt: skip


def test_a_full_disk_is_told_once(tmp_path, capsys):
    log = new_log(tmp_path / "missing")
    log.write(1, "train", {"loss": 1.0})
    log.write(2, "train", {"loss": 1.0})
    assert capsys.readouterr().out.count("warning") == 1


def test_tensorboard_events_are_written(tmp_path):
    pytest.importorskip("tensorboard")
    log = new_log(tmp_path, tensorboard=True)
    log.write(1, "train", {"loss": 1.0, "load/a": [1.0]})
    log.close()
    assert list((tmp_path / "tensorboard").iterdir())


def test_routing_totals_by_hand():
    totals = RoutingTotals()

    def stats(load, entropy, dropped, rows):
        return ToyStats(torch.tensor(load), torch.tensor(entropy), torch.tensor(dropped), torch.tensor(rows))

    totals.add({"a": stats([[3, 1, 0], [0, 0, 0]], 0.5, 1, 2)})
    totals.add({"a": stats([[1, 1, 0], [0, 2, 0]], 1.5, 0, 2)})
    totals.add({"a": stats([[0, 0, 0], [0, 0, 0]], math.nan, 0, 0)})  # no rows, no mean
    assert totals.values() == {
        "load/a": [0.5, 0.5, 0.0],
        "load_by_stream/a": [[4 / 6, 2 / 6, 0.0], [0.0, 1.0, 0.0]],
        "entropy/a": 1.0,
        "dead/a": 1,
        "dropped/a": 1 / 8,
    }
