"""Comparisons to shares with intervals: raw, corrected for a judge's errors, and at equal length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dpo_assets.checks.statistics import Proportion, wilson
from dpo_assets.judging.comparing import Comparison, Outcome

SCORES = {"win": 1.0, "tie": 0.5, "loss": 0.0}
RIDGE = 1e-3  # Of the logistic fit: without it a length that parts the outcomes has no finite slope.
NEWTON_STEPS = 50


class Compared(Protocol):
    """Two answers to one prompt, compared by whomever."""

    @property
    def outcome(self) -> Outcome:
        """How the first of them fared; `null` where nothing is known of it."""


@dataclass(frozen=True)
class Tally:
    """Comparisons, counted."""

    wins: int
    ties: int
    losses: int
    nulls: int
    flipped: int

    @classmethod
    def of(cls, comparisons: Sequence[Comparison]) -> Tally:
        outcomes = [one.outcome for one in comparisons]
        wins, ties, losses, nulls = (outcomes.count(name) for name in ("win", "tie", "loss", "null"))
        return cls(wins, ties, losses, nulls, sum(one.flipped for one in comparisons))

    @property
    def asked(self) -> int:
        return self.wins + self.ties + self.losses + self.nulls

    @property
    def decided(self) -> int:
        return self.asked - self.nulls

    def share(self, confidence: float) -> Proportion:
        """Of wins among the comparisons with a verdict, a tie counted half."""
        return wilson(self.wins + 0.5 * self.ties, self.decided, confidence)


def corrected(share: Proportion, agreement: Proportion) -> Proportion:
    """The share that people would have preferred, from a judge's share and its agreement with people.

    A judge that agrees with people with probability p, whichever answer is the better one (both orders are asked), sees
    w = p t + (1 - p) (1 - t) of a true share t, so t = (w + p - 1) / (2 p - 1) (Rogan & Gladen 1978). How far the ends
    of both intervals move it (dt/dw = 1 / (2 p - 1), dt/dp = (1 - 2 w) / (2 p - 1)^2) adds up as independent variances
    do (Zou & Donner 2008): by the root of w (1 - w) / n alone 16 wins of 16 would be certain.

    Args:
        agreement: share of people's own pairs in which the judge preferred what they did, a tie counted half.

    A judge whose agreement may be that of a coin says nothing: NaN, between 0 and 1.
    """
    nothing = Proportion(math.nan, 0.0, 1.0, share.n)
    if not share.n or not agreement.n or agreement.low <= 0.5:
        return nothing
    w, p = share.value, agreement.value
    slope = 2 * p - 1
    by_share, by_agreement = 1 / slope, (1 - 2 * w) / slope**2

    def reach(down: bool) -> float:
        """How far the value reaches: by the ends of both that move it there, as they lie from their values."""
        of_share = w - share.low if down else share.high - w
        of_agreement = agreement.high - p if (by_agreement < 0) == down else p - agreement.low
        return math.hypot(by_share * of_share, by_agreement * of_agreement)

    value = (w + p - 1) / slope
    low, high = (min(1.0, max(0.0, end)) for end in (value - reach(True), value + reach(False)))
    return Proportion(min(1.0, max(0.0, value)), low, high, share.n)


def at_equal_length(comparisons: Sequence[Compared], lengths: Sequence[tuple[int, int]]) -> float:
    """Win share at a length difference of zero: a logistic fit of the outcome on tanh of the standardised difference.

    The reduced form of AlpacaEval's length-controlled rate (Dubois et al., arXiv 2404.04475). NaN without a verdict.

    Args:
        lengths: characters of the first and of the second answer of each comparison.
    """
    decided = [
        (SCORES[c.outcome], a - b) for c, (a, b) in zip(comparisons, lengths, strict=True) if c.outcome != "null"
    ]
    if not decided:
        return math.nan
    outcomes, differences = zip(*decided, strict=True)
    scale = math.sqrt(math.fsum(d * d for d in differences) / len(differences)) or 1.0
    x = [math.tanh(d / scale) for d in differences]
    constant = slope = 0.0
    for _ in range(NEWTON_STEPS):
        fitted = [_sigmoid(constant + slope * v) for v in x]
        weights = [f * (1 - f) for f in fitted]
        by_constant = math.fsum(o - f for o, f in zip(outcomes, fitted, strict=True)) - RIDGE * constant
        by_slope = math.fsum((o - f) * v for o, f, v in zip(outcomes, fitted, x, strict=True)) - RIDGE * slope
        a, b, c = (math.fsum(w * v**power for w, v in zip(weights, x, strict=True)) for power in (0, 1, 2))
        a, c = a + RIDGE, c + RIDGE
        determinant = a * c - b * b
        moved = ((c * by_constant - b * by_slope) / determinant, (a * by_slope - b * by_constant) / determinant)
        constant, slope = constant + moved[0], slope + moved[1]
        if max(map(abs, moved)) < 1e-10:
            break
    return _sigmoid(constant)


def _sigmoid(value: float) -> float:
    """As a hyperbolic tangent, which no value overflows."""
    return 0.5 * (1 + math.tanh(value / 2))
