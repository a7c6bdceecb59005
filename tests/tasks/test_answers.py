from __future__ import annotations

import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutate_text

from mhmoe_vl.data.vqa import read_annotations
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


@pytest.mark.parametrize("count", [1, 2, 3, 9, 10, 11])
def test_targets_of_any_number_of_annotators(count):
    """The same as the official accuracy, which leaves out one annotator at a time."""
    vocabulary = AnswerVocabulary(["yes", "no"])
    for number in range(1, count):
        answers = ["yes"] * number + ["x"] * (count - number)
        assert vocabulary.targets(answers).get(0) == pytest.approx(answer_accuracy("yes", answers))
    assert vocabulary.targets(["yes"] * count) == pytest.approx({0: answer_accuracy("yes", ["yes"] * count)})


BUILT = AnswerVocabulary.build(GIVEN, 9)
FILES = {
    "own.json": BUILT.to_json(),
    "list.json": json.dumps(list(BUILT.answers)),
    "answer2label.txt": "".join(json.dumps({"answer": a, "label": i}) + "\n" for i, a in enumerate(BUILT.answers)),
}


@pytest.mark.parametrize("name", FILES)
def test_files_read_back(tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    assert AnswerVocabulary.read(tmp_path / name).sha256 == BUILT.sha256


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rng=st.randoms(use_true_random=False), name=st.sampled_from(sorted(FILES)))
def test_any_change_reads_or_is_one_line(tmp_path, rng, name):
    (tmp_path / name).write_text(mutate_text(FILES[name], rng), newline="")
    try:
        vocabulary = AnswerVocabulary.read(tmp_path / name)
    except DataError as error:
        assert str(error).startswith(f"{tmp_path}/") and str(error).isprintable()
        return
    assert 0 < len(vocabulary) == len(set(vocabulary.answers))
    assert name != "own.json" or vocabulary.answers == BUILT.answers


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


@pytest.mark.parametrize(
    ("file", "ceiling"),
    [
        ("vqav2_images/v2_mscoco_train2014_img_annotations.json", 0.933),
        ("vqav2_60k/v2_mscoco_train2014_sub9k_annotations.json.gz", 0.931),
    ],
)
def test_what_the_published_list_allows(data_dir, file, ceiling):
    vocabulary = AnswerVocabulary.read(data_dir / "vqav2_60k" / "trainval_label2ans.json")
    assert (len(vocabulary), vocabulary.answers[0]) == (3129, "")
    annotations = read_annotations(data_dir / file)
    ceilings = [vocabulary.ceiling([a["answer"] for a in annotation["answers"]]) for annotation in annotations]
    assert sum(ceilings) / len(ceilings) == pytest.approx(ceiling, abs=5e-4)


def test_a_list_of_real_annotations_does_not_depend_on_their_order(data_dir):
    annotations = read_annotations(data_dir / "vqav2_60k" / "v2_mscoco_train2014_sub48k_annotations.json.gz")
    given = [annotation["multiple_choice_answer"] for annotation in annotations]
    vocabulary = AnswerVocabulary.build(given, 9)
    assert (len(vocabulary), vocabulary.answers[:4]) == (353, ("yes", "no", "1", "2"))
    shuffled = random.Random(1).sample(given, len(given))
    assert AnswerVocabulary.build(shuffled, 9).to_json() == vocabulary.to_json()
