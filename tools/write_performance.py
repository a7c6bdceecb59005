"""Write README's section on performance from the JSON of benchmark_ffn.py and benchmark_training.py."""

import argparse
import sys
from pathlib import Path

from mhmoe_vl.benchmarks.readme import replace_section, section
from mhmoe_vl.errors import OneLineParser, guard


def main() -> int:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="files that --json wrote")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="%(default)s")
    return guard(lambda: write(parser.parse_args()))


def write(options: argparse.Namespace) -> int:
    text = options.readme.read_text(encoding="utf-8")
    options.readme.write_text(replace_section(text, section(options.results), str(options.readme)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
