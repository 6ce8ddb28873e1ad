"""Intervals and tests of independent counts. Pairs that share prompts are counted in `checks.evidence`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from statistics import NormalDist

from dpo_assets.artifact import Number


@dataclass(frozen=True)
class Proportion:
    """A share of `n` with its interval.

    `clusters` is how many conversations the `n` belong to, and `effective` how many independent pairs would bound the
    share as well. Both are None where the `n` were counted as independent: shares of answers, and scores of earlier
    versions.
    """

    value: Number
    low: Number
    high: Number
    n: int
    clusters: int | None = None
    effective: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)

    @property
    def counted(self) -> str:
        """The number of pairs, and of conversations where they are fewer."""
        return f"{self.n}" if self.clusters in (None, self.n) else f"{self.n} in {self.clusters} conversations"

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.counted})"


def wilson(successes: float, n: float, confidence: float = 0.95) -> Proportion:
    """Wilson score interval (Wilson 1927); `successes` may hold halves, from ties. A NaN bounds nothing.

    `n` may be an effective number of pairs, which is not whole.
    """
    if n == 0 or math.isnan(successes):
        return Proportion(math.nan, 0.0, 1.0, int(n))
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, width = successes / n, z / n  # z / n: a square of n is no float for every n.
    centre = (share + z * width / 2) / (1 + z * width)
    half = z / (1 + z * width) * math.sqrt(share * (1 - share) / n + width * width / 4)
    return Proportion(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)), int(n))


def percent(level: float) -> str:
    """0.95 as `95%`, 0.995 as `99.5%`."""
    return f"{100 * level:.6g}%"


def significant_rise(share: float, before: float, n: int, confidence: float = 0.95) -> bool:
    """Whether a share of `n` answers lies above the share of `n` others beyond chance, at a one-sided level.

    The lower end of Newcombe's interval for a difference of two shares (1998, method 10: from the Wilson intervals of
    both) lies above zero. NaN is a rise: it must never pass.
    """
    if math.isnan(share) or math.isnan(before):
        return True
    level = 2 * confidence - 1  # Two-sided intervals whose one end has the level that was asked for.
    now, then = wilson(share * n, n, level), wilson(before * n, n, level)
    return now.value - then.value > math.hypot(now.value - now.low, then.high - then.value)


def sign_test(towards: int, against: int) -> Fraction:
    """One-sided p of the exact sign test (McNemar, exact): P(X >= towards), X binomial of all at one half.

    All of it is counted in whole numbers: from 1,024 on 2**n is no float.
    """
    n = towards + against
    term = tail = math.comb(n, towards)
    for k in range(towards, n):
        term = term * (n - k) // (k + 1)  # The next binomial coefficient.
        tail += term
    return Fraction(tail, 2**n)


def significant_fall(lost: int, gained: int, confidence: float = 0.95) -> bool:
    """Exact McNemar test, one-sided: more things were lost than gained, beyond chance. Pairs that agree say nothing."""
    return lost > gained and sign_test(lost, gained) <= 1 - Fraction(confidence)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p of several tests, each adjusted so that comparing it with one level keeps that level over all (Holm 1979)."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted
