"""Whole training steps, the image loader and vocabulary heads, as ratios: see --parts.

base, tiny: a step of masked prediction on pictures, texts and pairs with MH-MoE at parity and with dense layers, random
data. loader: JPEGs of a shard to 224-pixel crops, one process. heads: scores at masked positions or at all of them. On
a machine with other work, --threads 1 --clock cpu counts the processor time of one thread.
"""

import argparse
import sys

from mhmoe_vl.benchmarks import machine, training
from mhmoe_vl.benchmarks.goals import goal_rows, goal_table
from mhmoe_vl.errors import OneLineParser, guard


def main() -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(training.PARTS)
    parser.add_argument(
        "--parts", nargs="+", choices=training.PARTS, default=training.PARTS, metavar="PART", help=names
    )
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), help="default: what is native")
    parser.add_argument("--depth", type=int, help="blocks of the base model, where 12 (about 14 GB) do not fit")
    parser.add_argument("--pictures", type=int, default=64, help="JPEGs of the loader's shard (%(default)s)")
    machine.add_options(parser, "out/benchmark_training.json")
    options = machine.parse(parser)
    for name in ("depth", "pictures"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name}: {value} is below 1")
    return guard(lambda: report(options))


def report(options: argparse.Namespace) -> int:
    device = machine.prepare(options)
    results = machine.describe(options, device, "benchmark_training") | training.measure(
        options.parts,
        options.dtype or machine.native_types(device),
        device,
        rounds=options.rounds,
        clock=machine.clock_of(options, device),
        pictures=options.pictures,
        depth=options.depth,
    )
    results["goals"] = goal_rows(training.GOALS, results)
    machine.save(options.json, results)
    tables = [machine.heading(results), *(training.group_table(group, results) for group in results["groups"])]
    print("\n\n".join([*tables, goal_table(results["goals"])]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
