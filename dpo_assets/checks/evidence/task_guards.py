"""Tasks and benchmarks as guards of a promotion: what must not have fallen beyond chance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dpo_assets.checks.evidence.power import one_sided
from dpo_assets.checks.statistics import holm


@dataclass(frozen=True)
class TaskGuard:
    """One metric of the challenger against the opponent's on the same documents.

    Attributes:
        shown: the difference, with its interval.
        p_worse: one-sided p that the challenger is worse; None: it was not compared, and `shown` says why. NaN: the
            challenger's scores are no numbers.
    """

    shown: str
    p_worse: float | None

    @property
    def tested(self) -> bool:
        return self.p_worse is not None


def fallen(guards: Mapping[str, TaskGuard], confidence: float = 0.95) -> list[str]:
    """The guards that hold a promotion, by name: worse beyond chance, or no numbers.

    Several metrics are several chances to hold a challenger that is as good: all are tested at one level (Holm 1979).
    """
    told = {name: one.p_worse for name, one in guards.items() if one.p_worse is not None}
    broken = [name for name, p in told.items() if math.isnan(p)]
    adjusted = holm({name: p for name, p in told.items() if name not in broken})
    return broken + [name for name, p in adjusted.items() if p <= one_sided(confidence)]
