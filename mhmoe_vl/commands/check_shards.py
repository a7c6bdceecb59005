"""What is wrong with shards: compared with their manifests, or read as archives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from tqdm import tqdm

from ..data.manifest import Index, member_at, scan_fully
from ..data.sample import BadSample
from ..data.shards import ShardSet, fetch_manifest, open_stream
from ..errors import DataError
from .findings import Finding, Report

HARMLESS = ("extension", "name", "not a file")
"""Reasons for which foreign members are passed over without a sample being the poorer."""


def check_shards(urls: list[str], report: Report) -> None:
    """Compare shards with their manifests; those without one are checked as archives only."""
    for url in tqdm(urls, unit="shard", disable=None):
        report.shards += 1
        try:
            manifest = fetch_manifest(url)
            report.without_manifest += manifest is None
            report.problems += _check_shard(url, manifest, report)
        except DataError as error:
            reason = error.reason if isinstance(error, BadSample) else "manifest"
            report.problems.append(Finding(url, "", reason, str(error)))


def _check_shard(url: str, manifest: Index | None, report: Report) -> Iterator[Finding]:
    try:
        with open_stream(url) as stream:
            index = scan_fully(stream, url)
    except (BadSample, OSError) as error:
        byte = getattr(error, "byte", None)
        member = "" if manifest is None or byte is None else member_at(manifest, byte)
        yield Finding(url, member, getattr(error, "reason", "unreadable"), str(error))
        if manifest is not None:
            report.samples += len(manifest.samples)
            yield from _lost_samples(url)
        return
    report.samples += len((manifest or index).samples)
    report.left_out = dict(Counter(report.left_out) + Counter(index.count_left_out()))
    for name, reason in index.left_out:
        if reason not in HARMLESS:
            yield Finding(url, name, reason, "member left out")
    if manifest is not None:
        yield from _differences(url, manifest, index)


def _lost_samples(url: str) -> Iterator[Finding]:
    """The samples that a damaged archive no longer gives."""
    samples = ShardSet([url])
    for number in range(len(samples)):
        try:
            samples[number]
        except BadSample as error:
            yield Finding(url, error.member, error.reason, str(error))


def _differences(url: str, manifest: Index, index: Index) -> Iterator[Finding]:
    listed, found = _members(manifest), _members(index)
    for name in sorted(listed.keys() | found.keys()):
        if name not in found:
            yield Finding(url, name, "missing", "listed in the manifest, not in the shard")
        elif name not in listed:
            yield Finding(url, name, "unlisted", "in the shard, not in the manifest")
        elif listed[name] != found[name]:
            yield Finding(url, name, "checksum", f"offset, size, crc32 {found[name]}, manifest {listed[name]}")
    if listed == found and (manifest.size, manifest.sha256) != (index.size, index.sha256):
        yield Finding(url, "", "checksum", "all members are right, but the file differs between them")


def _members(index: Index) -> dict[str, tuple]:
    return {f"{key}.{name}": place for key, members in index.samples.items() for name, place in members.items()}
