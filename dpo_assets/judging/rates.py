"""Comparisons counted, and their share of wins: as it is, and at equal length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dpo_assets.checks.evidence.clusters import FEWEST_FREEDOM, Clusters, Floats
from dpo_assets.checks.evidence.paired import SEED, expanded_tail
from dpo_assets.checks.statistics import Proportion, wilson
from dpo_assets.judging.comparing import Comparison, Outcome
from dpo_assets.judging.shares import Share

SCORES = {"win": 1.0, "tie": 0.5, "loss": 0.0}
RIDGE = 1e-3  # Of the logistic fit: without it a length that parts the outcomes has no finite slope.
NEWTON_STEPS = 50
DRAWS_OF_FITS = 2_000


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


def share_of(comparisons: Sequence[Compared], conversations: Sequence[object], confidence: float) -> Share:
    """Of wins among the comparisons with a verdict, a tie counted half."""
    decided = [(SCORES[c.outcome], of) for c, of in zip(comparisons, conversations, strict=True) if c.outcome != "null"]
    return Share.of([score for score, _ in decided], [of for _, of in decided], confidence)


def at_equal_length(
    comparisons: Sequence[Compared],
    lengths: Sequence[tuple[int, int]],
    conversations: Sequence[object],
    confidence: float,
) -> Proportion:
    """Win share at a length difference of zero: a logistic fit of the outcome on tanh of the standardised difference.

    The reduced form of AlpacaEval's length-controlled rate (Dubois et al., arXiv 2404.04475). Its interval is a
    bootstrap of the whole fit over conversations, with a fixed seed. NaN between 0 and 1 without a verdict; too few
    bound nothing.

    Args:
        lengths: characters of the first and of the second answer of each comparison.
        conversations: which each comparison belongs to.
    """
    decided = [
        (SCORES[c.outcome], float(a - b), of)
        for c, (a, b), of in zip(comparisons, lengths, conversations, strict=True)
        if c.outcome != "null"
    ]
    count = len(decided)
    if not decided:
        return Proportion(math.nan, 0.0, 1.0, 0)
    outcomes, differences = (np.asarray([row[column] for row in decided], dtype=float) for column in (0, 1))
    clusters = Clusters.of([of for _, _, of in decided], count)
    share = float(_at_zero(outcomes, differences, np.ones((1, count)))[0])
    if clusters.equivalent - 1 < FEWEST_FREEDOM:
        return Proportion(share, 0.0, 1.0, count, clusters.count)
    each = np.full(clusters.count, 1 / clusters.count)
    drawn = np.random.default_rng(SEED).multinomial(clusters.count, each, size=DRAWS_OF_FITS).astype(float)
    tail = expanded_tail(clusters.equivalent - 1, confidence)
    low, high = np.quantile(_at_zero(outcomes, differences, drawn[:, clusters.codes]), [tail, 1 - tail])
    # Where all went one way, every draw does, and says nothing of how far others would go.
    pairs = clusters.equivalent
    known = wilson(pairs * share, pairs, confidence) if len(set(outcomes.tolist())) == 1 else None
    low, high = (float(low), float(high)) if known is None else (known.low, known.high)
    return Proportion(share, min(share, low), max(share, high), count, clusters.count)


def _at_zero(outcomes: Floats, differences: Floats, weights: Floats) -> Floats:
    """The fitted share at a difference of zero, for each row of `weights` (draws, n): (draws)."""
    scale = np.sqrt((weights @ np.square(differences)) / weights.sum(axis=1))
    x = np.tanh(differences / np.where(scale > 0, scale, 1.0)[:, None])
    constant = slope = np.zeros(len(weights))
    for _ in range(NEWTON_STEPS):
        fitted = _sigmoid(constant[:, None] + slope[:, None] * x)
        spread, missed = weights * fitted * (1 - fitted), weights * (outcomes - fitted)
        by_constant = missed.sum(axis=1) - RIDGE * constant
        by_slope = (missed * x).sum(axis=1) - RIDGE * slope
        a, b, c = spread.sum(axis=1) + RIDGE, (spread * x).sum(axis=1), (spread * x * x).sum(axis=1) + RIDGE
        determinant = a * c - b * b
        moved = ((c * by_constant - b * by_slope) / determinant, (a * by_slope - b * by_constant) / determinant)
        constant, slope = constant + moved[0], slope + moved[1]
        if max(float(np.abs(one).max()) for one in moved) < 1e-10:
            break
    return _sigmoid(constant)


def _sigmoid(values: Floats) -> Floats:
    """As a hyperbolic tangent, which no value overflows."""
    return np.asarray(0.5 * (1 + np.tanh(values / 2)))
