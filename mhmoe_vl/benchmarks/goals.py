"""The goals of speed, each a quotient inside one run, and whether a run's JSON meets them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .tables import markdown
from .timing import Spread, ratio, spread

NO_BF16 = "this processor does not multiply bfloat16 itself"
Results = dict[str, Any]
Measured = Spread | None
Measure = Callable[[Results], Measured]


class Goal(NamedTuple):
    """A bound on a measured quotient.

    Attributes:
        number: of the goal.
        what: is measured.
        goal, stretch: bounds.
        measure: results to the quotient with its quartiles; none where the run did not measure it.
        at_least: the bounds are lower ones.
        unless: why a processor without bfloat16 products does not measure it.
    """

    number: int
    what: str
    goal: float
    stretch: float
    measure: Measure
    at_least: bool = False
    unless: str = ""

    def verdict(self, value: float) -> str:
        """``met``, ``met, stretch too`` or ``not met``."""
        sign = -1 if self.at_least else 1
        if sign * value <= sign * self.stretch:
            return "met, stretch too"
        return "met" if sign * value <= sign * self.goal else "not met"


def seconds(results: Results, group: str, dtype: str, name: str, what: str = "forward_backward") -> list[float] | None:
    """Measured numbers of a case, round by round."""
    for measured in results["groups"]:
        if (measured["group"], measured["dtype"]) == (group, dtype):
            for case in measured["cases"]:
                if case["name"] == name:
                    return case.get(what)
    return None


def quotient(
    group: str, dtype: str, mine: str, other: str, *, factor: float = 1.0, what: str = "forward_backward"
) -> Measure:
    """A measure: time of ``mine`` over that of ``other``, times ``factor``."""

    def measure(results: Results) -> Measured:
        a, b = (seconds(results, group, dtype, name, what) for name in (mine, other))
        return None if a is None or b is None else Spread(*(factor * value for value in ratio(a, b)))

    return measure


def memory_quotient(group: str, dtype: str, mine: str, other: str) -> Measure:
    """A measure: peak memory of ``mine`` over that of ``other``."""
    return quotient(group, dtype, mine, other, what="peak_mib")


def largest(*measures: Measure) -> Measure:
    """A measure: the one with the largest median."""

    def measure(results: Results) -> Measured:
        found = [measure(results) for measure in measures]
        return None if None in found else max(found, key=lambda s: s.median)

    return measure


def number(*keys: str) -> Measure:
    """A measure: a plain number, or a list of them, that stands in the results."""

    def measure(results: Results) -> Measured:
        value: Any = results
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return None if value is None else spread(value if isinstance(value, list) else [value])

    return measure


def goal_rows(goals: Sequence[Goal], results: Results) -> list[dict[str, Any]]:
    """Every goal with what was measured, JSON values."""
    native, rows = results.get("amx_bf16") or results.get("device") == "cuda", []
    for goal in goals:
        found = goal.measure(results)
        row = {"number": goal.number, "what": goal.what, "goal": goal.goal, "stretch": goal.stretch}
        row |= {"at_least": goal.at_least, "measured": None, "verdict": "not measured"}
        row["why"] = "" if native else goal.unless
        if found is not None:
            row |= {"measured": list(found), "verdict": goal.verdict(found.median), "why": ""}
        rows.append(row)
    return rows


def goal_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of :func:`goal_rows` as a table."""
    shown = [["#", "what", "goal", "stretch", "measured (quartiles)", ""]]
    for row in rows:
        sign = ">=" if row["at_least"] else "<="
        measured = "-"
        if row["measured"]:
            low, median, high = row["measured"]
            measured = f"{median:.3g} ({low:.3g} to {high:.3g})" if low != high else f"{median:.3g}"
        verdict = row["verdict"] + (f": {row['why']}" if row["why"] else "")
        shown.append([str(row["number"]), row["what"], f"{sign} {row['goal']:.3g}", f"{row['stretch']:.3g}"])
        shown[-1] += [measured, verdict]
    return markdown(shown)
