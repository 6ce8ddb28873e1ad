"""Scores of pairs that share prompts. Pairs of one prompt agree with each other, so they are no independent evidence.

Intervals treat the prompt as what was sampled (Miller 2024, arXiv 2411.00640, section 2.2). A share takes its design
effect, how much more its variance is than that of as many independent pairs (Kish 1965), and Wilson's
interval of the pairs that this leaves (Korn and Graubard 1998, with their correction for the degrees of freedom).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from dpo_assets.checks.evidence.measured import MeanScore
from dpo_assets.checks.statistics import Proportion, wilson

TIE_NATS = 1e-4  # Margins below this are floating-point noise, not a preference.
FEWEST_FREEDOM = 3.0  # Below, Student's quantile is no longer what its expansion gives, and means next to nothing.
# A pair's conversation, by its opening message: what the split keeps together, and what is counted. Turns of one
# conversation agree with each other as pairs of one prompt do, so they are no independent evidence either.
COUNTED_BY = "group_id"
Floats = NDArray[np.float64]
NODES, WEIGHTS = np.polynomial.legendre.leggauss(200)
NOTHING_BEYOND = 40.0  # Standard deviations: exp(-800) is no float.


@lru_cache(maxsize=4096)
def t_quantile(probability: float, freedom: float) -> float:
    """Student's t quantile by its expansion around the normal's (Abramowitz and Stegun 26.7.5).

    Within 0.3% of the tables from 5 degrees of freedom on, for probabilities up to 0.995.

    Raises:
        ValueError: fewer than 3 degrees of freedom.
    """
    if freedom < FEWEST_FREEDOM:
        raise ValueError(f"{freedom:g} degrees of freedom: the expansion needs at least {FEWEST_FREEDOM:g}")
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(terms))


def t_tail(t: float, freedom: float) -> float:
    """P(T >= t) of Student's t.

    With t = sqrt(freedom) tan(a) the density is proportional to cos(a)^(freedom - 1), which is integrated from there on
    by Gauss-Legendre's rule, as far as it is not nothing.
    """
    if math.isnan(t):
        return math.nan
    if t < 0:
        return 1 - t_tail(-t, freedom)
    start = math.atan(t / math.sqrt(freedom))
    half = (min(math.pi / 2, start + NOTHING_BEYOND / math.sqrt(freedom)) - start) / 2
    logs = (freedom - 1) * np.log(np.cos(start + half * (1 + NODES)))
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2
    return float(half * (WEIGHTS * np.exp(logs + scale)).sum())


@dataclass(frozen=True)
class Clusters:
    """Which prompt each of `n` pairs belongs to: `codes` (n), from 0, and `sizes` (prompts)."""

    codes: NDArray[np.intp]
    sizes: Floats

    @classmethod
    def of(cls, prompts: Sequence[object] | None, n: int) -> Clusters:
        """Of `n` pairs by the prompts' names; None: each pair has a prompt of its own.

        Raises:
            ValueError: the names are not one a pair.
        """
        if prompts is None:
            return cls(np.arange(n), np.ones(n))
        if len(prompts) != n:
            raise ValueError(f"{len(prompts)} prompts for {n} pairs")
        seen: dict[object, int] = {}
        codes = np.fromiter((seen.setdefault(prompt, len(seen)) for prompt in prompts), np.intp, n)
        return cls(codes, np.bincount(codes, minlength=len(seen)).astype(float))

    @property
    def n(self) -> int:
        return len(self.codes)

    @property
    def count(self) -> int:
        return len(self.sizes)

    @property
    def single(self) -> bool:
        """Whether every prompt has one pair."""
        return self.count == self.n

    @property
    def equivalent(self) -> float:
        """Prompts of equal size that would say as much, were pairs of a prompt alike: n^2 / sum of size^2 (Kish)."""
        return float(self.n**2 / np.square(self.sizes).sum()) if self.n else 0.0

    def sums(self, values: Floats) -> Floats:
        """The sum of `values` (n) within each prompt: (prompts)."""
        return np.bincount(self.codes, weights=values, minlength=self.count).astype(float)

    def variance(self, values: Floats) -> float:
        """Variance of the mean of `values` (n), prompts being what was sampled.

        Delete-one-prompt jackknife: linearised, so prompts of unequal size are weighed right (CR3 of Bell and
        McCaffrey 2002). With one pair a prompt it is the usual s^2 / n.
        """
        if self.count < 2:
            return math.inf
        residuals = self.sums(values - values.mean())
        left_out = residuals / (1 - self.sizes / self.n)
        return float((self.count - 1) / self.count * np.square(left_out / self.n).sum())

    def variance_of_components(self, values: Floats) -> float:
        """Variance of the mean of `values` (n) from its parts between and within prompts, by one-way analysis.

        It does not hang on the sizes of the few prompts that differ from the rest, as the jackknife does; but it takes
        size and outcome for unrelated, as the jackknife does not (Donner and Klar 2000, chapter 1; unequal sizes as in
        Searle, Casella and McCulloch 1992, section 3.6). It may come out below zero. Prompts have more than one pair.
        """
        sums, square = self.sums(values), float(np.square(self.sizes).sum())
        means = sums / self.sizes
        between = float((self.sizes * np.square(means - values.mean())).sum()) / (self.count - 1)
        within = float(np.square(values - means[self.codes]).sum()) / (self.n - self.count)
        typical = (self.n - square / self.n) / (self.count - 1)
        return square / self.n**2 * (between - within) / typical + within / self.n


def clustered_share(
    wins: Sequence[float], prompts: Sequence[object] | None = None, confidence: float = 0.95
) -> Proportion:
    """The share of `wins` (1, 0, or 0.5 for a tie) with Wilson's interval of its effective number of pairs.

    With one pair a prompt this is `wilson`. The variance is the larger of two estimates: where few prompts differ from
    the rest, each comes out small now and then. Where no outcome differs, or all prompts have the very same share,
    nothing is known of the agreement within a prompt, and full agreement is assumed. NaN bounds nothing.
    """
    values = np.asarray(wins, dtype=float)
    clusters = Clusters.of(prompts, len(values))
    total = float(values.sum())
    effective = _effective(values, clusters, confidence)
    if not clusters.n or math.isnan(total):
        return Proportion(math.nan, 0.0, 1.0, clusters.n, clusters.count, effective)
    if not effective:
        return Proportion(total / clusters.n, 0.0, 1.0, clusters.n, clusters.count, effective)
    interval = wilson(total * (effective / clusters.n), effective, confidence)
    share = total / clusters.n
    low, high = min(share, interval.low), max(share, interval.high)
    return Proportion(share, low, high, clusters.n, clusters.count, effective)


def _effective(values: Floats, clusters: Clusters, confidence: float) -> float:
    """Independent pairs that would bound the mean of `values` as well as these; 0 where prompts are too few to tell."""
    if clusters.single:
        return float(clusters.n)
    if clusters.equivalent - 1 < FEWEST_FREEDOM or not np.isfinite(values).all():
        return 0.0
    alone = Clusters.of(None, clusters.n).variance(values)
    shared = max(clusters.variance(values), clusters.variance_of_components(values))
    # What is left of the sums is rounding, where every prompt has the same share.
    pairs = clusters.n * alone / shared if shared > 1e-12 * alone > 0 else clusters.equivalent
    tail = 0.5 + confidence / 2
    freedom = t_quantile(tail, clusters.n - 1) / t_quantile(tail, clusters.equivalent - 1)
    # More than there are, where pairs of a prompt balance each other: a cut at their number would let copies of them
    # narrow the interval. The exact test beside it knows no such estimate.
    return float(pairs * freedom**2)


def clustered_mean(
    values: Sequence[float], prompts: Sequence[object] | None = None, confidence: float = 0.95
) -> MeanScore:
    """The mean of any values with Student's interval over prompts. A value that is not finite makes the mean NaN."""
    measured = np.asarray(values, dtype=float)
    with np.errstate(invalid="ignore"):  # Infinite ones of either sign have no mean.
        mean = float(measured.mean()) if len(measured) else math.nan
    return _student(mean, measured, prompts, confidence)


def clustered_ratio(
    values: Sequence[float],
    sizes: Sequence[float],
    prompts: Sequence[object] | None = None,
    confidence: float = 0.95,
) -> MeanScore:
    """The sum of any values over the sum of their sizes, with Student's interval over prompts.

    A ratio of sums, linearised: it varies as the mean of `(value - ratio * size) / mean size` does (Cochran 1977,
    Sampling Techniques, section 6.3). A mean over a fixed mean size would count the sizes' own variation as noise, or
    leave it out where value and size are unrelated. A value that is not finite, or no size, makes the ratio NaN.

    Raises:
        ValueError: not one size a value.
    """
    if len(values) != len(sizes):
        raise ValueError(f"{len(sizes)} sizes for {len(values)} values")
    measured, measures = np.asarray(values, dtype=float), np.asarray(sizes, dtype=float)
    total = float(measures.sum())
    if not total > 0:
        return MeanScore(math.nan, None, None, len(measured), Clusters.of(prompts, len(measured)).count)
    with np.errstate(invalid="ignore"):  # Infinite ones of either sign have no sum.
        ratio = float(measured.sum()) / total
        residuals = (measured - ratio * measures) / (total / len(measures))
    return _student(ratio, residuals, prompts, confidence)


def _student(value: float, varying: Floats, prompts: Sequence[object] | None, confidence: float) -> MeanScore:
    """A value with Student's interval and p, from what varies as it does, one a pair."""
    clusters = Clusters.of(prompts, len(varying))
    if not clusters.n or not (math.isfinite(value) and np.isfinite(varying).all()):
        return MeanScore(math.nan, None, None, clusters.n, clusters.count)
    freedom = clusters.equivalent - 1
    if freedom < FEWEST_FREEDOM:
        return MeanScore(value, None, None, clusters.n, clusters.count)
    error = math.sqrt(clusters.variance(varying))
    half = t_quantile(0.5 + confidence / 2, freedom) * error
    away = value / error if error else math.copysign(math.inf, value) if value else 0.0
    return MeanScore(value, value - half, value + half, clusters.n, clusters.count, t_tail(-away, freedom))


def wins_of(margins: Sequence[float]) -> list[float]:
    """1 for a margin above zero, 0 for one below, 0.5 inside the tie band, NaN for NaN."""
    return [math.nan if math.isnan(m) else 0.5 if abs(m) <= TIE_NATS else float(m > 0) for m in margins]


def tie_aware_accuracy(
    margins: Sequence[float], prompts: Sequence[object] | None = None, confidence: float = 0.95
) -> Proportion:
    """Share of margins above zero; a margin inside the tie band counts as half a win. NaN in, NaN out."""
    return clustered_share(wins_of(margins), prompts, confidence)


def pick_the_longer(
    chosen: Sequence[int], rejected: Sequence[int], prompts: Sequence[object] | None = None, confidence: float = 0.95
) -> Proportion:
    """How often the longer answer is the chosen one: what a score must beat to be more than a taste for length."""
    margins = [float(c - r) for c, r in zip(chosen, rejected, strict=True)]
    return tie_aware_accuracy(margins, prompts, confidence)
