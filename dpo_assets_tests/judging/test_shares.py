"""Shares of a judge's comparisons: their intervals, what conversations do to them, and what its errors do."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.judged_shares import Setting
from dpo_assets.checks.evidence.power import FEWEST_PROMPTS
from dpo_assets.checks.statistics import wilson
from dpo_assets.judging.comparing import Comparison, Outcome
from dpo_assets.judging.rates import SCORES, Tally, at_equal_length, share_of
from dpo_assets.judging.shares import Share, _correlation, corrected

CONFIDENCE = 0.95
counts = st.tuples(*[st.integers(0, 30)] * 3).filter(lambda three: sum(three) > 0)


def of(wins: int, ties: int, losses: int, *, first: int = 0, times: int = 1) -> Share:
    """Every comparison in a conversation of its own, or `times` over in it."""
    scores = [1.0] * wins + [0.5] * ties + [0.0] * losses
    names = [n for n in range(first, first + len(scores)) for _ in range(times)]
    return Share.of([score for score in scores for _ in range(times)], names, CONFIDENCE)


def people(right: int, ties: int, wrong: int) -> Share:
    """Pairs of people, of conversations without answers."""
    return of(right, ties, wrong, first=100_000)


def outcomes(*names: Outcome) -> list[Comparison]:
    return [Comparison(name, False, ("", "")) for name in names]


def alone(pairs: list[Comparison]) -> range:
    return range(len(pairs))


# --- as judged --------------------------------------------------------------------------------------------------------


def test_a_share_counts_ties_half_and_leaves_out_what_has_no_verdict() -> None:
    compared = outcomes("win", "win", "tie", "loss", "null")
    found = share_of(compared, alone(compared), CONFIDENCE)
    assert (found.value, found.n, found.ties) == (0.625, 4, 0.25)
    assert Tally.of(compared).asked == 5


@settings(max_examples=40, deadline=None)
@given(wins=st.integers(0, 60), losses=st.integers(0, 60))
def test_without_ties_the_interval_is_wilsons(wins: int, losses: int) -> None:
    found, plain = of(wins, 0, losses).proportion(CONFIDENCE), wilson(wins, wins + losses, CONFIDENCE)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=1e-8)


@settings(max_examples=20, deadline=None)
@given(three=counts)
def test_the_ends_are_where_the_score_test_of_three_outcomes_just_rejects(three: tuple[int, int, int]) -> None:
    """Against the most likely three chances with that mean, found by trying them all."""
    found = of(*three).proportion(CONFIDENCE)
    n, grid = sum(three), np.linspace(0, 1, 20_001)
    for end in (found.low, found.high):
        if end in (0.0, 1.0) or min(end, 1 - end) < 1e-3:
            continue
        ties = grid * 2 * min(end, 1 - end)
        chances = (end - ties / 2, ties, 1 - end - ties / 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            likely = sum(
                np.where(k > 0, k * np.log(np.maximum(c, 0)), 0.0) for k, c in zip(three, chances, strict=True)
            )
        best = ties[int(np.argmax(likely))]
        error = math.sqrt((end * (1 - end) - best / 4) / n)
        assert abs(found.value - end) / error == pytest.approx(1.959964, rel=5e-3)


def test_comparisons_of_one_conversation_that_agree_are_no_more_than_one() -> None:
    once, often = of(30, 10, 20).proportion(CONFIDENCE), of(30, 10, 20, times=5).proportion(CONFIDENCE)
    assert often.n == 5 * once.n
    assert (often.low, often.high) == pytest.approx((once.low, once.high), abs=0.005)


# --- corrected --------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(true=st.floats(0.05, 0.95), agreement=st.floats(0.7, 1.0))
def test_a_judge_that_errs_is_corrected_to_the_true_share(true: float, agreement: float) -> None:
    n = 4_000
    won, right = round((agreement * true + (1 - agreement) * (1 - true)) * n), round(agreement * n)
    found = corrected(of(won, 0, n - won), people(right, 0, n - right), CONFIDENCE)
    assert found.value == pytest.approx(true, abs=2e-3)
    assert found.low <= true <= found.high


def test_a_judge_that_is_known_to_be_right_is_not_corrected() -> None:
    share = of(60, 10, 30)
    found, plain = corrected(share, people(20_000, 0, 0), CONFIDENCE), share.proportion(CONFIDENCE)
    assert found.value == pytest.approx(plain.value)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=2e-3)


@pytest.mark.parametrize(
    "held_against",
    [people(55, 0, 45), people(0, 100, 0), people(20, 0, 80), people(0, 0, 0), people(FEWEST_PROMPTS - 1, 0, 0)],
    ids=["a coin", "ties alone", "against people", "nobody", "few"],
)
def test_a_judge_no_better_than_a_coin_or_hardly_known_says_nothing(held_against: Share) -> None:
    found = corrected(of(60, 0, 40), held_against, CONFIDENCE)
    assert math.isnan(found.value)
    assert (found.low, found.high) == (0.0, 1.0)
    assert not math.isnan(corrected(of(60, 0, 40), people(FEWEST_PROMPTS, 0, 0), CONFIDENCE).value)


@pytest.mark.parametrize("seen", [of(80, 0, 20), of(20, 0, 80)], ids=["larger", "smaller"])
def test_a_share_that_no_true_share_gives_with_that_agreement_is_no_evidence(seen: Share) -> None:
    """It was cut off to 1.000 [1.000, 1.000], the more certain the less the judge agreed with people."""
    found = corrected(seen, people(62, 0, 38), CONFIDENCE)
    assert math.isnan(found.value)
    assert (found.low, found.high) == (0.0, 1.0)
    most = corrected(of(68, 0, 32), people(62, 0, 38), CONFIDENCE)
    assert (most.value, most.high) == (1.0, 1.0), "part of its interval is possible"
    assert most.low < 0.9


def test_shares_of_the_same_conversations_have_a_correlation_of_no_more_than_one() -> None:
    """Rounding made it 1.0000000000000002, of which no interval could be computed."""
    for wins in range(FEWEST_PROMPTS, 80):
        both = of(wins, 3, 10)
        assert -1.0 <= _correlation(both, both) <= 1.0
        assert corrected(both, both, CONFIDENCE).value == 1.0


def test_few_comparisons_are_never_certain() -> None:
    for wins in (0, 16):
        found = corrected(of(wins, 0, 16 - wins), people(95, 0, 5), CONFIDENCE)
        assert found.high - found.low > 0.1
    assert corrected(of(0, 0, 1), people(95, 0, 5), CONFIDENCE).high > 0.5


def test_what_the_conversations_of_both_share_is_counted_once() -> None:
    """Where the judge errs on the same conversations, its share and its agreement move together."""
    scores, names = [1.0] * 80 + [0.0] * 20, list(range(100))
    both = Share.of(scores, names, CONFIDENCE)
    apart = Share.of(scores, [name + 100 for name in names], CONFIDENCE)
    together, other = corrected(both, both, CONFIDENCE), corrected(both, apart, CONFIDENCE)
    assert together.value == other.value == 1.0
    assert together.low > other.low + 0.05


@pytest.mark.parametrize(
    ("setting", "true"),
    [
        (Setting(60, 60, 0.7, ties=0.5), 0.95),
        (Setting(60, 60, 0.8, ties=0.2, turns=5, alike=0.3), 0.5),
        (Setting(100, 60, 0.9), 0.05),
    ],
    ids=["half ties", "turns of one conversation", "near none"],
)
def test_the_corrected_interval_holds_the_true_share_as_often_as_it_says(setting: Setting, true: float) -> None:
    """By `benchmarks/judged_shares.py` between 93 and 97 %; 150 draws are within 4 points of that."""
    rng = np.random.default_rng(5)
    found = [corrected(*setting.draw(rng, true), CONFIDENCE) for _ in range(150)]
    held = [one.low <= true <= one.high for one in found if not math.isnan(one.value)]
    assert len(held) > 100
    assert 0.9 <= np.mean(held) <= 0.995


# --- at equal length --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.lists(st.tuples(st.sampled_from(sorted(SCORES)), st.integers(0, 500), st.integers(0, 500)), max_size=30))
def test_a_share_at_equal_length_is_a_share_whatever_the_lengths(data: list[tuple[Outcome, int, int]]) -> None:
    compared = outcomes(*(name for name, _, _ in data))
    found = at_equal_length(compared, [(a, b) for _, a, b in data], alone(compared), CONFIDENCE)
    assert math.isnan(found.value) if not data else 0.0 <= found.low <= found.value <= found.high <= 1.0


def test_wins_that_go_with_length_are_no_wins_at_equal_length() -> None:
    """A judge that prefers the longer answer in four of five pairs, and a policy that is longer in four of five."""
    wins = outcomes(*["win"] * 32, *["loss"] * 8, *["win"] * 2, *["loss"] * 8)
    longer = [(200, 100)] * 40 + [(100, 200)] * 10
    assert share_of(wins, alone(wins), CONFIDENCE).value == pytest.approx(0.68)
    assert at_equal_length(wins, longer, alone(wins), CONFIDENCE).value == pytest.approx(0.5, abs=0.01)
    alike = at_equal_length(wins, [(100 + n % 2, 101 - n % 2) for n in range(50)], alone(wins), CONFIDENCE)
    assert alike.value == pytest.approx(0.68, abs=0.01)
    assert math.isnan(at_equal_length(outcomes("null"), [(1, 2)], [0], CONFIDENCE).value)


def test_turns_of_one_conversation_do_not_narrow_the_interval_at_equal_length() -> None:
    won, lengths = outcomes(*["win"] * 18, *["loss"] * 12), [(100 + 7 * n % 31, 110) for n in range(30)]
    once = at_equal_length(won, lengths, range(30), CONFIDENCE)
    often = at_equal_length(won * 4, lengths * 4, [*range(30)] * 4, CONFIDENCE)
    assert (often.low, often.high) == pytest.approx((once.low, once.high), abs=0.03)


def test_wins_alone_are_not_certain_at_equal_length() -> None:
    found = at_equal_length(outcomes(*["win"] * 8), [(10, 9)] * 8, range(8), CONFIDENCE)
    assert found.low == pytest.approx(wilson(8, 8).low, abs=0.02)
    assert at_equal_length(outcomes("win", "loss"), [(10, 9)] * 2, range(2), CONFIDENCE).low == 0.0
