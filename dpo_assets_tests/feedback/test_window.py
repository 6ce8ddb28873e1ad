"""A window of days: what it leaves out of training, what stays since it is held out, and that all is counted."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_assets.errors import ConfigError
from dpo_assets.feedback.batches import write_pairs
from dpo_assets.feedback.pool import stored
from dpo_assets.feedback.readers import Place, ReadOptions, format_named
from dpo_assets.feedback.screening import Screening
from dpo_assets.feedback.splits import sides
from dpo_assets.feedback.tables import pairs_frame
from dpo_assets.feedback.window import LeftOut, Window, left_out, newest_day, window_of
from dpo_assets.recipe import WindowSection, parse_recipe
from dpo_assets_tests.pipelines import demo_recipe
from dpo_assets_tests.samples import pair

NOW = date(2026, 11, 27)


def days_of(days: list[str | None]) -> pl.DataFrame:
    """Pairs of two batches with a day each, of which none is held out."""
    half, n = len(days) // 2, len(days)
    return pl.DataFrame(
        {
            "b": [int(k >= half) for k in range(n)],
            "n": [k - half * (k >= half) for k in range(n)],
            "day": pl.Series(days, dtype=pl.String).str.to_date(),
            "source": ["votes.jsonl"] * n,
            "held_out": [False] * n,
        },
        schema={"b": pl.UInt32, "n": pl.UInt32, "day": pl.Date, "source": pl.String, "held_out": pl.Boolean},
    )


def gone(found: LeftOut) -> list[tuple[int, int]]:
    return sorted(found.names.iter_rows())


def test_older_pairs_are_left_out_held_out_ones_stay_and_every_number_is_told() -> None:
    pairs = days_of(["2026-11-01", "2026-10-31", None, None, "2030-01-01"])
    window = Window(date(2026, 11, 1), undated=True)
    found = left_out(pairs, window, NOW)
    assert gone(found) == [(0, 1)]
    assert found.report(window) == {
        "start": "2026-11-01", "undated": True, "older": 1, "left_out_undated": 0, "held_out": 0,
        "without_date": {"votes.jsonl": 2},
    }  # fmt: skip
    assert found.future == 1
    strict = left_out(pairs, Window(date(2026, 11, 1), undated=False), NOW)
    assert gone(strict) == [(0, 1), (1, 0), (1, 1)]
    assert (strict.older, strict.undated) == (1, 2)
    is_old = pl.col("day").eq_missing(date(2026, 10, 31))
    kept = left_out(pairs.with_columns(held_out=is_old), window, NOW)
    assert (gone(kept), kept.held_out) == ([], 1)


def test_the_last_days_count_back_from_the_newest_pair_that_is_not_in_the_future() -> None:
    days = days_of(["2026-11-20", "2026-11-22", None, "2040-01-01"])["day"]
    newest = newest_day(days, NOW)
    assert newest == date(2026, 11, 22)
    assert newest_day(days, date(2039, 12, 31)) == date(2040, 1, 1), "a clock that is a day behind is no fault of a row"
    assert newest_day(days_of([None])["day"], NOW) is None
    assert window_of(WindowSection(days=3), newest).start == date(2026, 11, 20)
    assert window_of(WindowSection(days=1), newest).start == newest
    assert window_of(WindowSection(days=3, since=date(2026, 11, 21)), newest).start == date(2026, 11, 21)
    assert window_of(WindowSection(days=3, since=date(2026, 1, 1)), newest).start == date(2026, 11, 20)
    # By the week: the same Monday for each day of a week.
    weeks = [window_of(WindowSection(days=10, step_days=7), NOW + timedelta(days=n)).start for n in range(-4, 5)]
    assert weeks == [date(2026, 11, 9)] * 2 + [date(2026, 11, 16)] * 7
    assert window_of(WindowSection(days=10**6), newest).start == date.min
    # Nothing is dated: nothing is older.
    assert gone(left_out(days_of([None, None]), window_of(WindowSection(days=3), None), NOW)) == []


@given(
    st.lists(st.tuples(st.none() | st.integers(-400, 400), st.booleans()), max_size=12),
    st.integers(-300, 300),
    st.booleans(),
)
def test_every_pair_is_in_the_window_or_held_out_or_counted_as_left_out(
    drawn: list[tuple[int | None, bool]], start: int, undated: bool
) -> None:
    days = [None if n is None else str(NOW + timedelta(days=n)) for n, _ in drawn]
    pairs = days_of(days).with_columns(pl.Series("held_out", [held for _, held in drawn], dtype=pl.Boolean))
    found = left_out(pairs, Window(NOW + timedelta(days=start), undated), NOW)
    outside = [not undated if n is None else n < start for n, _ in drawn]
    half = len(days) // 2
    assert gone(found) == [
        (k >= half, k - half * (k >= half)) for k, out in enumerate(outside) if out and not drawn[k][1]
    ]
    assert found.older + found.undated + found.held_out == sum(outside)
    assert sum(found.without_date.values()) == days.count(None)


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 5))
def test_no_pair_that_is_older_lands_in_train_where_what_is_left_is_split_again(old: list[bool], groups: int) -> None:
    """Pairs of several groups with one opening are held out together: leaving some out must move none of the others."""
    facts = pl.DataFrame(
        {
            "group_id": [f"g{k}" for k in range(len(old))],
            "draw": pl.Series([(k * 7919 % 97) * 2**57 for k in range(len(old))], dtype=pl.UInt64),
            "together": [k % groups for k in range(len(old))],
        }
    )
    before = sides(facts, 0.5)
    stays = pl.Series(old, dtype=pl.Boolean).not_() | before
    after = sides(facts.filter(stays), 0.5)
    in_train = facts.filter(stays).with_columns(pl.Series("old", old).filter(stays)).filter(~after)
    assert not in_train["old"].any()


def test_what_a_window_leaves_out_contradicts_nobody_and_is_in_no_quarantine(tmp_path: Path) -> None:
    old = pair(1, created_at="2026-01-01T00:00:00+00:00", source="old.jsonl")
    turned = pair(1, chosen=old.rejected, rejected=old.chosen, created_at="2026-11-26T00:00:00+00:00")
    for name, one in (("old", old), ("new", turned)):
        (tmp_path / name).mkdir()
        write_pairs(pairs_frame([one]), tmp_path / name)

    def screened(names: pl.DataFrame | None) -> tuple[list[str], int]:
        screening = Screening(stored([tmp_path / "old", tmp_path / "new"]), left_out=names)
        accepted = pl.concat([part for part, _ in screening.parts()] or [pl.DataFrame({"pair_id": []})])
        return accepted["pair_id"].to_list(), screening.quarantine().height

    assert screened(None) == ([], 2)
    found = left_out(days_of(["2026-01-01", "2026-11-26"]), Window(date(2026, 11, 1), undated=True), NOW)
    assert screened(found.names) == ([turned.pair_id], 0)


@pytest.mark.parametrize(
    ("row", "when"),
    [
        ({"created_at": "2026-11-01T01:00:00+02:00"}, "2026-10-31T23:00:00+00:00"),
        ({"created_at": 1_700_000_000}, "2023-11-14T22:13:20+00:00"),
        ({"created_at": "last week"}, None),
        ({}, None),
    ],
)
def test_a_column_created_at_dates_a_row_of_any_format(row: dict[str, Any], when: str | None) -> None:
    rows = {
        "trl": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "openpipe": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                     "rejected_message": {"role": "assistant", "content": "c"}},
    }  # fmt: skip
    for name, values in rows.items():
        items = list(format_named(name).reader(ReadOptions()).read({**values, **row}, Place("a.jsonl", 1)))
        [(_, item)] = items
        assert item.created_at == when, name  # type: ignore[union-attr]


def test_a_window_without_a_start_is_refused_with_what_to_write() -> None:
    with pytest.raises(ConfigError, match=r"feedback\.window: .*needs `days` or `since`"):
        parse_recipe(demo_recipe(feedback={"window": {}}))
    given_ = parse_recipe(demo_recipe(feedback={"window": {"since": "2026-01-01"}}))
    assert given_.feedback.window == WindowSection(since=date(2026, 1, 1))
    assert parse_recipe(given_.model_dump()) == given_
