"""Perplexity of training runs, from their logs: curves over the steps, and against the number of experts."""

import sys
from pathlib import Path

from mhmoe_vl.analysis.run_figures import plot_runs
from mhmoe_vl.errors import OneLineParser, guard


def main() -> int:
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folders")
    add("--metric", default="perplexity", metavar="NAME", help="validation number, as perplexity/images (%(default)s)")
    add("--out", type=Path, default="out/runs", metavar="FOLDER", help="to write into (%(default)s)")
    add("--debug", action="store_true", help="show the traceback of an error")
    given = vars(parser.parse_args())
    return guard(lambda: plot_runs(**given), debug=given.pop("debug"))


if __name__ == "__main__":
    sys.exit(main())
