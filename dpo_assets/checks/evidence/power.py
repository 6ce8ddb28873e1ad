"""How large a difference these pairs can show, and how many would show a smaller one.

Normal theory of a one-sided test: a difference of (z(1 - level) + z(power)) standard errors is found with that power
(Miller 2024, arXiv 2411.00640, section 5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from dpo_assets.checks.evidence.measured import Comparison
from dpo_assets.checks.statistics import Proportion

# Below, cluster-robust intervals cover less than they say (Cameron and Miller 2015, section VI: "few" is under 20 to 50
# clusters; benchmarks/RESULTS.md measures ours), and only differences that nobody sees in practice would be found.
FEWEST_PROMPTS = 50
POWER = 0.8
EFFECT = 0.1  # Ten points of accuracy: the difference whose power is told.


def one_sided(confidence: float) -> float:
    """The level of one end of an interval: 0.025 for 0.95."""
    return (1 - confidence) / 2


def chance_error(score: Proportion) -> float:
    """Standard error of a share at one half, from its effective number of pairs; infinite where that is nothing."""
    pairs = score.n if score.effective is None else score.effective
    return 0.5 / math.sqrt(pairs) if pairs > 0 else math.inf


def detectable(error: float, level: float, power: float = POWER) -> float:
    """The least true difference that a one-sided test at `level` finds with `power`, given a standard error."""
    normal = NormalDist()
    if not _is_known(error):
        return math.nan
    return (normal.inv_cdf(1 - level) + normal.inv_cdf(power)) * error


def _is_known(error: float) -> bool:
    """Pairs that never differed tell nothing of how far others would: an error of 0 is none."""
    return error > 0


def power_at(effect: float, error: float, level: float) -> float:
    """The chance that a one-sided test at `level` finds a true difference of `effect`, given a standard error."""
    normal = NormalDist()
    if not _is_known(error):
        return math.nan
    return normal.cdf(effect / error - normal.inv_cdf(1 - level)) if math.isfinite(error) else 0.0


def pairs_needed(effect: float, error: float, n: int, level: float, power: float = POWER) -> int | None:
    """Pairs, spread over prompts as these `n` are, that find `effect` with `power`. None: no number would.

    `error` is the standard error at `n`.
    """
    if not effect > 0 or n == 0 or not _is_known(error):
        return None
    pairs = n * (detectable(error, level, power) / effect) ** 2
    return max(1, math.ceil(pairs)) if math.isfinite(pairs) else None


def can_decide(prompts: int, level: float, fewest: int = FEWEST_PROMPTS) -> bool:
    """Whether a test of so many prompts can meet the level at all: no sign-flip test has a p below 2^-prompts."""
    return prompts >= fewest and 2.0**-prompts <= level


@dataclass(frozen=True)
class Reach:
    """What a test of some pairs at `level` can find: the numbers that stand beside a score."""

    level: float
    prompts: int
    detectable: float
    power: float
    pairs_needed: int | None
    can_pass: bool

    def __str__(self) -> str:
        if not self.can_pass:
            return f"{self.prompts} conversations cannot decide at level {self.level:.2g}, whatever they say"
        if not math.isfinite(self.detectable):
            return "these pairs do not tell how many would decide"
        needed = f"{self.pairs_needed} pairs would show" if self.pairs_needed else "no number of pairs shows"
        return (
            f"a difference of {100 * self.detectable:.1f} points is found with {POWER:.0%} power at level "
            f"{self.level:.2g}; one of {100 * EFFECT:.0f} points with {self.power:.0%} ({needed} it)"
        )


def reach_of(error: float, n: int, prompts: int, level: float, fewest: int = FEWEST_PROMPTS) -> Reach:
    """The reach of `n` pairs in `prompts` prompts, given the standard error of what is tested."""
    return Reach(
        level=level,
        prompts=prompts,
        detectable=detectable(error, level),
        power=power_at(EFFECT, error, level),
        pairs_needed=pairs_needed(EFFECT, error, n, level),
        can_pass=can_decide(prompts, level, fewest),
    )


def reach_of_score(score: Proportion, level: float) -> Reach:
    """Of a share that is held against one half."""
    prompts = score.n if score.clusters is None else score.clusters
    return reach_of(chance_error(score), score.n, prompts, level)


def reach_of_comparison(comparison: Comparison, level: float) -> Reach:
    """Of a paired difference that is held against zero."""
    return reach_of(comparison.error, comparison.n, comparison.clusters, level)
