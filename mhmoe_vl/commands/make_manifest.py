"""``mhmoe-vl make-manifest``: the manifest beside each shard."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from ..data.manifest import make_manifest, manifest_path, read_manifest, scan
from ..data.remote import is_url
from ..data.shards import expand_shards
from ..errors import ConfigError, DataError, one_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this subcommand."""
    parser.add_argument("shards", nargs="+", help="tar files, folders, or patterns such as data/{000000..000999}.tar")
    parser.add_argument("--force", action="store_true", help="make manifests again that are up to date")


def run(arguments: argparse.Namespace) -> int:
    """Make what is missing or older than its shard; 1 when a shard is damaged."""
    shards = expand_shards(arguments.shards)
    if remote := next(filter(is_url, shards), None):
        raise ConfigError(f"{remote}: manifests are written beside local shards only (run this where they lie)")
    made, damaged = 0, 0
    left_out: Counter[str] = Counter()
    for shard in tqdm(shards, unit="shard", disable=None):
        try:
            if not arguments.force and _is_current(Path(shard)):
                continue
            make_manifest(shard)
            with open(shard, "rb") as stream:
                left_out.update(scan(stream, shard).count_left_out())
            made += 1
        except DataError as error:
            damaged += 1
            tqdm.write(f"error: {one_line(error)}", file=sys.stderr)
    print(f"{len(shards)} shards: {made} manifests made, {len(shards) - made - damaged} up to date, {damaged} damaged")
    for reason, count in sorted(left_out.items()):
        print(f"left out {count} members for their {reason}")
    return 1 if damaged else 0


def _is_current(shard: Path) -> bool:
    """Whether the manifest is readable, states the shard's size, and is not older than the shard."""
    try:
        index, path = read_manifest(shard), manifest_path(shard)
        state = shard.stat()
        return index is not None and index.size == state.st_size and path.stat().st_mtime_ns >= state.st_mtime_ns
    except (DataError, OSError):
        return False
