from __future__ import annotations

import collections
import json
import re

import numpy as np
import pytest
import scenes
from scene_drawing import BACKGROUNDS, COLORS, SHAPES, Scene, SceneObject, sample_scene
from scene_questions import KINDS, Question, ask, ask_attribute, ask_if_background, ask_presence, ask_relation
from scene_vqa import MISTAKE, OTHER_WORD, TYPO, annotate, question_type, vqa_files

from mhmoe_vl.data.annotated import PictureFolders, require_pictures
from mhmoe_vl.data.vqa import read_questions
from mhmoe_vl.metrics.vqa_accuracy import normalise

STAR = SceneObject("star", "green", "large", (30.0, 64.0), 20.0, 0.0)
CROSS = SceneObject("cross", "orange", "small", (90.0, 64.0), 12.0, 0.0)
RING = SceneObject("ring", "orange", "small", (64.0, 110.0), 12.0, 0.0)
SCENE = Scene(128, "grey", "plain", (STAR, RING, CROSS))

# Written by hand: every question of the kinds that only ask about what is there.
ANSWERS = {
    "How many shapes are there?": "3",
    "How many shapes are in the picture?": "3",
    "What color is the star?": "green",
    "What color is the cross?": "orange",
    "What color is the ring?": "orange",
    "What color is the large shape?": "green",
    "What shape is green?": "star",
    "How big is the star?": "large",
    "How big is the ring?": "small",
    "How big is the cross?": "small",
    "Where is the star?": "left",
    "Where is the cross?": "right",
    "Where is the ring?": "bottom",
    "What is to the left of the cross?": "star",
    "What is to the right of the star?": "cross",
    "What is above the ring?": "cross",
    "What is below the cross?": "ring",
    "What color is the background?": "gray",
    "Which shapes are there, from left to right?": "green star, orange ring and orange cross",
}
YES = [
    *("Is there a star?", "Are there any crosses?", "Is there an orange shape?", "Is there a green star?"),
    *("Is the star large?", "Is the ring orange?", "Is the star to the left of the cross?", "Is the background gray?"),
]
NO = [
    *("Is there a heart?", "Are there any squares?", "Is there a red shape?", "Is there an orange star?"),
    *("Is the star small?", "Is the ring green?", "Is the star above the cross?", "Is the background white?"),
]
YES_NO_KINDS = (ask_presence, ask_attribute, ask_relation, ask_if_background)
COUNTS = {
    "How many orange shapes are there?": "2",
    "How many stars are there?": "1",
    "How many red shapes are there?": "0",
}


def test_questions_and_answers_by_hand():
    rng = np.random.default_rng(0)
    found = [question for _ in range(1500) for kind in KINDS if (question := kind(SCENE, rng))]
    answers = {question.text: question.answer for question in found}
    assert all(answers[question.text] == question.answer for question in found)
    asked = {q.text for q in found if q.answer_type == "other"} | {text for text in answers if "shapes are" in text}
    counted = {text for text in asked if text.startswith("How many") and text not in ANSWERS}
    assert {text: answers[text] for text in asked - counted} == ANSWERS
    assert answers.items() >= {**COUNTS, **dict.fromkeys(YES, "yes"), **dict.fromkeys(NO, "no")}.items()
    assert {q.answer_type for q in found if q.answer in ("yes", "no")} == {"yes/no"}


def test_no_question_where_the_words_fit_two_things():
    twins = Scene(128, "white", "plain", (STAR, SceneObject("star", "red", "large", (90.0, 64.0), 20.0, 0.0)))
    texts = {question.text for i in range(300) for question in ask(twins, np.random.default_rng(i), 6)}
    assert not any(text.startswith(("What color is the star", "What color is the large")) for text in texts)
    assert {"How big is the red star?", "Is the green star to the left of the red star?", "Is there a star?"} <= texts


def test_words_alone_do_not_tell_yes_from_no():
    """Also not whether they are about colours, shapes or sizes."""
    counts = collections.defaultdict(collections.Counter)
    for i in range(1500):
        rng = np.random.default_rng([1, i])
        scene = sample_scene(rng)
        for question in filter(None, (kind(scene, rng) for kind in YES_NO_KINDS)):
            text = re.sub("small|large", "SIZE", question.text)
            text = re.sub("|".join((*COLORS, *BACKGROUNDS, "gray")), "COLOR", re.sub("|".join(SHAPES), "SHAPE", text))
            counts[text.replace(" an ", " a ").replace("SHAPEes", "SHAPEs")][question.answer] += 1
    assert set(counts) > {
        "Is there a COLOR SHAPE?",
        "Are there any SHAPEs?",
        "Is the SHAPE COLOR?",
        "Is the SHAPE SIZE?",
    }
    for text, count in counts.items():
        assert abs(count["yes"] - count["no"]) <= 4 * np.sqrt(count.total()), text


@pytest.mark.parametrize(
    ("question", "others"),
    [
        (Question("", "gray"), {"grey", "silver"}),
        (Question("", "2", "number"), {"two"}),
        (Question("", "yes", "yes/no"), set()),
        (Question("", "red star and blue ring"), set()),
    ],
    ids=lambda value: getattr(value, "answer", ""),
)
def test_annotators_err_at_their_rates(question, others):
    rng, count = np.random.default_rng(5), 4000
    given = collections.Counter(annotate(question, rng).text for _ in range(count))
    mistakes = {"gray": {"white", "turquoise"}, "2": {"1", "3"}, "yes": {"no"}}.get(question.answer, {"red star"})
    typos = sum(n for text, n in given.items() if text not in {question.answer, *others, *mistakes})
    rates = {
        MISTAKE: sum(given[text] for text in mistakes),
        OTHER_WORD if others else 0: sum(given[text] for text in others),
        TYPO if question.answer_type == "other" else 0: typos,
    }
    for rate, number in rates.items():
        assert abs(number / count - rate) <= 4 * np.sqrt(rate * (1 - rate) / count), given


@pytest.fixture(scope="module")
def asked():
    return scenes.make_examples("vqa", 1500, 150, seed=0, image_size=32)


def test_every_list_of_answers_lacks_the_rare_ones(asked):
    """As many questions as by default: nobody's list of answers given 9 times holds an answer to "which"."""
    files = vqa_files(asked)
    annotations = json.loads(files["v2_mscoco_train2014_annotations.json"])["annotations"]
    counts = collections.Counter(normalise(a["multiple_choice_answer"]) for a in annotations)
    rare = [a for a in annotations if counts[normalise(a["multiple_choice_answer"])] < 9]
    lists = [a for a in annotations if a["question_type"] == "which"]
    assert all(counts[normalise(a["multiple_choice_answer"])] < 9 for a in lists)
    assert 0.01 < len(lists) / len(annotations) < 0.05
    assert 0 <= len(rare) - len(lists) < 0.005 * len(annotations)
    assert {"yes", "no", "0", "1", "2", "3", "4", "gray", "turquoise", "diamond", "middle"} <= set(counts)


def test_most_answers_are_right_and_the_most_frequent_is_noted(asked):
    files = vqa_files(asked)
    annotations = json.loads(files["v2_mscoco_train2014_annotations.json"])["annotations"]
    truth = [question.answer for item in asked["train"] for question, _ in item.questions]
    assert np.mean([a["multiple_choice_answer"] == t for a, t in zip(annotations, truth, strict=True)]) > 0.995
    for annotation in annotations[:500]:
        given = [answer["answer"] for answer in annotation["answers"]]
        assert given.count(annotation["multiple_choice_answer"]) == max(map(given.count, given))
        assert [answer["answer_id"] for answer in annotation["answers"]] == list(range(1, 11))


def test_the_reader_takes_the_files(tmp_path):
    scenes.main([*OPTIONS, "--out", str(tmp_path), "--vqa", "20", "--val-fraction", "0.5"])
    splits = scenes.make_examples("vqa", 20, 10, seed=0, image_size=32)
    ids = []
    for split, items in splits.items():
        folder = tmp_path / "vqa"
        questions = folder / f"v2_OpenEnded_mscoco_{split}2014_questions.json"
        annotations = folder / f"v2_mscoco_{split}2014_annotations.json"
        examples = read_questions(questions, annotations, PictureFolders([folder / f"{split}2014"]))
        require_pictures(examples)
        read = [(e.record.question, e.record.answers) for e in examples]
        assert read == [(q.text, tuple(a.text for a in given)) for item in items for q, given in item.questions]
        assert len(examples) == 6 * len(items)
        ids += [e.record.question_id for e in examples]
        assert all(e.record.question_id // 1000 == e.record.image_id for e in examples)
    assert len(set(ids)) == len(ids)


OPTIONS = ["--size", "32", *(word for name in scenes.STREAMS for word in (f"--{name}", "0"))]


def test_keys_and_question_types_are_the_official_ones(data_dir):
    official = data_dir / "vqav2_images"
    types = (data_dir / "vqav2_60k/mscoco_question_types.txt").read_text().splitlines()
    rng = np.random.default_rng(3)
    scene_list = [sample_scene(rng) for _ in range(300)]
    for text in {q.text for scene in scene_list for q in ask(scene, rng, 6)}:
        words = text.lower().rstrip("?") + " "
        assert question_type(text) == max((t for t in types if words.startswith(t + " ")), key=len)
    files = vqa_files(scenes.make_examples("vqa", 2, 0, seed=0, image_size=32))
    for name, entries in (
        ("v2_OpenEnded_mscoco_train2014_{}questions.json", "questions"),
        ("v2_mscoco_train2014_{}annotations.json", "annotations"),
    ):
        theirs, ours = json.loads((official / name.format("img_")).read_text()), json.loads(files[name.format("")])
        assert set(ours) == set(theirs)
        assert set(ours[entries][0]) == set(theirs[entries][0])
        assert {k: ours[k] for k in ("data_type", "data_subtype")} == {
            k: theirs[k] for k in ("data_type", "data_subtype")
        }
