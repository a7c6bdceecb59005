"""Draw the embedded set: pictures of coloured shapes in the form of every task, from one seed.

Shards: OUT/pairs/{train,val}: jpg; txt, a caption (half are English, the rest German, French, Spanish or Chinese);
json, the ground truth. OUT/images/{train,val}: jpg. OUT/texts/{train,val}: txt, captions of other scenes, the five
languages alike often. Beside the shards of pairs and images, scenes.jsonl holds the ground truth by key.
Official files with folders of pictures: OUT/vqa, VQA v2; OUT/nlvr2, NLVR2, one or two statements about four pairs each;
OUT/captions, COCO's captions, five a picture; OUT/coco, COCO's instances with masks, the category is the shape;
OUT/imagefolder/{train,val}/<shape>, one shape a picture.
No validation scene of pairs, images, vqa, captions and coco has the content of a training scene, no validation text is
a training text, and no statement stands in both train.json and dev.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from packing import make_parser, pack, positive_number, run, sample_key, whole_number
from scene_captions import LANGUAGES, caption
from scene_classes import class_files, make_row
from scene_coco import captions_files, instances_files, make_captioned, make_instances
from scene_drawing import SHAPES, Scene, pick, sample_scene
from scene_files import Files, encode, write_files
from scene_statements import is_for_dev, make_statements, nlvr2_files
from scene_vqa import make_asked, vqa_files

from mhmoe_vl.data.manifest import write_text
from mhmoe_vl.data.writing import Members

MIN_SIZE, MAX_SIZE = 32, 2048
Splits = dict[str, list[Any]]
"""Examples of "train" and, where there are any, "val"."""


class Pair(NamedTuple):
    """A scene and its caption in one language."""

    scene: Scene
    language: str
    text: str


class Stream(NamedTuple):
    """One kind of example.

    Attributes:
        count: training examples where the user does not say.
        counted: what an example is, for the help.
        make: draws one by lot, for pictures of a size.
        contents: what no example of the one split may share with one of the other split.
        write: writes the splits into a folder by the options.
        is_for_val: whether an example belongs to the validation split, else to the training split, by its content;
            none: either may hold it.
    """

    count: int
    counted: str
    make: Callable[[np.random.Generator, int], Any]
    contents: Callable[[Any], set[Hashable]]
    write: Callable[[Path, Splits, argparse.Namespace], None]
    is_for_val: Callable[[Any], bool] | None = None


# -------------------------------------------------------------------------------------------- shards
def make_pair(rng: np.random.Generator, image_size: int) -> Pair:
    """A scene with a caption; every second one is English."""
    scene = sample_scene(rng, image_size)
    language = pick(rng, tuple(LANGUAGES)[1:]) if rng.integers(2) else "en"
    return Pair(scene, language, caption(scene, language, rng))


def make_text(rng: np.random.Generator, image_size: int) -> str:
    """The caption, in any language, of a scene that nobody draws."""
    return caption(sample_scene(rng, image_size), pick(rng, tuple(LANGUAGES)), rng)


def pair_members(pair: Pair) -> Members:
    """Picture, caption, ground truth."""
    return {"jpg": encode(pair.scene), "txt": pair.text, "json": {**pair.scene.record(), "language": pair.language}}


def picture_members(scene: Scene) -> Members:
    """The picture alone."""
    return {"jpg": encode(scene)}


def text_members(text: str) -> Members:
    """The text alone."""
    return {"txt": text}


def pair_truth(pair: Pair) -> dict[str, Any]:
    """The ground truth of a pair and its caption."""
    return {**pair.scene.record(), "language": pair.language, "caption": pair.text}


def shards(
    members: Callable[[Any], Members], truth: Callable[[Any], dict[str, Any]] | None = None
) -> Callable[[Path, Splits, argparse.Namespace], None]:
    """Writes shards of samples with these members and, beside them, the ground truth, a line of scenes.jsonl each."""

    def write(out: Path, splits: Splits, args: argparse.Namespace) -> None:
        sizes = {"samples_per_shard": args.samples_per_shard, "processes": args.processes}
        pack(out, splits, members, _settings(args), **sizes)
        for split, items in splits.items() if truth else ():
            lines = [{"key": sample_key(i), **truth(item)} for i, item in enumerate(items)]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_text(out / split / "scenes.jsonl", text)

    return write


def official(files: Callable[[Splits], Files]) -> Callable[[Path, Splits, argparse.Namespace], None]:
    """Writes these files."""

    def write(out: Path, splits: Splits, args: argparse.Namespace) -> None:
        write_files(out, files(splits), _settings(args), processes=args.processes)

    return write


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"source": "scenes", "seed": args.seed, "size": args.size}


# -------------------------------------------------------------------------------------------- streams
def scene_content(item: Any) -> set[Hashable]:
    """The content of an example's scene."""
    return {item.scene.content()}


def scene_is_for_val(item: Any) -> bool:
    """Whether an example's scene is kept for validation."""
    return item.scene.is_for_val()


STREAMS = {
    "pairs": Stream(2000, "pairs", make_pair, scene_content, shards(pair_members, pair_truth)),
    "images": Stream(2000, "pictures", sample_scene, lambda s: {s.content()}, shards(picture_members, Scene.record)),
    "texts": Stream(4000, "texts", make_text, lambda text: {text}, shards(text_members)),
    "vqa": Stream(
        1500, "pictures with 6 questions each", make_asked, scene_content, official(vqa_files), scene_is_for_val
    ),
    "nlvr2": Stream(
        1000,
        "sets of 1 or 2 statements about the same 4 pairs",
        make_statements,
        lambda item: {(left.content(), right.content()) for left, right in item.pairs},
        official(nlvr2_files),
        is_for_dev,
    ),
    "captions": Stream(
        2000,
        "pictures with 5 English captions each",
        make_captioned,
        scene_content,
        official(captions_files),
        scene_is_for_val,
    ),
    "coco": Stream(
        2000,
        "pictures with boxes and masks",
        make_instances,
        lambda item: scene_content(item) if item.scene.objects else set(),
        official(instances_files),
    ),
    "imagefolder": Stream(
        100, f"pictures of each of the {len(SHAPES)} classes", make_row, lambda row: set(), official(class_files)
    ),
}


def make_examples(name: str, num_train: int, num_val: int, *, seed: int, image_size: int) -> Splits:
    """Training and validation examples of the stream ``name``.

    Every example has a random generator of its own, so the first n training examples are the same for any count.
    """
    stream, number = STREAMS[name], list(STREAMS).index(name)

    def draw_by_lot(split: int, i: int, excluded: set[Hashable]) -> Any:
        rng = np.random.default_rng([seed, number, split, i])
        while True:
            example = stream.make(rng, image_size)
            misplaced = stream.is_for_val and stream.is_for_val(example) != bool(split)
            if not misplaced and not stream.contents(example) & excluded:
                return example

    train = [draw_by_lot(0, i, set()) for i in range(num_train)]
    known = set().union(*map(stream.contents, train))
    return {"train": train, "val": [draw_by_lot(1, i, known) for i in range(num_val)]}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; raises DataError on bad input."""
    val_help = "validation examples per training example, drawn in addition"
    parser = make_parser(__doc__, val_fraction=0.1, val_help=val_help)
    for name, stream in STREAMS.items():
        count_help = f"training examples, {stream.counted}; 0: leave out"
        parser.add_argument(f"--{name}", type=whole_number, default=stream.count, help=count_help)
    size_help = f"side of the pictures in pixels, {MIN_SIZE} to {MAX_SIZE}"
    parser.add_argument("--size", type=positive_number, default=128, help=size_help)
    args = parser.parse_args(argv)
    if not MIN_SIZE <= args.size <= MAX_SIZE:
        parser.error(f"--size {args.size}: pictures have {MIN_SIZE} to {MAX_SIZE} px")
    if not any(getattr(args, name) for name in STREAMS):
        parser.error(f"{' '.join(f'--{name} 0' for name in STREAMS)}: nothing to draw")
    for name, stream in STREAMS.items():
        if num_train := getattr(args, name):
            num_val = round(num_train * args.val_fraction)
            splits = make_examples(name, num_train, num_val, seed=args.seed, image_size=args.size)
            stream.write(args.out / name, {split: items for split, items in splits.items() if items}, args)


if __name__ == "__main__":
    run(main)
