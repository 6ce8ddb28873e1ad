"""How far the newest window of feedback differs from the one before it, measure by measure, with intervals.

A difference of two means has Student's interval over conversations, by leaving out one at a time: one that stands in
both windows is left out of both, so that what it says of each is not counted as independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from dpo_assets.artifact import Number
from dpo_assets.checks.evidence.clusters import (
    FEWEST_FREEDOM,
    Clusters,
    Floats,
    clustered_mean,
    t_quantile,
    t_tail,
)
from dpo_assets.checks.evidence.measured import MeanScore
from dpo_assets.checks.reports.base import Report
from dpo_assets.checks.statistics import holm
from dpo_assets.feedback.dated import DatedPairs

if TYPE_CHECKING:
    import polars as pl

# Shares of pairs in which the longer answer won, of all pairs, and of a model's pairs that it won; tokens of chosen
# answers; the feedback's own margin, in standard deviations of the window before.
Measure = Literal["longer won", "share of pairs", "win rate", "length", "margin"]
SHARES: tuple[Measure, ...] = ("longer won", "share of pairs", "win rate")
MOST = 10  # Sources, users and models that are looked at, the largest.
ALL = "all"


@dataclass(frozen=True)
class Shift:
    """One measure of one part of the feedback, now and before.

    `now` and `before` are shares, geometric means of tokens, or mean margins. `difference` with its ends is of shares,
    of logarithms of tokens, or of margins in standard deviations. `p` is two-sided, after Holm over all shifts. Ends
    and p are None where conversations are too few.
    """

    part: str
    measure: Measure
    now: Number
    before: Number
    pairs: tuple[int, int]
    conversations: tuple[int, int]
    difference: Number
    low: float | None
    high: float | None
    p: float | None

    def __str__(self) -> str:
        ends = "" if self.low is None or self.high is None else f" [{self._shown(self.low)}, {self._shown(self.high)}]"
        return f"{self.part}, {self.measure}: {self._shown(self.difference)}{ends}"

    def _shown(self, value: float) -> str:
        return f"x{math.exp(value):.3g}" if self.measure == "length" else f"{value:+.3g}"

    @property
    def shown(self) -> str:
        """The difference with its interval, in the unit of people."""
        return str(self).rpartition(": ")[2]


class WindowScore(Report):
    """What one window is like: pairs and conversations are all of it, means those of the pairs that are measured."""

    first: str
    last: str
    pairs: int
    conversations: int
    longer_won: MeanScore
    length: MeanScore  # Mean of the logarithms of chosen answers' tokens.
    margin: MeanScore


class DriftReport(Report):
    """The windows that hold dated pairs, newest first, and the newest against the one before it."""

    days: int
    undated: int
    windows: tuple[WindowScore, ...]
    shifts: tuple[Shift, ...]


def drift_report(dated: DatedPairs, conversations: int, confidence: float) -> DriftReport:
    """Windows and shifts of dated pairs.

    Args:
        conversations: fewer of them in a window bound nothing.
        confidence: of each interval.
    """
    windows = sorted(dated.counts)
    scores = tuple(_score(dated, window) for window in windows)
    shifts: list[Shift] = []
    if len(windows) > 1 and windows[0] == 0:
        now, before = (_of(dated.rows, window) for window in windows[:2])
        shifts = [
            _shift(part, measure, of_now, of_before, conversations, confidence)
            for part, measure, of_now, of_before in _measures(now, before)
        ]
    told = holm({str(n): shift.p for n, shift in enumerate(shifts) if shift.p is not None})
    return DriftReport(
        days=dated.days,
        undated=dated.undated,
        windows=scores,
        shifts=tuple(replace(shift, p=told.get(str(n))) for n, shift in enumerate(shifts)),
    )


def _of(rows: pl.DataFrame, window: int) -> pl.DataFrame:
    import polars as pl

    return rows.filter(pl.col("window") == window)


def _score(dated: DatedPairs, window: int) -> WindowScore:
    rows = _of(dated.rows, window)
    first, last = dated.bounds(window)
    rated = rows.drop_nulls("margin")
    return WindowScore(
        first=first.isoformat(),
        last=last.isoformat(),
        pairs=dated.counts[window],
        conversations=dated.conversations[window],
        longer_won=clustered_mean(_longer_won(rows), rows["group_id"].to_list()),
        length=clustered_mean(_lengths(rows), rows["group_id"].to_list()),
        margin=clustered_mean(rated["margin"].to_list(), rated["group_id"].to_list()),
    )


def _longer_won(rows: pl.DataFrame) -> list[float]:
    signs = np.sign(rows["chosen_tokens"].cast(int).to_numpy() - rows["rejected_tokens"].cast(int).to_numpy())
    return [float(share) for share in (signs + 1) / 2]


def _lengths(rows: pl.DataFrame) -> list[float]:
    return [float(value) for value in np.log(np.maximum(1, rows["chosen_tokens"].to_numpy()))]


Sample = tuple[list[float], list[str]]  # Values, and the conversation of each.


def _measures(now: pl.DataFrame, before: pl.DataFrame) -> Iterator[tuple[str, Measure, Sample, Sample]]:
    """Every (part, measure) with its values in both windows."""
    import polars as pl

    def groups(rows: pl.DataFrame) -> list[str]:
        return [str(group) for group in rows["group_id"]]

    def values(rows: pl.DataFrame, measure: Measure) -> Sample:
        return (_longer_won(rows) if measure == "longer won" else _lengths(rows)), groups(rows)

    for measure in ("longer won", "length"):
        yield ALL, measure, values(now, measure), values(before, measure)  # type: ignore[arg-type]
    rated = [rows.drop_nulls("margin") for rows in (now, before)]
    if all(rows.height > 1 for rows in rated) and (scale := float(np.std(rated[1]["margin"].to_numpy(), ddof=1))):
        of_now, of_before = (([float(m) / scale for m in rows["margin"]], groups(rows)) for rows in rated)
        yield ALL, "margin", of_now, of_before
    for column in ("source", "user"):
        for name in _largest(now, before, column):
            part = f"{column} {name}"
            is_one = pl.col(column) == name
            of_one = [rows.filter(is_one) for rows in (now, before)]
            shares = [[float(one == name) for one in rows[column]] for rows in (now, before)]
            # A file that stands in one window alone says when it was written, not who gave what is in it.
            if column != "source" or all(rows.height for rows in of_one):
                yield part, "share of pairs", (shares[0], groups(now)), (shares[1], groups(before))
            yield part, "longer won", values(of_one[0], "longer won"), values(of_one[1], "longer won")
    for name in _largest(now, before, "winner", "loser"):
        took_part = (pl.col("winner") == name) | (pl.col("loser") == name)
        of_both = [rows.filter(took_part) for rows in (now, before)]
        won = [[float(winner == name) for winner in rows["winner"]] for rows in of_both]
        yield f"model {name}", "win rate", (won[0], groups(of_both[0])), (won[1], groups(of_both[1]))


def _largest(now: pl.DataFrame, before: pl.DataFrame, *columns: str) -> list[str]:
    """The names with most pairs in both windows together; none where there is only one."""
    import polars as pl

    names = pl.concat([rows[column] for rows in (now, before) for column in columns]).drop_nulls().alias("name")
    counts = names.value_counts().sort("count", "name", descending=[True, False])
    return counts["name"].head(MOST).to_list() if counts.height > 1 else []


def _shift(part: str, measure: Measure, now: Sample, before: Sample, fewest: int, confidence: float) -> Shift:
    difference, ends, p = difference_of_means(now, before, fewest, confidence)
    means = [float(np.mean(values)) if values else math.nan for values, _ in (now, before)]
    if measure == "length":
        means = [math.exp(mean) for mean in means]
    low, high = ends or (None, None)
    return Shift(
        part, measure, means[0], means[1], (len(now[0]), len(before[0])),
        (len(set(now[1])), len(set(before[1]))), difference, low, high, p,
    )  # fmt: skip


def difference_of_means(
    now: Sample, before: Sample, fewest: int, confidence: float
) -> tuple[float, tuple[float, float] | None, float | None]:
    """(mean now less mean before, ends of its interval, two-sided p); the latter None where too few conversations.

    Delete-one-conversation jackknife, and the degrees of freedom of Welch (1947) from each window's own.
    """
    samples = [(np.asarray(values, dtype=float), groups) for values, groups in (now, before)]
    if not all(len(values) for values, _ in samples):
        return math.nan, None, None
    difference = float(samples[0][0].mean() - samples[1][0].mean())
    clusters = [Clusters.of(groups, len(values)) for values, groups in samples]
    freedoms = [one.equivalent - 1 for one in clusters]
    if min(one.equivalent for one in clusters) < fewest or min(freedoms) < FEWEST_FREEDOM:
        return difference, None, None
    error = math.sqrt(_variance(samples))
    if error == 0:
        return difference, (difference, difference), 0.0 if difference else 1.0
    alone = [one.variance(values) for one, (values, _) in zip(clusters, samples, strict=True)]
    freedom = sum(alone) ** 2 / sum(v**2 / f for v, f in zip(alone, freedoms, strict=True))
    half = t_quantile(0.5 + confidence / 2, freedom) * error
    return difference, (difference - half, difference + half), min(1.0, 2 * t_tail(abs(difference) / error, freedom))


def _variance(samples: Sequence[tuple[Floats, Sequence[str]]]) -> float:
    """Of the difference of two means, conversations of both being what was sampled."""
    union = Clusters.of([group for _, groups in samples for group in groups], sum(len(v) for v, _ in samples))
    cut = len(samples[0][0])
    left_out = []
    for (values, _), codes in zip(samples, (union.codes[:cut], union.codes[cut:]), strict=True):
        sums = np.bincount(codes, weights=values - values.mean(), minlength=union.count)
        sizes = np.bincount(codes, minlength=union.count)
        left_out.append(-sums / (len(values) - sizes))
    moved = left_out[0] - left_out[1]
    return float((union.count - 1) / union.count * np.square(moved).sum())
