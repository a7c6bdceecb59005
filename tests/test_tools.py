"""The doors: mistakes are one line and exit code 2, Ctrl-C is 130, and a comparison runs what its ledger lacks."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from mhmoe_vl import cli, commands
from mhmoe_vl.analysis.summary import TERMS
from mhmoe_vl.errors import ConfigError, guard

ROOT = Path(__file__).parents[1]
SUMMARY = {"step_seconds": 1.0, "perplexity/after": 2.0} | {f"perplexity/{term}/after": 2.0 for term in TERMS}
POPEN = subprocess.Popen
COUNT = {
    "ffn": {"kind": "dense", "hidden_dim": 8},
    "parameters": {"total": 1, "active": 1},
    "flops": {"pair": 1},
}


@pytest.fixture
def tool(monkeypatch):
    """tool(name, *arguments): exit code of a tool, run in this process from the root."""
    monkeypatch.chdir(ROOT)

    def run(name: str, *arguments: object) -> int:
        spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", *map(str, arguments)])
        try:
            return module.main()
        except SystemExit as stop:
            return stop.code

    return run


def one_error(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and len(captured.err) <= 301
    return captured.err


# -------------------------------------------------------------------------------------------- errors
def test_an_error_of_any_length_is_one_line_of_300_characters(capsys):
    def fail() -> int:
        raise ConfigError("x\n" * 500)

    assert guard(fail) == 2
    assert len(one_error(capsys)) == 301


def test_ctrl_c_is_one_line_and_130(capsys):
    def stop() -> int:
        raise KeyboardInterrupt

    assert guard(stop) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_ctrl_c_while_setting_up_a_run(monkeypatch, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_train", stop)
    with pytest.raises(SystemExit) as stopped:
        cli.run("masked_modeling", str(ROOT / "configs/pretrain/scenes_tiny.yaml"), "", [])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("count", [], "the following arguments are required: --config"),
        ("count", ["--config", "a.yaml", "--num-codes", "0"], "--num-codes: 0 is below 1"),
        ("count", ["--config", "a.yaml", "--text-len", "9" * 5000], "argument --text-len: invalid int value"),
        ("demo", ["--size", "3"], "unrecognized arguments: --size 3"),
        ("demo", ["--out"], "argument --out: expected one argument"),
        ("compare_ffn", ["--jobs", "0"], "--jobs: 0 is below 1"),
        ("compare_ffn", ["--jobs", "x"], "argument --jobs: invalid int value"),
        ("compare_ffn", ["--text-len", "0"], "--text-len: 0 is below 1"),
        ("compare_ffn", ["--table", "--tabel"], "unrecognized arguments beside --table: --tabel"),
        ("compare_ffn", ["--table", "--ledger", "none.jsonl"], "none.jsonl: No such file"),
        ("compare_ffn", ["--table", "--ledger", "setup.cfg"], "setup.cfg:1: not a line of tools/compare_ffn.py"),
        ("compare_ffn", ["--config", "none.yaml"], "none.yaml: No such file"),
        ("compare_ffn", ["--variants", "none"], "configs/ffn/none.yaml: No such file"),
        ("compare_ffn", ["--train.stesp", "3"], "did you mean 'steps'?"),
        ("compare_ffn", ["--ledger", "setup.cfg/a.jsonl"], "--ledger: setup.cfg/a.jsonl: "),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tool, capsys, name, arguments, words):
    assert tool(name, *arguments) == 2
    assert words in one_error(capsys)


@pytest.mark.parametrize("arguments", [[], ["make-manifst"], ["check-data"], ["check-data", "a", "--jsn"]])
def test_mistakes_with_subcommands_are_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        commands.main(arguments)
    assert stopped.value.code == 2
    assert one_error(capsys).endswith("(see --help)\n")


# -------------------------------------------------------------------------------------------- compare_ffn
@pytest.fixture
def started(monkeypatch):
    """Commands that tools/compare_ffn.py started; none runs, but leaves the files of one that did."""
    commands: list[list[str]] = []

    def run(command, **options):
        if command[0] == "git":
            raise FileNotFoundError(2, "No such file or directory", "git")
        commands.append(command[1:])
        if command[1].endswith("pretrain.py"):
            folder = Path(command[command.index("--output_dir") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "summary.json").write_text(json.dumps(SUMMARY))
        else:
            Path(command[command.index("--json") + 1]).write_text(json.dumps({"models": [COUNT]}))
        return SimpleNamespace(returncode=3 if "--seed 3" in " ".join(command) else 0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


@pytest.fixture
def compare(tool, tmp_path):
    """compare(*arguments): exit code of a comparison of one variant with one seed below ``tmp_path``."""
    where = ["--out", tmp_path / "out", "--ledger", tmp_path / "new" / "ledger.jsonl"]
    return lambda *arguments: tool("compare_ffn", *where, "--variants", "dense", "--seeds", "0", *arguments)


def test_a_run_is_repeated_only_with_another_command(compare, started, tmp_path, capsys):
    assert [compare("--train.steps", "5"), compare("--train.steps", "5")] == [0, 0]
    assert len(started) == 2  # one training, one count
    assert compare("--train.steps", "6") == 0
    other = tmp_path / "other.yaml"
    other.write_text((ROOT / "configs/pretrain/photos_tiny.yaml").read_text())
    assert compare("--train.steps", "5", "--config", other) == 0
    assert len(started) == 6
    lines = [json.loads(text) for text in (tmp_path / "new" / "ledger.jsonl").read_text().splitlines()]
    assert len({line["command"] for line in lines}) == 3
    assert capsys.readouterr().out.splitlines()[-1] == "| dense | - | - | - | - | - | 0 |"


def test_a_line_says_how_the_run_was_made(compare, started, tmp_path):
    assert compare("--jobs", "2", "--train.threads", "1", "--num-codes", "7", "--text-len", "9") == 0
    assert compare("--train.steps", "5") == 0
    first, second = (json.loads(text) for text in (tmp_path / "new" / "ledger.jsonl").read_text().splitlines())
    assert (first["jobs"], first["threads"], second["jobs"], second["threads"]) == (2, 1, 1, None)
    assert first["command"].startswith("python tools/pretrain.py --config configs/pretrain/photos_tiny.yaml configs/ff")
    assert first["command"].endswith(f"--seed 0 --output_dir {tmp_path}/out/dense-0 --train.threads 1")
    assert (first["commit"], first["summary"], first["count"]) == ("unknown", SUMMARY, COUNT)
    assert " ".join(started[1]).endswith("--text-len 9 --num-codes 7")
    assert " ".join(started[3]).endswith("--text-len 16 --num-codes 512")


def test_a_failed_run_ends_the_comparison_with_its_code(compare, started, tmp_path, monkeypatch):
    """Seed 3 fails; seed 4, which may have begun, is held until those that wait have been cancelled."""
    cancelled = threading.Event()
    run, shutdown = subprocess.run, ThreadPoolExecutor.shutdown

    def held(command, **options):
        if "dense-4" in " ".join(command):
            cancelled.wait(30)
        return run(command, **options)

    def cancel(pool, *, cancel_futures):
        shutdown(pool, wait=False, cancel_futures=cancel_futures)
        cancelled.set()
        shutdown(pool)

    monkeypatch.setattr(subprocess, "run", held)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", cancel)
    assert compare("--seeds", "1", "3", "4", "5", "6") == 3
    seeds = [command[command.index("--seed") + 1] for command in started if "--seed" in command]
    assert seeds in (["1", "3"], ["1", "3", "4"])
    assert '"seed": 3' not in (tmp_path / "new" / "ledger.jsonl").read_text()


# -------------------------------------------------------------------------------------------- demo, Ctrl-C
def _heed_interrupts() -> None:
    """A shell starts what it puts in the background deaf to SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupt_when(ready, *command: object) -> tuple[int, str]:
    """Exit code and stderr of a command whose process group gets SIGINT, as from Ctrl-C, once ``ready()``."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=_heed_interrupts,
    )  # fmt: skip
    while not ready() and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=100)[1]
    return process.returncode, error


def test_ctrl_c_ends_the_demo(tmp_path):
    code, error = interrupt_when(lambda: list(tmp_path.rglob("*.tar")), "tools/demo.py", "--out", tmp_path)
    assert code == 130
    assert "Traceback" not in error and "stopped" in error


def test_ctrl_c_ends_the_comparison(tmp_path):
    """The run under way is told too; those that wait are not started."""
    ledger = tmp_path / "ledger.jsonl"
    options = ["--out", tmp_path / "out", "--ledger", ledger, "--task.data_dir", tmp_path]
    code, error = interrupt_when(ledger.exists, "tools/compare_ffn.py", *options)
    assert code == 130
    assert error.splitlines()[-1] == "stopped"
    assert ledger.read_text() == ""


@pytest.mark.parametrize(
    ("perplexity", "accuracy", "code"), [(10.0, 60.0, 0), (50.0, 60.0, 1), (10.0, 35.0, 1), (10.0, 20.0, 1)]
)
def test_the_demo_ends_with_its_verdict(tool, tmp_path, monkeypatch, capsys, perplexity, accuracy, code):
    """Stages that do nothing; the summaries of two of them are there."""
    monkeypatch.setattr(subprocess, "Popen", lambda command: POPEN([sys.executable, "-c", ""]))
    values = {"before": 100.0, "after": 10.0, "baseline": 60.0}
    summary = {f"perplexity/{term}/{when}": value for term in TERMS for when, value in values.items()}
    summaries = {
        "pretrain": summary | {"perplexity/texts/after": perplexity},
        "vqa": {"accuracy/after": accuracy, "accuracy/baseline": 35.0},
    }
    for name, values in summaries.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(values))
    assert tool("demo", "--out", tmp_path) == code
    out = capsys.readouterr().out.splitlines()
    assert len([line for line in out if line.endswith(" s")]) == 5
    [verdict] = [line for line in out if "perplexit" in line]
    assert ("all four perplexities" in verdict) == (perplexity < 50)
    assert ("perplexity/texts 50 " in verdict) == (perplexity == 50)
    assert f"VQA accuracy {accuracy} %, with the most frequent answer of each question type 35.0 %" in out
    assert out[-2].endswith("vqa/report.html") and out[-1].endswith("routing/routing.html")
