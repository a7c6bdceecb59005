"""The loop on a toy task: exact resumption, exact losses, guards. Runs of six steps, some of them with two ranks."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import toy_task
from safetensors.torch import load_file
from torch.nn import functional as F
from toy_task import BATCH, VALIDATION, ToyTask, in_ranks, metrics, toy_config, train

from mhmoe_vl.errors import CheckpointError, ConfigError, TrainingError
from mhmoe_vl.train import checkpoint, engine, resume

FULL = {"train__ema_decay": 0.5, "train__eval_every": 2}
"""options under which everything that a checkpoint must hold matters"""


def tensors(run_dir: Path, name: str = "last") -> dict[str, torch.Tensor]:
    files = sorted((run_dir / "checkpoints" / name).glob("*.safetensors"))
    return {f"{file.stem}/{key}": value for file in files for key, value in load_file(file).items()}


def assert_same_run(first: Path, second: Path) -> None:
    assert metrics(first) == metrics(second)
    for name in ("last", "best"):
        one, other = tensors(first, name), tensors(second, name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run with dropout, moving average and evaluations that nothing ever stopped."""
    run_dir = tmp_path_factory.mktemp("whole")
    assert train(run_dir, {"dropout": 0.3}, **FULL) == 0
    return run_dir


# ---------------------------------------------------------------------------------------- what is computed
def test_logged_loss_by_hand(tmp_path):
    train(tmp_path, train__steps=1, optim__balance_loss_weight=0.1)
    torch.manual_seed(0)
    model = ToyTask().model(None)
    batch = toy_task.samples([1000 + number for number in range(BATCH)])
    with torch.no_grad():
        output = model(batch)
    has_label = batch.label >= 0
    assert 0 < has_label.sum() < BATCH
    y = float(F.mse_loss(output.values["y"], batch.y))
    label = float(F.cross_entropy(output.values["logits"][has_label], batch.label[has_label]))
    balance = float(output.aux_losses["balance_loss"])
    line = metrics(tmp_path)[1]
    assert (line["loss/y"], line["loss/label"], line["balance_loss"]) == pytest.approx((y, label, balance), rel=1e-6)
    assert line["loss"] == pytest.approx(y + label + 0.1 * balance, rel=1e-6)
    assert line["loss/never"] == 0.0  # no targets
    assert line["load/pool"] == pytest.approx((output.stats["pool"].load[0] / BATCH).tolist())
    assert line["lr"] == 0.005


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_equal_one_batch(tmp_path, parts):
    """With their different numbers of targets; the balance loss, a product of means, is left out."""
    for name, accumulate in (("one", 1), ("many", parts)):
        train(tmp_path / name, optim__balance_loss_weight=0.0, train__accumulate=accumulate)
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    for key in one.keys() - {"model/calls"}:
        torch.testing.assert_close(one[key], many[key], rtol=1e-5, atol=1e-7)
    for first, second in zip(metrics(tmp_path / "one"), metrics(tmp_path / "many"), strict=True):
        assert first.get("loss/y", 0) == pytest.approx(second.get("loss/y", 0), rel=1e-5)


def test_validation_scores_are_those_of_the_whole_set(whole):
    task, model = ToyTask(), ToyTask().model(None)
    checkpoint.load_weights(model, checkpoint.read(whole / "checkpoints/last").weights, whole)
    batch = toy_task.samples(list(range(VALIDATION)))
    with torch.no_grad():
        errors = (model.eval()(batch).values["y"] - batch.y).square().mean()
    last = metrics(whole)[-1]
    assert (last["split"], last["step"], last["count"]) == ("val", 6, VALIDATION)
    assert last["error"] == pytest.approx(float(errors), rel=1e-6)
    place = {"split": "val", "device": torch.device("cpu")}
    records, scores = engine.evaluate_checkpoint(
        task, ToyTask().model(None), toy_config(whole), whole / "checkpoints/last", **place
    )
    assert scores["error"] == last["error"]
    assert task.submission(records) == {"official.csv": (whole / "predictions/official.csv").read_text()}


def test_a_run_that_goes_on_must_find_its_data_again(tmp_path):
    assert train(tmp_path, {"classes": "a b"}, train__steps=2) == 0
    assert resume.recorded(tmp_path) == {"classes.json": "a b"}
    with pytest.raises(ConfigError, match=r"recorded/classes\.json: .* another one: line 1: a b in the run, b a now"):
        train(tmp_path, {"classes": "b a"}, train__steps=4)
    assert train(tmp_path, {"classes": "a b"}, train__steps=4) == 0


def test_evaluations_do_not_touch_the_training(tmp_path, whole):
    train(tmp_path, {"dropout": 0.3}, **FULL | {"train__eval_every": 0})
    assert [line for line in metrics(tmp_path) if line["split"] == "train"] == [
        line for line in metrics(whole) if line["split"] == "train"
    ]
    assert [line["step"] for line in metrics(tmp_path) if line["split"] == "val"] == [0, 6]


def test_workers_do_not_change_the_run(tmp_path, whole):
    train(tmp_path, {"dropout": 0.3}, **FULL, train__num_workers=2)
    assert_same_run(tmp_path, whole)


def test_the_average_of_weights_by_hand(tmp_path):
    """With decay d the average after a step is d * before + (1 - d) * now, beginning at the first weights."""
    train(tmp_path, train__ema_decay=0.25, train__steps=1)
    torch.manual_seed(0)
    start, found = ToyTask().model(None).state_dict(), tensors(tmp_path)
    for name in ("experts", "router.weight"):
        expected = 0.25 * start[name] + 0.75 * found[f"model/{name}"]
        torch.testing.assert_close(found[f"ema/{name}"], expected)
    assert not torch.equal(start["experts"], found["model/experts"])


def test_run_folder_holds_best_last_and_their_predictions(whole):
    errors = {line["step"]: line["error"] for line in metrics(whole) if line["split"] == "val"}
    best = min((step for step in errors if step), key=errors.get)
    assert checkpoint.read(whole / "checkpoints/best").state["step"] == best
    assert checkpoint.read(whole / "checkpoints/last").state["step"] == 6
    names = {path.name for path in (whole / "predictions").iterdir()}
    assert names == {"official.csv", *(f"val_step-{step:08d}.jsonl" for step in (best, 6))}
    records = [json.loads(line) for line in (whole / "predictions/val_step-00000006.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == list(range(VALIDATION))


def test_steps_can_be_kept(tmp_path):
    train(tmp_path, train__save_every=2, train__keep_steps=True)
    kept = {path.name for path in (tmp_path / "checkpoints").glob("step-*")}
    assert kept == {"step-00000002", "step-00000004", "step-00000006"}


def test_bfloat16_runs_and_keeps_float32_weights(tmp_path):
    train(tmp_path, train__precision="bfloat16")
    assert all(value.dtype != torch.bfloat16 for value in tensors(tmp_path).values())
    assert metrics(tmp_path)[-1]["error"] < metrics(tmp_path)[0]["error"]


# ------------------------------------------------------------------------------------------ stop and resume
@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, whole, at, number):
    code = train(tmp_path, {"dropout": 0.3, "signal_at": at, "signal": number}, **FULL)
    assert code == 128 + number
    assert checkpoint.read(tmp_path / "checkpoints/last").state["step"] == at + 1
    assert train(tmp_path, {"dropout": 0.3}, **FULL) == 0
    assert_same_run(tmp_path, whole)


def test_a_signal_during_an_evaluation_leaves_it_to_the_resumed_run(tmp_path, whole, monkeypatch):
    predict = ToyTask.predict

    def interrupted(task, model, batch):
        if model.calls == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return predict(task, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(ToyTask, "predict", interrupted)
        assert train(tmp_path, {"dropout": 0.3}, **FULL) == 128 + signal.SIGUSR1
    assert [(line["split"], line["step"]) for line in metrics(tmp_path)][-1] == ("train", 2)
    assert train(tmp_path, {"dropout": 0.3}, **FULL) == 0
    assert_same_run(tmp_path, whole)


def test_a_crashed_run_goes_on_from_its_last_checkpoint(tmp_path, whole):
    with pytest.raises(RuntimeError, match="fault injected"):
        train(tmp_path, {"dropout": 0.3, "fail_at": 5}, **FULL, train__save_every=3)
    assert metrics(tmp_path)[-1]["step"] == 5  # two lines more than the checkpoint of step 3 or 4 knows of
    assert train(tmp_path, {"dropout": 0.3}, **FULL) == 0
    assert_same_run(tmp_path, whole)


def test_a_damaged_checkpoint_costs_steps_but_not_the_run(tmp_path, whole, capsys):
    train(tmp_path, {"dropout": 0.3, "signal_at": 4}, **FULL, train__save_every=1)
    path = tmp_path / "checkpoints/last/optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    assert train(tmp_path, {"dropout": 0.3}, **FULL) == 0
    told = capsys.readouterr().out
    assert re.search(rf"^warning: {path}:\S+: damaged", told, re.M) and "continues from" in told
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(("higher_is_better", "best"), [(False, 2), (True, 4)])
def test_the_best_score_is_remembered(tmp_path, monkeypatch, higher_is_better, best):
    """Scores of steps 0, 2, 4 and 6; that before training does not count, nor does one that is not a number."""
    scores = iter([0.5, 3.0, 7.0, 5.0, math.nan])
    monkeypatch.setattr(ToyTask, "score", lambda task, records: {"error": next(scores)})
    monkeypatch.setattr(ToyTask, "higher_is_better", higher_is_better)
    assert train(tmp_path, {"signal_at": 4}, train__eval_every=2) == 143
    assert train(tmp_path, train__eval_every=2) == 0
    assert train(tmp_path, train__eval_every=2, train__steps=8) == 0
    assert checkpoint.read(tmp_path / "checkpoints/best").state["step"] == best
    names = {path.name for path in (tmp_path / "predictions").iterdir()}
    assert names == {"official.csv", *(f"val_step-{step:08d}.jsonl" for step in (best, 8))}


def test_a_finished_run_does_nothing_twice(tmp_path, capsys):
    train(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    settings = toy_config(tmp_path)
    task = ToyTask()
    assert engine.fit(task, task.model(None), settings, tmp_path, device=torch.device("cpu")) == 0
    assert "finished: 6 of 6 steps" in capsys.readouterr().out
    assert task.evaluations == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_finished_run_can_be_made_longer(tmp_path):
    train(tmp_path)
    assert train(tmp_path, train__steps=8) == 0
    assert [line["step"] for line in metrics(tmp_path) if line["split"] == "train"] == list(range(1, 9))


def test_a_checkpoint_of_another_model_is_refused(tmp_path, monkeypatch):
    train(tmp_path)
    monkeypatch.setattr(toy_task, "CLASSES", 5)
    with pytest.raises(CheckpointError, match=r"classifier.bias is \(3,\), the model has \(5,\)"):
        train(tmp_path)


@pytest.mark.parametrize("options", [{"seed": 1}, {"optim__lr": 0.5}])
def test_another_configuration_is_refused(tmp_path, options):
    train(tmp_path, train__steps=1)
    with pytest.raises(ConfigError, match="in the run to continue"):
        train(tmp_path, train__steps=2, **options)


# ---------------------------------------------------------------------------------------------- guards
def test_a_step_that_is_not_finite_changes_nothing(tmp_path):
    train(tmp_path, {"nan_at": (3,)}, **FULL, train__save_every=1, train__keep_steps=True)
    before, after = tensors(tmp_path, "step-00000003"), tensors(tmp_path, "step-00000004")
    assert all(torch.equal(before[key], after[key]) for key in before)
    lines = {line["step"]: line for line in metrics(tmp_path) if line["split"] == "train"}
    assert lines[4]["loss"] is None and [lines[step]["skipped"] for step in (3, 4, 6)] == [0, 1, 1]
    assert all(torch.isfinite(value).all() for value in tensors(tmp_path).values())
    assert not torch.equal(after["model/experts"], tensors(tmp_path)["model/experts"])


def test_ten_such_steps_in_a_row_stop_the_run(tmp_path):
    bad = tuple(range(2, 20))
    with pytest.raises(TrainingError, match="10 steps in a row without a finite loss and gradient, the last is 12"):
        train(tmp_path, {"nan_at": bad}, train__steps=20, train__save_every=2)
    found = checkpoint.newest(tmp_path / "checkpoints", print)
    assert found.state["step"] == 10 and found.state["skipped_in_a_row"] == 8
    with pytest.raises(TrainingError, match="the last is 12"):  # counted across a stop
        train(tmp_path, {"nan_at": bad}, train__steps=20)


def test_bad_samples_are_counted_and_too_many_stop_the_run(tmp_path):
    train(tmp_path / "few", {"bad_per_part": 1})
    assert metrics(tmp_path / "few")[-2]["bad/checksum"] == 6
    with pytest.raises(TrainingError, match=r"12 of 60 samples are bad, over train.max_bad_fraction 0.01: 12 checksum"):
        train(tmp_path / "many", {"bad_per_part": 1}, train__accumulate=2)


def test_a_full_disk_is_survived_twice_in_a_row(tmp_path, monkeypatch, capsys):
    real, failures = checkpoint.save, []

    def save(root, parts, state, config):
        if state["step"] in failing:
            failures.append(state["step"])
            raise OSError(28, "No space left on device")
        return real(root, parts, state, config)

    monkeypatch.setattr(checkpoint, "save", save)
    failing = (2, 3)
    assert train(tmp_path / "a", train__save_every=1) == 0
    assert failures == [2, 3] and "No space left on device (the checkpoint before stands)" in capsys.readouterr().out
    failing = (2, 3, 4)
    with pytest.raises(TrainingError, match="No space left on device"):
        train(tmp_path / "b", train__save_every=1)
    assert checkpoint.newest(tmp_path / "b/checkpoints", print).state["step"] == 1


def test_a_folder_in_use_is_refused(tmp_path):
    from mhmoe_vl.train.system import lock

    with lock(tmp_path), pytest.raises(ConfigError, match="another process trains"):
        train(tmp_path)


# ------------------------------------------------------------------------------------------ more processes
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_equal_one_process(tmp_path, accumulate):
    """In float32 over 50 steps, with a balance loss over all ranks and a layer that only one of them uses."""
    options = {"train__steps": 50, "train__eval_every": 10, "train__ema_decay": 0.9, "train__accumulate": accumulate}
    options |= {"optim__balance_loss_weight": 0.1}
    assert train(tmp_path / "one", **options) == 0
    assert in_ranks(lambda: train(tmp_path / "two", **options)) == [0, 0]
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        numbers = {key for key, value in one.items() if isinstance(value, (int, float))}
        assert {key: two[key] for key in numbers} == pytest.approx({key: one[key] for key in numbers}, rel=1e-5)
        assert {key: two[key] for key in two.keys() - numbers} == {key: one[key] for key in one.keys() - numbers}
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-6)


def test_two_ranks_stop_skip_and_go_on_together(tmp_path):
    """The second rank alone is told to stop, and holds the bad numbers of step 2."""
    toy = {"nan_at": (1,), "dropout": 0.3}
    assert in_ranks(lambda: train(tmp_path / "whole", toy, **FULL)) == [0, 0]
    assert in_ranks(lambda: train(tmp_path / "cut", {**toy, "signal_at": 3}, **FULL)) == [143, 143]
    assert in_ranks(lambda: train(tmp_path / "cut", toy, **FULL)) == [0, 0]
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    lines = [line for line in metrics(tmp_path / "cut") if line["split"] == "train"]
    assert [line["skipped"] for line in lines] == [0, 1, 1, 1, 1, 1]
    # and with another number of ranks
    assert train(tmp_path / "cut", toy, **FULL, train__steps=7) == 0


def test_ranks_with_different_configurations_are_refused(tmp_path):
    def refused() -> int:
        try:
            return train(tmp_path, seed=int(os.environ["RANK"]))
        except ConfigError as error:
            return 2 if "different configurations" in str(error) else 1

    assert in_ranks(refused) == [2, 2]


def start(run_dir: Path, toy: dict, **options) -> subprocess.Popen:
    command = [sys.executable, toy_task.__file__, str(run_dir), json.dumps(options), json.dumps(toy)]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parents[2]))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)  # its own group


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_to_the_whole_process_group_is_obeyed_within_a_step(tmp_path, number, code):
    """As from a scheduler or a terminal: the data workers get it too."""
    process = start(tmp_path, {}, train__steps=100_000, train__num_workers=2)
    assert any("step 3/" in line for line in process.stdout)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, "")
    stopped = int(out.split("after step ")[1].split()[0])
    assert checkpoint.read(tmp_path / "checkpoints/last").state["step"] == stopped
    assert metrics(tmp_path)[-1]["step"] == stopped


@pytest.mark.slow
def test_a_run_killed_again_and_again_is_the_run_never_killed(tmp_path):
    options = FULL | {"train__steps": 150, "train__save_every": 1}
    assert train(tmp_path / "whole", {"dropout": 0.3}, **options) == 0
    kills, draw = 0, random.Random(0)
    while True:
        child = os.fork()
        if child == 0:
            os._exit(train(tmp_path / "killed", {"dropout": 0.3}, **options))
        time.sleep(draw.uniform(0.05, 0.5))
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        assert kills < 200
    assert kills >= 3
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
