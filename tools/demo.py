"""Everything once, on a drawn data set: scenes, visual tokenizer, MH-MoE pre-training, report, page of its routing.

Ends with 1 when the pre-trained model has not learnt: each of its four validation perplexities must end below half of
its value before training, and below the perplexity without a model.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from mhmoe_vl.analysis.summary import shortfalls
from mhmoe_vl.errors import OneLineParser, guard

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default="out/demo", help="folder for data and runs (default: %(default)s)")
    out = parser.parse_args().out
    return guard(lambda: demo(out))


def demo(out: Path) -> int:
    data, tokenizer, run = out / "data", out / "visual_tokenizer", out / "pretrain"
    stages = {
        "Drawing scenes": ["data_prep/scenes.py", "--out", data],
        "Training the visual tokenizer": [
            "tools/train_visual_tokenizer.py",
            *("--config", ROOT / "configs/visual_tokenizer/scenes_tiny.yaml"),
            *("--output_dir", tokenizer, "--task.data_dir", data),
        ],
        "Pre-training the tiny MH-MoE encoder": [
            "tools/pretrain.py",
            *("--config", ROOT / "configs/pretrain/scenes_tiny.yaml"),
            *("--output_dir", run, "--task.data_dir", data, "--task.visual_tokenizer", tokenizer),
        ],
        "Showing where sub-tokens go": [
            "tools/visualize_routing.py",
            *("--checkpoint", run, "--image", data / "pairs/val", "--limit", 48, "--out", out / "routing"),
        ],
    }
    for title, (script, *options) in stages.items():
        shown = " ".join(map(str, ["python", script, *options]))
        print(f"\n== {title}\n   {shown}\n", flush=True)
        start = time.time()
        if code := stage([sys.executable, str(ROOT / script), *map(str, options)]):
            return code
        print(f"\n   {title}: {time.time() - start:.0f} s", flush=True)
    return check(run / "summary.json")


def stage(command: list[str]) -> int:
    """The exit code of a command; Ctrl-C reaches it too, and it may save its work before it ends."""
    with subprocess.Popen(command) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            code = process.wait() or 130
    return code if code >= 0 else 128 - code


def check(summary: Path) -> int:
    """Say whether the model has learnt."""
    found = shortfalls(json.loads(summary.read_text()))
    if found:
        print(f"\nnot below half of its first value, or not below the value without a model: {'; '.join(found)}")
        return 1
    print("\nall four perplexities are below half of their first value and below the value without a model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
