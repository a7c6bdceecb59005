from __future__ import annotations

import json
import random

import pytest

from mhmoe_vl.data.records import read_json
from mhmoe_vl.errors import DataError
from mhmoe_vl.metrics.vqa_accuracy import answer_accuracy
from mhmoe_vl.tasks.answers import AnswerVocabulary

GIVEN = ["yes"] * 12 + ["Two"] * 5 + ["2"] * 4 + ["a cat"] * 9 + ["dog"] * 8


def test_the_published_rule():
    vocabulary = AnswerVocabulary.build(GIVEN, 9)
    assert vocabulary.answers == ("yes", "2", "cat")
    mixed = random.Random(0).sample(GIVEN, len(GIVEN))
    assert AnswerVocabulary.build(mixed, 9).sha256 == vocabulary.sha256
    assert AnswerVocabulary.build(GIVEN, 8).sha256 != vocabulary.sha256


def test_targets_are_the_accuracies_that_answers_would_have():
    vocabulary = AnswerVocabulary(["yes", "no", "2", "red"])
    answers = ["yes"] * 4 + ["no"] * 3 + ["two"] * 2 + ["red"]
    assert vocabulary.targets(answers) == pytest.approx({0: 1.0, 1: 0.9, 2: 0.6, 3: 0.3})
    for number, value in vocabulary.targets(answers).items():
        assert answer_accuracy(vocabulary.answers[number], answers) == pytest.approx(value)
    assert vocabulary.targets(["purple"] * 10) == {}


def test_the_ceiling_is_the_best_of_all_answers():
    vocabulary = AnswerVocabulary(["yes", "2", "t shirt"])
    for answers in (["two"] * 10, ["two"] * 9 + ["3"], ["t-shirt"] * 5 + ["yes"] * 2 + ["x"] * 3, ["z"] * 10, ["yes"]):
        best = max(answer_accuracy(answer, answers) for answer in vocabulary.answers)
        assert vocabulary.ceiling(answers) == best
    assert vocabulary.ceiling(["two"] * 10) == 0  # unanimous answers are compared as they are written


def test_files_read_back(tmp_path):
    vocabulary = AnswerVocabulary.build(GIVEN, 9)
    files = {
        "own.json": vocabulary.to_json(),
        "list.json": json.dumps(list(vocabulary.answers)),
        "answer2label.txt": "".join(
            json.dumps({"answer": a, "label": i}) + "\n" for i, a in enumerate(vocabulary.answers)
        ),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert AnswerVocabulary.read(tmp_path / name).sha256 == vocabulary.sha256


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '["x", "x"]', "'x' stands twice"),
        ("a.json", "[]", "no answer"),
        ("a.json", '["x", 1]', r"\[1\]: need a text, got 1"),
        ("a.json", '{"answers": ["x"], "sha256": "0"}', "sha256 is not that of the answers"),
        ("a.txt", '{"answer": "x", "label": 1}', "labels are not 0 to 0"),
    ],
)
def test_lists_that_cannot_be_right(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        AnswerVocabulary.read(tmp_path / name)


def test_what_the_published_list_allows(data_dir):
    vocabulary = AnswerVocabulary.read(data_dir / "vqav2_60k" / "trainval_label2ans.json")
    assert len(vocabulary) == 3129
    annotations = read_json(data_dir / "vqav2_images" / "v2_mscoco_train2014_img_annotations.json")["annotations"]
    ceilings = [vocabulary.ceiling([a["answer"] for a in annotation["answers"]]) for annotation in annotations]
    assert sum(ceilings) / len(ceilings) == pytest.approx(0.933, abs=5e-4)
