"""Intervals and tallies of held-out scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from statistics import NormalDist

from dpo_assets.artifact import Number

TIE_NATS = 1e-4  # Margins below this are floating-point noise, not a preference.


@dataclass(frozen=True)
class Proportion:
    """A share with its Wilson score interval."""

    value: Number
    low: Number
    high: Number
    n: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n})"


def wilson(successes: float, n: int, confidence: float = 0.95) -> Proportion:
    """Wilson score interval (Wilson 1927); `successes` may hold halves, from ties. A NaN bounds nothing."""
    if n == 0 or math.isnan(successes):
        return Proportion(math.nan, 0.0, 1.0, n)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, width = successes / n, z / n  # z / n: a square of n is no float for every n.
    centre = (share + z * width / 2) / (1 + z * width)
    half = z / (1 + z * width) * math.sqrt(share * (1 - share) / n + width * width / 4)
    return Proportion(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)), n)


def percent(level: float) -> str:
    """0.95 as `95%`, 0.995 as `99.5%`."""
    return f"{100 * level:.6g}%"


def tie_aware_accuracy(margins: Sequence[float], confidence: float = 0.95) -> Proportion:
    """Share of margins above zero; a margin inside the tie band counts as half a win. NaN in, NaN out."""
    if any(math.isnan(m) for m in margins):
        return Proportion(math.nan, 0.0, 1.0, len(margins))
    wins = sum(0.5 if abs(m) <= TIE_NATS else float(m > 0) for m in margins)
    return wilson(wins, len(margins), confidence)


def pick_the_longer(chosen: Sequence[int], rejected: Sequence[int], confidence: float = 0.95) -> Proportion:
    """How often the longer answer is the chosen one: what a score must beat to be more than a taste for length."""
    margins = [float(c - r) for c, r in zip(chosen, rejected, strict=True)]
    return tie_aware_accuracy(margins, confidence)


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


def significant_fall(lost: int, gained: int, confidence: float = 0.95) -> bool:
    """Exact McNemar test, one-sided: more things were lost than gained, beyond chance. Pairs that agree say nothing.

    Under chance each discordant pair is a fair coin: p = P(X >= lost), X binomial of lost + gained at one half. All of
    it is counted in whole numbers: from 1,024 pairs on 2**n is no float.
    """
    if lost <= gained:
        return False
    n = lost + gained
    term = tail = math.comb(n, lost)
    for k in range(lost, n):
        term = term * (n - k) // (k + 1)  # The next binomial coefficient.
        tail += term
    return Fraction(tail, 2**n) <= 1 - Fraction(confidence)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) of independent values, by the normal approximation; one value alone bounds nothing.

    A value that is not finite makes the mean NaN.
    """
    n = len(values)
    if n == 0 or not all(map(math.isfinite, values)):
        return math.nan, -math.inf, math.inf
    mean = math.fsum(v / n for v in values)
    if n == 1:
        return mean, -math.inf, math.inf
    spread = math.hypot(*(v - mean for v in values)) / math.sqrt(n - 1) / math.sqrt(n)  # No square to overflow.
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * spread
    return mean, mean - half, mean + half
