"""The table that compares feed-forward layers, from the ledger of their runs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError, one_line
from ..parity import ffn_label
from .summary import TERMS

Line = dict[str, Any]


def comparison_table(ledger: Sequence[Line], reference: str) -> str:
    """Two tables in Markdown, one row a variant: what it is and how well it does, and how far it is from ``reference``.

    Numbers are means over seeds, with the standard deviation behind the sign. Differences are in loss (nats), paired by
    seed and so by data, with the standard error of their mean.

    Args:
        ledger: lines of ``tools/compare_ffn.py``.
        reference: variant that the paired differences are taken to.
    """
    variants = {line["variant"]: [other for other in ledger if other["variant"] == line["variant"]] for line in ledger}
    scores = ["variant", "layer", "parameters, M", "active, M", "GFLOPs a pair", *TERMS, "perplexity"]
    scores += ["load min / max", "dead", "s a step"]
    differences = [f"loss minus {reference}", *TERMS, "mean of the four", "seeds"]
    return "\n\n".join(
        [
            _markdown([scores, *(_scores(name, lines) for name, lines in variants.items())]),
            _markdown(
                [
                    differences,
                    *(_differences(name, lines, variants.get(reference, [])) for name, lines in variants.items()),
                ]
            ),
        ]
    )


def read_ledger(path: Path) -> list[Line]:
    """The lines of a ledger of ``tools/compare_ffn.py``.

    Raises:
        DataError: it cannot be read, or a line lacks what the table shows.
    """
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"{path}: {what} (name a ledger of tools/compare_ffn.py)") from error
    return [_read_line(text, f"{path}:{number}") for number, text in enumerate(texts, 1)]


def _read_line(text: str, place: str) -> Line:
    try:
        line = json.loads(text)
        if not isinstance(line["command"], str) or type(line["seed"]) is not int:
            raise ValueError("command or seed")
        comparison_table([line], "")
        return line
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        what = f"not a line of tools/compare_ffn.py: {type(error).__name__}: {error}"
        raise DataError(f"{place}: {one_line(what, 160)} (mend it or name another ledger)") from error


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *body))


def _scores(variant: str, lines: Sequence[Line]) -> list[str]:
    count, summaries = lines[0]["count"], [line["summary"] for line in lines]
    load = "-"
    if "expert_share_min" in summaries[0]:
        smallest = min(s["expert_share_min"] for s in summaries)
        load = f"{smallest:.1%} / {max(s['expert_share_max'] for s in summaries):.1%}"
    return [
        variant,
        ffn_label(count["ffn"]),
        f"{count['parameters']['total'] / 1e6:.2f}",
        f"{count['parameters']['active'] / 1e6:.2f}",
        f"{count['flops']['pair'] / 1e9:.3f}",
        *(_spread([s[f"perplexity/{term}/after"] for s in summaries]) for term in TERMS),
        _spread([s["perplexity/after"] for s in summaries]),
        load,
        f"{max(s.get('dead_experts', 0) for s in summaries):.0f}",
        f"{statistics.median(s['step_seconds'] for s in summaries):.2f}",
    ]


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{deviation}"


def _differences(variant: str, lines: Sequence[Line], reference: Sequence[Line]) -> list[str]:
    keys = [f"perplexity/{term}/after" for term in TERMS] + ["perplexity/after"]
    by_seed = {line["seed"]: line for line in reference}
    pairs = [(line["summary"], by_seed[line["seed"]]["summary"]) for line in lines if line["seed"] in by_seed]
    cells = [_paired([math.log(mine[key] / theirs[key]) for mine, theirs in pairs]) for key in keys]
    if lines and lines[0] in reference:
        cells = ["0"] * len(keys)
    return [variant, *cells, " ".join(str(line["seed"]) for line in sorted(lines, key=lambda line: line["seed"]))]


def _paired(differences: Sequence[float]) -> str:
    if not differences:
        return "-"
    error = f" ± {statistics.stdev(differences) / math.sqrt(len(differences)):.3f}" if len(differences) > 1 else ""
    return f"{statistics.mean(differences):+.3f}{error}"
