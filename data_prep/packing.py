"""What the packing scripts share: options, splits, checks of pictures, and folders that a second run finishes."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from mhmoe_vl.data.manifest import write_text
from mhmoe_vl.data.sample import size_limit
from mhmoe_vl.data.writing import Members, pack_shards
from mhmoe_vl.errors import DataError, MhmoeError, OneLineParser, one_line

Item = TypeVar("Item")
EXTENSION_OF_FORMAT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats that may stand in a shard, as the file's content tells them; a file's own ending is not believed."""


def make_parser(
    description: str | None,
    *,
    val_fraction: float,
    val_help: str = "share of the input for OUT/val, the rest is for OUT/train; 0: all in OUT",
) -> OneLineParser:
    """The options that all packing scripts have; ``val_fraction`` is that option's default."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = OneLineParser(description=description, formatter_class=formatter, argument_default=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards, made when missing")
    parser.add_argument("--val-fraction", type=fraction, default=val_fraction, help=val_help)
    parser.add_argument("--seed", type=whole_number, default=0, help="the same seed gives the same shards")
    parser.add_argument("--samples-per-shard", type=positive_number, default=500, help="samples in one tar file")
    parser.add_argument("--processes", type=positive_number, default=1, help="the output is the same for any number")
    return parser


def add_picture_options(parser: argparse.ArgumentParser, folder: str) -> None:
    """``--images`` (``folder`` says of what) and ``--skip-bad``."""
    parser.add_argument("--images", type=Path, required=True, help=folder)
    parser.add_argument("--skip-bad", action="store_true", default=False, help="leave out and count what is bad")


def fraction(text: str) -> float:
    """An option's value from 0 to below 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below 1")
    return value


def whole_number(text: str, least: int = 0) -> int:
    """An option's value, a whole number of at least ``least``."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def positive_number(text: str) -> int:
    """An option's value, a whole number of at least 1."""
    return whole_number(text, least=1)


def run(main: Callable[[], None]) -> NoReturn:
    """Call a script's ``main`` and exit: 0 done, 2 after one line on stderr about something the user can mend."""
    try:
        main()
    except (MhmoeError, OSError) as error:
        what = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(one_line(f"error: {what}"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command finishes the work", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def read_text(path: Path) -> str:
    """A whole UTF-8 file.

    Raises:
        DataError: it is missing, unreadable, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror} (name a readable file)") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start} (convert it)") from error


def read_json(path: Path) -> Any:
    """The value in a JSON file; a :class:`DataError` says where it is broken."""
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg} (mend or download it again)") from error
    except RecursionError as error:
        raise DataError(f"{path}: JSON nested too deep (mend or download it again)") from error


# -------------------------------------------------------------------------------------------- pictures
def picture_problem(root: Path, name: str) -> str | None:
    """What keeps the picture ``root/name`` out of a shard, after decoding all of it; none when it is sound."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not name.isprintable():
        return f"{one_line(name)}: not a plain path inside {root} (mend the name)"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            extension, data = picture_member(root / name)
            with Image.open(root / name) as image:
                image.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return f"{root / name}: too many pixels (shrink it)"
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error on damaged files
        missing = isinstance(error, FileNotFoundError)
        return f"{root / name}: {'missing' if missing else f'not a readable picture: {error}'} (mend or remove it)"
    return f"{root / name}: {len(data)} bytes (shrink it)" if len(data) > size_limit(extension) else None


def picture_member(path: Path) -> tuple[str, bytes]:
    """Extension and unchanged bytes of a picture file."""
    with Image.open(path) as image:
        if image.format not in EXTENSION_OF_FORMAT:
            raise ValueError(f"format {image.format}, not one of {', '.join(EXTENSION_OF_FORMAT)}")
        return EXTENSION_OF_FORMAT[image.format], path.read_bytes()


def find_bad_pictures(root: Path, names: Sequence[str], processes: int) -> dict[str, str]:
    """Name to problem of every picture that cannot be packed; decodes all of them."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder (name the folder of the pictures)")
    check = partial(picture_problem, root)
    if processes == 1 or len(names) < 100:
        return _problems(names, map(check, names))
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return _problems(names, pool.map(check, names, chunksize=32))


def _problems(names: Sequence[str], results: Iterable[str | None]) -> dict[str, str]:
    bar = tqdm(zip(names, results, strict=True), desc="checking pictures", total=len(names), unit="picture")
    return {name: problem for name, problem in bar if problem}


def settle(problems: Sequence[str], skip_bad: bool) -> None:
    """Say how many parts of the input are left out, or stop at the first.

    Raises:
        DataError: there are problems, and ``skip_bad`` is off.
    """
    if problems and not skip_bad:
        more = f"; and {len(problems) - 1} more like it" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}; --skip-bad leaves them out")
    if problems:
        print(f"left out {len(problems)} bad parts, the first: {one_line(problems[0])}", file=sys.stderr)


# -------------------------------------------------------------------------------------------- packing
def split(items: Sequence[Item], val_fraction: float, seed: int) -> dict[str, list[Item]]:
    """``items`` shuffled by ``seed``, by subfolder: ``train`` and ``val``, or all in one under ``""``.

    They are shuffled because readers shuffle only within a window of shards, and sources are sorted by class.

    Raises:
        DataError: nothing would be left for one of the two.
    """
    shuffled = [items[i] for i in np.random.default_rng(seed).permutation(len(items))]
    if not val_fraction:
        return {"": shuffled}
    num_val = max(1, round(len(items) * val_fraction))
    if num_val >= len(items):
        raise DataError(f"--val-fraction {val_fraction}: {len(items)} items cannot be split (use more, or 0)")
    return {"train": shuffled[num_val:], "val": shuffled[:num_val]}


def pack(
    out: Path,
    splits: dict[str, list[Item]],
    members: Callable[[Item], Members],
    settings: dict[str, Any],
    *,
    samples_per_shard: int,
    processes: int,
) -> None:
    """Pack every split into its subfolder of ``out``; the key of a sample is its number within the split.

    Args:
        splits: items by subfolder; what an item prints as is part of the fingerprint that a second run must match.
        members: makes the members of an item; picklable.
        settings: the options that decide the output, to be compared with those of an earlier run.

    Raises:
        DataError: there is nothing to pack, or ``out`` holds something else.
    """
    if not all(splits.values()):
        raise DataError(f"{out}: nothing to pack (check the input and the options)")
    claim(out, {**settings, "samples_per_shard": samples_per_shard}, splits)
    for name, items in splits.items():
        numbered = [(sample_key(i), item) for i, item in enumerate(items)]
        read = partial(_sample, members)
        paths = pack_shards(out / name, numbered, read, samples_per_shard=samples_per_shard, processes=processes)
        print(f"{out / name}: {len(items)} samples in {len(paths)} shards")


def pack_split(
    args: argparse.Namespace, items: Sequence[Item], members: Callable[[Item], Members], settings: dict[str, Any]
) -> None:
    """:func:`split` and :func:`pack` by the common options."""
    pack(
        args.out,
        split(items, args.val_fraction, args.seed),
        members,
        {**settings, "seed": args.seed, "val_fraction": args.val_fraction},
        samples_per_shard=args.samples_per_shard,
        processes=args.processes,
    )


def sample_key(number: int) -> str:
    """The key of a split's sample, by its number."""
    return f"{number:08d}"


def _sample(members: Callable[[Item], Members], numbered: tuple[str, Item]) -> tuple[str, Members]:
    key, item = numbered
    return key, members(item)


def claim(out: Path, settings: dict[str, Any], source: object) -> None:
    """Note in ``packing.json`` what ``out`` holds: what is whole is kept, so other settings must not continue it.

    Args:
        out: made when missing.
        settings: the options that decide the output.
        source: all that is written; what it prints as is noted as a fingerprint.

    Raises:
        DataError: ``out`` holds something else.
    """
    settings = {**settings, "input": hashlib.sha256(repr(source).encode()).hexdigest()[:16]}
    note = out / "packing.json"
    if note.is_file():
        before = read_json(note)
        changed = [k for k in settings if not isinstance(before, dict) or before.get(k) != settings[k]]
        if changed:
            old = before.get(changed[0]) if isinstance(before, dict) else before
            what = f"made with {changed[0]} {old}, now {settings[changed[0]]}"
            raise DataError(f"{note}: {what} (choose another --out, or delete this folder)")
        return
    if found := next(out.rglob("*.tar"), None):
        raise DataError(f"{found}: already there and not from this script (choose another --out)")
    out.mkdir(parents=True, exist_ok=True)
    write_text(note, json.dumps(settings, indent=1))


# -------------------------------------------------------------------------------------------- captioned pictures
class Captioned(NamedTuple):
    """A picture with its captions.

    Attributes:
        name: path below the folder of pictures.
        captions: the first becomes ``txt``; all stand in the ``json`` member.
        facts: further entries for the ``json`` member.
    """

    name: str
    captions: tuple[str, ...]
    facts: dict[str, Any]


def captioned_members(root: Path, item: Captioned) -> Members:
    """The picture as it is, ``txt`` with the first caption, ``json`` with all captions, file name and facts."""
    extension, data = picture_member(root / item.name)
    about = {"image": item.name, "captions": list(item.captions), **item.facts}
    return {extension: data, "txt": item.captions[0], "json": about}


def pack_captioned(
    args: argparse.Namespace, items: Sequence[Captioned], problems: Sequence[str], settings: dict[str, Any]
) -> None:
    """Check, split and pack captioned pictures: one sample per picture, so no picture is stored twice.

    Args:
        args: the common options, ``images`` and ``skip_bad``.
        items: in the order of the source.
        problems: of the captions, found before.
        settings: see :func:`pack`.
    """
    bad = find_bad_pictures(args.images, [item.name for item in items], args.processes)
    settle([*problems, *bad.values()], args.skip_bad)
    good = [item for item in items if item.name not in bad]
    pack_split(args, good, partial(captioned_members, args.images), settings)
