"""Where sub-tokens go: a page to explore, its data as JSON and CSV, and figures, of pictures and captions."""

import sys
from pathlib import Path

from mhmoe_vl.analysis.visualize import visualize
from mhmoe_vl.errors import OneLineParser, guard


def main() -> int:
    parser = OneLineParser(description=__doc__, epilog="Without --image and --text this page is printed.")
    add, many = parser.add_argument, {"nargs": "+", "action": "extend", "default": []}
    add("--checkpoint", **many, metavar="RUN", help="run folder, checkpoint or saved encoder; two side by side")
    add("--image", **many, metavar="PATH", help="pictures, folders of them, shards (tar, pattern, address)")
    add("--text", **many, metavar="TEXT", help="caption of every picture, in order; or texts without pictures")
    add("--out", type=Path, default="out/routing", metavar="FOLDER", help="to write into (default: %(default)s)")
    add("--capacity", type=float, metavar="F", help="mark what this capacity factor would drop in training")
    add("--img-size", type=int, nargs="+", metavar="N", help="side, or height and width, in pixels (the model's)")
    add("--limit", type=int, default=100, metavar="N", help="most items of a folder or shards (default: 100)")
    add("--batch-size", type=int, default=16, metavar="N", help="items at a time; capacity is of these (default: 16)")
    add("--debug", action="store_true", help="show the traceback of an error")
    given = vars(parser.parse_args())
    if not (given["image"] or given["text"]):
        parser.print_help()
        return 0
    return guard(lambda: visualize(**given), debug=given.pop("debug"))


if __name__ == "__main__":
    sys.exit(main())
