from __future__ import annotations

import collections
import json
import re

import pytest
import scenes
from scene_drawing import Scene, SceneObject
from scene_statements import is_for_dev, nlvr2_files

from mhmoe_vl.data.annotated import PictureFolders, require_pictures
from mhmoe_vl.data.nlvr2 import read_statements

COLOR = "red|orange|yellow|green|blue|purple|brown|black"
LOOK = f"an? (?:({COLOR}) )?(shape|circle|square|triangle|star|ring|heart|cross|diamond)"
RELATION = "(to the left of|to the right of|above|below)"
COUNT = {"one": 1, "two": 2, "three": 3, "four": 4}
COMPARING = {"more", "fewer", "same", "different", "share", "equally"}
FRAMES = {
    r"The left (?:image|picture) \w+ (.*)": lambda left, right: left,
    r"The (?:image|picture) on the left \w+ (.*)": lambda left, right: left,
    r"The right (?:image|picture) \w+ (.*)": lambda left, right: right,
    r"The (?:image|picture) on the right \w+ (.*)": lambda left, right: right,
    r"Both (?:images|pictures) \w+ (.*)": lambda left, right: left and right,
    r"Each (?:image|picture) \w+ (.*)": lambda left, right: left and right,
    r"Only one (?:image|picture) \w+ (.*)": lambda left, right: left + right == 1,
    r"Exactly one (?:image|picture) \w+ (.*)": lambda left, right: left + right == 1,
    r"At least one (?:image|picture) \w+ (.*)": lambda left, right: left or right,
    r"One or both (?:images|pictures) \w+ (.*)": lambda left, right: left or right,
    r"Neither (?:image|picture) \w+ (.*)": lambda left, right: not left and not right,
    r"No (?:image|picture) \w+ (.*)": lambda left, right: not left and not right,
}


def shows(words: str, scene: Scene) -> bool:
    """Whether a scene shows what the end of a sentence names, read word by word."""
    if found := re.fullmatch(r"an? (\w+) background", words):
        return scene.background == found[1]
    if found := re.fullmatch(r"exactly (\w+) shapes?", words):
        return len(scene.objects) == COUNT[found[1]]
    if found := re.fullmatch(LOOK, words):
        return any(found[1] in (None, o.color) and found[2] in ("shape", o.shape) for o in scene.objects)
    found = re.fullmatch(f"{LOOK} {RELATION} {LOOK}", words)
    first, second = ([o for o in scene.objects if (o.color, o.shape) == found.group(i, i + 1)] for i in (1, 4))
    if not (first and second):
        return False
    dx, dy = (b - a for a, b in zip(first[0].center, second[0].center, strict=True))
    along, across = (dx, dy) if "to the" in found[3] else (dy, dx)
    return bool(along * (-1 if found[3] in ("to the right of", "below") else 1) >= 1.5 * abs(across))


def frame(sentence: str) -> tuple[str, str]:
    """The pattern of a sentence about what pictures show, and the words behind its verb; empty for others."""
    found = [(pattern, match[1]) for pattern in FRAMES if (match := re.fullmatch(pattern + r"\.", sentence))]
    return found[0] if found and "than" not in sentence else ("", "")


def is_true(sentence: str, left: Scene, right: Scene) -> bool:
    pattern, words = frame(sentence)
    if pattern:
        return bool(FRAMES[pattern](shows(words, left), shows(words, right)))
    if found := re.match(r"The (left|right) .* (more|fewer) shapes than", sentence):
        difference = (len(left.objects) - len(right.objects)) * (1 if found[1] == "left" else -1)
        return difference > 0 if found[2] == "more" else difference < 0
    values = [s.background if "background" in sentence else len(s.objects) for s in (left, right)]
    assert re.search("same|equally|share|different", sentence)
    return (values[0] == values[1]) != ("different" in sentence or "do not" in sentence)


STAR = SceneObject("star", "green", "large", (30.0, 64.0), 20.0, 0.0)
CROSS = SceneObject("cross", "orange", "small", (90.0, 64.0), 12.0, 0.0)
BOTH, ONE = Scene(128, "grey", "plain", (STAR, CROSS)), Scene(128, "pink", "plain", (CROSS,))


@pytest.mark.parametrize(
    ("sentence", "true"),
    [
        ("Both images show an orange cross.", True),
        ("Only one image shows a star.", True),
        ("The right image shows a green star to the left of an orange cross.", False),
        ("The left image shows a green star to the left of an orange cross.", True),
        ("The left image shows a green star above an orange cross.", False),
        ("The picture on the right has a pink background.", True),
        ("Neither picture contains exactly two shapes.", False),
        ("The right picture has fewer shapes than the other one.", True),
        ("The images share a background color.", False),
        ("The images do not have the same number of shapes.", True),
        ("No image has an orange star.", True),
    ],
)
def test_the_check_of_truth_by_hand(sentence, true):
    assert is_true(sentence, BOTH, ONE) == true


@pytest.fixture(scope="module")
def splits():
    return scenes.make_examples("nlvr2", 160, 30, seed=0, image_size=32)


def lines(splits, split):
    """Every sentence with a pair and its label."""
    for item in splits[split]:
        for k, sentence in enumerate(item.sentences):
            yield from ((sentence, pair, true == k) for pair, true in zip(item.pairs, item.true, strict=True))


def test_labels_are_true(splits):
    for split in splits:
        for sentence, pair, label in lines(splits, split):
            assert is_true(sentence, *pair) == label, sentence


def test_neither_sentence_nor_pictures_tell_the_label(splits):
    """Two pairs of four are true for each sentence, and of two sentences about a pair one is."""
    for split in splits:
        by_sentence, by_pair = collections.defaultdict(list), collections.defaultdict(list)
        for sentence, pair, label in lines(splits, split):
            by_sentence[sentence].append(label)
            by_pair[pair].append(label)
        assert all(sum(labels) * 2 == len(labels) and len(labels) % 4 == 0 for labels in by_sentence.values())
        assert all(sorted(labels) == [False, True] for labels in by_pair.values())


def test_one_picture_is_not_enough(splits):
    """Whoever reads the sentence, sees all of one picture and knows the rates, is wrong one time in eight or more."""
    for side in (0, 1):
        counts = collections.defaultdict(collections.Counter)
        for sentence, pair, label in lines(splits, "train"):
            pattern, words = frame(sentence)
            seen = shows(words, pair[side]) if pattern else len(pair[side].objects)
            kind = pattern or tuple(re.findall("left .*more|left .*fewer|right .*more|not|different", sentence))
            counts[kind, seen][label] += 1
        right = sum(max(count.values()) for count in counts.values())
        assert right / sum(count.total() for count in counts.values()) < 0.875


def test_all_kinds_stand_in_both_splits_but_no_sentence(splits):
    train, val = ({sentence for item in splits[split] for sentence in item.sentences} for split in ("train", "val"))
    assert not train & val
    for sentences, least in ((train, len(FRAMES)), (val, len(FRAMES) - 2)):
        assert len({frame(sentence)[0] for sentence in sentences} & set(FRAMES)) >= least
    assert {word for s in train for word in re.findall("more|fewer|same|different|share|equally", s)} == COMPARING
    assert all(is_for_dev(item) == (split == "val") for split in splits for item in splits[split])


def test_the_reader_takes_the_files(tmp_path):
    options = ["--size", "32", *(word for name in scenes.STREAMS for word in (f"--{name}", "0"))]
    scenes.main([*options, "--out", str(tmp_path), "--nlvr2", "6", "--val-fraction", "0.5"])
    splits = scenes.make_examples("nlvr2", 6, 3, seed=0, image_size=32)
    for split, name in (("train", "train"), ("val", "dev")):
        examples = read_statements(tmp_path / f"nlvr2/{name}.json", PictureFolders([tmp_path / "nlvr2" / name]))
        require_pictures(examples)
        read = [(e.record.sentence, e.record.label) for e in examples]
        assert read == [(sentence, label) for sentence, _, label in lines(splits, split)]
        assert all(e.picture(side).startswith(b"\x89PNG") for e in examples[:4] for side in (0, 1))
        assert [e.pictures[0].name for e in examples[:2]] == [f"{name}-0-{k}-img0.png" for k in range(2)]


def test_pictures_are_those_of_the_pair(splits):
    files = nlvr2_files({"train": splits["train"][:1]})
    for k, (left, right) in enumerate(splits["train"][0].pairs):
        assert files[f"train/0/train-0-{k}-img0.png"] == left and files[f"train/0/train-0-{k}-img1.png"] == right


def test_keys_are_the_official_ones(data_dir, splits):
    theirs = json.loads((data_dir / "nlvr2/data/dev.json").read_text().splitlines()[0])
    files = nlvr2_files(splits)
    dev, train = (json.loads(files[f"{name}.json"].splitlines()[0]) for name in ("dev", "train"))
    assert set(dev) == set(theirs)
    assert set(train) == set(theirs) - {"extra_validations"} | {"directory"}
