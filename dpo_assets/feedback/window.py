"""Which pairs a window of days leaves out of training.

What is held out stays, however old it is: the pairs that a released model was judged by must be there when the next one
is held against it. The window comes before every rule between rows: an old pair that is left out contradicts nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

from dpo_assets.feedback.pool import Pool
from dpo_assets.recipe import WindowSection

if TYPE_CHECKING:
    import polars as pl

AHEAD = timedelta(days=1)  # A pair dated further in the future than this tells nothing of when feedback ends.


@dataclass(frozen=True)
class Window:
    """Training takes pairs from `start` on, a day in UTC; `undated` says whether it takes those without a date."""

    start: date
    undated: bool

    def identity(self) -> dict[str, Any]:
        """What decides which pairs are taken."""
        return {"start": self.start.isoformat(), "undated": self.undated}


@dataclass(frozen=True)
class LeftOut:
    """What a window leaves out of training.

    Args:
        names: `b` and `n` of those pairs.
        by_reason: their number: `older` than the window, or `undated`.
        held_out: pairs outside of the window that stay, because they are held out.
        undated: pairs without a date, by source, taken or not.
        future: pairs that are dated more than a day ahead of now; they are taken.
    """

    names: pl.DataFrame
    by_reason: dict[str, int]
    held_out: int
    undated: dict[str, int]
    future: int

    def report(self, window: Window) -> dict[str, Any]:
        """For the dataset's report."""
        told = {"held_out": self.held_out, "undated_by_source": self.undated, "future": self.future}
        return {**window.identity(), **self.by_reason, **told}


def day_of(column: str = "created_at") -> pl.Expr:
    """The day, in UTC, of a column of times as readers give them; null where it is none."""
    import polars as pl

    return pl.col(column).str.slice(0, 10).str.to_date("%Y-%m-%d", strict=False)


def today() -> date:
    return datetime.now(UTC).date()


def newest_day(pool: Pool, now: date) -> date | None:
    """The latest day on which a preference was given, as far as it is not in the future; None: none is dated."""
    import polars as pl

    found: Iterable[date | None] = (
        batch.columns(["created_at"]).select(day_of()).filter(pl.col("created_at") <= now + AHEAD).to_series().max()
        for batch in pool.batches
    )
    return max((day for day in found if day is not None), default=None)


def window_of(section: WindowSection, newest: date | None) -> Window:
    """The window of feedback whose newest day is `newest`: the same feedback has the same window on whatever day it is
    asked. Of `days` and `since` the later start counts."""
    starts = [section.since] if section.since is not None else []
    if section.days is not None and newest is not None:
        starts.append(newest - timedelta(days=section.days - 1))
    return Window(max(starts, default=date.min), section.undated == "keep")


def left_out(pool: Pool, window: Window, held_out: Callable[[str], bool], now: date) -> LeftOut:
    """The pairs of a pool that the window leaves out.

    Args:
        held_out: whether a group is held out, by its `group_id`.
        now: today, in UTC.
    """
    import polars as pl

    parts, undated, future, kept = [], [], 0, 0
    for b, batch in enumerate(pool.batches):
        pairs = batch.columns(["created_at", "group_id", "source"]).with_columns(day=day_of()).with_row_index("n")
        future += pairs.filter(pl.col("day") > now + AHEAD).height
        undated.append(pairs.filter(pl.col("day").is_null())["source"])
        old = pl.col("day") < window.start
        outside = pairs.filter(old.fill_null(not window.undated))
        stays = pl.Series([held_out(group) for group in outside["group_id"]], dtype=pl.Boolean)
        kept += int(stays.sum())
        out = outside.filter(~stays).select("n", older=pl.col("day").is_not_null())
        parts.append(out.with_columns(b=pl.lit(b, dtype=pl.UInt32)))
    gone = pl.concat(parts)
    older = int(gone["older"].sum())
    sources = pl.concat(undated).value_counts(sort=False).sort("source")
    return LeftOut(
        gone.select("b", "n"),
        {"older": older, "undated": gone.height - older},
        kept,
        dict(sources.iter_rows()),
        future,
    )
