"""``mhmoe-vl check-data``: compare shards with their manifests."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from tqdm import tqdm

from ..data.manifest import Index, member_at, scan_fully
from ..data.sample import BadSample
from ..data.shards import ShardSet, expand_shards, fetch_manifest, open_stream
from ..errors import DataError, one_line

HARMLESS = ("extension", "name", "not a file")
"""Reasons for which foreign members are passed over without a sample being the poorer."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where (shard, member or empty) and what."""

    file: str
    member: str
    reason: str
    message: str


@dataclass
class Report:
    """What a check found."""

    shards: int = 0
    samples: int = 0
    without_manifest: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this subcommand."""
    parser.add_argument("shards", nargs="+", help="tar files, folders, patterns or http(s) addresses")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Read every byte of the shards; 1 when something is wrong."""
    report = check(expand_shards(arguments.shards))
    print(json.dumps(asdict(report), ensure_ascii=False, indent=1) if arguments.json else _table(report))
    return 1 if report.problems else 0


def check(urls: list[str]) -> Report:
    """Compare shards with their manifests; those without one are checked as archives only."""
    report = Report()
    for url in tqdm(urls, unit="shard", disable=None):
        report.shards += 1
        try:
            manifest = fetch_manifest(url)
            report.without_manifest += manifest is None
            report.problems += _check_shard(url, manifest, report)
        except DataError as error:
            reason = error.reason if isinstance(error, BadSample) else "manifest"
            report.problems.append(Problem(url, "", reason, str(error)))
    return report


def _check_shard(url: str, manifest: Index | None, report: Report) -> Iterator[Problem]:
    try:
        with open_stream(url) as stream:
            index = scan_fully(stream, url)
    except (BadSample, OSError) as error:
        byte = getattr(error, "byte", None)
        member = "" if manifest is None or byte is None else member_at(manifest, byte)
        yield Problem(url, member, getattr(error, "reason", "unreadable"), str(error))
        if manifest is not None:
            report.samples += len(manifest.samples)
            yield from _lost_samples(url)
        return
    report.samples += len((manifest or index).samples)
    report.left_out = dict(Counter(report.left_out) + Counter(index.count_left_out()))
    for name, reason in index.left_out:
        if reason not in HARMLESS:
            yield Problem(url, name, reason, "member left out")
    if manifest is not None:
        yield from _differences(url, manifest, index)


def _lost_samples(url: str) -> Iterator[Problem]:
    """The samples that a damaged archive no longer gives."""
    samples = ShardSet([url])
    for number in range(len(samples)):
        try:
            samples[number]
        except BadSample as error:
            yield Problem(url, error.member, error.reason, str(error))


def _differences(url: str, manifest: Index, index: Index) -> Iterator[Problem]:
    listed, found = _members(manifest), _members(index)
    for name in sorted(listed.keys() | found.keys()):
        if name not in found:
            yield Problem(url, name, "missing", "listed in the manifest, not in the shard")
        elif name not in listed:
            yield Problem(url, name, "unlisted", "in the shard, not in the manifest")
        elif listed[name] != found[name]:
            yield Problem(url, name, "checksum", f"offset, size, crc32 {found[name]}, manifest {listed[name]}")
    if listed == found and (manifest.size, manifest.sha256) != (index.size, index.sha256):
        yield Problem(url, "", "checksum", "all members are right, but the file differs between them")


def _members(index: Index) -> dict[str, tuple]:
    return {f"{key}.{name}": place for key, members in index.samples.items() for name, place in members.items()}


def _table(report: Report) -> str:
    """One line per problem (file, member, reason, what) and a line of counts."""
    rows = [(one_line(p.file), one_line(p.member) or "-", p.reason, one_line(p.message)) for p in report.problems]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines = ["  ".join([*map(str.ljust, row, widths), row[3]]) for row in rows]
    counts = [f"{report.shards} shards, {report.samples} samples, {len(rows)} problems"]
    if report.without_manifest:
        counts.append(f"{report.without_manifest} without manifest (members not checked)")
    counts += [f"{count} members left out ({reason})" for reason, count in sorted(report.left_out.items())]
    return "\n".join([*lines, "; ".join(counts)])
