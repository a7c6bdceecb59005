"""Everything once, on a drawn data set: scenes, visual tokenizer, MH-MoE pre-training, report."""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="out/demo", help="folder for data and runs (default: %(default)s)")
    out = Path(parser.parse_args().out)
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
    }
    for title, (script, *options) in stages.items():
        shown = " ".join(map(str, ["python", script, *options]))
        print(f"\n== {title}\n   {shown}\n", flush=True)
        code = subprocess.run([sys.executable, str(ROOT / script), *map(str, options)], check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
