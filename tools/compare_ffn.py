"""Compare feed-forward layers at equal FLOPs and parameters: every variant with every seed, into a ledger.

Options that are not listed go to tools/pretrain.py as they are (--train.steps 100). Runs that the ledger already holds,
with the same command, are not repeated, so this can be stopped and started again. The table in README is printed by
--table from the ledger alone; of two lines of a variant and seed the later one counts.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from mhmoe_vl import config
from mhmoe_vl.analysis.compare import comparison_table, read_ledger
from mhmoe_vl.benchmarks.processor import cpu_name
from mhmoe_vl.errors import ConfigError, OneLineParser, guard

VARIANTS = ("dense", "smoe", "xmoe", "fine_grained", "mh_moe_2", "mh_moe_4")


class Run(NamedTuple):
    """One training run: its folder, its command without "python", its number of threads (none: torch's choice)."""

    variant: str
    seed: int
    folder: Path
    command: list[str]
    threads: int | None


def main() -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/pretrain/photos_tiny.yaml", help="common settings (%(default)s)")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help=f"files of configs/ffn ({' '.join(VARIANTS)})")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="0 1 2")
    parser.add_argument("--out", type=Path, default=Path("out/photos/compare"), help="run folders (%(default)s)")
    parser.add_argument("--ledger", type=Path, default=Path("results/photos_tiny.jsonl"), help="%(default)s")
    parser.add_argument("--baseline", default="fine_grained", help="variant of the paired differences (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, e.g. one a core (%(default)s)")
    parser.add_argument("--text-len", type=int, default=16, help="tokens of a text, to count FLOPs (%(default)s)")
    parser.add_argument("--num-codes", type=int, default=512, help="of the visual tokenizer, to count (%(default)s)")
    parser.add_argument("--table", action="store_true", help="print the table of the ledger, run nothing")
    options, overrides = parser.parse_known_args()
    for name in ("jobs", "text_len", "num_codes"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: {getattr(options, name)} is below 1")
    if options.table and overrides:
        parser.error(f"unrecognized arguments beside --table: {' '.join(overrides)}")
    return guard(lambda: compare(options, overrides))


def compare(options: argparse.Namespace, overrides: list[str]) -> int:
    code = 0 if options.table else run_all(plan(options, overrides), options)
    if code == 0:
        latest = {(line["variant"], line["seed"]): line for line in read_ledger(options.ledger)}
        print(comparison_table(list(latest.values()), options.baseline))
    return code


def plan(options: argparse.Namespace, overrides: list[str]) -> list[Run]:
    """Every variant with every seed; a mistake in the files or options is found before anything runs."""
    runs = []
    for seed in options.seeds:
        for variant in options.variants:
            files, folder = [options.config, f"configs/ffn/{variant}.yaml"], options.out / f"{variant}-{seed}"
            given = ["--seed", str(seed), "--output_dir", str(folder), *overrides]
            settings = config.load(config.run_config("masked_modeling"), files, given)
            command = ["tools/pretrain.py", "--config", *files, *given]
            runs.append(Run(variant, seed, folder, command, settings.train.threads or None))
    return runs


def run_all(runs: list[Run], options: argparse.Namespace) -> int:
    """0 when the ledger holds all runs, else the exit code of the first that failed; the rest is then not started."""
    try:
        options.ledger.parent.mkdir(parents=True, exist_ok=True)
        options.ledger.open("a").close()
    except OSError as error:
        raise ConfigError(f"--ledger: {options.ledger}: {error.strerror} (name a file you may write)") from error
    pool = ThreadPoolExecutor(options.jobs)
    try:
        return next(filter(None, pool.map(lambda run: run_once(run, options), runs)), 0)
    finally:
        # Ctrl-C reaches the runs under way too: each saves a checkpoint and ends.
        pool.shutdown(cancel_futures=True)


def run_once(run: Run, options: argparse.Namespace) -> int:
    """Train one variant with one seed and append its line to the ledger, unless it is there; returns the exit code."""
    line: dict[str, Any] = {"variant": run.variant, "seed": run.seed, "command": " ".join(["python", *run.command])}
    if any(line.items() <= {key: old[key] for key in line}.items() for old in read_ledger(options.ledger)):
        return 0
    print(f"\n== {run.variant}, seed {run.seed}\n   {line['command']}", flush=True)
    files = {name: run.folder / name for name in ("config.yaml", "count.json", "summary.json")}
    count = ["tools/count.py", "--config", str(files["config.yaml"]), "--json", str(files["count.json"])]
    count += ["--text-len", str(options.text_len), "--num-codes", str(options.num_codes)]
    start = time.time()
    for command, output in ((run.command, None), (count, subprocess.DEVNULL)):
        code = subprocess.run([sys.executable, *command], stdout=output, check=False).returncode
        if code:
            return code if code > 0 else 128 - code
    line |= {
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{cpu_name()}, {os.cpu_count()} cores",
        "jobs": options.jobs,
        "threads": run.threads,
        "seconds": round(time.time() - start, 1),
        "summary": json.loads(files["summary.json"].read_text()),
        "count": json.loads(files["count.json"].read_text())["models"][0],
    }
    with options.ledger.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return 0


def git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
