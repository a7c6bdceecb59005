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
    parser.add_argument("--table", action="store_true", help="print the table of the ledger, run nothing")
    options, overrides = parser.parse_known_args()
    if not options.table:
        for seed in options.seeds:
            for variant in options.variants:
                if not run_once(variant, seed, options, overrides):
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
    counted = subprocess.run(
        [sys.executable, "tools/count.py", "--config", str(run_dir / "config.yaml"), "--json", str(run_dir / "count.json")],
        cwd=ROOT, check=False, capture_output=True,
    )  # fmt: skip
    line = {
        "variant": variant,
        "seed": seed,
        "command": "python " + " ".join(command),
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{cpu_name()}, {os.cpu_count()} cores",
        "seconds": round(time.time() - start, 1),
        "summary": json.loads((run_dir / "summary.json").read_text()),
        "count": json.loads((run_dir / "count.json").read_text()) if counted.returncode == 0 else None,
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
    names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] \
        if cpuinfo.exists() else []  # fmt: skip
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
