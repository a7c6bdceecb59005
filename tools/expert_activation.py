"""Which experts the tokens of a data set reach: report.html, activation.json and figures. torchrun shares the work."""

import sys
from pathlib import Path

from mhmoe_vl.analysis.expert_activation import expert_activation
from mhmoe_vl.errors import OneLineParser, guard


def main() -> int:
    parser = OneLineParser(description=__doc__)
    add, many = parser.add_argument, {"nargs": "+", "action": "extend", "default": []}
    add("--checkpoint", **many, metavar="RUN", help="run folders, checkpoints or saved encoders, side by side")
    add("--data", **many, metavar="SHARDS", help="tar files, folders, patterns or addresses; all samples are read")
    add("--words", type=Path, metavar="FILE", help="a word a line, such as polysemous ones: divergence counted apart")
    add("--image", metavar="FILE", help="also divergence maps of this picture by the runs' kept steps")
    add("--out", type=Path, default="out/activation", metavar="FOLDER", help="to write into (%(default)s)")
    add("--capacity", type=float, metavar="F", help="count what this factor would drop, each sample a batch of its own")
    add("--per", choices=("token", "row", "even"), default="token", help="measure of the heat map (%(default)s)")
    add("--batch-size", type=int, default=8, metavar="N", help="samples at a time, no number changes (%(default)s)")
    add("--num-workers", type=int, default=1, metavar="N", help="processes that read samples (%(default)s)")
    add("--device", choices=("auto", "cpu"), default="auto", help="auto takes a GPU where there is one")
    add("--debug", action="store_true", help="show the traceback of an error")
    given = vars(parser.parse_args())
    return guard(lambda: expert_activation(**given), debug=given.pop("debug"))


if __name__ == "__main__":
    sys.exit(main())
