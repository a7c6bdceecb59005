"""Bad files through the real tools: one line with file, place and remedy, exit code 2, and nothing trained; a picture
that training can do without is counted, one that evaluation needs ends it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_finetune import WORLDS, annotated, finetune, settings
from tiny_world import write_settings


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """The three worlds, as they should be."""
    return {kind: write(tmp_path_factory.mktemp(kind)) for kind, write in WORLDS.items()}


@pytest.fixture
def run(worlds, tmp_path, capsys):
    """Runs a task's tool on a copy of its world that ``spoil`` has changed: exit code, stdout, stderr."""

    def call(kind: str, spoil: Callable[[Path], None], *options: object, **task: Any) -> tuple[int, str, str]:
        world = tmp_path / "world"
        shutil.copytree(worlds[kind], world)
        spoil(world)
        values = settings(kind, world, tmp_path / "run", **{"num_beams": 1} if kind == "captioning" else {}, **task)
        values["train"] |= {"steps": 2, "log_every": 1, "num_workers": 0}
        capsys.readouterr()
        code = finetune(kind, "--config", write_settings(tmp_path / "c.yaml", values), *options)
        streams = capsys.readouterr()
        return code, streams.out, streams.err.replace(f"{world}/", "")

    return call


def value_of(path: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    """Changes the JSON value of a file in a world."""

    def spoil(world: Path) -> None:
        value = json.loads((world / path).read_text())
        change(value)
        (world / path).write_text(json.dumps(value))

    return spoil


def text_of(path: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    """Changes the text of a file in a world."""
    return lambda world: (world / path).write_text(change((world / path).read_text()))


def line_of(path: str, number: int, **values: Any) -> Callable[[Path], None]:
    """Changes keys in a line of JSON lines."""

    def change(text: str) -> str:
        lines = text.splitlines()
        lines[number - 1] = json.dumps(json.loads(lines[number - 1]) | values)
        return "\n".join(lines) + "\n"

    return text_of(path, change)


def cut(path: str, keep: int) -> Callable[[Path], None]:
    """Leaves the first bytes of a file."""
    return lambda world: (world / path).write_bytes((world / path).read_bytes()[:keep])


def exchanged(world: Path) -> None:
    """Left and right of a pair, by links."""
    folder = world / "images"
    names = [f"dev-0-1-img{side}.png" for side in (0, 1)]
    for name in names:
        (folder / name).rename(folder / f"real-{name}")
    (folder / "store").mkdir()
    for name, other in zip(names, reversed(names), strict=True):
        (folder / f"real-{other}").rename(folder / "store" / other)
        (folder / name).symlink_to(folder / "store" / other)


def same_twice(world: Path) -> None:
    """A pair whose two pictures are one file."""
    (world / "images/dev-2-0-img1.png").unlink()
    (world / "images/dev-2-0-img1.png").hardlink_to(world / "images/dev-2-0-img0.png")


VAL = "images/val/COCO_val_000000000003.jpg"
FAULTS = [
    ("vqa", text_of("val_a.json", lambda text: text[:200]), "val_a.json: line 1, byte 193: JSON ends in the middle"),
    ("vqa", text_of("val_q.json", lambda text: "\ufeff" + text), "val_q.json: byte 0: a byte order mark (save it as"),
    ("vqa", text_of("train_q.json", lambda text: text.replace("1000", "1e999", 1)), "1e999 is no finite number"),
    ("vqa", text_of("train_q.json", lambda text: text.replace('"train"', "NaN", 1)), "NaN is no finite number"),
    (
        "vqa",
        text_of("val_a.json", lambda text: text.replace("{", '{"annotations": 1, ', 1)),
        'val_a.json: line 1, byte 19: key "annotations" stands twice in one object (mend the file)',
    ),
    ("vqa", text_of("val_a.json", lambda text: "[" * 100_000), "val_a.json: line 1, byte 100: nested deeper than 100"),
    ("vqa", text_of("val_q.json", lambda text: "[]"), "val_q.json: need an object, got a list of 0 (mend the file)"),
    (
        "vqa",
        value_of("val_q.json", lambda v: v["questions"][3].pop("question")),
        "val_q.json: questions[3].question: missing (mend the file)",
    ),
    (
        "vqa",
        value_of("val_q.json", lambda v: v["questions"][3].update(image_id="2")),
        'val_q.json: questions[3].image_id: need a whole number, got "2" (mend the file)',
    ),
    (
        "vqa",
        value_of("val_q.json", lambda v: v["questions"][3].update(question=" ")),
        'val_q.json: questions[3].question: need a text that is not empty, got " " (mend the file)',
    ),
    (
        "vqa",
        value_of("val_q.json", lambda v: v["questions"].append(v["questions"][2])),
        "val_q.json: questions[18].question_id: 2000 stands already at [2] (mend the file)",
    ),
    (
        "vqa",
        value_of("val_a.json", lambda v: v["annotations"][5].update(answers=None)),
        "val_a.json: annotations[5].answers: need a list, got null (mend the file)",
    ),
    (
        "vqa",
        value_of("val_a.json", lambda v: v["annotations"][5].update(answers=[])),
        "val_a.json: annotations[5].answers: need at least 1, got none (mend the file)",
    ),
    (
        "vqa",
        value_of("val_a.json", lambda v: v["annotations"].pop(4)),
        "val_a.json: 1 questions of val_q.json without annotation, 0 annotations without question (give the files",
    ),
    ("vqa", lambda world: (world / VAL).unlink(), "val_q.json: 1 pictures missing: COCO_val_000000000003.jpg ("),
    ("nlvr2", line_of("dev.json", 3, label="maybe"), 'dev.json: line 3: label: need True or False, got "maybe"'),
    ("nlvr2", line_of("dev.json", 3, sentence=""), "dev.json: line 3: sentence: need a text that is not empty, got"),
    ("nlvr2", line_of("dev.json", 3, identifier="dev-0"), "dev.json: line 3: identifier: need an identifier such as"),
    (
        "nlvr2",
        line_of("dev.json", 3, identifier="dev-0-0-0"),
        'dev.json: line 3: identifier: "dev-0-0-0" stands already at line 1 (mend the file)',
    ),
    ("nlvr2", text_of("dev.json", lambda text: text.replace("}\n", "\n", 1)), "dev.json: line 1, byte "),
    ("nlvr2", exchanged, "dev.json: line 2: the picture dev-0-1-img0.png is a link to dev-0-1-img1.png"),
    ("nlvr2", same_twice, "dev.json: line 9: the pictures dev-2-0-img0.png and dev-2-0-img1.png are one file"),
    (
        "nlvr2",
        lambda world: (world / "images/dev-0-1-img1.png").unlink(),
        "dev.json: 1 pictures missing: dev-0-1-img1.png (get them, or evaluate on a split that is whole)",
    ),
    (
        "captioning",
        value_of("coco.json", lambda v: v["annotations"][6].update(caption="")),
        'coco.json: annotations[6].caption: need a text that is not empty, got "" (mend the file)',
    ),
    (
        "captioning",
        value_of("coco.json", lambda v: v["annotations"][6].update(image_id=900)),
        "coco.json: annotations[6].image_id: 900 is not in images (mend the file)",
    ),
    (
        "captioning",
        value_of("coco.json", lambda v: v["annotations"].append(v["annotations"][1])),
        "coco.json: annotations[80].id: 1 stands already at [1] (mend the file)",
    ),
    (
        "captioning",
        value_of("coco.json", lambda v: v["images"].append(v["images"][1])),
        "coco.json: images[40].id: 1 stands already at [1] (mend the file)",
    ),
    ("captioning", text_of("coco.json", lambda text: text[:-30]), "coco.json: line 1, byte "),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "spoil", "message"), FAULTS, ids=lambda value: value if type(value) is str else "")
def test_bad_files_are_one_line_before_training(run, tmp_path, kind, spoil, message):
    code, _, error = run(kind, spoil)
    assert code == 2
    assert error.startswith("error: ") and message in error
    assert error.count("\n") == 1 and len(error) <= 300
    assert not (tmp_path / "run/checkpoints").exists()


PICTURES = {
    "vqa": (VAL, "images/train/COCO_train_000000000003.jpg", "val_q.json: 3000: "),
    "nlvr2": ("images/dev-1-1-img1.png", "images/train-3-2-img0.png", "dev.json: dev-1-1-0: "),
    "captioning": ("images/000000000030.jpg", "images/000000000003.jpg", "dataset_coco.json: 30: "),
}


@pytest.mark.parametrize("kind", list(PICTURES))
def test_evaluation_ends_at_a_damaged_picture(run, kind):
    """Never a score on fewer examples."""
    name, _, place = PICTURES[kind]
    task = {"train": annotated("dataset_coco.json")} if kind == "captioning" else {}
    code, out, error = run(kind, cut(name, 50), **task)
    assert code == 2
    assert error.startswith(f"error: {place}{name}: ") and "damaged picture" in error and "(mend the picture" in error
    assert error.count("\n") == 1 and len(error) <= 300
    assert "accuracy" not in out and "CIDEr" not in out


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(PICTURES))
def test_training_goes_on_without_a_damaged_picture_and_counts_it(run, tmp_path, kind):
    _, name, _ = PICTURES[kind]
    task = {"train": annotated("dataset_coco.json")} if kind == "captioning" else {}
    code, _, error = run(kind, cut(name, 50), "--train.steps", 6, **task)
    assert code == 0, error
    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(line.get("bad/image", 0) for line in logged) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1, 50])
def test_any_number_of_captions_of_any_length(run, tmp_path, count):
    """A picture without captions is not learnt from; longer texts than the encoder reads are cut and counted."""

    def spoil(value: dict[str, Any]) -> None:
        kept = [a for a in value["annotations"] if a["image_id"] != 3]
        texts = [("ein Wort — слово 語 " * 1250) if n == 0 else f"Nummer {n}" for n in range(count)]
        value["annotations"] = kept + [{"id": 1000 + n, "image_id": 3, "caption": t} for n, t in enumerate(texts)]

    val = annotated("dataset_coco.json")
    code, _, error = run("captioning", value_of("coco.json", spoil), "--train.steps", 8, val=val)
    assert code == 0, error
    last = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()][-2]
    assert last["split"] == "train"  # 128 captions drawn, of 78, 79, 128
    assert last.get("texts_cut") in {0: (None,), 1: (1, 2), 50: (1,)}[count]
    split = json.loads((tmp_path / "run/recorded/split.json").read_text())
    assert split["training_examples"] == 78 + count
