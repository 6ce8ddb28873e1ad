"""Whether a refresh is asked for: what changed, what it waits for, and what became of what was asked for before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_assets.automation.waiting import Answer, Cursor, GpuUse, Outcome, Refresh, Tick
from dpo_assets.feedback.watching import Content, Look
from dpo_assets.recipe.running import RefreshSection

NOW = 1_800_000_000.0
HOUR = 3600.0
A, B = Content(digest="a"), Content(digest="b")


def look(content: Content | None = A, name: str = "votes", **more: Any) -> Look:
    return Look(name, content, **more)


def tick(
    looks: Sequence[Look] = (),
    read: Mapping[str, Content] | None = None,
    refreshes: Sequence[Refresh] = (),
    cursor: Cursor | None = None,
    now: float = NOW,
    new: int | None = 5,
    gpu: Sequence[GpuUse] = (),
    **settings: Any,
) -> Answer:
    settings = {"min_new_pairs": 0, **settings}
    looks = looks or [look()]
    return Tick(now, cursor, looks, read or {}, refreshes, RefreshSection(**settings), lambda *_: new, gpu).answer()


def refresh(key: str, outcome: Outcome, ended: float = NOW, run_id: str = "run") -> Refresh:
    return Refresh(run_id, outcome, ended, None if outcome == "under way" else ended, key)


def test_feedback_that_was_never_read_is_asked_for() -> None:
    assert tick().asks


def test_a_sensor_switched_on_after_a_run_of_the_same_content_asks_for_nothing() -> None:
    answer = tick(read={"votes": A})
    assert not answer.asks
    assert answer.reason == "nothing new in 1 source"


def test_content_a_then_b_then_a_again_is_asked_for_three_times() -> None:
    first = tick([look(A)])
    second = tick([look(B)], {"votes": A}, [refresh(first.key, "succeeded", NOW)], first.cursor, NOW + 60)
    past = [refresh(second.key, "succeeded", NOW + 60), refresh(first.key, "succeeded", NOW)]
    third = tick([look(A)], {"votes": B}, past, second.cursor, NOW + 120)
    assert [first.asks, second.asks, third.asks] == [True, True, True]
    assert first.key == third.key != second.key
    settled = tick(
        [look(A)], {"votes": A}, [refresh(third.key, "succeeded", NOW + 120), *past], third.cursor, NOW + 180
    )
    assert not settled.asks


def test_nothing_is_asked_for_while_a_refresh_is_under_way_whoever_started_it() -> None:
    answer = tick(refreshes=[refresh("", "under way", run_id="by-hand")])
    assert not answer.asks
    assert "by-hand is under way" in answer.reason


def test_a_failed_refresh_is_asked_for_again_after_growing_pauses_and_then_given_up() -> None:
    cursor = tick().cursor
    key, failed, now, asked = cursor.key, [], NOW, []
    for minutes in (10, 20, 40):
        failed.insert(0, refresh(key, "failed", now, f"run{len(failed)}"))
        # It failed after it had read its feedback: nothing is new, and still it is not done.
        early = tick(read={"votes": A}, refreshes=failed, cursor=cursor, now=now + minutes * 60 - 1)
        late = tick(read={"votes": A}, refreshes=failed, cursor=cursor, now=now + minutes * 60)
        asked += [early.asks, late.asks]
        now += minutes * 60
    assert asked == [False, True] * 3
    failed.insert(0, refresh(key, "failed", now, "run3"))
    given_up = tick(read={"votes": A}, refreshes=failed, cursor=cursor, now=now + 1000 * HOUR)
    assert not given_up.asks
    assert "4 refreshes of this feedback failed, the last of them is run3" in given_up.reason


def test_new_feedback_is_asked_for_whatever_failed_before_it() -> None:
    cursor = tick([look(A)]).cursor
    failed = [refresh(cursor.key, "failed", NOW)] * 9
    assert tick([look(B)], refreshes=failed, cursor=cursor, now=NOW + 60).asks


def test_a_refresh_that_a_person_cancelled_is_not_asked_for_again() -> None:
    cursor = tick().cursor
    answer = tick(refreshes=[refresh(cursor.key, "cancelled", NOW)], cursor=cursor, now=NOW + 100 * HOUR)
    assert not answer.asks
    assert "was cancelled" in answer.reason


def test_what_looks_otherwise_after_each_reading_is_read_once() -> None:
    """A server whose entity tags change with each request."""
    cursor = tick().cursor
    answer = tick(read={"votes": B}, refreshes=[refresh(cursor.key, "succeeded")], cursor=cursor, now=NOW + HOUR)
    assert not answer.asks


def test_few_new_pairs_wait_for_more_and_no_longer_than_the_longest_wait() -> None:
    few = tick(new=5, min_new_pairs=10, max_wait_hours=2.0)
    assert not few.asks
    assert "5 new pairs in `votes`, of 10 (refresh.min_new_pairs); at the latest at 2027-01-15 10:00 UTC" in few.reason
    assert tick(new=10, min_new_pairs=10).asks
    later = {"cursor": few.cursor, "min_new_pairs": 10, "max_wait_hours": 2.0}
    assert not tick(new=0, now=NOW + 2 * HOUR - 1, **later).asks
    assert tick(new=0, now=NOW + 2 * HOUR, **later).asks  # Also what is no addition: a withdrawal.


def test_a_longest_wait_starts_with_the_change_and_not_with_the_sensor() -> None:
    calm = tick(read={"votes": A}, min_new_pairs=10, max_wait_hours=2.0)
    assert calm.cursor.changed_since is None
    few = tick([look(B)], {"votes": A}, cursor=calm.cursor, now=NOW + 50 * HOUR, new=1, min_new_pairs=10)
    assert few.cursor.changed_since == NOW + 50 * HOUR


def test_a_change_that_cannot_be_counted_from_outside_is_enough() -> None:
    assert tick(new=None, min_new_pairs=1000).asks


def test_a_cool_down_holds_new_feedback_after_a_refresh_of_anybody() -> None:
    by_hand = [refresh("", "succeeded", NOW)]
    early = tick(refreshes=by_hand, now=NOW + 29 * 60, cool_down_minutes=30.0)
    assert not early.asks
    assert "no refresh before 2027-01-15 08:30 UTC" in early.reason
    assert tick(refreshes=by_hand, now=NOW + 30 * 60, cool_down_minutes=30.0).asks


def test_a_broken_source_shows_and_does_not_hold_up_the_others() -> None:
    broken = look(None, "s3", fault="no credentials")
    answer = tick([broken, look()])
    assert answer.asks
    assert "`s3` is broken, the others go on: no credentials" in answer.reason
    quiet = tick([broken, look()], {"votes": A})
    assert not quiet.asks
    assert "no credentials" in quiet.reason


def test_a_source_that_came_back_is_a_reason_to_try_again() -> None:
    broken = tick([look(None, "s3", fault="down"), look()])
    failed = [refresh(broken.key, "failed", NOW)] * 4
    assert not tick([look(None, "s3", fault="down"), look()], {}, failed, broken.cursor, NOW + 100 * HOUR).asks
    read = {"s3": B}
    broken = tick([look(None, "s3", fault="down"), look()], read)
    failed = [refresh(broken.key, "failed", NOW)] * 4
    assert tick([look(B, "s3"), look()], read, failed, broken.cursor, NOW + 60).asks


def test_a_file_that_is_being_written_says_so() -> None:
    answer = tick([look(None, busy=True)])
    assert not answer.asks
    assert "a file of `votes` is still being written" in answer.reason
    assert answer.cursor.busy_since == NOW


@given(st.text() | st.sampled_from(["{}", "null", "[]", '{"listing": [], "digest": "x"}', '{"version": 1}']))
def test_whatever_stands_in_a_cursor_it_is_replaced_and_told(text: str) -> None:
    cursor, told = Cursor.of(text)
    assert cursor is None
    assert bool(told) == bool(text)


def test_a_cursor_comes_back_as_it_was() -> None:
    cursor = tick([look(None, busy=True)]).cursor
    assert Cursor.of(cursor.model_dump_json()) == (cursor, "")


@pytest.mark.parametrize("text", ['{"version": 2, "key": "a", "since": "yesterday"}', '{"version": 2'])
def test_half_a_cursor_is_none(text: str) -> None:
    assert Cursor.of(text)[0] is None


def test_a_spent_gpu_budget_holds_feedback_until_enough_of_it_left_the_period_and_ticks_say_what_is_left() -> None:
    used = [GpuUse(NOW - 6 * 24 * HOUR, 3.0), GpuUse(NOW - 8 * 24 * HOUR, 50.0), GpuUse(NOW - 24 * HOUR, 2.5)]
    budget: dict[str, Any] = {"gpu_hours": 5.0, "max_wait_hours": 1.0}
    held = tick(gpu=used, **budget)
    assert not held.asks
    assert "no refresh before 2027-01-16 08:00 UTC (refresh.gpu_hours)" in held.reason
    assert "5.50 of 5 GPU hours of the last 7 days are spent, 0.00 are left" in held.reason
    # No wait is so long that it would go over the budget, and a failed refresh is no exception.
    late = NOW + 24 * HOUR - 1
    waited = tick(gpu=used, cursor=held.cursor, now=late, min_new_pairs=9, **budget)
    failed = [refresh(held.key, "failed")]
    assert not waited.asks
    assert not tick(gpu=used, cursor=held.cursor, refreshes=failed, now=late, **budget).asks
    free = tick(gpu=used, cursor=held.cursor, now=NOW + 24 * HOUR, **budget)
    assert free.asks
    assert "2.50 of 5 GPU hours of the last 7 days are spent, 2.50 are left" in free.reason
    unlimited = tick(gpu=used)
    assert unlimited.asks
    assert "GPU" not in unlimited.reason


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 10)), max_size=8), st.floats(0.1, 30), st.floats(0.5, 14))
def test_the_time_that_a_spent_budget_names_is_the_first_at_which_it_is_not_spent(
    runs: list[tuple[float, float]], budget: float, days: float
) -> None:
    used = [GpuUse(NOW - ago * 24 * HOUR, hours) for ago, hours in runs]

    def spent(at: float) -> float:
        return sum(use.hours for use in used if use.ended > at - days * 24 * HOUR)

    asked = tick(gpu=used, gpu_hours=budget, gpu_days=days)
    assert asked.asks == (spent(NOW) < budget)
    if not asked.asks:
        ends = sorted(at for use in used if (at := use.ended + days * 24 * HOUR) > NOW)
        first = next(at for at in ends if spent(at) < budget - 1e-9)
        assert tick(gpu=used, now=first + 1e-3, gpu_hours=budget + 1e-9, gpu_days=days).asks
        assert not tick(gpu=used, now=first - 1e-3, gpu_hours=budget - 1e-6, gpu_days=days).asks
