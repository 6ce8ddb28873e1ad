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
from dpo_assets.feedback.pool import LoadedBatch, Pool, stored
from dpo_assets.feedback.readers import Place, ReadOptions, format_named
from dpo_assets.feedback.screening import Screening
from dpo_assets.feedback.tables import pairs_frame
from dpo_assets.feedback.window import LeftOut, Window, left_out, newest_day, window_of
from dpo_assets.recipe import WindowSection, parse_recipe
from dpo_assets_tests.pipelines import demo_recipe
from dpo_assets_tests.samples import pair

NOW = date(2026, 11, 27)


def pool_of(days: list[str | None], source: str = "votes.jsonl") -> Pool:
    """A pool of two batches with a pair for each time, which is its `created_at`."""
    pairs = [pair(n, created_at=day, source=source) for n, day in enumerate(days)]
    half = len(pairs) // 2
    return Pool([LoadedBatch(pairs_frame(pairs[:half])), LoadedBatch(pairs_frame(pairs[half:]))])


def gone(found: LeftOut) -> list[tuple[int, int]]:
    return sorted(found.names.select("b", "n").iter_rows())


def test_older_pairs_are_left_out_held_out_ones_stay_and_every_number_is_told() -> None:
    pool = pool_of(["2026-11-01T00:00:00+00:00", "2026-10-31T23:59:59+00:00", None, "soon", "2030-01-01T00:00:00Z"])
    window = Window(date(2026, 11, 1), undated=True)
    found = left_out(pool, window, lambda _: False, NOW)
    assert gone(found) == [(0, 1)]
    assert found.report(window) == {
        "start": "2026-11-01", "older": 1, "undated": 0, "held_out": 0, "future": 1,
        "undated_by_source": {"votes.jsonl": 2},
    }  # fmt: skip
    strict = left_out(pool, Window(date(2026, 11, 1), undated=False), lambda _: False, NOW)
    assert gone(strict) == [(0, 1), (1, 0), (1, 1)]
    assert strict.by_reason == {"older": 1, "undated": 2}
    old = pair(1).group_id
    kept = left_out(pool, window, lambda group: group == old, NOW)
    assert (gone(kept), kept.held_out) == ([], 1)


def test_the_last_days_count_back_from_the_newest_pair_that_is_not_in_the_future() -> None:
    pool = pool_of(["2026-11-20T10:00:00+00:00", "2026-11-22T23:00:00+00:00", None, "2040-01-01T00:00:00+00:00"])
    newest = newest_day(pool, NOW)
    assert newest == date(2026, 11, 22)
    assert newest_day(pool, date(2039, 12, 31)) == date(2040, 1, 1), "a clock that is a day behind is no fault of a row"
    assert newest_day(pool_of([None, "never"]), NOW) is None
    assert window_of(WindowSection(days=3), newest).start == date(2026, 11, 20)
    assert window_of(WindowSection(days=1), newest).start == newest
    assert window_of(WindowSection(days=3, since=date(2026, 11, 21)), newest).start == date(2026, 11, 21)
    assert window_of(WindowSection(days=3, since=date(2026, 1, 1)), newest).start == date(2026, 11, 20)
    # Nothing is dated: nothing is older.
    assert gone(left_out(pool_of([None, None]), window_of(WindowSection(days=3), None), lambda _: False, NOW)) == []


@given(
    st.lists(st.one_of(st.none(), st.integers(-400, 400)), max_size=12),
    st.integers(-300, 300),
    st.booleans(),
    st.integers(0, 3),
)
def test_every_pair_is_in_the_window_or_held_out_or_counted_as_left_out(
    offsets: list[int | None], start: int, undated: bool, held: int
) -> None:
    days = [None if n is None else f"{NOW + timedelta(days=n)}T12:00:00+00:00" for n in offsets]
    held_out = {pair(n).group_id for n in range(0, len(days), held)} if held else set()
    window = Window(NOW + timedelta(days=start), undated)
    found = left_out(pool_of(days), window, held_out.__contains__, NOW)

    def is_out(n: int) -> bool:
        out = not undated if offsets[n] is None else offsets[n] < start  # type: ignore[operator]
        return out and pair(n).group_id not in held_out

    half = len(days) // 2
    assert gone(found) == [(n >= half, n - half * (n >= half)) for n in range(len(days)) if is_out(n)]
    assert sum(found.by_reason.values()) == found.names.height
    assert sum(found.undated.values()) == offsets.count(None)


def test_what_a_window_leaves_out_contradicts_nobody_and_is_in_no_quarantine(tmp_path: Path) -> None:
    old = pair(1, created_at="2026-01-01T00:00:00+00:00", source="old.jsonl")
    turned = pair(1, chosen=old.rejected, rejected=old.chosen, created_at="2026-11-26T00:00:00+00:00")
    for name, one in (("old", old), ("new", turned)):
        (tmp_path / name).mkdir()
        write_pairs(pairs_frame([one]), tmp_path / name)

    def screened(window: Window | None) -> tuple[list[str], int]:
        pool = stored([tmp_path / "old", tmp_path / "new"])
        names = left_out(pool, window, lambda _: False, NOW).names if window is not None else None
        screening = Screening(pool, left_out=names)
        accepted = pl.concat([part for part, _ in screening.parts()] or [pl.DataFrame({"pair_id": []})])
        return accepted["pair_id"].to_list(), screening.quarantine().height

    assert screened(None) == ([], 2)
    assert screened(Window(date(2026, 11, 1), undated=True)) == ([turned.pair_id], 0)


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
