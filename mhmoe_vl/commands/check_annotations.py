"""What is wrong with annotation files and the pictures they name: all of it, not only the first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..data.annotated import PictureFolders, Pictures, read_picture
from ..data.kinds import KINDS, Kind, as_problem, parse, unmatched
from ..data.records import Problem, reason
from ..data.sample import BadSample
from ..errors import DataError
from .findings import AnnotationFile, Finding, Report

Links = dict[str, dict[Path, dict[int, int]]]
"""By kind and file, what the ids in it are about."""


def check_annotations(paths: Sequence[Path], kind: str | None, images: Sequence[Path], report: Report) -> None:
    """Check every file by its kind, files about the same ids against each other, and each picture once.

    Args:
        paths: annotation files.
        kind: of all of them; none to know each by its content.
        images: folders of pictures; none leaves pictures out.
        report: to add to.

    Raises:
        DataError: a file or folder does not exist.
    """
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such file (name an annotation file)")
    folders = PictureFolders(images) if images else None
    wanted: dict[Path, tuple[Path, str]] = {}
    links: Links = {}
    for path in tqdm(paths, unit="file", disable=None):
        name, parsed = parse(path, kind)
        report.problems += [Finding(str(path), place, "syntax", what) for place, what in parsed.problems]
        if name is not None and parsed.content is not None:
            _check_content(path, name, parsed.content, folders, wanted, links, report)
            continue
        report.files.append(AnnotationFile(str(path), name or "", 0, 0))
        if not parsed.problems:
            what = f"none of the kinds that are known by their content (name it with --kind: {', '.join(KINDS)})"
            report.problems.append(Finding(str(path), "", "kind", what))
    report.problems += _unmatched(links)
    report.problems += _bad_pictures(wanted)


def _check_content(
    path: Path,
    name: str,
    content: Any,
    folders: PictureFolders | None,
    wanted: dict[Path, tuple[Path, str]],
    links: Links,
    report: Report,
) -> None:
    """Add what is wrong inside a file to ``report``, its pictures to ``wanted`` and its ids to ``links``."""
    kind = KINDS[name]
    problems = list(kind.problems(content))
    pictures, more = ([], []) if folders is None else _pictures(path, kind, content, folders)
    problems += more
    for place, picture in pictures:
        wanted.setdefault(picture, (path, place))
    unchecked = folders is None and kind.pictures is not None
    count = None if unchecked else len({picture for _, picture in pictures})
    if kind.links is not None:
        links.setdefault(name, {})[path] = kind.links(content)
    report.problems += _findings(path, problems)
    report.files.append(AnnotationFile(str(path), name, kind.count(content), count))


def _pictures(path: Path, kind: Kind, content: Any, folders: PictureFolders) -> Pictures:
    try:
        return kind.pictures(content, folders) if kind.pictures is not None else ([], [])
    except DataError as error:  # the folders do not say which picture is meant
        return [], [as_problem(path, error)]


def _findings(path: Path, problems: Iterable[Problem]) -> Iterator[Finding]:
    for problem in problems:
        yield Finding(str(path), problem[0], reason(problem), problem[1])


def _unmatched(links: Links) -> Iterator[Finding]:
    """Each file that has partners is held against the one with which it has most ids in common."""
    for name, files in links.items():
        partners = links.get(KINDS[name].partner)
        for path, own in files.items() if partners else ():
            other = max(partners, key=lambda partner: len(own.keys() & partners[partner].keys()))
            yield from _findings(path, unmatched(own, partners[other], str(other)))


def _bad_pictures(wanted: Mapping[Path, tuple[Path, str]]) -> Iterator[Finding]:
    """The pictures that the tools could not read, at the place that needs them first."""
    from ..data.transforms import decode_image

    for picture, (path, place) in tqdm(wanted.items(), unit="picture", disable=None):
        try:
            decode_image(read_picture(picture))
        except OSError as error:
            yield Finding(str(path), place, "missing image", f"{picture}: {error.strerror}")
        except BadSample as error:
            what = str(error).removeprefix(f"{picture}: ")
            yield Finding(str(path), place, "unreadable image", f"{picture}: {what}")
