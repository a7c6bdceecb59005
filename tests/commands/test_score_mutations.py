"""The three ``score`` commands on files in which anything was changed: a score of the whole split, or one line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutate, mutate_text
from ten_rows import ANNOTATIONS, ANSWERS, CAPTIONS, COCO, NLVR2, QUESTIONS, TRUTHS, text

from mhmoe_vl import commands

FILES: dict[str, dict[str, Any]] = {
    "vqa": {"predictions": ANSWERS, "annotations": ANNOTATIONS, "questions": QUESTIONS},
    "captions": {"predictions": CAPTIONS, "annotations": COCO},
    "nlvr2": {"predictions": TRUTHS, "annotations": NLVR2},
}


def write(folder: Path, metric: str, victim: str, rng: random.Random, as_text: bool) -> tuple[list[str], Any]:
    """The files of a metric, one of them changed: options that name them, and what the changed one now holds."""
    options, now = [], None
    for name, value in FILES[metric].items():
        content = json.dumps(value) if name == "predictions" and metric != "nlvr2" else text(value)
        if name == victim:
            whole = as_text or isinstance(value, str)
            now = mutate_text(content, rng) if whole else mutate(value, rng)
            content = now if whole else json.dumps(now) if content[0] == "[" else text(now)
        (folder / name).write_text(content, newline="")
        options += [f"--{name}", str(folder / name)]
    return options, now


def size(metric: str, annotations: Any) -> int:
    """Examples in an annotation file."""
    return len(annotations["images" if metric == "captions" else "annotations"] if metric != "nlvr2" else annotations)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32), metric=st.sampled_from(sorted(FILES)), as_text=st.booleans(), check=st.booleans(),
    victim=st.sampled_from(["predictions", "predictions", "annotations", "questions"]),
)  # fmt: skip
def test_any_change_ends_in_a_score_of_the_split_or_in_one_line(tmp_path, capsys, seed, metric, as_text, check, victim):
    options, now = write(tmp_path, metric, victim, random.Random(seed), as_text)
    out = tmp_path / "scores.json"
    out.unlink(missing_ok=True)
    capsys.readouterr()
    code = commands.main(["score", metric, *options, "--json", str(out), *(["--check"] if check else [])])
    printed, error = capsys.readouterr()
    assert all(character.isprintable() or character == "\n" for character in printed + error)
    if code == 2:
        assert error and (check or error.count("\n") == 1)
        assert all(line.startswith("error: ") and len(line) <= 300 for line in error.splitlines())
        assert not out.exists()
        return
    assert (code, error) == (0, "")
    expected = 10 if victim != "annotations" or isinstance(now, str) else size(metric, now)
    if not out.exists():  # a split without captions or labels
        assert check and "nothing to score" in printed
        return
    scores = json.loads(out.read_text())
    scored = {
        "vqa": lambda: len(scores["per_question"]),
        "captions": lambda: scores["images"],
        "nlvr2": lambda: int(printed.splitlines()[-2].split()[-2]),
    }[metric]()
    assert scored == expected == 10


@pytest.mark.parametrize("metric", sorted(FILES))
@pytest.mark.parametrize("change", ["missing", "extra", "double"])
def test_predictions_for_other_than_the_split_are_refused(tmp_path, capsys, metric, change):
    rows = FILES[metric]["predictions"]
    rows = rows.splitlines() if metric == "nlvr2" else rows
    other = {"vqa": {"question_id": 99, "answer": "x"}, "captions": {"image_id": 99, "caption": "x"}}
    extra = other.get(metric, "dev-99-0-0,True")
    rows = {"missing": rows[1:], "extra": [*rows, extra], "double": [*rows, rows[2]]}[change]
    options, _ = write(tmp_path, metric, "", random.Random(0), False)
    (tmp_path / "predictions").write_text("\n".join(rows) if metric == "nlvr2" else json.dumps(rows))
    said = {"missing": "1 of 10 ", "extra": "1 ", "double": "1 "}[change]
    words = {"missing": "missing: ", "extra": "not in the split: ", "double": "given twice or more: "}[change]
    for check in ([], ["--check"]):
        assert commands.main(["score", metric, *options, *check]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {tmp_path}/predictions: {said}") and words in error
        assert error.count("\n") == 1 and len(error) <= 300
