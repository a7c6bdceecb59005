"""Draw the embedded set: pictures of coloured shapes with captions in five languages, as shards, from one seed.

OUT/pairs/{train,val}: jpg; txt, a caption (half are English, the rest German, French, Spanish or Chinese); json, the
ground truth. OUT/images/{train,val}: jpg. OUT/texts/{train,val}: txt, captions of other scenes, the five languages
alike often. Beside the shards of pairs and images, scenes.jsonl holds the ground truth by key. No validation scene has
the content of a training scene of its stream, and no validation text is a training text.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from packing import make_parser, pack, positive_number, run, sample_key, whole_number
from scene_captions import LANGUAGES, caption
from scene_drawing import Scene, draw, pick, sample_scene

from mhmoe_vl.data.manifest import write_text
from mhmoe_vl.data.writing import Members

MIN_SIZE, MAX_SIZE = 32, 2048
JPEG_QUALITY = 92


class Pair(NamedTuple):
    """A scene and its caption in one language."""

    scene: Scene
    language: str
    text: str


class Stream(NamedTuple):
    """One kind of example.

    Attributes:
        make: draws one by lot, for pictures of a size.
        content: what no example of the one split may share with the other split.
        members: of its sample.
        truth: its line in scenes.jsonl; none when there is no picture.
    """

    make: Callable[[np.random.Generator, int], Any]
    content: Callable[[Any], Hashable]
    members: Callable[[Any], Members]
    truth: Callable[[Any], dict[str, Any]] | None


def make_pair(rng: np.random.Generator, image_size: int) -> Pair:
    """A scene with a caption; every second one is English."""
    scene = sample_scene(rng, image_size)
    language = pick(rng, tuple(LANGUAGES)[1:]) if rng.integers(2) else "en"
    return Pair(scene, language, caption(scene, language, rng))


def make_text(rng: np.random.Generator, image_size: int) -> str:
    """The caption, in any language, of a scene that nobody draws."""
    return caption(sample_scene(rng, image_size), pick(rng, tuple(LANGUAGES)), rng)


def encode(scene: Scene) -> bytes:
    """The picture of a scene as JPEG."""
    buffer = io.BytesIO()
    draw(scene).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


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


STREAMS = {
    "pairs": Stream(make_pair, lambda pair: pair.scene.content(), pair_members, pair_truth),
    "images": Stream(sample_scene, Scene.content, picture_members, Scene.record),
    "texts": Stream(make_text, str, text_members, None),
}


def make_examples(name: str, num_train: int, num_val: int, *, seed: int, image_size: int) -> dict[str, list[Any]]:
    """Training and validation examples of the stream ``name``.

    Every example has a random generator of its own, so the first n training examples are the same for any count.
    """
    stream, number = STREAMS[name], list(STREAMS).index(name)

    def draw_by_lot(split: int, i: int, excluded: set[Hashable]) -> Any:
        rng = np.random.default_rng([seed, number, split, i])
        example = stream.make(rng, image_size)
        while stream.content(example) in excluded:
            example = stream.make(rng, image_size)
        return example

    train = [draw_by_lot(0, i, set()) for i in range(num_train)]
    known = {stream.content(example) for example in train}
    return {"train": train, "val": [draw_by_lot(1, i, known) for i in range(num_val)]}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; raises DataError on bad input."""
    val_help = "validation examples per training example, drawn in addition"
    parser = make_parser(__doc__, val_fraction=0.1, val_help=val_help)
    for name, count in {"pairs": 2000, "images": 2000, "texts": 4000}.items():
        parser.add_argument(f"--{name}", type=whole_number, default=count, help="training examples; 0: leave out")
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
            pack_stream(args, name, stream, {split: items for split, items in splits.items() if items})


def pack_stream(args: argparse.Namespace, name: str, stream: Stream, splits: dict[str, list[Any]]) -> None:
    """Write the shards of a stream and, beside them, its ground truth."""
    sizes = {"samples_per_shard": args.samples_per_shard, "processes": args.processes}
    pack(args.out / name, splits, stream.members, {"source": "scenes", "seed": args.seed, "size": args.size}, **sizes)
    for split, items in splits.items() if stream.truth else ():
        lines = [{"key": sample_key(i), **stream.truth(item)} for i, item in enumerate(items)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(args.out / name / split / "scenes.jsonl", text)


if __name__ == "__main__":
    run(main)
