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
    checker = _Checker(PictureFolders(images) if images else None, report)
    for path in tqdm(paths, unit="file", disable=None):
        checker.check_file(path, kind)
    report.problems += _unmatched(checker.links)
    report.problems += _bad_pictures(checker.wanted)


class _Checker:
    """Files one by one, and what is left to check once all are known.

    Args:
        folders: of pictures, where these are to be checked.
        report: to add to.

    Attributes:
        wanted: file and place that need a picture first.
        links: by kind and file, what the ids in it are about.
    """

    def __init__(self, folders: PictureFolders | None, report: Report) -> None:
        self.folders, self.report = folders, report
        self.wanted: dict[Path, tuple[Path, str]] = {}
        self.links: dict[str, dict[Path, dict[int, int]]] = {}

    def check_file(self, path: Path, kind: str | None) -> None:
        """Add what is wrong in a file, pictures aside."""
        name, parsed = parse(path, kind)
        self.report.problems += [Finding(str(path), place, "syntax", what) for place, what in parsed.problems]
        if name is not None and not (parsed.content is None and parsed.problems):
            self._check_content(path, name, parsed.content)
            return
        self.report.files.append(AnnotationFile(str(path), name or "", 0, None if self.folders is None else 0))
        if not parsed.problems:
            what = f"none of the kinds that are known by their content (name it with --kind: {', '.join(KINDS)})"
            self.report.problems.append(Finding(str(path), "", "kind", what))

    def _check_content(self, path: Path, name: str, content: Any) -> None:
        kind = KINDS[name]
        pictures, problems = ([], []) if self.folders is None else _pictures(path, kind, content, self.folders)
        self.report.problems += _findings(path, [*kind.problems(content), *problems])
        for place, picture in pictures:
            self.wanted.setdefault(picture, (path, place))
        if kind.links is not None:
            self.links.setdefault(name, {})[path] = kind.links(content)
        unchecked = self.folders is None and kind.pictures is not None
        count = None if unchecked else len({picture for _, picture in pictures})
        self.report.files.append(AnnotationFile(str(path), name, kind.count(content), count))


def _pictures(path: Path, kind: Kind, content: Any, folders: PictureFolders) -> Pictures:
    try:
        return kind.pictures(content, folders) if kind.pictures is not None else ([], [])
    except DataError as error:  # the folders do not say which picture is meant
        return [], [as_problem(path, error)]


def _findings(path: Path, problems: Iterable[Problem]) -> Iterator[Finding]:
    for problem in problems:
        yield Finding(str(path), problem[0], reason(problem), problem[1])


def _unmatched(links: Mapping[str, Mapping[Path, dict[int, int]]]) -> Iterator[Finding]:
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
