"""Intervals: against textbook values, and what must hold for every count."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo_assets.checks.evidence.clusters import TIE_NATS, pick_the_longer, tie_aware_accuracy
from dpo_assets.checks.statistics import (
    Proportion,
    percent,
    significant_fall,
    significant_rise,
    wilson,
)

_levels = st.sampled_from([0.51, 0.8, 0.9, 0.95, 0.99, 0.999])


@st.composite
def _counts(draw: st.DrawFn) -> tuple[float, int]:
    n = draw(st.integers(1, 5000))
    return draw(st.integers(0, 2 * n)) / 2, n


@pytest.mark.parametrize(
    ("successes", "n", "confidence", "low", "high"),
    [
        # Agresti and Coull 1998 and Newcombe 1998 give these to four places.
        (81, 263, 0.95, 0.2553, 0.3662),
        (15, 148, 0.95, 0.0624, 0.1605),
        (0, 20, 0.95, 0.0000, 0.1611),
        (1, 29, 0.95, 0.0061, 0.1718),
        (8, 10, 0.95, 0.4902, 0.9433),
        (20, 20, 0.95, 0.8389, 1.0000),
    ],
)
def test_wilson_gives_the_published_intervals(
    successes: int, n: int, confidence: float, low: float, high: float
) -> None:
    interval = wilson(successes, n, confidence)
    assert interval.value == successes / n
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)
    assert interval.n == n


@settings(max_examples=60, deadline=None)
@given(counts=_counts(), confidence=_levels)
@example(counts=(10.0, 10), confidence=0.9)
@example(counts=(0.0, 3), confidence=0.9)
def test_an_interval_lies_between_zero_and_one_and_holds_its_value_but_for_rounding(
    counts: tuple[float, int], confidence: float
) -> None:
    interval = wilson(*counts, confidence)
    assert 0.0 <= interval.low < interval.high <= 1.0
    assert interval.low - 1e-12 <= interval.value <= interval.high + 1e-12


@pytest.mark.parametrize(("successes", "n"), [(10, 10), (0, 3)])
def test_an_interval_at_the_edge_holds_its_value_to_the_last_digit(successes: int, n: int) -> None:
    interval = wilson(successes, n, 0.9)
    assert interval.low <= interval.value <= interval.high


@settings(max_examples=60, deadline=None)
@given(counts=_counts(), confidence=_levels)
def test_more_confidence_widens_more_pairs_narrow_and_losses_mirror_wins(
    counts: tuple[float, int], confidence: float
) -> None:
    wins, n = counts
    interval = wilson(wins, n, confidence)
    wider, narrower = wilson(wins, n, 0.9999), wilson(4 * wins, 4 * n, confidence)
    assert wider.low <= interval.low + 1e-12
    assert interval.high <= wider.high + 1e-12
    assert narrower.high - narrower.low < interval.high - interval.low
    mirrored = wilson(n - wins, n, confidence)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_no_pairs_say_nothing_about_the_share() -> None:
    interval = wilson(0, 0)
    assert math.isnan(interval.value)
    assert (interval.low, interval.high, interval.n) == (0.0, 1.0, 0)


def test_a_share_reads_as_a_line_and_as_a_mapping() -> None:
    share = Proportion(0.5, 0.25, 0.75, 4)
    assert str(share) == "0.500 [0.250, 0.750] (n=4)"
    assert share.as_dict() == {
        "value": 0.5, "low": 0.25, "high": 0.75, "n": 4, "clusters": None, "effective": None,
    }  # fmt: skip
    assert str(Proportion(0.5, 0.25, 0.75, 4, 3, 2.5)) == "0.500 [0.250, 0.750] (n=4 in 3 conversations)"
    assert str(Proportion(0.5, 0.25, 0.75, 4, 4, 4.0)) == "0.500 [0.250, 0.750] (n=4)"


@pytest.mark.parametrize(
    ("margins", "value"),
    [
        ([1.0, 0.5, -1.0, -0.5], 0.5),
        ([1.0, 1.0], 1.0),
        ([-1.0], 0.0),
        ([0.0], 0.5),
        ([TIE_NATS, -TIE_NATS], 0.5),
        ([2 * TIE_NATS], 1.0),
        ([-2 * TIE_NATS], 0.0),
        ([1.0, 0.0], 0.75),
        ([math.inf, -math.inf], 0.5),
    ],
)
def test_margins_inside_the_noise_count_as_half_a_win(margins: list[float], value: float) -> None:
    assert tie_aware_accuracy(margins).value == value
    assert tie_aware_accuracy(margins).n == len(margins)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(allow_nan=False), max_size=30))
def test_flipping_every_pair_mirrors_the_accuracy(margins: list[float]) -> None:
    forward, backward = tie_aware_accuracy(margins), tie_aware_accuracy([-m for m in margins])
    if margins:
        assert forward.value + backward.value == pytest.approx(1.0)
    else:
        assert math.isnan(forward.value)


@pytest.mark.parametrize("margins", [[math.nan], [1.0, math.nan]], ids=repr)
def test_a_margin_that_is_no_number_makes_the_accuracy_no_number(margins: list[float]) -> None:
    assert math.isnan(tie_aware_accuracy(margins).value)


@pytest.mark.parametrize(("level", "shown"), [(0.95, "95%"), (0.9, "90%"), (0.995, "99.5%"), (0.999, "99.9%")])
def test_a_level_is_shown_as_it_is(level: float, shown: str) -> None:
    assert percent(level) == shown


def test_the_length_baseline_is_how_often_the_longer_answer_was_chosen() -> None:
    assert pick_the_longer([10, 5, 7], [5, 10, 7]).value == 0.5
    assert pick_the_longer([10, 11], [5, 6]).value == 1.0
    assert pick_the_longer([10], [5], confidence=0.5).low > pick_the_longer([10], [5], confidence=0.99).low
    with pytest.raises(ValueError, match="shorter"):
        pick_the_longer([1, 2], [1])


@pytest.mark.parametrize(
    ("lost", "gained", "significant"),
    [
        (0, 0, False),
        (4, 0, False),
        (5, 0, True),
        (8, 1, True),
        (7, 1, True),
        (6, 1, False),
        (1, 8, False),
        (5, 5, False),
    ],
)
def test_a_paired_fall_is_significant_where_the_binomial_tail_says_so(
    lost: int, gained: int, significant: bool
) -> None:
    # p of 5:0 is 1/32, of 4:0 1/16, of 7:1 9/256, of 6:1 8/128.
    assert significant_fall(lost, gained) is significant


@pytest.mark.parametrize(
    ("lost", "gained", "significant"),
    [(1024, 0, True), (1100, 900, True), (1030, 970, False), (5000, 5000, False), (0, 5000, False)],
)
def test_a_fall_of_a_thousand_tasks_and_more_is_judged(lost: int, gained: int, significant: bool) -> None:
    # From 1,024 discordant pairs on, 2**n is no float.
    assert significant_fall(lost, gained) is significant


@settings(max_examples=40, deadline=None)
@given(lost=st.integers(0, 2500), gained=st.integers(0, 2500))
def test_a_large_fall_is_judged_as_the_normal_approximation_away_from_its_edge(lost: int, gained: int) -> None:
    n = lost + gained
    z = (lost - 0.5 - n / 2) / math.sqrt(n / 4) if n else 0.0
    if n >= 400 and abs(z - 1.645) > 0.05:
        assert significant_fall(lost, gained) is (z > 1.645)


@given(lost=st.integers(0, 30), gained=st.integers(0, 30), confidence=_levels)
def test_a_fall_is_judged_by_the_sum_of_its_tail(lost: int, gained: int, confidence: float) -> None:
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(lost, n + 1)) / 2**n
    assert significant_fall(lost, gained, confidence) is (lost > gained and tail <= 1 - confidence)


@pytest.mark.parametrize(("confidence", "lost"), [(0.5, 1), (0.75, 2), (0.875, 3), (0.9375, 4)])
def test_a_tail_that_is_exactly_the_level_is_significant(confidence: float, lost: int) -> None:
    # P(X >= lost) of lost coins is 2**-lost, to the last digit.
    assert significant_fall(lost, 0, confidence)
    assert not significant_fall(lost - 1, 0, confidence)


@pytest.mark.parametrize(
    ("after", "before", "n", "significant"),
    [(0.0, 0.0, 32, False), (1.0, 0.0, 8, True), (0.25, 0.0, 4, False), (0.5, 0.0, 8, True), (0.5, 0.5, 99, False)],
)
def test_a_rise_of_a_share_needs_enough_answers(after: float, before: float, n: int, significant: bool) -> None:
    assert significant_rise(after, before, n) is significant
    assert significant_rise(math.nan, before, n)


@given(after=st.integers(0, 20), before=st.integers(0, 20))
def test_a_rise_is_one_sided_and_grows_with_the_number_of_answers(after: int, before: int) -> None:
    few, many = (significant_rise(after / 20, before / 20, n) for n in (20, 2000))
    assert not few or after > before
    assert many or not few


def test_a_share_of_any_number_of_answers_has_an_interval() -> None:
    n = 10**200  # Its square is no float.
    interval = wilson(n // 4, n)
    assert (interval.low, interval.high) == pytest.approx((0.25, 0.25))
    assert math.isnan(wilson(math.nan, 10).value)


@pytest.mark.parametrize(
    ("confidence", "least"),
    # The least number of 20 answers, after 2 of 20 before, whose rise is beyond chance: from Newcombe's formula with
    # Wilson intervals whose ends have the one-sided level. Two-sided intervals of that level would ask for more.
    [(0.9, 6), (0.95, 7), (0.975, 8), (0.99, 9)],
)
def test_a_rise_is_held_against_the_one_sided_level_that_was_asked_for(confidence: float, least: int) -> None:
    found = [n for n in range(21) if significant_rise(n / 20, 2 / 20, 20, confidence)]
    assert found == list(range(least, 21))
