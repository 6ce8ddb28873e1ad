"""Two models on the same pairs. Only pairs on which they differ speak, and prompts, not pairs, are what was sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from dpo_assets.checks.evidence.clusters import FEWEST_FREEDOM, Clusters, Floats, t_quantile
from dpo_assets.checks.evidence.measured import Comparison
from dpo_assets.checks.statistics import sign_test

DRAWN_UP_TO = 400  # Prompts whose interval is drawn. Above, a mean is normal to the levels that are asked for.
DRAWS, SEED = 10_000, 20_261_127


def compare(
    challenger: Sequence[float],
    champion: Sequence[float],
    prompts: Sequence[object] | None = None,
    confidence: float = 0.95,
    draws: int = DRAWS,
) -> Comparison:
    """The challenger's wins (1, 0, 0.5 for a tie) against the champion's, on the same pairs in the same order.

    p: were the two alike, each prompt's difference would have either sign with equal chance (Fisher 1935, section 21).
    Every sign of every prompt is counted: of many prompts few may differ, and then no normal theory holds. The interval
    is a bootstrap of `draws` over prompts up to `DRAWN_UP_TO` of them, Student's above.
    NaN in any win makes every number NaN and p 1.

    Raises:
        ValueError: not one win of each side, and one prompt, a pair; or a win that is no multiple of one half.
    """
    if len(challenger) != len(champion):
        raise ValueError(f"{len(challenger)} wins of the challenger, {len(champion)} of the champion")
    differences = np.asarray(challenger, dtype=float) - np.asarray(champion, dtype=float)
    clusters = Clusters.of(prompts, len(differences))
    if not clusters.n or not np.isfinite(differences).all():
        nothing = (math.nan, -1.0, 1.0, math.nan)
        return Comparison(*nothing, 1.0, 1.0, 1.0, clusters.n, clusters.count, 0)
    sums = np.rint(2 * clusters.sums(differences)).astype(np.int64)
    if not np.allclose(2 * differences, np.rint(2 * differences)):
        raise ValueError("a win is 1, 0, or 0.5 for a tie")
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    low, high = (
        bootstrap_interval(differences, clusters, confidence, draws)
        if clusters.count <= DRAWN_UP_TO
        else _student(differences, clusters, confidence)
    )
    return Comparison(
        difference=float(differences.mean()),
        low=low,
        high=high,
        error=math.sqrt(clusters.variance(differences)) if clusters.count > 1 else math.nan,
        p_better=sign_flip_tail(sums),
        p_worse=sign_flip_tail(-sums),
        p_pairs=float(sign_test(gained, lost)),
        n=clusters.n,
        clusters=clusters.count,
        discordant=gained + lost,
    )


def sign_flip_tail(sums: NDArray[np.int64]) -> float:
    """Chance that whole numbers with fair random signs sum to at least what `sums` (prompts) do, to rounding.

    Numbers of equal size make a binomial, so their distribution is built size by size: no draw, no smallest p but
    2^-prompts. Chances that no float holds in full are left out, so many prompts cost little more than few.
    """
    sums = sums // max(1, int(np.gcd.reduce(sums)))
    sizes, counts = np.unique(np.abs(sums[sums != 0]), return_counts=True)
    positive, fewest = np.ones(1), 0  # positive[k]: chance that the numbers with a plus sum to fewest + k.
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        heads, least = _fair_coins(count)
        spread = np.zeros(len(positive) + size * (len(heads) - 1))
        for rest in range(min(size, len(positive))):
            spread[rest::size] = np.convolve(positive[rest::size], heads)
        positive, first = _held(spread)
        fewest += size * least + first
    observed = int(sums[sums > 0].sum())
    return min(1.0, float(positive[max(0, observed - fewest) :].sum()))


def _fair_coins(count: int) -> tuple[Floats, int]:
    """Chances of so many heads of `count` coins, and how many heads the first of them is of.

    From the middle outwards by the ratio of neighbours, and then scaled to a sum of one: no factorial to overflow.
    """
    middle = count // 2
    above = np.arange(middle, count)
    upper = np.concatenate([np.ones(1), np.cumprod((count - above) / (above + 1))])
    chances = np.concatenate([upper[::-1][:middle], upper])
    return _held(chances / chances.sum())


def _held(chances: Floats) -> tuple[Floats, int]:
    """The chances from the first to the last that a float holds in full, and where the first is."""
    held = np.flatnonzero(chances >= np.finfo(float).tiny)
    return chances[held[0] : held[-1] + 1], int(held[0])


def expanded_tail(freedom: float, confidence: float) -> float:
    """The share of draws beyond each end of a percentile interval of few prompts ("expanded percentile", Hesterberg
    2015, The American Statistician 69)."""
    return NormalDist().cdf(-math.sqrt((freedom + 1) / freedom) * t_quantile(0.5 + confidence / 2, freedom))


def bootstrap_interval(
    values: Floats, clusters: Clusters, confidence: float = 0.95, draws: int = DRAWS, seed: int = SEED
) -> tuple[float, float]:
    """(low, high) of the mean of `values` by drawing prompts with replacement, with a fixed seed.

    Percentiles are taken further out than `confidence` alone asks for, as few prompts need (`expanded_tail`). Too few
    prompts bound nothing: (-1, 1).
    """
    freedom = clusters.equivalent - 1
    if freedom < FEWEST_FREEDOM:
        return -1.0, 1.0
    count = clusters.count
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    means = (weights @ clusters.sums(values)) / (weights @ clusters.sizes)
    tail = expanded_tail(freedom, confidence)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _student(values: Floats, clusters: Clusters, confidence: float) -> tuple[float, float]:
    freedom = clusters.equivalent - 1
    if freedom < FEWEST_FREEDOM:
        return -1.0, 1.0
    half = t_quantile(0.5 + confidence / 2, freedom) * math.sqrt(clusters.variance(values))
    mean = float(values.mean())
    return mean - half, mean + half
