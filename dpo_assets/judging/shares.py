"""Shares of comparisons with their intervals: as a judge sees them, and corrected for what it errs.

All intervals come of score tests, and take the conversation as what was sampled. `benchmarks/judged_shares.py` says how
often they hold the true share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from dpo_assets.checks.evidence.clusters import Floats, clustered_share
from dpo_assets.checks.evidence.power import FEWEST_PROMPTS
from dpo_assets.checks.statistics import Proportion

CHANCE = 0.5
HALVINGS = 28  # To 4e-9.
DIRECTIONS = np.linspace(0.0, 2 * math.pi, 73)
ROUNDING = 1e-6  # Of a corrected share, from ends that are known to `HALVINGS`.


@dataclass(frozen=True)
class Share:
    """A share of wins, ties counted half, of comparisons that may share conversations.

    Attributes:
        scores: 1, 0.5 or 0 of each comparison: (n)
        conversations: which each belongs to: (n)
        ties: share of ties.
        effective: independent comparisons that would say as much (`clustered_share`); 0: too few to tell.
    """

    scores: Floats
    conversations: tuple[object, ...]
    ties: float
    effective: float

    @classmethod
    def of(cls, scores: Sequence[float], conversations: Sequence[object], confidence: float) -> Share:
        """Of the scores of comparisons that have one."""
        effective = clustered_share(scores, conversations, confidence).effective
        ties = scores.count(0.5) / len(scores) if scores else 0.0
        return cls(np.asarray(scores, dtype=float), tuple(conversations), ties, effective or 0.0)

    @property
    def n(self) -> int:
        return len(self.scores)

    @property
    def clusters(self) -> int:
        return len(set(self.conversations))

    @property
    def value(self) -> float:
        return float(self.scores.mean()) if self.n else math.nan

    def proportion(self, confidence: float) -> Proportion:
        """With Tango's score interval (1998, Statistics in Medicine 17, 891); without ties it is Wilson's.

        Wilson's takes a tie for half a win and half a loss, which vary more: of 200 comparisons of which half are ties
        it holds the true share in 99.4 % of cases.
        """
        if not self.effective:
            return Proportion(self.value, 0.0, 1.0, self.n, self.clusters, self.effective)
        z = normal_quantile(confidence)
        low, high = self.limits(np.array([z, -z])).tolist()
        low, high = min(low, self.value), max(high, self.value)
        return Proportion(self.value, low, high, self.n, self.clusters, self.effective)

    def limits(self, z: Floats) -> Floats:
        """The true share that lies each of `z` standard errors, which it has itself, below the one that was seen."""
        low, high = np.where(z >= 0, 0.0, self.value), np.where(z >= 0, self.value, 1.0)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            below = self._z(middle) > z
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return np.asarray((low + high) / 2)

    def _z(self, share: Floats) -> Floats:
        variance = share * (1 - share) - self._ties_at(share) / 4
        return np.asarray((self.value - share) * np.sqrt(self.effective / np.maximum(variance, 1e-300)))

    def _ties_at(self, share: Floats) -> Floats:
        """The most likely share of ties where `share` is the true one: the root of t (a - t) (b - t) =
        t (wins (b - t) + losses (a - t)), of shares seen, with a = 2 share and b = 2 (1 - share)."""
        twice, rest = 2 * share, 2 * (1 - share)
        wins = self.value - self.ties / 2
        middle = 2 * self.ties + wins * rest + (1 - self.ties - wins) * twice
        square = middle**2 - 4 * self.ties * twice * rest
        return np.asarray((middle - np.sqrt(np.maximum(square, 0.0))) / 2)


def corrected(share: Share, agreement: Share, confidence: float) -> Proportion:
    """The share that people would have preferred, from a judge's share and its agreement with people.

    A judge that agrees with people with probability p, whichever answer is the better one (both orders are asked), sees
    w = p t + (1 - p) (1 - t) of a true share t, so t = (w + p - 1) / (2 p - 1) (Rogan & Gladen 1978).

    The interval is all t of the (w, p) that both data sets together do not reject: those with z_w^2 + z_p^2 below the
    squared quantile, each z a score test's (a profile of both; for p known it is the interval of w). Where answers
    and people's pairs share conversations, z_w and z_p have their correlation.

    Args:
        agreement: share of people's own pairs in which the judge preferred what they did, a tie counted half.

    A judge whose agreement may be that of a coin says nothing, and one that was held against fewer than
    `FEWEST_PROMPTS` conversations is not known: NaN, between 0 and 1. So is one for which no t of the interval lies
    between 0 and 1: with that agreement it cannot see so large a share, or so small a one, of any true share. Where
    part of the interval does, it is cut off at 0 and 1, and so is a value outside.
    """
    nothing = Proportion(math.nan, 0.0, 1.0, share.n, share.clusters)
    if not share.effective or agreement.clusters < FEWEST_PROMPTS or not agreement.effective:
        return nothing
    if agreement.proportion(confidence).low <= CHANCE:
        return nothing
    z, both = normal_quantile(confidence), _correlation(share, agreement)
    w = share.limits(z * (both * np.cos(DIRECTIONS) + math.sqrt(1 - both**2) * np.sin(DIRECTIONS)))
    p = agreement.limits(z * np.cos(DIRECTIONS))
    ends = (w + p - 1) / (2 * p - 1)
    if ends.min() > 1 + ROUNDING or ends.max() < -ROUNDING:
        return nothing
    ends = np.clip(ends, 0.0, 1.0)
    value = min(1.0, max(0.0, (share.value + agreement.value - 1) / (2 * agreement.value - 1)))
    low, high = min(value, float(ends.min())), max(value, float(ends.max()))
    return Proportion(value, low, high, share.n, share.clusters, share.effective)


def _correlation(one: Share, other: Share) -> float:
    """Of two shares, by the conversations that are in both."""
    names = {name: number for number, name in enumerate(dict.fromkeys((*one.conversations, *other.conversations)))}
    sums = np.zeros((2, len(names)))
    for row, share in zip(sums, (one, other), strict=True):
        np.add.at(row, [names[name] for name in share.conversations], share.scores - share.value)
    spread = math.sqrt(float(np.square(sums[0]).sum() * np.square(sums[1]).sum()))
    return max(-1.0, min(1.0, float(sums[0] @ sums[1]) / spread)) if spread else 0.0


def normal_quantile(confidence: float) -> float:
    """Of a two-sided interval."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)
