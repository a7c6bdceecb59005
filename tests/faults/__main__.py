"""``make faults``: every promise at full size, printed as a table, written as JSON and into README."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import traceback
from datetime import date
from importlib import import_module
from pathlib import Path

import torch

from mhmoe_vl.benchmarks.readme import replace_section
from mhmoe_vl.benchmarks.tables import markdown
from mhmoe_vl.errors import one_line

from .harness import ROOT, Found

PROMISES = {
    1: "kills",
    2: "damaged_shards",
    3: "exactly_once",
    4: "foreign_code",
    5: "bit_rot",
    6: "not_a_number",
    7: "full_disk",
    8: "bombs",
    9: "lost_processes",
    10: "remote_shards",
    11: "routing",
    12: "messages",
    13: "old_files",
    14: "cost",
}
"""files beside this one, by the number of their promise"""
RESULTS = ROOT / "results" / "faults.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- faults: written by make faults -->", "<!-- /faults -->"


def check(number: int, folder: Path, *, full: bool) -> Found:
    """What the check of promise ``number`` finds, at full size or in its quick part."""
    logging.getLogger("mhmoe_vl").setLevel(logging.ERROR)  # thousands of bad samples need not all be named
    return import_module(f".{PROMISES[number]}", __package__).check(folder, full)


def table(results: list[dict]) -> str:
    """The results as a table in Markdown."""
    rows = [(str(row["number"]), row["title"], row["figure"], "yes" if row["met"] else "no") for row in results]
    return markdown([("", "promise", "found", "met"), *rows]) + "\n"


def write_readme(results: list[dict], when: str) -> None:
    """Put the table between its marks in README."""
    text, new = README.read_text(encoding="utf-8"), f"\nRun on {when}.\n\n{table(results)}"
    README.write_text(replace_section(text, new, README.name, BEGIN, END), encoding="utf-8")


def main() -> int:
    """Check, print, write; 1 when a promise is not met."""
    parser = argparse.ArgumentParser("python -m faults", description=__doc__)
    parser.add_argument("--only", nargs="+", type=int, choices=PROMISES, default=list(PROMISES), help="their numbers")
    parser.add_argument("--quick", action="store_true", help="the smaller counts of make test")
    parser.add_argument("--json", type=Path, help="also write the results there")
    parser.add_argument(
        "--readme", action="store_true", help=f"write them to {RESULTS.name} and README (all, full size)"
    )
    options = parser.parse_args()
    if options.readme and (options.quick or len(options.only) < len(PROMISES)):
        parser.error("--readme: only with all promises at full size")
    torch.set_num_threads(1)  # children are forked: they would wait for threads that only the parent has
    results = []
    for number in options.only:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            try:
                found = check(number, Path(folder), full=not options.quick)
            except Exception as error:  # the others are checked all the same
                traceback.print_exc()
                found = Found("the check itself failed", [one_line(repr(error))])
        title = import_module(f".{PROMISES[number]}", __package__).TITLE
        results.append({"number": number, "title": title, "met": found.met, "figure": found.figure})
        results[-1] |= {"seconds": round(time.monotonic() - began, 1), "failures": found.failures[:10]}
        results[-1]["numbers"] = found.numbers
        print(f"{number:2}  {'met    ' if found.met else 'NOT MET'}  {title}: {found.figure}", flush=True)
        for failure in found.failures[:5]:
            print(f"      {failure}", flush=True)
    met, seconds = sum(row["met"] for row in results), sum(row["seconds"] for row in results)
    print(f"{met} of {len(results)} promises met in {seconds:.0f} s")
    text = json.dumps({"date": date.today().isoformat(), "results": results}, indent=1) + "\n"
    for path in filter(None, [options.json, RESULTS if options.readme else None]):
        path.write_text(text, encoding="utf-8")
    if options.readme:
        write_readme(results, date.today().strftime("%-d %B %Y"))
    return 0 if all(row["met"] for row in results) else 1


if __name__ == "__main__":
    sys.exit(main())
