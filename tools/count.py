"""Parameters and FLOPs of models, side by side, and how far each lies from its parity baseline.

FLOPs are 2 x multiply-adds of one forward pass; norms, activations and look-ups are not counted. "active" leaves out
the experts that a token does not reach.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mhmoe_vl import parity
from mhmoe_vl.config import EncoderConfig, ParityConfig, merge, read_yaml, validate
from mhmoe_vl.errors import ConfigError, DataError, MhmoeError, OneLineParser, guard


def main() -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", required=True, metavar="FILE", help="run or model files, one per model")
    parser.add_argument("--base", metavar="FILE", help="file that every --config is merged over")
    parser.add_argument("--text-len", type=int, metavar="N", help=f"tokens of a text (at most {parity.TEXT_LEN})")
    parser.add_argument("--num-codes", type=int, metavar="N", help="count pre-training heads too, N image codes")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers to a file too")
    options = parser.parse_args()
    for name in ("text_len", "num_codes"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: {getattr(options, name)} is below 1")
    return guard(lambda: report(options))


def report(options: argparse.Namespace) -> int:
    models = [count(path, options) for path in options.config]
    if options.json:
        try:
            options.json.write_text(json.dumps({"models": models}, indent=1) + "\n")
        except OSError as error:
            raise DataError(f"{options.json}: {error.strerror} (name a file in an existing folder)") from error
    print_table(models)
    return 0


def count(path: str, options: argparse.Namespace) -> dict[str, Any]:
    """All numbers of the model in one file."""
    values = merge(read_yaml(options.base) if options.base else {}, read_yaml(path))
    if "encoder" not in values:
        raise ConfigError(f"{path}: holds no encoder (name a file with a section encoder, or give --base)")
    encoder = validate(EncoderConfig, values["encoder"], path)
    baseline = validate(ParityConfig, values["parity"], path) if values.get("parity") else None
    try:
        return measure(parity.resolve(encoder, baseline), baseline, options) | {"config": path}
    except MhmoeError as error:
        raise ConfigError(f"{path}: {error}") from error


def measure(encoder: EncoderConfig, baseline: ParityConfig | None, options: argparse.Namespace) -> dict[str, Any]:
    given = {"text_len": options.text_len, "num_codes": options.num_codes}
    inputs = parity.widest_input(encoder)
    kinds = ("pair", "image", "text") if inputs == "pair" else (inputs,)
    parts = parity.count_encoder(encoder, inputs=inputs, **given)
    total = parity.total(parts)
    experts = parts.get("experts", parity.Cost())
    found = parity.difference(encoder, baseline, text_len=options.text_len) if baseline else {}
    return {
        "ffn": encoder.ffn.model_dump(),
        "parameters": {"total": total.parameters, "active": total.active, "experts": experts.parameters},
        "flops": {k: parity.total(parity.count_encoder(encoder, inputs=k, **given)).flops for k in kinds},
        "parts": {name: vars(cost) for name, cost in parts.items()},
        "difference_percent": {name: percent._asdict() for name, percent in found.items()},
    }


def print_table(models: list[dict[str, Any]]) -> None:
    """A column per model, a row per number; parts that no model has are left out."""
    rows = [("", [Path(m["config"]).stem for m in models]), ("ffn", [parity.ffn_label(m["ffn"]) for m in models])]
    rows += numbers("parameters, M", models, 1e6, lambda m: {**m["parameters"], **column(m, "parameters")})
    flops = "FLOPs, M (by part: image-text pair, or the only input)"
    rows += numbers(flops, models, 1e6, lambda m: {**m["flops"], **column(m, "flops")})
    if any(m["difference_percent"] for m in models):
        rows += numbers("difference to the parity baseline, %", models, 1, differences, "+.2f")
    widths = [max(len(row[i]) for _, row in rows if row) for i in range(len(models))]
    for label, row in rows:
        cells = (f"  {cell:>{width}}" for cell, width in zip(row, widths, strict=False))
        print(f"{label:<22}{''.join(cells)}".rstrip())


def column(model: dict[str, Any], what: str) -> dict[str, int]:
    return {f"  {part}": cost[what] for part, cost in model["parts"].items() if cost[what]}


def differences(model: dict[str, Any]) -> dict[str, float]:
    return {f"{where} {what}": v for where, both in model["difference_percent"].items() for what, v in both.items()}


def numbers(title: str, models: list[dict[str, Any]], unit: float, pick: Any, style: str = ",.3f") -> list[Any]:
    columns = [pick(model) for model in models]
    order = [f"  {part}" for part in parity.PARTS]
    names = sorted({n: 0 for c in columns for n in c}, key=lambda n: order.index(n) if n in order else -1)
    cells = [[format(c[name] / unit, style) if name in c else "-" for c in columns] for name in names]
    return [("", []), (title, []), *zip([f"  {name}" for name in names], cells, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
