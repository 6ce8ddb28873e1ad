"""How long a server asks to be left alone: as a number, as a date, and as nothing that can be read."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_assets.retry_after import LONGEST_WAIT, asked_to_wait, wait


@pytest.mark.parametrize(
    ("told", "seconds"),
    [("7", 7.0), (" 0 ", 0.0), ("1.5", 1.5), ("-3", 0.0), ("", None), ("soon", None), ("inf", None), ("nan", None)],
)
def test_seconds_are_read_and_what_is_none_is_not(told: str, seconds: float | None) -> None:
    assert asked_to_wait(httpx.Headers({"retry-after": told})) == seconds


def test_an_answer_without_the_header_asks_for_nothing() -> None:
    assert asked_to_wait(httpx.Headers()) is None


@pytest.mark.parametrize("zone", ["GMT", "-0000"])
def test_a_date_is_counted_from_now(zone: str) -> None:
    at = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True).replace("GMT", zone)
    asked = asked_to_wait({"Retry-After": at})
    assert asked is not None
    assert 50 < asked <= 60
    assert asked_to_wait({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0


@given(st.text())
def test_no_header_breaks_the_reading_of_it(told: str) -> None:
    asked = asked_to_wait({"Retry-After": told})
    assert 1.0 <= wait(1.0, asked) <= LONGEST_WAIT
