"""VQA v2's files: the real ones read, and every way in which one can be wrong is one line that says where."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
        ("q", ["questions"], [], "questions: none"),
        ("q", ["questions", 1, "image_id"], None, r"questions\[1\].image_id: need a whole number, got null"),
        ("q", ["questions", 1, "image_id"], 3, "1 questions about another image_id than in .* first 20"),
        ("q", ["questions", 1, "question_id"], 30, "1 questions of .* without annotation, 1 annotations without"),
        ("a", ["annotations", 0, "answers"], None, r"annotations\[0\].answers: need a list, got null"),
        ("a", ["annotations", 0, "answers"], [], r"annotations\[0\].answers: need at least 1, got none"),
        ("a", ["annotations", 0, "answers"], [{}], r"annotations\[0\].answers\[0\].answer: missing"),
        ("a", ["annotations", 0, "multiple_choice_answer"], 1, "multiple_choice_answer: need a text, got 1"),
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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=2)
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=st.sampled_from("qa"), field=st.integers(0, 9), value=JSON, delete=st.booleans())
def test_any_change_reads_or_is_one_line(read, file, field, value, delete):
    files = {"q": copy.deepcopy(QUESTIONS), "a": copy.deepcopy(ANNOTATIONS)}
    entry = files[file]["questions" if file == "q" else "annotations"][0]
    key = sorted(entry)[field % len(entry)]
    if delete:
        del entry[key]
    else:
        entry[key] = value
    try:
        assert len(read(files["q"], files["a"])) == 2
    except DataError as error:
        assert "\n" not in str(error)


def test_the_real_files(data_dir):
    folder = data_dir / "vqav2_images"
    found = read_questions(
        folder / "v2_OpenEnded_mscoco_train2014_img_questions.json",
        folder / "v2_mscoco_train2014_img_annotations.json",
        PictureFolders([folder / "images" / "train2014"]),
    )
    assert len(found) == 101 and len({e.pictures for e in found}) == 67
    assert missing_pictures(found) == []
