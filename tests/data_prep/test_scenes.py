from __future__ import annotations

import collections
import hashlib
import io
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import scenes
from PIL import Image
from scene_captions import LANGUAGES
from scene_drawing import COLORS, SHAPES

SHARDS = ("pairs", "images", "texts")
SMALL = ["--pairs", "60", "--images", "20", "--texts", "40", "--size", "64", "--samples-per-shard", "25"]
SMALL += [word for name in scenes.STREAMS if name not in SHARDS for word in (f"--{name}", "0")]
NOTHING = [word for name in scenes.STREAMS for word in (f"--{name}", "0")]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    scenes.main(["--out", str(out), *SMALL])
    return out


def test_counts_and_members(small, load):
    sizes = {"pairs": (60, 6), "images": (20, 2), "texts": (40, 4)}
    members = {"pairs": {"jpg", "txt", "json"}, "images": {"jpg"}, "texts": {"txt"}}
    for stream, counts in sizes.items():
        for split, count in zip(("train", "val"), counts, strict=True):
            samples = load(small / stream / split)
            assert len(samples) == count
            assert all(set(sample) == members[stream] for sample in samples.values())
    assert [p.name for p in sorted((small / "pairs/train").glob("*.tar"))] == [f"shard-{i:06d}.tar" for i in range(3)]


def test_pictures_and_truth_belong_together(small, load):
    samples = load(small / "pairs/train")
    lines = [json.loads(line) for line in (small / "pairs/train/scenes.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == list(samples)
    for line in lines:
        sample = samples[line.pop("key")]
        assert sample["txt"].decode() == line.pop("caption")
        assert json.loads(sample["json"]) == line
        pixels = np.array(Image.open(io.BytesIO(sample["jpg"])))
        assert pixels.shape == (64, 64, 3)
        for item in line["objects"]:
            inside = [0.5, 0.5] if item["shape"] != "ring" else [0.5, 0.9]
            x, y = (int(item["box"][i] + share * item["box"][i + 2]) for i, share in enumerate(reversed(inside)))
            assert np.abs(pixels[y, x].astype(int) - COLORS[item["color"]]).max() < 60


def test_images_have_truth_and_texts_none(small, load):
    assert len((small / "images/val/scenes.jsonl").read_text().splitlines()) == len(load(small / "images/val"))
    assert not (small / "texts/train/scenes.jsonl").exists()


def test_same_bytes_again_and_with_two_processes(small, tmp_path, run_script):
    code, error = run_script("scenes", "--out", tmp_path / "two", *SMALL, "--processes", 2)
    assert code == 0, error
    assert contents(tmp_path / "two") == contents(small)
    scenes.main(["--out", str(tmp_path / "other"), *SMALL, "--images", "0", "--texts", "0", "--seed", "1"])
    other = contents(tmp_path / "other")
    assert set(other) == {name for name in contents(small) if name.startswith("pairs")}
    assert other["pairs/train/shard-000000.tar"] != contents(small)["pairs/train/shard-000000.tar"]


@pytest.mark.parametrize("stream", scenes.STREAMS)
def test_validation_is_new_and_counts_only_add(stream):
    num_train, num_val = (400, 60) if stream in SHARDS else (60, 12)
    splits = scenes.make_examples(stream, num_train, num_val, seed=0, image_size=128)
    train, val = (set().union(*map(scenes.STREAMS[stream].contents, splits[split])) for split in ("train", "val"))
    assert not train & val
    assert (train and val) or stream == "imagefolder"  # of which nothing is promised
    assert scenes.make_examples(stream, 30, 0, seed=0, image_size=128)["train"] == splits["train"][:30]


def test_streams_differ_and_languages_are_shared_out():
    pairs = scenes.make_examples("pairs", 600, 0, seed=0, image_size=128)["train"]
    images = scenes.make_examples("images", 600, 0, seed=0, image_size=128)["train"]
    assert not {pair.scene for pair in pairs} & set(images)
    languages = collections.Counter(pair.language for pair in pairs)
    assert set(languages) == set(LANGUAGES) and 250 < languages["en"] < 350
    assert min(languages.values()) > 40


def test_a_killed_run_is_finished_by_running_it_again(tmp_path, start, load):
    arguments = [*NOTHING, "--images", 500, "--size", 32, "--samples-per-shard", 5]
    folder = tmp_path / "killed/images/train"
    process = start("scenes", "--out", tmp_path / "killed", *arguments)
    while len(list(folder.glob("*.tar"))) < 3 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    standing = list(folder.glob("*.tar"))
    assert 3 <= len(standing) < 100
    assert len(load(folder)) == 5 * len(standing)
    first = {path: path.stat().st_mtime_ns for path in standing}
    (folder / "shard-000098.tar.part").write_bytes(b"half a shard")

    for name in ("killed", "whole"):
        scenes.main(["--out", str(tmp_path / name), *map(str, arguments)])
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert first == {path: path.stat().st_mtime_ns for path in standing}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--size", "8"], "error: --size 8: pictures have 32 to 2048 px (see --help)"),
        (["--size", "99999999999"], "error: --size 99999999999: pictures have 32 to 2048 px (see --help)"),
        (
            NOTHING,
            f"error: {' '.join(NOTHING)}: nothing to draw (see --help)",
        ),
        (["--pairs", "-1"], "error: argument --pairs: '-1' is not a whole number of at least 0 (see --help)"),
        (["--val-fraction", "1"], "error: argument --val-fraction: '1' is not a number from 0 to below 1 (see --help)"),
        (["--procesess", "2"], "error: unrecognized arguments: --procesess 2 (see --help)"),
    ],
)
def test_bad_options_get_one_line(arguments, line, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        scenes.main(["--out", str(tmp_path / "out"), *arguments])
    assert stop.value.code == 2
    assert capsys.readouterr().err == line + "\n"
    assert not (tmp_path / "out").exists()


def test_another_set_is_not_mixed_in(small, run_script):
    code, error = run_script("scenes", "--out", small, *SMALL, "--seed", 5)
    assert code == 2
    assert error == (
        f"error: {small}/pairs/packing.json: made with seed 0, now 5 (choose another --out, or delete this folder)\n"
    )


INPUTS, TRUTH = (
    {"pairs": "10c407123518a01c", "images": "6c21eea60ca70bcc", "texts": "54df8ad9d4f27426"},
    "bdb41552fa3c3968",
)
OFFICIAL = ["--vqa", "4", "--nlvr2", "2", "--captions", "4", "--coco", "4", "--imagefolder", "2"]


def test_official_sets_are_the_same_again_and_with_two_processes(tmp_path, run_script):
    options = [*NOTHING, *OFFICIAL, "--imagefolder", "13", "--size", "32", "--val-fraction", "0.5"]
    scenes.main(["--out", str(tmp_path / "one"), *options])
    code, error = run_script("scenes", "--out", tmp_path / "two", *options, "--processes", 2)
    assert code == 0, error
    one = contents(tmp_path / "one")
    assert contents(tmp_path / "two") == one
    assert {name.partition("/")[0] for name in one} == {"vqa", "nlvr2", "captions", "coco", "imagefolder"}
    assert not any(name.endswith(".part") for name in one)

    # What a stopped run has drawn is kept, and annotation files come last.
    path = tmp_path / "one/coco/train2017/000000000001.jpg"
    path.unlink()
    before = (tmp_path / "one/coco/train2017/000000000003.jpg").stat().st_mtime_ns
    scenes.main(["--out", str(tmp_path / "one"), *options])
    assert contents(tmp_path / "one") == one
    assert (tmp_path / "one/coco/train2017/000000000003.jpg").stat().st_mtime_ns == before


def test_class_folders(tmp_path):
    scenes.main(["--out", str(tmp_path), *NOTHING, "--imagefolder", "3", "--size", "32", "--val-fraction", "0.34"])
    for split, count in (("train", 3), ("val", 1)):
        folders = sorted((tmp_path / "imagefolder" / split).iterdir())
        assert [folder.name for folder in folders] == sorted(SHAPES)
        assert all(len(list(folder.glob("*.jpg"))) == count for folder in folders)
    for row in scenes.make_examples("imagefolder", 3, 0, seed=0, image_size=32)["train"]:
        assert [[o.shape for o in scene.objects] for scene in row] == [[shape] for shape in SHAPES]


def test_streams_are_as_they_always_were(small):
    """Fingerprints of what is drawn, apart from the picture library; whoever changes one changes every number."""
    texts = b"".join(path.read_bytes() for path in sorted(small.rglob("scenes.jsonl")))
    inputs = {name: json.loads((small / name / "packing.json").read_text())["input"] for name in SHARDS}
    assert (inputs, hashlib.sha256(texts).hexdigest()[:16]) == (INPUTS, TRUTH)
