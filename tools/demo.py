"""Everything once, on a drawn data set: scenes, visual tokenizer, MH-MoE pre-training, questions, routing page.

Ends with 1 when the models have not learnt: each of the four validation perplexities of pre-training must end below
half of its value before training, and below the perplexity without a model; the answers to questions must be right more
often than the most frequent answer of each question type.
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
SETS_OF_OTHER_TOOLS = ("--nlvr2", 0, "--captions", 0, "--coco", 0, "--imagefolder", 0)
VQA_STEPS, NUM_SHOWN = 300, 48


def main() -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default="out/demo", help="folder for data and runs (default: %(default)s)")
    out = parser.parse_args().out
    return guard(lambda: demo(out))


def demo(out: Path) -> int:
    data, tokenizer, run, vqa = out / "data", out / "visual_tokenizer", out / "pretrain", out / "vqa"
    stages = {
        "Drawing scenes": ["data_prep/scenes.py", "--out", data, *SETS_OF_OTHER_TOOLS],
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
        "Fine-tuning it to answer questions": [
            "tools/finetune_vqa.py",
            *("--config", ROOT / "configs/finetune/vqa_scenes.yaml", "--train.steps", VQA_STEPS),
            *("--output_dir", vqa, "--init_from", run, "--task.data_dir", data / "vqa"),
        ],
        "Showing where its sub-tokens go": [
            "tools/visualize_routing.py",
            *("--checkpoint", run, "--image", data / "pairs/val", "--limit", NUM_SHOWN, "--out", out / "routing"),
        ],
    }
    for title, (script, *options) in stages.items():
        shown = " ".join(map(str, ["python", script, *options]))
        print(f"\n== {title}\n   {shown}\n", flush=True)
        start = time.time()
        if code := stage([sys.executable, str(ROOT / script), *map(str, options)]):
            return code
        print(f"\n   {title}: {time.time() - start:.0f} s", flush=True)
    code = check(run / "summary.json", vqa / "summary.json")
    print(f"\nquestions, pictures and answers   {vqa / 'report.html'}")
    print(f"which expert every sub-token took {out / 'routing' / 'routing.html'}")
    return code


def stage(command: list[str]) -> int:
    """The exit code of a command; Ctrl-C reaches it too, and it may save its work before it ends."""
    with subprocess.Popen(command) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            code = process.wait() or 130
    return code if code >= 0 else 128 - code


def check(pretraining: Path, questions: Path) -> int:
    """Say whether the models have learnt, from the summaries of their runs."""
    found = shortfalls(json.loads(pretraining.read_text()))
    if found:
        print(f"\nnot below half of its first value, or not below the value without a model: {'; '.join(found)}")
    else:
        print("\nall four perplexities are below half of their first value and below the value without a model")
    scores = json.loads(questions.read_text())
    accuracy, frequent = scores["accuracy/after"], scores["accuracy/baseline"]
    print(f"VQA accuracy {accuracy:.1f} %, with the most frequent answer of each question type {frequent:.1f} %")
    return 1 if found or accuracy <= frequent else 0


if __name__ == "__main__":
    sys.exit(main())
