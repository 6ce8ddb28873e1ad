"""Dated pairs in windows of equally many days, newest first: what drift is seen by.

Taken from all pairs as they were read, so that a recipe's window, the model and rules between rows change nothing of
what is compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TYPE_CHECKING

from dpo_assets.feedback.pool import PART, Pool
from dpo_assets.feedback.quality_sources import answering_models
from dpo_assets.feedback.window import day_of, newest_day

if TYPE_CHECKING:
    import polars as pl

WINDOWS = 6  # How far back: windows that are shown.
SAMPLE = 20_000  # Pairs of a window whose texts are read: at a share of one half the standard error is then 0.0035.
NUMBERS = ("window", "group_id", "source", "user", "margin", "chosen", "rejected", "winner", "loser")


@dataclass(frozen=True)
class DatedPairs:
    """Pairs of the last WINDOWS windows.

    Args:
        days: of a window.
        newest: the last day of window 0; None: no pair is dated.
        rows: NUMBERS of each: its window (0 is the newest), conversation, source, user, margin, letters of both answers
            and the models that gave them, where they are told.
        counts: pairs by window, of which at most SAMPLE each are in `rows`.
        undated: pairs without a date.
    """

    days: int
    newest: date | None
    rows: pl.DataFrame
    counts: dict[int, int]
    undated: int

    def bounds(self, window: int) -> tuple[date, date]:
        """First and last day of a window."""
        assert self.newest is not None
        last = self.newest - timedelta(days=self.days * window)
        return last - timedelta(days=self.days - 1), last


def dated_pairs(pool: Pool, days: int, now: date) -> DatedPairs:
    """The dated pairs of a pool; one that stands there several times with one date is one.

    Args:
        days: of a window, from 1.
        now: today, in UTC.
    """
    import polars as pl

    newest = newest_day(pool, now)
    found, undated = [], 0
    for b, batch in enumerate(pool.batches):
        columns = ["created_at", "pair_id", "group_id", "source", "user", "margin", "meta"]
        pairs = batch.columns(columns).with_row_index("n").with_columns(day=day_of(), b=pl.lit(b, dtype=pl.UInt32))
        undated += pairs["day"].null_count()
        age = (pl.lit(newest, dtype=pl.Date) - pl.col("day")).dt.total_days()
        pairs = pairs.with_columns(window=age // days).filter((age >= 0) & (pl.col("window") < WINDOWS))
        found.append(pairs.drop("day"))
    several = pl.concat(found).unique(["pair_id", "created_at"], keep="first", maintain_order=True)
    counts = dict(several["window"].value_counts(sort=False).sort("window").iter_rows())
    # An id is a digest of content, so the first of them are a random sample.
    sample = several.sort("pair_id", "created_at").group_by("window", maintain_order=True).head(SAMPLE)
    parts = [part.select(NUMBERS) for part in _measured(pool, sample)]
    empty = pl.DataFrame(schema=dict.fromkeys(NUMBERS, pl.String)).cast(
        {"window": pl.Int64, "margin": pl.Float64, "chosen": pl.Int64, "rejected": pl.Int64}
    )
    return DatedPairs(days, newest, pl.concat([empty, *parts], how="vertical_relaxed"), counts, undated)


def _measured(pool: Pool, sample: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """The pairs with the letters of their answers, read part by part."""
    import polars as pl

    def letters(side: str) -> pl.Expr:
        texts = pl.element().struct.field("content").str.len_chars()
        return pl.col(side).list.eval(texts).list.sum().cast(pl.Int64)

    for start in range(0, sample.height, PART):
        part = sample.slice(start, PART)
        texts = pool.take(part, ["chosen", "rejected"]).with_columns(letters("chosen"), letters("rejected"))
        models = [answering_models(meta) or (None, None) for meta in part["meta"]]
        sides = {"winner": [won for won, _ in models], "loser": [lost for _, lost in models]}
        names = [pl.Series(name, values, dtype=pl.String) for name, values in sides.items()]
        yield part.with_columns(names).join(texts, on=["b", "n"], how="left", maintain_order="left")
