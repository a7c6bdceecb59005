"""The ``mhmoe-vl`` command: one file per subcommand, imported only when it is called.

A subcommand's module has ``add_arguments(parser)`` and ``run(arguments) -> int``, the exit code: 0 all well, 1 the
command found something wrong in what it was asked to check. Mistakes in the call itself exit with 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..errors import OneLineParser, guard

COMMANDS = {
    "make-manifest": "write the manifest beside each shard: exact counts, random access, checksums",
    "check-data": "list what is wrong with shards, annotation files and the pictures they name",
    "check-checkpoint": "compare checkpoints with their checksums and list what is damaged",
    "convert-checkpoint": "tensors of a torch.save file as safetensors; nothing in it is run",
    "score": "the official metrics of a predictions file: VQA accuracy, captions, NLVR2, COCO",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; an error of ours becomes one line on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    parsed = _parser(chosen).parse_args(arguments)
    module = import_module(f".{_module(parsed.command)}", __name__)
    return guard(lambda: module.run(parsed), debug=parsed.debug)


def _parser(chosen: str | None) -> OneLineParser:
    """All subcommands by name; the arguments of the chosen one only, so that nothing else is imported."""
    parser = OneLineParser("mhmoe-vl", description="Tools for mhmoe_vl's data and results.")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=about, description=about)
        if name == chosen:
            import_module(f".{_module(name)}", __name__).add_arguments(subparser)
    return parser


def _module(command: str) -> str:
    return command.replace("-", "_")
