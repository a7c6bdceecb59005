"""The table that compares feed-forward layers, from the ledger of their runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

TERMS = ("images", "texts", "pairs_image", "pairs_text")
Line = dict[str, Any]


def comparison_table(ledger: Sequence[Line], reference: str) -> str:
    """Markdown: one row a variant, means over seeds with the standard deviation behind the sign.

    The last column is the mean over seeds of the difference in loss (nats, mean of the four terms) to ``reference``
    with the same seed and so the same data, with the standard error of that mean.

    Args:
        ledger: lines of ``tools/compare_ffn.py``.
        reference: variant that the paired differences are taken to.
    """
    variants = list(dict.fromkeys(line["variant"] for line in ledger))
    header = ["variant", "experts", "parameters, M", "active, M", "GFLOPs a pair", *TERMS, "all four"]
    header += ["load min / max", "dead", "s a step", "minutes", "seeds", f"loss minus {reference}"]
    rows = [header, ["---"] * len(header)]
    for variant in variants:
        rows.append(_row(variant, [line for line in ledger if line["variant"] == variant], ledger, reference))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(variant: str, lines: Sequence[Line], ledger: Sequence[Line], reference: str) -> list[str]:
    count, ffn = lines[0]["count"], lines[0]["count"]["ffn"]
    summaries = [line["summary"] for line in lines]
    perplexities = [_spread([s[f"perplexity/{term}/after"] for s in summaries]) for term in TERMS]
    load = "-"
    if "expert_share_min" in summaries[0]:
        smallest = min(s["expert_share_min"] for s in summaries)
        load = f"{smallest:.1%} / {max(s['expert_share_max'] for s in summaries):.1%}"
    return [
        variant,
        ffn.split(maxsplit=1)[1],
        f"{count['parameters']['total'] / 1e6:.2f}",
        f"{count['parameters']['active'] / 1e6:.2f}",
        f"{count['flops']['pair'] / 1e9:.3f}",
        *perplexities,
        _spread([s["perplexity/after"] for s in summaries]),
        load,
        f"{max(s.get('dead_experts', 0) for s in summaries):.0f}",
        f"{statistics.median(s['step_seconds'] for s in summaries):.2f}",
        f"{statistics.median(line['seconds'] for line in lines) / 60:.1f}",
        " ".join(str(line["seed"]) for line in lines),
        _paired(lines, [line for line in ledger if line["variant"] == reference]),
    ]


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{deviation}"


def _paired(lines: Sequence[Line], reference: Sequence[Line]) -> str:
    losses = {line["seed"]: math.log(line["summary"]["perplexity/after"]) for line in reference}
    differences = [
        math.log(line["summary"]["perplexity/after"]) - losses[line["seed"]] for line in lines if line["seed"] in losses
    ]
    if not differences or lines[0] in reference:
        return "-"
    error = f" ± {statistics.stdev(differences) / math.sqrt(len(differences)):.3f}" if len(differences) > 1 else ""
    return f"{statistics.mean(differences):+.3f}{error}"
