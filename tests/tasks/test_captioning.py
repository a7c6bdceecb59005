"""Captioning: a tiny run from end to end, what is hidden, which tokens the loss leaves out, and what is refused."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_world import COLORS, write_settings
from torch.nn import functional as F

from mhmoe_vl import cli, commands, config
from mhmoe_vl.tasks.base import InputSpec, ModelOutput
from mhmoe_vl.tasks.captioning import NOT_HIDDEN, CaptionBatch, Captioning, hide

ENCODER = {
    "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8, "vocab_size": 49410,
    "max_text_len": 16, "ffn": {"kind": "mh_moe", "num_experts": 4, "hidden_dim": 16, "top_k": 2, "num_subtokens": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """One-coloured pictures; captions in COCO's and Karpathy's form."""
    folder = tmp_path_factory.mktemp("captions")
    (folder / "images").mkdir()
    images, annotations, listed = [], [], []
    for number in range(40):
        color, name = list(COLORS)[number % len(COLORS)], f"{number:012d}.jpg"
        file = io.BytesIO()
        Image.fromarray(np.full((32, 32, 3), COLORS[color], np.uint8)).save(file, "jpeg")
        (folder / "images" / name).write_bytes(file.getvalue())
        texts = [f"a {color} picture", f"the {color} one is here"]
        images.append({"id": number, "file_name": name})
        annotations += [{"id": 2 * number + i, "image_id": number, "caption": text} for i, text in enumerate(texts)]
        split = "test" if number >= 36 else "val" if number >= 28 else "restval" if number >= 24 else "train"
        about = {"filename": name, "filepath": "images", "cocoid": number, "imgid": number, "split": split}
        listed.append(about | {"sentences": [{"raw": text} for text in texts]})
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (folder / "dataset_coco.json").write_text(json.dumps({"images": listed, "dataset": "coco"}))
    return folder


def files(name: str) -> dict[str, str]:
    return {"annotations": name, "images": "images"}


def settings(world, out, **task):
    return {
        "output_dir": str(out),
        "encoder": ENCODER,
        "task": {
            "kind": "captioning", "data_dir": str(world), "train": files("coco.json"), "val_fraction": 0.2,
            "batch_size": 16, "max_text_len": 10, "num_beams": 2,
            "augment": {"min_crop": 1.0, "flip": 0.0, "color_jitter": 0.0}, **task,
        },
        "optim": {"lr": 5e-3, "warmup_steps": 2},
        "train": {
            "steps": 60, "log_every": 20, "num_workers": 0, "threads": 1, "precision": "float32", "device": "cpu",
        },
    }  # fmt: skip


def finetune(path, *arguments) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.run("captioning", "", "", ["--config", str(path), *map(str, arguments)])
    return stopped.value.code


def test_it_learns_to_write(world, tmp_path):
    path = write_settings(tmp_path / "c.yaml", settings(world, tmp_path / "run", label_smoothing=0.0))
    assert finetune(path, "--train.steps", 250, "--train.log_every", 50) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["CIDEr/after"] > 3 * summary["CIDEr/baseline"]
    records = [json.loads(x) for x in (tmp_path / "run/predictions/val_step-00000250.jsonl").read_text().splitlines()]
    assert len(records) == 8
    right = sum(record["caption"] in record["references"] for record in records)
    assert right >= 6, records


def test_karpathys_split_and_the_results_file(world, tmp_path):
    karpathy = files("dataset_coco.json")
    values = settings(world, tmp_path / "run", train=karpathy, test=karpathy, num_beams=1)
    assert finetune(write_settings(tmp_path / "c.yaml", values), "--train.steps", 2) == 0
    split = json.loads((tmp_path / "run/recorded/split.json").read_text())
    assert (split["validation_pictures"], split["training_captions"]) == (8, 56)
    with pytest.raises(SystemExit) as stopped:
        cli.run("captioning", "", "", ["--eval", str(tmp_path / "run"), "--split", "test"])
    assert stopped.value.code == 0
    results = json.loads((tmp_path / "run/predictions/test/captions_results.json").read_text())
    assert [entry["image_id"] for entry in results] == [36, 37, 38, 39]


def test_the_results_file_passes_the_check(world, tmp_path):
    values = settings(world, tmp_path / "run", val=files("coco.json"))
    assert finetune(write_settings(tmp_path / "c.yaml", values), "--train.steps", 2) == 0
    out = tmp_path / "scores.json"
    predictions = tmp_path / "run/predictions/captions_results.json"
    arguments = ["--predictions", predictions, "--annotations", world / "coco.json", "--json", out]
    assert commands.main(["score", "captions", *map(str, arguments)]) == 0
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    scores = json.loads(out.read_text())
    assert {name: scores[name] for name in ("Bleu_4", "ROUGE_L", "CIDEr")} == pytest.approx(
        {name: last[name] for name in ("Bleu_4", "ROUGE_L", "CIDEr")}
    )


def test_what_is_hidden():
    ids = np.arange(100, 111)
    shares = np.zeros(3)
    for seed in range(400):
        shown, targets = hide(ids, 0.7, 7, 50, np.random.default_rng(seed))
        hidden = targets != NOT_HIDDEN
        assert hidden.sum() == 7 and not hidden[0]
        assert np.array_equal(targets[hidden], ids[hidden]) and np.array_equal(shown[~hidden], ids[~hidden])
        shares += [(shown[hidden] == 7).mean(), (shown[hidden] == ids[hidden]).mean(), (shown[hidden] < 50).mean()]
    assert shares[:2] / 400 == pytest.approx([0.8, 0.1], abs=0.02)
    assert hide(np.array([1, 2]), 0.01, 7, 50, np.random.default_rng(0))[1].tolist() == [NOT_HIDDEN, 2]


def test_the_worst_tokens_are_left_out(world, tmp_path):
    values = config.validate(config.RunConfig, settings(world, tmp_path, drop_worst_ratio=0.4, drop_worst_after=2))
    options = values.task.model_dump(exclude={"kind"})
    task = Captioning(InputSpec.of(values.encoder), seed=0, accumulate=1, **options)
    steps = task.dataset("train")
    assert [steps[step][0].drop for step in (0, 1, 2, 3)] == [0, 0, 0.4, 0.4]
    targets = torch.tensor([[NOT_HIDDEN, 1, 2], [3, 0, 1]])
    batch = CaptionBatch(torch.empty(2, 3, 32, 32), targets, targets < 0, targets, [{}, {}], drop=0.4)
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    rows = F.cross_entropy(logits, torch.tensor([1, 2, 3, 0, 1]), label_smoothing=0.1, reduction="none")
    assert task.num_targets(batch) == {"caption": 3}
    found = task.loss(ModelOutput({"logits": logits}, {}, {}), batch)["caption"]
    assert found == pytest.approx(float(rows.sort().values[:3].sum()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": files("none.json")}, "none.json: No such file"),
        ({"val": {"annotations": "coco.json", "images": "nowhere"}}, "nowhere: No such file or directory"),
        ({"max_text_len": 40}, "max_text_len: 40 with encoder.max_text_len 16"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
    ],
)
def test_mistakes_are_one_line_before_training(world, tmp_path, capsys, change, message):
    assert finetune(write_settings(tmp_path / "c.yaml", settings(world, tmp_path / "run", **change))) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()
