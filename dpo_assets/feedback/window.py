"""Which pairs a window of days leaves out of training.

What is held out stays, however old it is: the pairs that a released model was judged by must be there when the next one
is held against it. The window comes before every rule between rows: an old pair that is left out contradicts nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

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
        older, undated: their number: before the window, or without a date.
        held_out: pairs outside of the window that stay, because they are held out.
        without_date: pairs without a date, by source, taken or not.
        future: pairs that are dated more than a day ahead of now; they are taken.
    """

    names: pl.DataFrame
    older: int
    undated: int
    held_out: int
    without_date: dict[str, int]
    future: int

    def report(self, window: Window) -> dict[str, Any]:
        """For the dataset's report."""
        return {
            **window.identity(),
            "older": self.older,
            "left_out_undated": self.undated,
            "held_out": self.held_out,
            "without_date": self.without_date,
        }


def today() -> date:
    return datetime.now(UTC).date()


def newest_day(days: pl.Series, now: date) -> date | None:
    """The latest of the days on which preferences were given that is not in the future; None: there is none."""
    newest = days.filter(days <= now + AHEAD).max()
    assert newest is None or isinstance(newest, date)
    return newest


def window_of(section: WindowSection, newest: date | None) -> Window:
    """The window of feedback whose newest day is `newest`: the same feedback has the same window on whatever day it is
    asked. Of `days` and `since` the later start counts."""
    starts = [section.since] if section.since is not None else []
    if section.days is not None and newest is not None:
        first = newest.toordinal() - section.days + 1
        starts.append(date.fromordinal(max(1, first - (first - 1) % section.step_days)))
    return Window(max(starts, default=date.min), section.undated == "keep")


def left_out(pairs: pl.DataFrame, window: Window, now: date) -> LeftOut:
    """The pairs that the window leaves out.

    Args:
        pairs: `b`, `n`, `day`, `source` and `held_out` (its side of the split) of each.
        now: today, in UTC.
    """
    import polars as pl

    outside = pairs.filter((pl.col("day") < window.start).fill_null(not window.undated))
    gone = outside.filter(~pl.col("held_out"))
    sources = pairs.filter(pl.col("day").is_null())["source"].value_counts(sort=False).sort("source")
    undated = gone["day"].null_count()
    return LeftOut(
        names=gone.select("b", "n"),
        older=gone.height - undated,
        undated=undated,
        held_out=outside.height - gone.height,
        without_date=dict(sources.iter_rows()),
        future=pairs.filter(pl.col("day") > now + AHEAD).height,
    )
