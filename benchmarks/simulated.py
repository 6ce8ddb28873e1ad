"""Two policies of known skill on simulated held-out pairs, and how the promotion rules decide on them.

On each pair the two differ with a chance; who wins then is drawn with a chance of the conversation's own, so that pairs
of one conversation agree: `agreement` is the intra-class correlation of the wins, 0 (independent) to 1 (one answer a
conversation). A pipeline counts conversations, whose turns agree, and has two metrics on the same pairs; here the
second is the first's on half the conversations and drawn anew on the others, so their differences have a correlation of
`CORRELATION`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from dpo_assets.checks.evidence.clusters import FEWEST_FREEDOM, t_quantile
from dpo_assets.checks.evidence.measured import Comparison
from dpo_assets.checks.evidence.paired import sign_flip_tail
from dpo_assets.checks.evidence.rules import Evidence, by_evidence

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
DIFFER = 0.3  # Share of pairs on which two policies of one lineage differ.
CORRELATION = 0.5  # Of the two metrics' differences between those policies, conversation by conversation.
NEAR = 0.6  # Standard errors below the level from which the exact test is worked out.


@dataclass(frozen=True)
class Pairs:
    """Held-out pairs: how many conversations, the fewest and most pairs of one, and how far these agree.

    `long` is the share of conversations with ten times `most` pairs: feedback has a few very long ones.
    """

    conversations: int
    fewest: int = 1
    most: int = 1
    agreement: float = 0.0
    long: float = 0.0

    def __str__(self) -> str:
        sizes = f"{self.fewest}" if self.fewest == self.most else f"{self.fewest} to {self.most}"
        sizes += f" and {100 * self.long:g} % of {10 * self.most}" if self.long else ""
        return f"{self.conversations} x {sizes}, agreement {self.agreement:g}"

    @property
    def expected(self) -> float:
        """Pairs in all."""
        usual = (self.fewest + self.most) / 2
        return self.conversations * (usual + self.long * (10 * self.most - usual))

    def sizes(self, rng: np.random.Generator, trials: int) -> Ints:
        """(trials, conversations)"""
        usual = rng.integers(self.fewest, self.most, (trials, self.conversations), endpoint=True)
        if not self.long:
            return usual
        return np.where(rng.random(usual.shape) < self.long, 10 * self.most, usual)


def chances(rng: np.random.Generator, mean: float | Floats, agreement: float, shape: tuple[int, ...]) -> Floats:
    """A chance for each conversation, with that mean, whose draws have that intra-class correlation."""
    if agreement <= 0:
        return np.full(shape, mean)
    if agreement >= 1:
        return (rng.random(shape) < mean).astype(float)
    size = 1 / agreement - 1
    return rng.beta(mean * size, (1 - mean) * size, shape)


@dataclass(frozen=True)
class Metrics:
    """Two metrics of trials on the same pairs.

    Attributes:
        sums: challenger's less champion's wins within each conversation, doubled as the test counts:
            (2, trials, conversations)
        sizes: pairs of each conversation: (trials, conversations)
    """

    sums: Ints
    sizes: Ints

    def of(self, trials: Ints) -> Metrics:
        """Those trials."""
        return Metrics(self.sums[:, trials], self.sizes[trials])

    def z(self) -> Floats:
        """(2, trials)"""
        spread = np.sqrt(np.square(self.sums).sum(axis=2).astype(float))
        return np.asarray(self.sums.sum(axis=2) / np.maximum(spread, 1e-9))

    def differences(self) -> Floats:
        """(2, trials)"""
        return np.asarray(self.sums.sum(axis=2) / 2 / self.sizes.sum(axis=1))

    def comparison(self, metric: int, trial: int, *, exact: bool = True) -> Comparison:
        """As `paired.compare` has it, but for the interval; without `exact` its p is 1."""
        sums, sizes = self.sums[metric, trial], self.sizes[trial]
        n, count = int(sizes.sum()), len(sizes)
        mean = float(sums.sum() / 2 / n)
        left_out = (sums / 2 - mean * sizes) / (1 - sizes / n) / n
        error = math.sqrt((count - 1) / count * float(np.square(left_out).sum()))
        freedom = n**2 / float(np.square(sizes).sum()) - 1
        half = t_quantile(0.975, round(freedom, 1)) * error if freedom >= FEWEST_FREEDOM else 2.0
        p = sign_flip_tail(sums) if exact else 1.0
        return Comparison(mean, mean - half, mean + half, error, p, 1.0, 1.0, n, count, int((sums != 0).sum()))


def drawn(
    rng: np.random.Generator, pairs: Pairs, trials: int, effect: float | Floats = 0.0, differ: float = DIFFER
) -> Metrics:
    """Challenger against champion, better by `effect`, which is one number or (trials, 1)."""
    sizes = pairs.sizes(rng, trials)
    first, second = (apart(rng, sizes, pairs.agreement, effect, differ) for _ in range(2))
    return Metrics(np.stack([first, np.where(rng.random(sizes.shape) < CORRELATION, first, second)]), sizes)


def apart(rng: np.random.Generator, sizes: Ints, agreement: float, effect: float | Floats, differ: float) -> Ints:
    """One metric's doubled differences of wins: (trials, conversations)."""
    discordant = rng.binomial(sizes, differ)
    won = rng.binomial(discordant, chances(rng, 0.5 + effect / differ / 2, agreement, discordant.shape))
    return np.asarray(2 * (2 * won - discordant))


Known = Callable[[Ints], Metrics]  # The known conversations of the trials that are asked for.


@dataclass(frozen=True)
class Judged:
    """Of each trial whether it was promoted, and whether it would have been, had no guard held it."""

    promoted: NDArray[np.bool_]
    held: NDArray[np.bool_]


def judged(fresh: Metrics, levels: Floats, known: Known | None = None) -> Judged:
    """Trials at their levels. Those far below, which no rule promotes, are not worked out."""
    z = fresh.z()
    needed = np.array([NormalDist().inv_cdf(1 - level / len(z)) for level in levels])  # Holm's least p of two.
    near = z > needed - NEAR
    asked = np.flatnonzero(near.any(axis=0))
    guards = known(asked) if known is not None and len(asked) else None
    found = np.zeros((2, len(levels)), dtype=bool)
    for number, trial in enumerate(asked.tolist()):
        evidence = Evidence(
            {str(k): fresh.comparison(k, trial, exact=bool(near[k, trial])) for k in range(2)},
            {str(k): guards.comparison(k, number, exact=False) for k in range(2)} if guards is not None else {},
        )
        outcome = by_evidence(evidence, float(levels[trial]), first=False)
        better = min(outcome.adjusted.values(), default=1.0) <= levels[trial]
        found[:, trial] = outcome.decision == "promote", outcome.decision == "hold" and better
    return Judged(*found)


def knowing(rng: np.random.Generator, conversations: int, effect: float) -> Known:
    return lambda asked: drawn(rng, Pairs(conversations), len(asked), effect)
