"""Dated pairs in windows of equally many days, newest first: what drift is seen by.

Taken from all pairs that fit the model, before rules between rows and a recipe's window: neither changes what is
compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta
from typing import TYPE_CHECKING

from dpo_assets.feedback.batches import PAIR_ID
from dpo_assets.feedback.window import newest_day

if TYPE_CHECKING:
    import polars as pl

WINDOWS = 6  # How far back: windows that are shown.
MOST_MEASURED = 20_000  # Pairs of a window that are measured: at a share of one half the standard error is then 0.0035.
# Facts of a pair: when and by whom it was given, what it is about, tokens of both answers, the models that gave them.
NUMBERS = ("day", "group_id", "source", "user", "margin", "chosen_tokens", "rejected_tokens", "winner", "loser")


@dataclass(frozen=True)
class DatedPairs:
    """Pairs of the last WINDOWS windows.

    Args:
        days: of a window.
        newest: the last day of window 0; None: no pair is dated.
        rows: NUMBERS of each, and its `window` (0 is the newest). `source` is a `series_of` files.
        conversations: by window, of all its pairs.
        counts: pairs by window, of which at most MOST_MEASURED each are in `rows`.
        undated: pairs without a date.
    """

    days: int
    newest: date | None
    rows: pl.DataFrame
    counts: dict[int, int]
    conversations: dict[int, int]
    undated: int

    def bounds(self, window: int) -> tuple[date, date]:
        """First and last day of a window."""
        assert self.newest is not None
        last = self.newest - timedelta(days=self.days * window)
        return last - timedelta(days=self.days - 1), last


def dated_pairs(pairs: pl.DataFrame, days: int, now: date) -> DatedPairs:
    """The dated ones among pairs; one that stands there several times with one date is one.

    Args:
        pairs: PAIR_ID and NUMBERS of each.
        days: of a window, from 1.
        now: today, in UTC.
    """
    import polars as pl

    newest = newest_day(pairs["day"], now)
    age = (pl.lit(newest, dtype=pl.Date) - pl.col("day")).dt.total_days()
    within = pairs.with_columns(window=age // days).filter((age >= 0) & (pl.col("window") < WINDOWS))
    once = within.sort(*PAIR_ID, "day", "source").unique([*PAIR_ID, "day"], keep="first", maintain_order=True)
    by_window = once.group_by("window").agg(pl.len(), pl.col("group_id").n_unique()).sort("window")
    counts, conversations = (dict(by_window.select("window", name).iter_rows()) for name in ("len", "group_id"))
    # An id is a digest of content, so the first of them are a random sample.
    sample = once.group_by("window", maintain_order=True).head(MOST_MEASURED)
    rows = sample.select("window", *NUMBERS).with_columns(source=series_of(pl.col("source")))
    return DatedPairs(days, newest, rows, counts, conversations, pairs["day"].null_count())


def series_of(source: pl.Expr) -> pl.Expr:
    """The name of a source with `*` for each number or date in it: `2026-11-03/votes.jsonl` is `*/votes.jsonl`.

    A file that belongs to a day or a month, or is one of a row of parts, holds pairs of that time by construction; what
    stays from window to window is the series.
    """
    return source.str.replace_all(r"\d+(?:[-_.:T]\d+)*", "*")
