"""What `benchmarks.redownload` takes for the same model, and what not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.redownload import EXACT, Row, Said, differences, largest_gap

SAID = Said("User: Hi", [1, 2], [3, 1], "Hi.", [[4, 5, 1], [6]], [-6.0, -2.0])


def row(other: Said, apart: float = 0.1, **told: str | bool) -> Row:
    return Row(
        "4.57.6", "a release", "a way", differences([SAID], [other]), largest_gap([SAID], [other]), apart, **told
    )  # type: ignore[arg-type]


def test_the_same_model_holds_up_to_rounding_a_token() -> None:
    assert row(SAID).holds
    assert row(replace(SAID, logps=[-6.0 - 2.9 * EXACT, -2.0])).holds


@pytest.mark.parametrize(
    "other",
    [
        replace(SAID, logps=[-6.0 - 3.1 * EXACT, -2.0]),
        replace(SAID, logps=[-6.0, -2.0 + 1.1 * EXACT]),
        replace(SAID, text="User:Hi"),
        replace(SAID, ids=[1, 3]),
        replace(SAID, answer=[3]),
        replace(SAID, spoken="Hi"),
        replace(SAID, answer_ids=[[4, 5, 1], [7]]),
    ],
)
def test_what_differs_is_a_fault(other: Said) -> None:
    assert not row(other).holds


def test_a_model_that_cannot_be_told_from_the_wrong_one_proves_nothing() -> None:
    assert not row(SAID, apart=EXACT).holds


def test_a_release_that_does_not_load_is_a_fault_unless_that_way_may_refuse() -> None:
    assert not row(SAID, why_not="OSError").holds
    assert row(SAID, why_not="OSError", may_refuse=True).holds
    assert not row(replace(SAID, answer=[3]), may_refuse=True).holds
