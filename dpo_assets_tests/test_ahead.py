"""The next item is made while the one before is in use, and nothing else changes."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_assets.ahead import ahead


@given(st.lists(st.none() | st.integers()))
def test_the_items_are_the_same_in_the_same_order(items: list[int | None]) -> None:
    assert list(ahead(items)) == items


def test_one_item_is_made_ahead_and_no_more() -> None:
    made: list[int] = []
    second = threading.Event()

    def items() -> Iterator[int]:
        for n in range(5):
            made.append(n)
            if n == 1:
                second.set()
            yield n

    source = ahead(items())
    assert next(source) == 0
    assert second.wait(10)
    assert made == [0, 1]
    source.close()  # type: ignore[attr-defined]


def test_a_fault_comes_where_its_item_would_have() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    source = ahead(items())
    assert next(source) == 1
    with pytest.raises(ValueError, match="broken"):
        next(source)
