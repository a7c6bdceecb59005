"""Compare feed-forward layers at equal FLOPs and parameters: every variant with every seed, into a ledger.

Runs that the ledger already holds are not repeated, so the command can be stopped and started again. The table in
README is printed by ``--table`` from the ledger alone.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mhmoe_vl.analysis.compare import comparison_table

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = ("dense", "smoe", "xmoe", "fine_grained", "mh_moe_2", "mh_moe_4")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/pretrain/photos_tiny.yaml", help="common settings (%(default)s)")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help="files of configs/ffn (%(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="%(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/photos/compare"), help="run folders (%(default)s)")
    parser.add_argument("--ledger", type=Path, default=Path("results/photos_tiny.jsonl"), help="%(default)s")
    parser.add_argument("--baseline", default="fine_grained", help="variant of the paired differences (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, e.g. one a core (%(default)s)")
    parser.add_argument("--table", action="store_true", help="print the table of the ledger, run nothing")
    options, overrides = parser.parse_known_args()
    if not options.table:
        todo = [(variant, seed) for seed in options.seeds for variant in options.variants]
        with ThreadPoolExecutor(options.jobs) as pool:
            done = list(pool.map(lambda job: run_once(*job, options, overrides), todo))
        if not all(done):
            return 1
    print(comparison_table(read(options.ledger), options.baseline))
    return 0


def read(ledger: Path) -> list[dict]:
    return [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []


def run_once(variant: str, seed: int, options: argparse.Namespace, overrides: list[str]) -> bool:
    """Train one variant with one seed and append its line to the ledger, unless it is there."""
    if any(line["variant"] == variant and line["seed"] == seed for line in read(options.ledger)):
        return True
    run_dir = options.out / f"{variant}-{seed}"
    command = ["tools/pretrain.py", "--config", options.config, f"configs/ffn/{variant}.yaml"]
    command += ["--seed", str(seed), "--output_dir", str(run_dir), *overrides]
    print(f"\n== {variant}, seed {seed}\n   python {' '.join(command)}", flush=True)
    start = time.time()
    if subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode:
        return False
    files = [str(run_dir / name) for name in ("config.yaml", "count.json")]
    count = ["tools/count.py", "--config", files[0], "--text-len", "16", "--num-codes", "512", "--json", files[1]]
    subprocess.run([sys.executable, *count], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    line = {
        "variant": variant,
        "seed": seed,
        "command": "python " + " ".join(command),
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{cpu_name()}, {os.cpu_count()} cores",
        "seconds": round(time.time() - start, 1),
        "summary": json.loads((run_dir / "summary.json").read_text()),
        "count": json.loads((run_dir / "count.json").read_text())["models"][0],
    }
    options.ledger.parent.mkdir(parents=True, exist_ok=True)
    with options.ledger.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return True


def git_commit() -> str:
    result = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or "unknown"


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
