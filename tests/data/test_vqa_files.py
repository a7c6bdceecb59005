"""VQA v2's files: the real ones read, and every way in which one can be wrong is one line that says where."""

from __future__ import annotations

import copy
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutate, mutate_text

from mhmoe_vl.data.annotated import PictureFolders, missing_pictures
from mhmoe_vl.data.vqa import read_questions
from mhmoe_vl.errors import DataError

QUESTIONS = {
    "data_subtype": "train2014",
    "questions": [
        {"question_id": 10, "image_id": 1, "question": "Is it red?"},
        {"question_id": 20, "image_id": 2, "question": "How many?"},
    ],
}
ANNOTATIONS = {
    "annotations": [
        {
            "question_id": number,
            "image_id": number // 10,
            "question_type": "is",
            "answer_type": "other",
            "multiple_choice_answer": "yes",
            "answers": [{"answer": "yes"}] * 10,
        }
        for number in (20, 10)
    ]
}


@pytest.fixture
def read(tmp_path):
    (tmp_path / "COCO_train2014_000000000001.jpg").touch()
    (tmp_path / "000000000002.jpg").touch()

    def run(questions, annotations):
        (tmp_path / "q.json").write_text(json.dumps(questions))
        (tmp_path / "a.json").write_text(json.dumps(annotations))
        answers = None if annotations is None else tmp_path / "a.json"
        return read_questions(tmp_path / "q.json", answers, PictureFolders([tmp_path]))

    return run


def test_questions_meet_their_annotations_and_pictures(read):
    first, second = read(QUESTIONS, ANNOTATIONS)
    assert (first.key, first.record.question, first.record.answers) == ("10", "Is it red?", ("yes",) * 10)
    assert [e.pictures[0].name for e in (first, second)] == ["COCO_train2014_000000000001.jpg", "000000000002.jpg"]


def test_a_test_split_has_no_answers(read):
    assert [e.record.answers for e in read(QUESTIONS, None)] == [None, None]


@pytest.mark.parametrize(
    ("file", "path", "value", "message"),
    [
        ("q", ["questions", 1, "question"], " ", r"questions\[1\].question: need a text that is not empty, got \" \""),
        ("q", ["questions", 1, "question_id"], "20", r"questions\[1\].question_id: need a whole number, got \"20\""),
        ("q", ["questions", 1, "question_id"], 10, r"questions\[1\].question_id: 10 stands already at \[0\]"),
        ("q", ["questions", 1, "question"], "\ud800", r"questions\[1\].question: need a text that is not empty"),
        ("q", ["questions"], [], "questions: need at least 1, got none"),
        ("q", ["data_subtype"], "../x", r'data_subtype: need a name such as train2014, got "../x"'),
        ("q", ["questions", 1, "image_id"], None, r"questions\[1\].image_id: need a whole number, got null"),
        ("q", ["questions", 1, "image_id"], 3, "1 questions about another image_id than in .* first 20"),
        ("q", ["questions", 1, "question_id"], 30, "1 questions of .* without annotation, 1 annotations without"),
        ("a", ["annotations", 0, "answers"], None, r"annotations\[0\].answers: need a list, got null"),
        ("a", ["annotations", 0, "answers"], [], r"annotations\[0\].answers: need at least 1, got none"),
        ("a", ["annotations", 0, "answers"], [{}], r"annotations\[0\].answers\[0\].answer: missing"),
        ("a", ["annotations", 0, "multiple_choice_answer"], 1, "multiple_choice_answer: need a text, got 1"),
        ("a", ["annotations", 1, "question_id"], 20, r"annotations\[1\].question_id: 20 stands already at \[0\]"),
        ("a", ["annotations"], [], "annotations: need at least 1, got none"),
        ("a", ["annotations"], {}, "annotations: need a list, got an object of 0"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(read, file, path, value, message):
    files = {"q": copy.deepcopy(QUESTIONS), "a": copy.deepcopy(ANNOTATIONS)}
    place = files[file]
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(DataError, match=message) as caught:
        read(files["q"], files["a"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["q.json", "a.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1, byte 0: nothing here"),
        ('{"questions": [{"question_id"', "line 1, byte 29: JSON ends in the middle"),
        ("\ufeff{}", "byte 0: a byte order mark"),
        ('{"questions": [NaN]}', "line 1, byte 15: NaN is no finite number"),
        ('{"questions": [1e999]}', "line 1, byte 15: 1e999 is no finite number"),
        ('{"questions": [], "questions": []}', 'line 1, byte 18: key "questions" stands twice'),
        ("[]", "need an object, got a list of 0"),
        pytest.param("[" * 100_000, "line 1, byte 100: nested deeper than 100 levels", id="nested"),
    ],
)
def test_what_is_no_official_file_is_named_with_its_place(read, tmp_path, file, text, message):
    read(QUESTIONS, ANNOTATIONS)
    (tmp_path / file).write_text(text)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read_questions(tmp_path / "q.json", tmp_path / "a.json", PictureFolders([tmp_path]))
    assert str(caught.value).startswith(f"{tmp_path / file}: ") and "\n" not in str(caught.value)


def test_all_that_is_wrong_is_said_at_once(read):
    questions = [entry | {"question": ""} for entry in [*QUESTIONS["questions"], *QUESTIONS["questions"]]]
    with pytest.raises(DataError) as caught:
        read({"questions": questions}, None)
    message = str(caught.value)
    assert "questions[0].question: need" in message and "and 3 more problems" in message


@pytest.mark.parametrize("count", [1, 3, 9, 11])
def test_any_number_of_answers_is_kept(read, count):
    changed = copy.deepcopy(ANNOTATIONS)
    changed["annotations"][1]["answers"] = [{"answer": f"Answer {n}"} for n in range(count)]
    assert read(QUESTIONS, changed)[0].record.answers == tuple(f"Answer {n}" for n in range(count))


def test_pictures_of_test_dev_are_those_of_test(read, tmp_path):
    (tmp_path / "COCO_test2015_000000000001.jpg").touch()
    found = read(QUESTIONS | {"data_subtype": "test-dev2015"}, None)
    assert found[0].pictures[0].name == "COCO_test2015_000000000001.jpg"


def test_equal_texts_and_paths_are_kept_once(read):
    """443,757 questions with ten answers each have to fit into memory."""
    questions = {"questions": [QUESTIONS["questions"][0], QUESTIONS["questions"][1] | {"image_id": 1}]}
    annotations = copy.deepcopy(ANNOTATIONS)
    annotations["annotations"][0]["image_id"] = 1
    first, second = read(questions, annotations)
    assert first.pictures is second.pictures
    assert len({id(answer) for e in (first, second) for answer in e.record.answers}) == 1


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rng=st.randoms(use_true_random=False), victim=st.sampled_from("qa"), as_text=st.booleans())
def test_any_change_reads_or_is_one_line(tmp_path, rng, victim, as_text):
    (tmp_path / "000000000002.jpg").touch()
    for name, value in (("q", QUESTIONS), ("a", ANNOTATIONS)):
        changed = mutate(value, rng) if name == victim and not as_text else value
        text = mutate_text(json.dumps(changed), rng) if name == victim and as_text else json.dumps(changed)
        (tmp_path / f"{name}.json").write_text(text)
    try:
        found = read_questions(tmp_path / "q.json", tmp_path / "a.json", PictureFolders([tmp_path]))
    except DataError as error:
        assert str(error).startswith(f"{tmp_path}/") and str(error).isprintable()
        return
    assert [type(answer) for e in found for answer in e.record.answers].count(str) >= len(found) == 2
    assert len(missing_pictures(found)) <= 2
    for example in found:
        example.record.question.encode()


def test_the_real_files(data_dir):
    folder = data_dir / "vqav2_images"
    found = read_questions(
        folder / "v2_OpenEnded_mscoco_train2014_img_questions.json",
        folder / "v2_mscoco_train2014_img_annotations.json",
        PictureFolders([folder / "images" / "train2014"]),
    )
    assert len(found) == 101 and len({e.pictures for e in found}) == 67
    assert missing_pictures(found) == []
