"""``mhmoe-vl score``: tables, files of scores, and what is said of predictions and annotations that do not fit."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mhmoe_vl import commands
from mhmoe_vl.commands.score import METRICS

Score = Callable[..., tuple[int, str, str]]


def answered(question_id: int, answer: str, count: int = 10) -> dict[str, Any]:
    """An official annotation whose annotators give one answer, the last of them another one."""
    answers = [answer] * (count - 1) + ["maybe"] * (count > 0)
    entries = [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(answers, 1)]
    names = {"question_type": "is it" if question_id % 2 else "what", "answer_type": "other"}
    return {"question_id": question_id, "image_id": question_id // 10, "answers": entries, **names}


QUESTIONS = {"questions": [{"question_id": i, "image_id": i // 10, "question": "what?"} for i in range(100, 110)]}
ANNOTATIONS = {"annotations": [answered(question["question_id"], "red") for question in QUESTIONS["questions"]]}
ANSWERS = [{"question_id": i, "answer": "A red." if i < 105 else "blue"} for i in range(100, 110)]
EXAMPLES = [
    {"identifier": f"dev-7-{pair}-{sentence}", "sentence": "x", "label": str((pair + sentence) % 2 == 0)}
    for sentence in range(3)
    for pair in range(4)
]
ROWS = "".join(f"{example['identifier']},{example['label']}\n" for example in EXAMPLES)


@pytest.fixture
def score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Score:
    """Writes predictions, annotations and questions, runs the command: exit code, stdout, stderr without the folder."""

    def run(metric: str, predictions: Any, annotations: Any = None, *more: str, questions: Any = None):
        arguments = ["score", metric, *more]
        for option, value in (("predictions", predictions), ("annotations", annotations), ("questions", questions)):
            if value is not None:
                path = tmp_path / option
                path.write_text(value if isinstance(value, str) else json.dumps(value))
                arguments += [f"--{option}", str(path)]
        capsys.readouterr()
        code = commands.main(arguments)
        out, err = capsys.readouterr()
        return code, out.replace(f"{tmp_path}/", ""), err.replace(f"{tmp_path}/", "")

    return run


def lines_of(examples: list[Any]) -> str:
    return "".join(json.dumps(example) + "\n" for example in examples)


def changed(records: list[dict], number: int, **values: Any) -> list[dict]:
    return [record | (values if i == number else {}) for i, record in enumerate(records)]


# ------------------------------------------------------------------------------------------------- VQA
def test_vqa_prints_a_table_and_writes_json(score: Score, tmp_path: Path) -> None:
    code, out, err = score("vqa", ANSWERS, ANNOTATIONS, "--json", str(tmp_path / "out.json"), questions=QUESTIONS)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "         accuracy  questions",
        "overall     50.00         10",
        "",
        "other       50.00         10",
        "",
        "is it       40.00          5",
        "what        60.00          5",
    ]
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found) == ["overall", "per_answer_type", "per_question_type", "per_question"]
    assert (found["overall"], found["per_answer_type"]) == (50.0, {"other": 50.0})
    assert found["per_question"] == {str(i): 100.0 * (i < 105) for i in range(100, 110)}


@pytest.mark.parametrize(("system", "overall"), [("answerer", 87.222903), ("variants", 63.680517)])
def test_vqa_of_real_questions(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], system: str, overall: float
) -> None:
    folder, out = data_dir / "vqav2_60k", tmp_path / "out.json"
    predictions = folder / "known_scores" / f"v2_OpenEnded_mscoco_train2014_sub9k_{system}_results.json"
    annotations = folder / "v2_mscoco_train2014_sub9k_annotations.json.gz"
    questions = folder / "v2_OpenEnded_mscoco_train2014_sub9k_questions.json.gz"
    call = ["score", "vqa", "--predictions", predictions, "--annotations", annotations, "--questions", questions]
    assert commands.main([*map(str, call), "--check", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    expected = json.loads((folder / "known_scores" / "expected.json").read_bytes())[system]
    assert found["overall"] == pytest.approx(overall, abs=1e-6)
    assert found["per_answer_type"] == pytest.approx(expected["perAnswerType"], abs=1e-6)
    assert found["per_question_type"] == pytest.approx(expected["perQuestionType"], abs=1e-6)
    assert f"{overall:.2f}       8977" in capsys.readouterr().out


def test_check_lists_each_kind_of_mistake_on_a_line(score: Score) -> None:
    predictions = [*ANSWERS[:6], *ANSWERS[:2], {"question_id": "106", "answer": "x"}, {"question_id": 107}, 5]
    predictions += [{"question_id": 999, "answer": "x"}]
    code, out, err = score("vqa", predictions, ANNOTATIONS, "--check")
    assert (code, out) == (2, "")
    wrong = '3 values missing or of a wrong type, first [8].question_id: need a whole number, got "106"'
    assert err.splitlines() == [
        f'error: predictions: {wrong} (write [{{"question_id": 1, "answer": "yes"}}, ...])',
        "error: predictions: 3 of 10 questions missing: 106, 108, 109 (predict the whole split)",
        "error: predictions: 1 questions not in the split: 999 (leave them out)",
        "error: predictions: 2 questions given twice or more: 100, 101 (keep one prediction each)",
    ]


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (ANSWERS[1:], "1 of 10 questions missing: 100 "),
        ([*ANSWERS, {"question_id": 5, "answer": "x"}], "1 questions not in the split: 5 "),
        ([*ANSWERS, ANSWERS[0]], "1 questions given twice or more: 100 "),
        (
            changed(ANSWERS, 3, answer=None),
            "1 values missing or of a wrong type, first [3].answer: need a text, got null ",
        ),
        ({"answers": ANSWERS}, "1 values missing or of a wrong type, first need a list, got an object of 1 "),
        ([], "10 of 10 questions missing: 100, 101, 102, ... "),
    ],
)
def test_vqa_is_never_scored_on_other_than_the_split(score: Score, predictions: Any, message: str) -> None:
    code, out, err = score("vqa", predictions, ANNOTATIONS)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: predictions: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ("", "line 1, byte 0: nothing here"),
        (json.dumps(ANNOTATIONS)[:-20], "line 1, byte "),
        ("\ufeff{}", "byte 0: a byte order mark"),
        ('{"annotations": [NaN]}', "line 1, byte 17: NaN is no finite number"),
        ('{"annotations": [], "annotations": []}', 'line 1, byte 20: key "annotations" stands twice'),
        pytest.param("[" * 100_000, "line 1, byte 100: nested deeper than 100 levels", id="nested"),
        ([], "need an object, got a list of 0"),
        ({"questions": []}, "annotations: missing"),
        ({"annotations": []}, "annotations: need at least 1, got none"),
        (
            {"annotations": changed(ANNOTATIONS["annotations"], 4, answers=None)},
            "annotations[4].answers: need a list, got",
        ),
        ({"annotations": [answered(100, "x", 0)]}, "annotations[0].answers: need at least 1, got none"),
        (
            {"annotations": changed(ANNOTATIONS["annotations"], 4, question_id="104", answer_type=3)},
            'annotations[4].question_id: need a whole number, got "104"; annotations[4].answer_type: need ',
        ),
        (
            {"annotations": changed(ANNOTATIONS["annotations"], 4, question_id=102)},
            "annotations[4].question_id: 102 stands already at [2]",
        ),
    ],
)
def test_bad_vqa_annotations_are_named_with_their_place(score: Score, annotations: Any, message: str) -> None:
    code, out, err = score("vqa", ANSWERS, annotations)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: annotations: {message}")
    assert err.count("\n") == 1


def test_questions_with_fewer_than_ten_answers_score_and_are_counted(score: Score) -> None:
    """Of 4 annotators, 3 right: (1 left out wrong: 3/3; 3 left out right: 2/3 each) / 4 = 0.75."""
    annotations = {"annotations": [answered(100, "red"), answered(101, "red", 4), answered(102, "red", 1)]}
    code, out, _ = score("vqa", [{"question_id": i, "answer": "red"} for i in (100, 101, 102)], annotations)
    assert code == 0
    assert out.splitlines()[1] == f"overall  {(100 + 75 + 0) / 3:8.2f}          3"
    assert out.splitlines()[-1] == "2 questions with other than 10 answers"


def test_a_test_split_is_checked_against_its_questions(score: Score) -> None:
    code, out, _ = score("vqa", ANSWERS, None, "--check", questions=QUESTIONS)
    assert code == 0
    assert out.splitlines() == [
        "predictions: 10 predictions, one for each of the split",
        "questions: questions only, so nothing to score",
    ]
    code, _, err = score("vqa", ANSWERS[:-2], None, "--check", questions=QUESTIONS)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: predictions: 2 of 10 questions missing: 108, 109 ")
    code, _, err = score("vqa", ANSWERS, None, questions=QUESTIONS)
    assert (code, err.startswith("error: score vqa: no --annotations ")) == (2, True)


def test_questions_and_annotations_must_be_of_one_split(score: Score) -> None:
    fewer = {"annotations": ANNOTATIONS["annotations"][:7]}
    code, _, err = score("vqa", ANSWERS[:7], fewer, questions=QUESTIONS)
    assert code == 2
    assert err.startswith("error: annotations: 3 questions of questions without annotation, 0 annotations without ")
    double = {"questions": [*QUESTIONS["questions"], QUESTIONS["questions"][0]]}
    code, _, err = score("vqa", ANSWERS, ANNOTATIONS, questions=double)
    assert code == 2
    assert err.startswith("error: questions: questions[10].question_id: 100 stands already at [0] ")


# ----------------------------------------------------------------------------------------------- NLVR2
def test_nlvr2_prints_and_writes_json(score: Score, tmp_path: Path) -> None:
    """Twelve examples of three sentences; one wrong prediction spoils one sentence."""
    rows = ROWS.replace("dev-7-0-1,False", "dev-7-0-1,True")
    code, out, _ = score("nlvr2", rows, lines_of(EXAMPLES), "--json", str(tmp_path / "out.json"))
    assert code == 0
    assert out == "accuracy     0.916667  of 12 examples\nconsistency  0.666667  of 3 sentences\n"
    assert json.loads((tmp_path / "out.json").read_text()) == pytest.approx({"accuracy": 11 / 12, "consistency": 2 / 3})


@pytest.mark.parametrize(("split", "accuracy"), [("dev", "0.5086"), ("test1", "0.5107")])
def test_nlvr2_always_true_on_the_real_sets(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str, accuracy: str
) -> None:
    annotations = data_dir / "nlvr2" / "data" / f"{split}.json"
    rows = [f"{json.loads(line)['identifier']},True\n" for line in annotations.read_text().splitlines()]
    (tmp_path / "p.csv").write_text("".join(reversed(rows)))
    assert (
        commands.main(["score", "nlvr2", "--predictions", f"{tmp_path}/p.csv", "--annotations", str(annotations)]) == 0
    )
    assert f"{float(capsys.readouterr().out.split()[1]):.4f}" == accuracy


@pytest.mark.parametrize("spell", [str, lambda label: label == "True", str.lower, str.upper])
def test_nlvr2_labels_and_predictions_in_any_spelling(score: Score, spell: Callable[[str], Any]) -> None:
    examples = [example | {"label": spell(example["label"])} for example in EXAMPLES]
    rows = "identifier,prediction\r\n" + ROWS.replace("\n", "\r\n").replace("True", "true").replace(",", " , ")
    code, out, _ = score("nlvr2", rows, lines_of(examples))
    assert (code, out.split()[1]) == (0, "1.000000")


def test_nlvr2_check_lists_each_kind_of_mistake_on_a_line(score: Score) -> None:
    rows = ROWS.splitlines()
    rows = [*rows[:9], rows[0], rows[0], "dev-7-2-2", f"{rows[10].split(',')[0]},maybe", "", "dev-9-0-0,True"]
    code, out, err = score("nlvr2", "\n".join(rows), lines_of(EXAMPLES), "--check")
    assert (code, out) == (2, "")
    wrong = (
        '3 values missing or of a wrong type, first line 12: need identifier,True or identifier,False, got "dev-7-2-2"'
    )
    assert err.splitlines() == [
        f"error: predictions: {wrong} (write identifier,prediction in each line, such as dev-850-0-1,True)",
        "error: predictions: 3 of 12 examples missing: dev-7-1-2, dev-7-2-2, dev-7-3-2 (predict the whole split)",
        "error: predictions: 1 examples not in the split: dev-9-0-0 (leave them out)",
        "error: predictions: 1 examples given twice or more: dev-7-0-0 (keep one prediction each)",
    ]
    code, out, err = score("nlvr2", "\n".join(rows), lines_of(EXAMPLES))
    assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (lines_of(EXAMPLES)[:-9], "line 12, byte "),
        (
            changed(EXAMPLES, 2, identifier="dev-7"),
            'line 3: identifier: need an identifier such as dev-850-0-1, got "dev-7"',
        ),
        (changed(EXAMPLES, 2, identifier=None), "line 3: identifier: need an identifier such as dev-850-0-1, got null"),
        (changed(EXAMPLES, 2, label="yes"), 'line 3: label: need True or False, got "yes"'),
        (changed(EXAMPLES, 2, label=1), "line 3: label: need True or False, got 1"),
        ([*EXAMPLES, EXAMPLES[4]], 'line 13: identifier: "dev-7-0-1" stands already at line 5'),
        ([{"sentence": "x"}], "line 1: identifier: missing"),
        ([*EXAMPLES[:-1], {"identifier": "dev-7-3-2"}], "line 12: 1 of 12 examples without label: "),
        ("", "line 1, byte 0: nothing here"),
    ],
)
def test_bad_nlvr2_annotations_are_named_with_their_place(score: Score, examples: Any, message: str) -> None:
    code, out, err = score("nlvr2", ROWS, examples if isinstance(examples, str) else lines_of(examples))
    assert (code, out) == (2, "")
    assert err.startswith(f"error: annotations: {message}")
    assert err.count("\n") == 1


def test_nlvr2_without_labels_is_checked_only(score: Score) -> None:
    examples = lines_of([{"identifier": example["identifier"], "sentence": "x"} for example in EXAMPLES])
    code, out, _ = score("nlvr2", ROWS, examples, "--check")
    assert code == 0
    assert out.splitlines() == [
        "predictions: 12 predictions, one for each of the split",
        "annotations: no labels in it, so nothing to score",
    ]
    code, _, err = score("nlvr2", ROWS, examples)
    assert (code, err.startswith("error: annotations: no labels in it (score against")) == (2, True)


# ------------------------------------------------------------------------------------------ all of them
def test_missing_files_and_unwritable_scores_are_one_line(score: Score, tmp_path: Path) -> None:
    code, _, err = score("nlvr2", ROWS, lines_of(EXAMPLES), "--json", str(tmp_path / "no" / "out.json"))
    assert (code, err) == (2, "error: no/out.json: cannot be written: No such file or directory (name another file)\n")
    code, _, err = score("nlvr2", ROWS, None, "--annotations", str(tmp_path / "none.json"))
    assert (code, err) == (2, "error: none.json: No such file or directory (name a readable file)\n")


def test_gzipped_annotations_are_read_by_their_content(score: Score, tmp_path: Path) -> None:
    path = tmp_path / "packed"
    path.write_bytes(gzip.compress(json.dumps(ANNOTATIONS).encode()))
    code, out, _ = score("vqa", ANSWERS, None, "--annotations", str(path))
    assert (code, out.split()[3]) == (0, "50.00")


def test_each_metric_has_help_and_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\nfrom mhmoe_vl import commands\n"
        "try:\n    commands.main(['score', sys.argv[1], '--help'])\nexcept SystemExit:\n"
        "    print([m for m in ('torch', 'timm', 'PIL', 'numpy') if m in sys.modules])"
    )
    root = Path(commands.__file__).parents[2]
    for metric in METRICS:
        call = [sys.executable, "-c", code, metric]
        done = subprocess.run(call, capture_output=True, text=True, cwd=root, check=True)
        assert "--predictions" in done.stdout
        assert done.stdout.endswith("[]\n")
