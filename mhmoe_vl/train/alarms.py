"""Alarms about the numbers of the log: routing that collapses, losses that jump."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

SPIKE = 10.0
"""times the median of the last logged losses that makes a spike"""
REMEMBERED = 50
DEAD_STEPS = 1000
"""steps without any choice, seen at logged steps, after which an expert counts as dead"""


def share_limit(num_experts: int) -> float:
    """Share of a pool's choices above which one expert has taken over: four times an even share, at most 0.9."""
    return min(4 / num_experts, 0.9)


class CollapseAlarm:
    """Watches the shares of the experts in the lines of the log.

    Args:
        last_used: by pool, the last logged step at which each expert was chosen; kept in the checkpoint, filled here.
    """

    def __init__(self, last_used: dict[str, list[int]]) -> None:
        self.last_used = last_used
        self._told: set[tuple[str, str]] = set()

    def check(self, step: int, values: Mapping[str, Any]) -> tuple[int, list[str]]:
        """How many pools of a line (keys ``load/<pool>``) are in alarm, and a text for each alarm that is new."""
        loads = {key.removeprefix("load/"): shares for key, shares in values.items() if key.startswith("load/")}
        found = {(pool, kind): text for pool in loads for kind, text in self._alarms(pool, step, loads[pool])}
        new = [text for alarm, text in found.items() if alarm not in self._told]
        self._told = set(found)
        return len({pool for pool, _ in found}), new

    def _alarms(self, pool: str, step: int, shares: list[float]) -> list[tuple[str, str]]:
        used = self.last_used.setdefault(pool, [step] * len(shares))
        used[:] = [step if share > 0 else last for share, last in zip(shares, used, strict=True)]
        if len(shares) == 1:
            return []
        alarms, advice = [], "(routing collapses: raise optim.balance_loss_weight)"
        largest = max(shares)
        if largest > share_limit(len(shares)):
            taken = f"expert {shares.index(largest)} gets {largest:.0%} of all choices"
            alarms.append(("share", f"{pool}: {taken} {advice}"))
        dead = [number for number, last in enumerate(used) if step - last >= DEAD_STEPS]
        if dead:
            named = ", ".join(map(str, dead[:8])) + (f" and {len(dead) - 8} more" if len(dead) > 8 else "")
            alarms.append(("dead", f"{pool}: no choice in {DEAD_STEPS} steps for expert {named} {advice}"))
        return alarms


class SpikeAlarm:
    """Watches the logged loss."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=REMEMBERED)

    def check(self, loss: float) -> str | None:
        """A text when ``loss`` is over ten times the median of the losses before it, of which there are ten or more."""
        count = len(self._last)
        usual = median(self._last) if count >= 10 else math.inf
        if math.isfinite(loss):
            self._last.append(loss)
        if loss <= SPIKE * usual or math.isnan(loss):
            return None
        before = f"the median of the last {count} is {usual:.4g}"
        return f"loss {loss:.4g}, {before} (look at this step's data)"
