"""Intervals and tallies of held-out scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

TIE_NATS = 1e-4  # Margins below this are floating-point noise, not a preference.


@dataclass(frozen=True)
class Proportion:
    """A share with its Wilson score interval."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n})"


def wilson(successes: float, n: int, confidence: float = 0.95) -> Proportion:
    """Wilson score interval (Wilson 1927); `successes` may hold halves, from ties."""
    if n == 0:
        return Proportion(math.nan, 0.0, 1.0, 0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
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
