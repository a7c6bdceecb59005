"""VQA: a tiny run from end to end, and what it must refuse."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_finetune import finetune, questions, settings, write_vqa
from tiny_world import COLORS, write_settings

from mhmoe_vl import commands
from mhmoe_vl.errors import CheckpointError
from mhmoe_vl.models.factory import load_head_weights
from mhmoe_vl.models.heads import ClassList, answer_head


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_vqa(tmp_path_factory.mktemp("vqa"))


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    values = settings("vqa", world, out, augment={"min_crop": 0.8, "flip": 0.5, "color_jitter": 0.0})
    values["optim"]["head_lr_factor"] = 2.0
    assert finetune("vqa", "--config", write_settings(out.with_suffix(".yaml"), values)) == 0
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
    assert (split["training_examples"], split["validation_examples"]) == (48, 18)


def test_the_official_file_has_the_score_of_the_run(finished, world, tmp_path):
    out = tmp_path / "scores.json"
    arguments = ["--predictions", finished / "predictions/vqa_results.json", "--annotations", world / "val_a.json"]
    assert commands.main(["score", "vqa", *map(str, arguments), "--check", "--json", str(out)]) == 0
    best = max(json.loads(line).get("accuracy", 0) for line in (finished / "metrics.jsonl").read_text().splitlines())
    assert json.loads(out.read_text())["overall"] == pytest.approx(best)


def test_a_test_split_needs_no_training_files(finished, world, tmp_path, capsys):
    gone = ["--task.train.questions", "gone.json", "--task.train.images", "gone"]
    assert finetune("vqa", "--eval", finished, "--split", "test", *gone) == 0
    predicted = json.loads((finished / "predictions/test/vqa_results.json").read_text())
    validated = json.loads((finished / "predictions/vqa_results.json").read_text())
    assert predicted == validated  # the same questions, without their answers
    assert "accuracy" not in capsys.readouterr().out


def test_validation_pictures_held_out_of_training(world, tmp_path):
    config = write_settings(tmp_path / "c.yaml", settings("vqa", world, tmp_path / "run", val=None, val_images=4))
    assert finetune("vqa", "--config", config, "--train.steps", 1) == 0
    split = json.loads((tmp_path / "run/recorded/split.json").read_text())
    assert len(split["validation"]) == 4
    assert (split["training_examples"], split["validation_examples"]) == (40, 8)
    records = [
        json.loads(line) for line in (tmp_path / "run/predictions/val_step-00000001.jsonl").read_text().splitlines()
    ]
    assert {record["question_id"] // 1000 for record in records} == set(split["validation"])


def test_a_head_for_other_answers_gives_all_but_its_last_layer(finished, world, tmp_path, capsys):
    """As many answers as the run had, so that shapes alone would not tell."""
    recorded = json.loads((finished / "recorded/answers.json").read_text())["answers"]
    (tmp_path / "answers.json").write_text(json.dumps(recorded[::-1]))
    config = write_settings(tmp_path / "c.yaml", settings("vqa", world, tmp_path / "run"))
    options = ["--task.answers", tmp_path / "answers.json", "--optim.lr", "1e-30", "--train.steps", 1]
    assert finetune("vqa", "--config", config, "--init_from", finished, *options) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "another list of classes" in line]
    assert len(said) == 1 and said[0].endswith("so head.3 starts anew")
    before = load_file(finished / "checkpoints/best/model.safetensors")
    after = load_file(tmp_path / "run/checkpoints/last/model.safetensors")
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"head.3.weight", "head.3.bias", "answers.sha256"}


def test_a_run_is_not_evaluated_with_other_answers(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run/recorded/answers.json"
    answers = json.loads(file.read_text())["answers"]
    file.write_text(json.dumps({"answers": answers[::-1]}))
    assert finetune("vqa", "--eval", tmp_path / "run") == 2
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


def test_every_answer_starts_as_one_of_many():
    """Not as likely as not, which the first steps would have to unlearn in all layers."""
    torch.manual_seed(0)
    head = answer_head(16, 500, norm_eps=1e-5)
    probabilities = head(torch.randn(8, 16)).sigmoid()
    assert torch.allclose(probabilities, torch.full_like(probabilities, 1 / 500), rtol=0.5)
    assert answer_head(16, 1, norm_eps=1e-5)[-1].bias.isfinite().all()


def test_a_class_list_knows_its_own():
    ours, theirs = ClassList("ab" * 32, "head"), ClassList("cd" * 32, "head")
    ours.load_state_dict(ClassList("ab" * 32, "head").state_dict())
    with pytest.raises(CheckpointError, match=r"for the list of classes cdcdcdcdcdcd\.\.\., this one is abababababab"):
        ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val": questions("train") | {"images": "images/val"}}, "pictures missing"),
        ({"val": questions("val") | {"annotations": None}}, "files of 1 questions, 0 annotations"),
        ({"max_text_len": 64}, "max_text_len: 64 with encoder.max_text_len 16"),
        ({"min_answer_count": 1000}, "no answer occurs 1000 times"),
        ({"val": None, "val_images": 24}, "24 of 24 groups to hold out"),
        ({"train": questions("train") | {"images": "nowhere"}}, "nowhere: No such file or directory"),
        ({"answers": "none.json"}, "none.json: No such file"),
        ({"train": {n: [v, v] for n, v in questions("train").items()}}, "question 1000 stands in two files"),
    ],
)
def test_mistakes_are_one_line_before_training(world, tmp_path, capsys, change, message):
    config = write_settings(tmp_path / "c.yaml", settings("vqa", world, tmp_path / "run", **change))
    assert finetune("vqa", "--config", config) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_missing_training_picture_is_counted(world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    (tmp_path / "world/images/train/COCO_train_000000000003.jpg").unlink()
    config = write_settings(tmp_path / "c.yaml", settings("vqa", tmp_path / "world", tmp_path / "run"))
    assert finetune("vqa", "--config", config, "--train.steps", 6, "--train.log_every", 1) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(line.get("bad/missing image", 0) for line in lines) == 2


def test_the_report_shows_questions_with_their_pictures(finished):
    cards = json.loads((finished / "gallery.json").read_text())
    assert len(cards) == 18 and all((finished / name).is_file() for card in cards for name in card["images"])
    assert {"What color is it?", "Is it red?"} == {card["caption"] for card in cards}
    page = (finished / "report.html").read_text()
    assert "What color is it?" in page and "data:image/jpeg" in page


def test_predictions_that_cannot_be_written_are_one_line(finished, capsys):
    (finished / "predictions/test").mkdir(exist_ok=True)
    (finished / "predictions/test/records.jsonl").unlink(missing_ok=True)
    (finished / "predictions/test/records.jsonl").mkdir()
    assert finetune("vqa", "--eval", finished, "--split", "test") == 2
    assert "predictions/test: cannot be written: " in capsys.readouterr().err


def test_a_run_without_a_checkpoint_may_begin_with_other_data(world, tmp_path):
    config = write_settings(tmp_path / "c.yaml", settings("vqa", world, tmp_path / "run"))
    (tmp_path / "run/recorded").mkdir(parents=True)
    (tmp_path / "run/recorded/answers.json").write_text("of a start that never came to a checkpoint")
    assert finetune("vqa", "--config", config, "--train.steps", 1) == 0
    assert "of a start" not in (tmp_path / "run/recorded/answers.json").read_text()
