"""VQA: a tiny run from end to end, and what it must refuse."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_world import COLORS, write_settings

from mhmoe_vl import cli, commands
from mhmoe_vl.errors import CheckpointError
from mhmoe_vl.models.factory import load_head_weights
from mhmoe_vl.models.heads import ClassList

ENCODER = {
    "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8, "vocab_size": 49410,
    "max_text_len": 16, "ffn": {"kind": "mh_moe", "num_experts": 4, "hidden_dim": 16, "top_k": 2, "num_subtokens": 4},
}  # fmt: skip


def picture(color: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((32, 40, 3), COLORS[color], np.uint8)).save(file, "jpeg")
    return file.getvalue()


def write_split(folder, split: str, count: int) -> dict[str, str]:
    """Questions about one-coloured pictures, two a picture, in the official layout."""
    questions, annotations = [], []
    images = folder / "images" / split
    images.mkdir(parents=True)
    for number in range(1, count + 1):
        color = list(COLORS)[number % len(COLORS)]
        (images / f"COCO_{split}_{number:012d}.jpg").write_bytes(picture(color))
        asked = {"What color is it?": ("other", color), "Is it red?": ("yes/no", "yes" if color == "red" else "no")}
        for place, (question, (kind, answer)) in enumerate(asked.items()):
            ids = {"question_id": number * 1000 + place, "image_id": number}
            questions.append({**ids, "question": question})
            given = [{"answer": answer} for _ in range(9)] + [{"answer": "dunno"}]
            about = {"question_type": question.split()[0].lower(), "answer_type": kind}
            annotations.append({**ids, **about, "multiple_choice_answer": answer, "answers": given})
    (folder / f"{split}_q.json").write_text(json.dumps({"data_subtype": split, "questions": questions}))
    (folder / f"{split}_a.json").write_text(json.dumps({"annotations": annotations}))
    return {"questions": f"{split}_q.json", "annotations": f"{split}_a.json", "images": f"images/{split}"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqa")
    for split, count in (("train", 24), ("val", 9)):
        write_split(folder, split, count)
    return folder


def files(split: str) -> dict[str, str]:
    return {"questions": f"{split}_q.json", "annotations": f"{split}_a.json", "images": f"images/{split}"}


def settings(world, out, **task):
    return {
        "output_dir": str(out),
        "encoder": ENCODER,
        "task": {
            "kind": "vqa", "data_dir": str(world), "train": files("train"), "val": files("val"),
            "test": {"questions": "val_q.json", "images": "images/val"}, "min_answer_count": 3, "batch_size": 8,
            "max_question_len": 12, "augment": {"min_crop": 0.8, "flip": 0.5, "color_jitter": 0.0}, **task,
        },
        "optim": {"lr": 5e-3, "warmup_steps": 2, "head_lr_factor": 2.0},
        "train": {
            "steps": 40, "log_every": 10, "num_workers": 0, "threads": 1, "precision": "float32", "device": "cpu",
        },
    }  # fmt: skip


def finetune(world, config, *arguments) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.run("vqa", "", "", ["--config", str(config), *map(str, arguments)])
    return stopped.value.code


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    config = write_settings(out.with_suffix(".yaml"), settings(world, out))
    assert finetune(world, config) == 0
    return out


def test_it_learns_and_says_what_is_possible(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["accuracy/after"] > max(85, summary["accuracy/baseline"] + 20)
    assert summary["ceiling/after"] == 100
    by_type = [summary[f"accuracy/{kind}/after"] for kind in ("other", "yes/no")]
    assert summary["accuracy/after"] == pytest.approx(sum(by_type) / 2)


def test_the_run_records_its_answers_and_its_split(finished):
    answers = json.loads((finished / "recorded/answers.json").read_text())
    assert set(answers["answers"]) == {"yes", "no", *COLORS}
    split = json.loads((finished / "recorded/split.json").read_text())
    assert (split["training_questions"], split["validation_questions"], split["without_listed_answer"]) == (48, 18, 0)


def test_the_official_file_has_the_score_of_the_run(finished, world, tmp_path):
    out = tmp_path / "scores.json"
    arguments = ["--predictions", finished / "predictions/vqa_results.json", "--annotations", world / "val_a.json"]
    assert commands.main(["score", "vqa", *map(str, arguments), "--check", "--json", str(out)]) == 0
    best = max(json.loads(line).get("accuracy", 0) for line in (finished / "metrics.jsonl").read_text().splitlines())
    assert json.loads(out.read_text())["overall"] == pytest.approx(best)


def test_a_test_split_needs_no_training_files(finished, world, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run("vqa", "", "", [
            "--eval", str(finished), "--split", "test", "--task.train.questions", "gone.json",
            "--task.train.images", "gone",
        ])  # fmt: skip
    assert stopped.value.code == 0
    predicted = json.loads((finished / "predictions/test/vqa_results.json").read_text())
    validated = json.loads((finished / "predictions/vqa_results.json").read_text())
    assert predicted == validated  # the same questions, without their answers
    assert "accuracy" not in capsys.readouterr().out


def test_validation_pictures_held_out_of_training(world, tmp_path):
    config = write_settings(tmp_path / "c.yaml", settings(world, tmp_path / "run", val=None, val_images=4))
    assert finetune(world, config, "--train.steps", 1) == 0
    split = json.loads((tmp_path / "run/recorded/split.json").read_text())
    assert len(split["validation_images"]) == 4
    assert (split["training_questions"], split["validation_questions"]) == (40, 8)
    records = [
        json.loads(line) for line in (tmp_path / "run/predictions/val_step-00000001.jsonl").read_text().splitlines()
    ]
    assert {record["question_id"] // 1000 for record in records} == set(split["validation_images"])


def test_a_head_for_other_answers_is_refused(finished, world, tmp_path, capsys):
    other = write_settings(tmp_path / "c.yaml", settings(world, tmp_path / "run", min_answer_count=3))
    (tmp_path / "answers.json").write_text(json.dumps(["no", "yes", *COLORS]))
    code = finetune(world, other, "--init_from", finished, "--task.answers", tmp_path / "answers.json")
    assert code == 2
    assert "weights were trained for the list of classes" in capsys.readouterr().err


def test_heads_are_taken_where_name_and_shape_fit(finished, tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pooler = torch.nn.ModuleDict({"dense": torch.nn.Linear(32, 32)})
            self.head = torch.nn.Linear(32, 7)

    model = Model()
    start = model.head.weight.clone()
    assert load_head_weights(model, finished) == ["pooler.dense.bias", "pooler.dense.weight"]
    assert torch.equal(model.head.weight, start)


def test_a_class_list_knows_its_own():
    ours, theirs = ClassList("ab" * 32), ClassList("cd" * 32)
    ours.load_state_dict(ClassList("ab" * 32).state_dict())
    with pytest.raises(CheckpointError, match=r"for the list of classes cdcdcdcdcdcd\.\.\., this one is abababababab"):
        ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val": files("train") | {"images": "images/val"}}, "pictures missing"),
        ({"val": files("val") | {"annotations": None}}, "files of 1 questions, 0 annotations"),
        ({"max_question_len": 64}, "max_question_len: 64 with encoder.max_text_len 16"),
        ({"min_answer_count": 1000}, "no answer occurs 1000 times"),
        ({"val": None, "val_images": 24}, "24 of 24 groups to hold out"),
        ({"train": files("train") | {"images": "nowhere"}}, "nowhere: No such file or directory"),
        ({"answers": "none.json"}, "none.json: No such file"),
        ({"train": {n: [v, v] for n, v in files("train").items()}}, "question 1000 stands in two files"),
    ],
)
def test_mistakes_are_one_line_before_training(world, tmp_path, capsys, change, message):
    config = write_settings(tmp_path / "c.yaml", settings(world, tmp_path / "run", **change))
    assert finetune(world, config) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_missing_training_picture_is_counted(world, tmp_path):
    import shutil

    shutil.copytree(world, tmp_path / "world")
    (tmp_path / "world/images/train/COCO_train_000000000003.jpg").unlink()
    config = write_settings(tmp_path / "c.yaml", settings(tmp_path / "world", tmp_path / "run"))
    assert finetune(world, config, "--train.steps", 6, "--train.log_every", 1) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(line.get("bad/missing image", 0) for line in lines) == 2


def test_the_report_shows_questions_with_their_pictures(finished):
    cards = json.loads((finished / "gallery.json").read_text())
    assert len(cards) == 18 and all((finished / name).is_file() for card in cards for name in card["images"])
    assert {"What color is it?", "Is it red?"} == {card["caption"] for card in cards}
    page = (finished / "report.html").read_text()
    assert "What color is it?" in page and "data:image/jpeg" in page
