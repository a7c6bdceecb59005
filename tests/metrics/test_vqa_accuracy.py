"""VQA accuracy against the official evaluation's numbers, and its rules one by one."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_vl.errors import DataError
from mhmoe_vl.metrics.vqa_accuracy import CONTRACTIONS, answer_accuracy, normalise, score_vqa

SPLIT = "train2014_sub9k"


@pytest.mark.parametrize(("system", "overall"), [("answerer", 87.222903), ("variants", 63.680517)])
def test_real_questions_score_as_the_official_code_prints(data_dir: Path, system: str, overall: float) -> None:
    folder = data_dir / "vqav2_60k"
    known = folder / "known_scores"
    annotations = json.loads(gzip.decompress((folder / f"v2_mscoco_{SPLIT}_annotations.json.gz").read_bytes()))
    predictions = json.loads((known / f"v2_OpenEnded_mscoco_{SPLIT}_{system}_results.json").read_bytes())
    expected = json.loads((known / "expected.json").read_bytes())[system]
    per_question = json.loads((known / f"v2_OpenEnded_mscoco_{SPLIT}_{system}_evalQA.json").read_bytes())
    scores = score_vqa({p["question_id"]: p["answer"] for p in predictions}, annotations["annotations"])
    assert scores.overall == pytest.approx(overall, abs=1e-6)
    assert scores.per_answer_type == pytest.approx(expected["perAnswerType"], abs=1e-6)
    assert scores.per_question_type == pytest.approx(expected["perQuestionType"], abs=1e-6)
    assert {str(question): accuracy for question, accuracy in scores.per_question.items()} == pytest.approx(
        per_question, abs=1e-6
    )


@pytest.mark.parametrize(
    ("matches", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)]
)
def test_ten_annotators_leave_one_out(matches: int, accuracy: float) -> None:
    """3 matches: the 3 sets without one of them count 2/3, the 7 others 1, (3 * 2/3 + 7) / 10."""
    assert answer_accuracy("cat", ["cat"] * matches + ["dog"] * (10 - matches)) == pytest.approx(accuracy, abs=1e-12)


@given(st.text("ab", max_size=1), st.lists(st.text("ab", max_size=1), min_size=1, max_size=12))
def test_any_number_of_annotators_scores_as_the_definition_says(prediction: str, answers: list[str]) -> None:
    """The mean written out; 'a' is an article, and so equal to the empty answer where annotators disagree."""
    agree = len(set(answers)) == 1
    same = [answer == prediction if agree else normalise(answer) == normalise(prediction) for answer in answers]
    left_out = [min(1.0, (sum(same) - same[i]) / 3) for i in range(len(same))]
    accuracy = answer_accuracy(prediction, answers)
    assert accuracy == pytest.approx(sum(left_out) / len(left_out), abs=1e-12)
    assert 0 <= accuracy <= 1


def test_answers_are_normalised_only_where_annotators_disagree() -> None:
    assert answer_accuracy("Yes.", ["yes"] * 10) == 0
    assert answer_accuracy("yes", ["Yes."] * 10) == 0
    assert answer_accuracy("Yes.", ["yes"] * 9 + ["no"]) == 1
    assert answer_accuracy("yes", ["The yes!"] * 9 + ["no"]) == 1


def test_line_breaks_and_ends_are_cleaned_before_annotators_are_compared() -> None:
    """The ten differ in white space only, so they agree, and nothing is normalised."""
    answers = ["red\nbus"] * 5 + [" red\tbus "] * 5
    assert answer_accuracy("red bus", answers) == 1
    assert answer_accuracy("\tred\nbus", answers) == 1
    assert answer_accuracy("Red bus", answers) == 0
    assert answer_accuracy("red  bus", answers) == 0


@pytest.mark.parametrize(
    ("answer", "official"),
    [
        ("A Cat", "cat"),
        ("the", ""),
        ("None", "0"),
        ("TEN", "10"),
        ("twenty one", "twenty 1"),
        ("t-shirt", "t shirt"),  # no space beside the mark: it becomes one
        ("t- shirt-x", "t shirtx"),  # one beside a space, and all of its kind vanish
        ("a/b ; c", "b c"),  # each mark is judged alone; a is an article once / is a space
        ("1,000-2", "10002"),  # a comma between digits, and all marks vanish
        ("red,blue", "red blue"),
        ("10:30", "10:30"),
        ("3.5", "3.5"),
        ("3. 5.", "3 5"),
        (".5", ".5"),
        ("u.s.a.", "usa"),
        ("." * 40 + "x", "........x"),  # the first 32 only
        ("what?!", "what"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("Im", "im"),  # the published list has it in capitals only, and words are lower-case by then
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("somebody'd", "somebodyd"),
        ("lets", "lets"),
        ("shes", "shes"),
        ("wed", "wed"),
        ("ows'at", "ows'at"),
        ("ow's'at", "'ow's'at"),
        ("yalld've", "yalld've"),
        ("y'alld've", "y'all'd've"),
        ("_x_", "x"),
        ("[a]", ""),
        ("e\u0301 ", "e\u0301"),
    ],
)
def test_official_spelling(answer: str, official: str) -> None:
    assert normalise(answer) == official


def test_the_published_list_has_114_contractions_of_lower_case_letters() -> None:
    """Counted in the official code, less what stands for itself and what has a capital, which no word then has."""
    assert len(CONTRACTIONS) == 114
    words = ["ain't", "o'clock", "ma'am", "'twas", "not've", "y'all", "where've", "why're", "she'd've", "somebody'd've"]
    assert [normalise(word.replace("'", "", 1)) for word in words] == words
    assert all(key.replace("'", "") == word.replace("'", "") for key, word in CONTRACTIONS.items())


def annotation(question_id: int, answer_type: str, question_type: str, *answers: str) -> dict:
    entries = [{"answer": answer, "answer_id": i} for i, answer in enumerate(answers, 1)]
    names = {"question_id": question_id, "answer_type": answer_type, "question_type": question_type}
    return names | {"answers": entries}


def test_means_by_type() -> None:
    annotations = [
        annotation(1, "yes/no", "is it", *["yes"] * 10),
        annotation(2, "yes/no", "is the", *["yes"] * 2, *["no"] * 8),
        annotation(3, "other", "is it", *["a red one"] * 3, *["blue"] * 7),
    ]
    scores = score_vqa({3: "red 1", 1: "yes", 2: "yes"}, annotations)
    assert scores.per_question == pytest.approx({1: 100, 2: 60, 3: 90})
    assert scores.overall == pytest.approx(250 / 3)
    assert scores.per_answer_type == pytest.approx({"other": 90, "yes/no": 80})
    assert scores.per_question_type == pytest.approx({"is it": 95, "is the": 60})


def test_only_whole_splits_are_scored() -> None:
    annotations = [annotation(number, "other", "what", *["x"] * 10) for number in range(5)]
    with pytest.raises(DataError, match=r"^4 of 5 questions missing: 1, 2, 3, \.\.\. \(.*; 1 questions not in .*: 7 "):
        score_vqa({0: "x", 7: "x"}, annotations)
    with pytest.raises(DataError, match="no question to score"):
        score_vqa({}, [])
