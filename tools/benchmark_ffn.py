"""Time and memory of the MH-MoE layer against dense layers of equal FLOPs, one-hot dispatch and other libraries.

Every contender must first give the numbers of a loop in float64. Contenders of a group take turns, and quotients are
formed round by round. The goals are quotients, so they can be compared between machines; milliseconds cannot. On a
machine with other work, --threads 1 --clock cpu counts the processor time of one thread.
"""

import argparse
import sys
from pathlib import Path

import torch

from mhmoe_vl.benchmarks import ffn, machine, parts
from mhmoe_vl.benchmarks.goals import goal_rows, goal_table
from mhmoe_vl.benchmarks.sizes import GROUPS, default_groups
from mhmoe_vl.errors import OneLineParser, guard

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = f"{', '.join(GROUPS)} (default: those meant for the device)"
    parser.add_argument("--sizes", nargs="+", choices=GROUPS, metavar="GROUP", help=listed)
    parser.add_argument("--dtype", nargs="+", choices=TYPES, help="default: float32, and bfloat16 where it is native")
    parser.add_argument("--figure", type=Path, help="draw the profile by part (SVG, PNG or PDF)")
    machine.add_options(parser, "out/benchmark_ffn.json")
    options = machine.parse(parser)
    return guard(lambda: report(options))


def report(options: argparse.Namespace) -> int:
    device = machine.prepare(options)
    dtypes = [TYPES[name] for name in options.dtype or machine.native_types(device)]
    results = machine.describe(options, device, "benchmark_ffn")
    groups = {name: GROUPS[name] for name in options.sizes or default_groups(device.type)}
    results |= ffn.measure(groups, dtypes, device, rounds=options.rounds, clock=machine.clock_of(options, device))
    results["goals"] = goal_rows(ffn.goals_for(device), results)
    machine.save(options.json, results)
    tables = [
        machine.heading(results),
        *(ffn.group_table(group, results.get("ceilings")) for group in results["groups"]),
    ]
    if results["parts"]:
        tables.append(parts.table(results["parts"]))
        if options.figure:
            parts.draw(results["parts"], options.figure)
    print("\n\n".join([*tables, goal_table(results["goals"])]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
