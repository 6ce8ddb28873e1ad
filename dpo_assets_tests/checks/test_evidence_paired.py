"""Two models on the same pairs: exact tests against their enumeration, the bootstrap, Holm, power."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.checks.evidence.clusters import Clusters, clustered_share
from dpo_assets.checks.evidence.measured import Comparison
from dpo_assets.checks.evidence.paired import DRAWN_UP_TO, bootstrap_interval, compare, sign_flip_tail
from dpo_assets.checks.evidence.power import (
    FEWEST_PROMPTS,
    chance_error,
    detectable,
    one_sided,
    pairs_needed,
    power_at,
    reach_of,
    reach_of_comparison,
    reach_of_score,
)
from dpo_assets.checks.evidence.slices import SliceScore
from dpo_assets.checks.statistics import Proportion, holm
from dpo_assets.report.scores import parts_table, scores_table
from dpo_assets_tests.samples import champion_scores, evaluation_report

_win = st.sampled_from([0.0, 0.5, 1.0])
_both = st.lists(st.tuples(_win, _win, st.integers(0, 9)), min_size=1, max_size=40)
Both = list[tuple[float, float, int]]


def compared(both: Both) -> Comparison:
    return compare([a for a, _, _ in both], [b for _, b, _ in both], [p for _, _, p in both], draws=200)


def drawn(seed: int, prompts: int, effect: float = 0.0) -> tuple[list[float], list[float], list[int]]:
    """Pairs of 1 to 6 a prompt on which two models differ in 30%."""
    rng = np.random.default_rng(seed)
    names = np.repeat(np.arange(prompts), rng.integers(1, 7, prompts))
    champion, differ = rng.random(len(names)) < 0.6, rng.random(len(names)) < 0.3
    better = rng.random(len(names)) < 0.5 + effect / 0.6
    challenger = np.where(differ, better, champion)
    before = np.where(differ, ~better, champion)
    return challenger.astype(float).tolist(), before.astype(float).tolist(), names.tolist()


@settings(max_examples=80, deadline=None)
@given(sums=st.lists(st.integers(-7, 7), max_size=9))
def test_the_tail_of_sign_flips_is_that_of_all_signs(sums: list[int]) -> None:
    flips = [sum(s * abs(v) for s, v in zip(signs, sums, strict=True)) for signs in signs_of(len(sums))]
    expected = sum(flip >= sum(sums) for flip in flips) / len(flips)
    assert sign_flip_tail(np.array(sums, dtype=np.int64)) == pytest.approx(expected)


def tail_by_counting(sums: list[int]) -> Fraction:
    """The same tail in whole numbers: how many signings reach each sum of the numbers with a plus."""
    ways = Counter({0: 1})
    for size in map(abs, sums):
        reached = Counter(ways)
        for total, count in ways.items():
            reached[total + size] += count
        ways = reached
    observed = sum(one for one in sums if one > 0)
    return Fraction(sum(count for reached, count in ways.items() if reached >= observed), 2 ** len(sums))


@settings(max_examples=60, deadline=None)
@given(sums=st.lists(st.integers(-9, 9), max_size=120))
def test_the_tail_of_many_sign_flips_is_exact_in_every_digit_that_a_float_keeps(sums: list[int]) -> None:
    found = sign_flip_tail(np.array(sums, dtype=np.int64))
    assert found == pytest.approx(float(tail_by_counting(sums)), rel=1e-12)


@pytest.mark.parametrize("most", [1, 5], ids=["one pair a prompt", "up to five"])
def test_twenty_thousand_prompts_are_tested_in_a_second(most: int) -> None:
    rng = np.random.default_rng(7)
    sums = rng.binomial(rng.integers(1, most, 20_000, endpoint=True), 0.5) * rng.choice([-2, -1, 1, 2], 20_000)
    started = time.process_time()
    found = sign_flip_tail(sums)
    assert time.process_time() - started < 1
    z = sums.sum() / math.sqrt(np.square(sums).sum())
    assert found == pytest.approx(1 - NormalDist().cdf(z), abs=0.005)
    assert found + sign_flip_tail(-sums) >= 1


def signs_of(count: int) -> list[tuple[int, ...]]:
    return list(itertools.product((-1, 1), repeat=count))


def test_the_smallest_p_is_one_of_all_signs() -> None:
    assert sign_flip_tail(np.full(60, 3)) == pytest.approx(2.0**-60, rel=1e-9)
    assert sign_flip_tail(np.zeros(5, dtype=np.int64)) == 1.0


@settings(max_examples=60, deadline=None)
@given(both=_both)
def test_a_comparison_turned_round_is_its_mirror(both: Both) -> None:
    found, turned = compared(both), compared([(b, a, p) for a, b, p in both])
    assert turned.difference == pytest.approx(-found.difference)
    assert (turned.p_better, turned.p_worse) == pytest.approx((found.p_worse, found.p_better))
    assert found.p_better + found.p_worse >= 1 - 1e-12
    assert found.discordant == sum(a != b for a, b, _ in both)


@settings(max_examples=60, deadline=None)
@given(both=_both, copies=st.integers(2, 4))
def test_repeated_pairs_of_a_prompt_are_no_further_evidence(both: Both, copies: int) -> None:
    once, repeated = compared(both), compared(both * copies)
    assert repeated.p_better == pytest.approx(once.p_better)
    assert repeated.difference == pytest.approx(once.difference)
    assert (repeated.low, repeated.high) == pytest.approx((once.low, once.high))


def test_a_model_against_itself_differs_in_nothing() -> None:
    wins, _, names = drawn(0, 60)
    found = compare(wins, wins, names)
    assert (found.difference, found.low, found.high, found.error) == (0, 0, 0, 0)
    assert (found.p_better, found.p_worse, found.p_pairs, found.discordant) == (1, 1, 1, 0)


def test_single_pairs_have_the_p_of_mcnemar() -> None:
    challenger = [1.0] * 8 + [0.0] + [1.0] * 20
    champion = [0.0] * 8 + [1.0] + [1.0] * 20
    found = compare(challenger, champion)
    assert found.p_pairs == pytest.approx(10 / 512)  # Of 9 coins: 1 + 9 of 512.
    assert found.p_better == pytest.approx(found.p_pairs)


def test_mcnemar_alone_would_take_agreeing_pairs_for_evidence() -> None:
    prompts = [n // 10 for n in range(60)]
    found = compare([float(p < 5) for p in prompts], [float(p >= 5) for p in prompts], prompts)
    assert found.p_better == pytest.approx(7 / 64)  # Five prompts of six, one tail.
    assert found.p_pairs < 1e-6


def test_many_prompts_of_which_few_differ_are_judged_by_the_few() -> None:
    """450 prompts, 5 of them won and none lost: five coins, which normal theory would call p = 0.013."""
    found = compare([float(n < 5) for n in range(450)], [0.0] * 450)
    assert found.p_better == pytest.approx(2**-5)
    assert found.p_better == pytest.approx(found.p_pairs)


def test_the_interval_of_many_prompts_is_what_the_bootstrap_comes_to() -> None:
    challenger, champion, names = drawn(3, DRAWN_UP_TO + 1, 0.06)
    found = compare(challenger, champion, names)
    drawn_ends = bootstrap_interval(np.array(challenger) - np.array(champion), Clusters.of(names, len(names)))
    assert (found.low, found.high) == pytest.approx(drawn_ends, abs=0.002)


def test_the_bootstrap_draws_prompts_and_draws_the_same_each_time() -> None:
    challenger, champion, names = drawn(5, 120, 0.1)
    found = compare(challenger, champion, names)
    assert found == compare(challenger, champion, names)
    half = 1.98 * found.error
    assert (found.low, found.high) == pytest.approx((found.difference - half, found.difference + half), abs=0.006)
    copies = compare(challenger * 5, champion * 5, names * 5)
    assert copies.high - copies.low == pytest.approx(found.high - found.low)


def test_a_paired_difference_is_covered_as_often_as_is_said() -> None:
    held = 0
    for seed in range(300):
        challenger, champion, names = drawn(1000 + seed, 60, 0.1)
        found = compare(challenger, champion, names, draws=600)
        held += found.low <= 0.1 <= found.high
    assert 0.91 <= held / 300 <= 0.98


def test_what_is_no_number_is_no_evidence() -> None:
    found = compare([1.0, math.nan], [0.0, 1.0])
    assert math.isnan(found.difference)
    assert (found.low, found.high, found.p_better, found.p_worse) == (-1, 1, 1, 1)
    assert compare([], []).p_better == 1


def test_two_sides_are_compared_on_the_same_pairs() -> None:
    with pytest.raises(ValueError, match="2 wins of the challenger, 1 of the champion"):
        compare([1.0, 0.0], [1.0])
    with pytest.raises(ValueError, match=r"1, 0, or 0\.5"):
        compare([0.3, 1.0], [0.0, 0.0])


# ---------------------------------------------------------------------------------------------------------------- Holm


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"only": 0.02}) == {"only": 0.02}
    assert holm({}) == {}


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=6))
def test_holm_never_makes_a_p_smaller_and_keeps_their_order(p_values: dict[str, float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= adjusted[name] <= 1 for name, p in p_values.items())
    assert [adjusted[name] for name in sorted(p_values, key=lambda n: p_values[n])] == sorted(adjusted.values())


# --------------------------------------------------------------------------------------------------------------- power


@pytest.mark.parametrize(
    ("points", "discordant", "pairs"),
    # Paired shares at 80% power and 95%: shared figures of McNemar's formula, whose two errors differ a little.
    [(2, 0.1, 1960), (3, 0.2, 1742), (5, 0.3, 940), (10, 0.2, 155)],
)
def test_the_pairs_that_are_needed_are_those_of_mcnemars_formula(points: int, discordant: float, pairs: int) -> None:
    error = math.sqrt(discordant / 500)
    assert pairs_needed(points / 100, error, 500, 0.025) == pytest.approx(pairs, rel=0.02)


@settings(max_examples=50)
@given(error=st.floats(1e-4, 0.5), level=st.floats(1e-7, 0.2), power=st.floats(0.5, 0.99))
def test_the_least_difference_is_found_with_the_power_it_is_for(error: float, level: float, power: float) -> None:
    assert power_at(detectable(error, level, power), error, level) == pytest.approx(power)


def test_a_smaller_level_and_fewer_effective_pairs_find_less() -> None:
    alike = Proportion(0.6, 0.5, 0.7, 600, 60, 60.0)
    free = Proportion(0.6, 0.5, 0.7, 600, 600, 600.0)
    assert chance_error(alike) == pytest.approx(0.5 / math.sqrt(60))
    assert reach_of_score(alike, 0.025).detectable > reach_of_score(free, 0.025).detectable
    assert reach_of_score(free, 0.0001).power < reach_of_score(free, 0.025).power
    assert reach_of_score(replace(free, effective=0.0), 0.025).power == 0
    assert reach_of_score(replace(free, effective=None, clusters=None), 0.025).prompts == 600


def test_whether_so_few_prompts_can_decide_at_all_is_told() -> None:
    assert not reach_of(0.05, 100, FEWEST_PROMPTS - 1, 0.025).can_pass
    assert reach_of(0.05, 100, FEWEST_PROMPTS, 0.025).can_pass
    assert not reach_of(0.05, 100, FEWEST_PROMPTS, 2.0**-51).can_pass
    assert "49 conversations cannot decide" in str(reach_of(0.05, 100, 49, 0.025))
    told = str(reach_of(0.05, 100, 80, 0.025))
    assert told == (
        "a difference of 14.0 points is found with 80% power at level 0.025; one of 10 points with 52% "
        "(197 pairs would show it)"
    )


@pytest.mark.parametrize("effect", [0.0, -0.1, math.nan])
def test_no_number_of_pairs_shows_what_is_not_there(effect: float) -> None:
    assert pairs_needed(effect, 0.05, 100, 0.025) is None
    assert pairs_needed(0.1, math.inf, 100, 0.025) is None


def test_every_score_stands_beside_its_pairs_and_the_difference_they_show() -> None:
    challenger, champion, names = drawn(5, 120, 0.1)
    paired = compare(challenger, champion, names)
    shown = scores_table(evaluation_report(logp_against_sft=paired)).splitlines()
    assert len(shown) == 2 + 5
    assert "120 in 100 conversations" in shown[2]
    assert f"{detectable(0.05, one_sided(0.95)):.3f}" in shown[2]
    assert f"{paired.n} in 120 conversations" in shown[-1]
    assert f"{reach_of_comparison(paired, 0.025).detectable:.3f}" in shown[-1]
    assert len(scores_table(evaluation_report()).splitlines()) == 2 + 4


def test_both_p_of_a_paired_difference_are_shown_and_where_they_disagree_about_the_level() -> None:
    """Six prompts of ten pairs that agree: by pairs the difference is beyond chance, by prompts it is not."""
    prompts = [n // 10 for n in range(60)]
    apart = compare([float(p < 5) for p in prompts], [float(p >= 5) for p in prompts], prompts)
    shown = scores_table(evaluation_report(logp_against_sft=apart)).splitlines()[-1]
    assert f"{apart.p_better:.2g} ({apart.p_pairs:.2g}; they disagree: prompts are what counts)" in shown
    same = compare([float(n < 50) for n in range(60)], [float(n >= 50) for n in range(60)])
    told = scores_table(evaluation_report(logp_against_sft=same)).splitlines()
    assert "p for better (by pairs, McNemar)" in told[0]
    assert f"| {same.p_better:.2g} ({same.p_pairs:.2g}) |" in told[-1]
    assert all(line.rstrip().endswith("| - |") for line in told[2:-1]), "an accuracy alone has no such test"


def test_the_champion_stands_beside_the_policy_with_the_paired_differences() -> None:
    challenger, champion, names = drawn(5, 120, 0.1)
    paired = compare(challenger, champion, names)
    held = champion_scores(reward_against=paired)
    shown = scores_table(evaluation_report(champion="c" * 64, champion_scores=held)).splitlines()
    assert len(shown) == 2 + 4 + 2 + 2
    assert f"champion, implicit reward against its own start | {held.implicit_reward_accuracy.value:.3f}" in shown[6]
    assert f"policy less champion, implicit reward, paired | {paired.difference:+.3f}" in shown[-2]
    assert f"{reach_of_comparison(paired, 0.025).detectable:.3f}" in shown[-2]
    assert "policy less champion, log-probability per token, paired | +0.020" in shown[-1]


def test_what_is_forgotten_of_a_source_stands_in_the_table_of_parts() -> None:
    challenger, champion, names = drawn(5, 60, -0.2)
    part = SliceScore(
        "source", "tickets|2026.csv", clustered_share(challenger, names), compare(challenger, champion, names),
        clustered_share(champion, names), compare(challenger, champion, names),
    )  # fmt: skip
    shown = parts_table(evaluation_report(slices=(part,))).splitlines()
    assert f"{part.against_sft.difference:+.3f}" in shown[2]
    assert part.against_sft.high < 0
    assert f"{part.reward.n} in 60 conversations" in shown[2]
    assert part.champion is not None
    assert shown[2].count(f"{part.against_sft.difference:+.3f}") == 2, "against the champion too"
    assert f"| {part.champion.value:.3f} " in shown[2]
    assert parts_table(evaluation_report()) == "one source, and one margin or none"
