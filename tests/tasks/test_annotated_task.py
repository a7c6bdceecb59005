"""What all fine-tuning tasks promise: a run that goes on repeats the one never stopped, and ranks change nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_finetune import TASKS, WORLDS, finetune, log, settings
from tiny_world import write_settings

from mhmoe_vl.data.text import create_text_tokenizer
from mhmoe_vl.tasks.pair_batch import read_text

ROOT = Path(__file__).parents[2]
EVERY = {"steps": 4, "log_every": 1, "save_every": 2, "keep_steps": True}


@pytest.fixture(scope="module", params=list(TASKS))
def run(request, tmp_path_factory):
    """Kind, configuration and finished folder of a run of four steps."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    values = settings(kind, WORLDS[kind](folder), folder / "run")
    values["encoder"] = values["encoder"] | {"dropout": 0.1}
    values["train"] |= EVERY
    config = write_settings(folder / "c.yaml", values)
    assert finetune(kind, "--config", config) == 0
    return kind, config, folder / "run"


def test_a_run_that_goes_on_repeats_the_one_never_stopped(run, tmp_path):
    kind, config, whole = run
    half = whole / "checkpoints/step-00000002"
    assert finetune(kind, "--config", config, "--output_dir", tmp_path / "run", "--train.resume", half) == 0
    late = [line for line in log(whole) if line["step"] > 2]
    assert [line for line in log(tmp_path / "run") if line["step"] > 2] == late and len(late) == 3
    names = ("predictions/val_step-00000004.jsonl", "recorded/split.json")
    for name in names:
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("text", ["", "a cat", "one two three four five six", "\u8a9e" * 40])
@pytest.mark.parametrize("max_len", [2, 3, 5, 8, 60])
def test_a_text_is_cut_as_the_tokenizer_cuts(text, max_len):
    tokenizer = create_text_tokenizer("bpe")
    whole = tokenizer.encode(text, 1000)
    found = read_text(tokenizer, text, max_len)
    assert found == {"text": tokenizer.encode(text, max_len), "cut": len(whole) > max_len}


@pytest.mark.slow
def test_two_processes_train_and_predict_as_one(run, tmp_path):
    kind, config, _ = run
    tool = ROOT / "tools" / f"finetune_{kind}.py"
    options = ["--config", config, "--encoder.dropout", "0.0"]
    assert finetune(kind, *options, "--output_dir", tmp_path / "one") == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", tool, *options]
    done = subprocess.run(
        list(map(str, [*command, "--output_dir", tmp_path / "two"])),
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    losses = [[line["loss"] for line in lines if line["split"] == "train"] for lines in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == 4
    records = [
        (tmp_path / name / "predictions/val_step-00000004.jsonl").read_text().count("\n") for name in ("one", "two")
    ]
    assert records[0] == records[1] > 0
