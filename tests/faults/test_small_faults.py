"""Faults of a run that need no figure: memory that ends, secrets in the environment, a full console, leaks."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from faults.harness import error_line, fork, wait
from faults.runs import losses, pretrain, write_run
from mhmoe_vl.train.step import Trainer

pytestmark = pytest.mark.slow


def run(file: Path, before=lambda: None) -> tuple[int | None, str]:
    """Exit code and words of a run in a child that did ``before`` first."""
    said = file.with_suffix(".txt")
    code = wait(fork(lambda: before() or pretrain("--config", file), said), 200)
    return code, said.read_text()


def at_step(number: int, action) -> None:
    """Call ``action`` before that update, in this process."""
    update = Trainer.update

    def watched(trainer, step, *arguments, **options):
        if step == number:
            action()
        return update(trainer, step, *arguments, **options)

    Trainer.update = watched


def test_memory_that_ends_is_one_line_and_the_checkpoint_stands(tmp_path):
    """T3"""
    file = write_run(tmp_path, "run", save_every=1, steps=6)

    def shrink() -> None:
        Trainer._backward = lambda *arguments: bytearray(2**62)

    code, said = run(file, lambda: at_step(3, shrink))
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and error_line(errors[-1]) is None
    assert "out of memory in step 4, parts of [4] samples" in errors[-1]
    assert run(file)[0] == 0
    assert len([line for line in losses(tmp_path / "run") if line["split"] == "train"]) == 6


def test_secrets_of_the_environment_are_nowhere(tmp_path):
    """C6"""
    secret = "hf_canary0123456789"
    file = write_run(tmp_path, "run", steps=2)

    def set_secret() -> None:
        os.environ.update(HF_TOKEN=secret, WANDB_API_KEY=secret, AWS_SECRET_ACCESS_KEY=secret)

    code, said = run(file, set_secret)
    assert code == 0 and secret not in said
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 8 and not [path for path in files if secret.encode() in path.read_bytes()]


@pytest.mark.parametrize("console", ["full", "closed"])
def test_training_goes_on_without_a_console(tmp_path, console):
    """T11"""
    file = write_run(tmp_path, "run", steps=4)

    def silence() -> None:
        if console == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        else:
            read, write = os.pipe()
            os.close(read)
            os.dup2(write, 1)

    run(file, silence)
    assert [line["step"] for line in losses(tmp_path / "run") if line["split"] == "train"] == [1, 2, 3, 4]
    assert (tmp_path / "run/checkpoints/last/COMPLETE").exists()


def test_files_and_memory_do_not_grow_with_the_steps(tmp_path):
    """T12, in small: from step 40 to step 120."""
    file = write_run(tmp_path, "run", steps=121, save_every=20, eval_every=20)
    seen = tmp_path / "seen"

    def look() -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        with seen.open("a") as lines:
            lines.write(f"{len(os.listdir('/proc/self/fd'))} {len(os.listdir('/proc/self/task'))} {peak}\n")

    code, said = run(file, lambda: at_step(40, look) or at_step(120, look))
    assert code == 0, said[-500:]
    early, late = ([float(number) for number in line.split()] for line in seen.read_text().splitlines())
    assert late[:2] == early[:2]
    assert late[2] < early[2] + 30
