"""Scores of pairs that share prompts: what must hold for any pairs, and how often the intervals are right."""

from __future__ import annotations

import math
from statistics import fmean, stdev, variance

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.checks.evidence.clusters import (
    Clusters,
    clustered_mean,
    clustered_ratio,
    clustered_share,
    pick_the_longer,
    t_quantile,
    t_tail,
    tie_aware_accuracy,
)
from dpo_assets.checks.evidence.slices import MOST_SOURCES, parts
from dpo_assets.checks.statistics import wilson
from dpo_assets.training.scoring.divergence import per_token

Pairs = list[tuple[float, int]]
_wins = st.sampled_from([0.0, 0.5, 1.0])
_pairs = st.lists(st.tuples(_wins, st.integers(0, 12)), min_size=1, max_size=60)
_levels = st.sampled_from([0.8, 0.9, 0.95, 0.99])


def split(pairs: Pairs) -> tuple[list[float], list[int]]:
    return [win for win, _ in pairs], [prompt for _, prompt in pairs]


@pytest.mark.parametrize(
    ("probability", "freedom", "value"),
    [(0.975, 5, 2.571), (0.975, 10, 2.228), (0.975, 49, 2.010), (0.995, 10, 3.169), (0.95, 30, 1.697), (0.9, 8, 1.397)],
)
def test_students_quantile_is_that_of_the_tables(probability: float, freedom: int, value: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(value, abs=1e-3)


def test_students_quantile_is_refused_where_its_expansion_fails() -> None:
    with pytest.raises(ValueError, match="needs at least 3"):
        t_quantile(0.975, 2.9)


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    # The tables' quantiles, and the closed form of 3 degrees of freedom; the normal's tail where there are many.
    [
        (2.5706, 5, 0.025), (2.2281, 10, 0.025), (3.1693, 10, 0.005), (0.0, 7, 0.5), (-2.2281, 10, 0.975),
        (2.0, 3, 0.069663), (5.0, 1e6, 2.8665e-7), (math.inf, 4, 0.0),
    ],
)  # fmt: skip
def test_students_tail_is_that_of_the_tables(t: float, freedom: float, p: float) -> None:
    assert t_tail(t, freedom) == pytest.approx(p, rel=2e-4)


@pytest.mark.parametrize("values", [[math.inf, -math.inf] * 4, [1.0] * 7 + [math.inf], [math.nan] * 8], ids=repr)
def test_a_value_that_is_not_finite_has_no_mean_and_no_ratio(values: list[float]) -> None:
    for found in (clustered_mean(values), clustered_ratio(values, [1.0] * 8)):
        assert math.isnan(found.value)
        assert (found.low, found.high, found.p_below, found.p_above) == (None,) * 4
    assert math.isnan(clustered_ratio([], []).value)
    assert math.isnan(clustered_ratio([1.0], [0.0]).value)
    with pytest.raises(ValueError, match="1 sizes for 2 values"):
        clustered_ratio([1.0, 2.0], [1.0])


def test_the_ratio_of_equal_sizes_is_the_mean() -> None:
    values = [float(n % 7) - 2 for n in range(40)]
    ratio, mean = clustered_ratio([3 * v for v in values], [3.0] * 40), clustered_mean(values)
    assert (ratio.value, ratio.low, ratio.p_below) == pytest.approx((mean.value, mean.low, mean.p_below))


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.3, 1.0])
def test_the_interval_of_a_divergence_holds_it_as_often_as_it_says_whatever_the_lengths(noise: float) -> None:
    """32 answers of 3 to 64 tokens at 0.05 nats a token, 1,500 times: a normal interval of the sums alone held all."""
    drawn = np.random.default_rng(1)
    sizes = drawn.choice([3, 5, 8, 64, 64, 64, 20, 30], size=(1500, 32))
    values = 0.05 * sizes + noise * np.sqrt(sizes) * drawn.standard_normal(sizes.shape)
    held = []
    for ratios, lengths in zip(values.tolist(), sizes.tolist(), strict=True):
        one = per_token(list(zip(ratios, lengths, strict=True)))
        assert one.low is not None
        assert one.high is not None
        held.append(one.low <= 0.05 <= one.high)
    assert 0.93 <= fmean(held) <= 0.97


@settings(max_examples=60, deadline=None)
@given(wins=st.lists(_wins, max_size=60), confidence=_levels)
def test_one_pair_a_prompt_has_the_interval_of_independent_pairs(wins: list[float], confidence: float) -> None:
    score, plain = clustered_share(wins, range(len(wins)), confidence), wilson(sum(wins), len(wins), confidence)
    assert (score.low, score.high) == pytest.approx((plain.low, plain.high))
    assert score.value == pytest.approx(plain.value, nan_ok=True)
    assert (score.clusters, score.effective) == (len(wins), len(wins))
    assert clustered_share(wins, None, confidence).effective == len(wins)


@settings(max_examples=80, deadline=None)
@given(pairs=_pairs, copies=st.integers(2, 5), confidence=_levels)
def test_pairs_that_are_repeated_within_their_prompts_narrow_nothing(
    pairs: Pairs, copies: int, confidence: float
) -> None:
    once, repeated = (clustered_share(*split(some), confidence) for some in (pairs, pairs * copies))
    assert repeated.value == pytest.approx(once.value)
    assert repeated.low <= once.low + 1e-9
    assert repeated.high >= once.high - 1e-9
    first, again = (clustered_mean(*split(some), confidence) for some in (pairs, pairs * copies))
    if again.low is not None and first.low is not None:
        assert again.low <= first.low + 1e-9


@settings(max_examples=60, deadline=None)
@given(pairs=_pairs, seed=st.randoms(use_true_random=False))
def test_neither_the_order_of_pairs_nor_the_names_of_prompts_nor_the_side_matter(pairs: Pairs, seed: object) -> None:
    score = clustered_share(*split(pairs))
    moved = list(pairs)
    seed.shuffle(moved)  # type: ignore[attr-defined]
    other = clustered_share([win for win, _ in moved], [f"prompt {name}" for _, name in moved])
    assert (other.low, other.high) == pytest.approx((score.low, score.high))
    assert other.clusters == score.clusters
    mirrored = clustered_share([1 - win for win, _ in pairs], [name for _, name in pairs])
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((score.low, score.high))
    assert 0 <= score.low <= score.value <= score.high <= 1


@settings(max_examples=60, deadline=None)
@given(pairs=_pairs)
def test_the_variance_is_that_of_leaving_out_a_prompt_at_a_time(pairs: Pairs) -> None:
    values, prompts = split(pairs)
    clusters = Clusters.of(prompts, len(prompts))
    names = set(prompts)
    if len(names) < 2:
        assert clusters.variance(np.array(values)) == math.inf
        return
    left = [fmean(v for v, p in pairs if p != name) - fmean(values) for name in names]
    expected = (len(names) - 1) / len(names) * math.fsum(d * d for d in left)
    assert clusters.variance(np.array(values)) == pytest.approx(expected, abs=1e-12)


def test_the_variance_of_components_by_hand() -> None:
    """Prompts (1, 1), (0, 0), (1, 0): squares between 1 and within 1/2, so two thirds of (1/2 - 1/6) / 2, and 1/36."""
    clusters = Clusters.of([1, 1, 2, 2, 3, 3], 6)
    values = np.array([1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    assert clusters.variance_of_components(values) == pytest.approx(12 / 36 * (1 / 2 - 1 / 6) / 2 + 1 / 36)


def test_few_losing_prompts_of_uneven_size_are_covered_as_is_said() -> None:
    """Nine prompts of ten are right with all their pairs: the jackknife alone holds 0.9 in 92% of trials."""
    rng = np.random.default_rng(9)
    held = 0
    for _ in range(1500):
        names = np.repeat(np.arange(50), rng.integers(1, 11, 50))
        score = clustered_share((rng.random(50) < 0.9)[names].astype(float), names)
        held += score.low <= 0.9 <= score.high
    assert held / 1500 >= 0.94


def test_the_variance_of_single_pairs_is_the_usual_one() -> None:
    values = [1.0, 2.5, 4.0, 8.0]
    assert Clusters.of(None, 4).variance(np.array(values)) == pytest.approx(variance(values) / 4)


def test_ten_agreeing_pairs_of_a_prompt_count_as_one() -> None:
    wins = [float(prompt < 36) for prompt in range(60) for _ in range(10)]
    score = clustered_share(wins, [pair // 10 for pair in range(600)])
    once = wilson(36, 60)
    assert (score.n, score.clusters) == (600, 60)
    assert score.effective == pytest.approx(57, rel=0.02)  # A few fewer: it was estimated from 60 prompts.
    assert (score.low, score.high) == pytest.approx((once.low, once.high), abs=0.01)
    assert score.low < 0.5 < wilson(360, 600).low


def test_prompts_without_skill_look_better_than_chance_no_more_often_than_is_said() -> None:
    """60 prompts of 10 agreeing pairs: 26% of them did, where 2.5% is meant."""
    rng = np.random.default_rng(7)
    names, trials = np.repeat(np.arange(60), 10), 1000
    right = rng.random((trials, 60)) < 0.5
    scores = [clustered_share(row[names].astype(float), names) for row in right]
    assert sum(score.low > 0.5 for score in scores) / trials <= 0.04
    assert 0.93 <= sum(score.low <= 0.5 <= score.high for score in scores) / trials <= 0.97


def test_prompts_of_one_to_ten_pairs_that_agree_a_little_are_covered_as_is_said() -> None:
    rng = np.random.default_rng(8)
    trials, shares, means = 800, 0, 0
    for _ in range(trials):
        names = np.repeat(np.arange(60), rng.integers(1, 11, 60))
        wins = rng.random(len(names)) < rng.beta(1.3, 0.7, 60)[names]  # Mean 0.65, agreement 1/3.
        score = clustered_share(wins.astype(float), names)
        shares += score.low <= 0.65 <= score.high
        mean = clustered_mean(rng.normal(1, 1, len(names)) + rng.normal(0, 1, 60)[names], names)
        means += mean.low is not None and mean.high is not None and mean.low <= 1 <= mean.high
    assert 0.93 <= shares / trials <= 0.97
    assert 0.93 <= means / trials <= 0.97


@pytest.mark.parametrize(
    ("wins", "prompts"),
    [([1.0] * 40, [n // 4 for n in range(40)]), ([0.0, 1.0] * 20, [n // 4 for n in range(40)])],
    ids=["no outcome differs", "every prompt has the same share"],
)
def test_pairs_that_say_nothing_of_their_agreement_are_taken_to_agree(wins: list[float], prompts: list[int]) -> None:
    score = clustered_share(wins, prompts)
    assert score.effective is not None
    assert score.effective < 10
    assert score.high - score.low > 0.2


@pytest.mark.parametrize("prompts", [[1] * 40, [n // 14 for n in range(40)], [0] * 31 + list(range(1, 10))])
def test_a_few_large_prompts_bound_nothing(prompts: list[int]) -> None:
    values = [float(n % 3 == 0) for n in range(40)]
    score = clustered_share(values, prompts)
    assert (score.low, score.high, score.effective, score.n) == (0.0, 1.0, 0.0, 40)
    mean = clustered_mean(values, prompts)
    assert (mean.low, mean.high) == (None, None)
    assert mean.value == pytest.approx(fmean(values))


def test_what_is_no_number_bounds_nothing() -> None:
    score = tie_aware_accuracy([1.0, math.nan, 1.0], ["a", "a", "b"])
    assert math.isnan(score.value)
    assert (score.low, score.high, score.n, score.clusters) == (0.0, 1.0, 3, 2)
    assert math.isnan(clustered_share([]).value)
    for values in ([], [1.0, math.inf], [math.nan]):
        assert math.isnan(clustered_mean(values).value)


def test_every_score_takes_prompts() -> None:
    prompts = [n // 5 for n in range(100)]
    margins = [1.0 if n % 10 < 5 else -1.0 for n in range(100)]
    longer = [20 if n % 10 < 5 else 5 for n in range(100)]
    for score in (tie_aware_accuracy(margins, prompts), pick_the_longer(longer, [10] * 100, prompts)):
        assert (score.n, score.clusters) == (100, 20)
        assert score.effective == pytest.approx(20, rel=0.15)


def test_a_prompt_is_asked_for_each_pair() -> None:
    with pytest.raises(ValueError, match="2 prompts for 3 pairs"):
        clustered_share([1.0, 0.0, 1.0], ["a", "b"])


def test_the_mean_of_single_pairs_is_students() -> None:
    values = [float(n) for n in range(30)]
    mean, error = clustered_mean(values), stdev(values) / 30**0.5
    assert mean.value == fmean(values)
    assert mean.low is not None
    assert (mean.value - mean.low) / error == pytest.approx(2.0452, rel=1e-4)
    assert mean.p_below == pytest.approx(1.0, abs=1e-9)
    assert clustered_mean([-v for v in values]).p_below == pytest.approx(mean.p_above, rel=1e-3, abs=1e-12)


# -------------------------------------------------------------------------------------------------------------- slices


@settings(max_examples=80, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(st.sampled_from([f"file {n}" for n in range(20)]), st.none() | st.sampled_from([0.5, 1.0, 2.0, 3.0])),
        max_size=60,
    )
)
def test_every_pair_is_in_one_part_of_each_division(pairs: list[tuple[str, float | None]]) -> None:
    found = parts([source for source, _ in pairs], [margin for _, margin in pairs])
    for by in ("source", "margin"):
        of_it = [part for part in found if part.by == by]
        assert len(of_it) != 1
        assert len(of_it) <= MOST_SOURCES + 1
        assert not of_it or sorted(n for part in of_it for n in part.pairs) == list(range(len(pairs)))
    for part in found:
        if part.by == "margin":
            inside = {pairs[n][1] for n in part.pairs}
            assert not inside & {margin for n, (_, margin) in enumerate(pairs) if n not in part.pairs}


def test_margins_are_divided_into_quartiles_and_small_sources_go_together() -> None:
    margins = [None, *(float(n) for n in range(1, 9))]
    sources = [f"file {n % 3}" for n in range(9)]
    told = {(part.by, part.name): part.pairs for part in parts(sources, margins)}
    assert told["source", "file 1"] == (1, 4, 7)
    assert told["margin", "no margin"] == (0,)
    assert [told["margin", f"quartile {n}"] for n in (1, 2, 3, 4)] == [(1, 2), (3, 4), (5, 6), (7, 8)]
    unrated = [None] * 8
    stepped = [1.0, 2.0, 2.0, 2.0, 3.0, 4.0, 4.0, 5.0]  # Edges at 2, 2.5 and 4: an edge is in the lower part.
    by_rating = [part.pairs for part in parts(["one"] * 16, [*unrated, *stepped]) if part.by == "margin"]
    assert by_rating == [tuple(range(8)), (8, 9, 10, 11), (12, 13, 14), (15,)]
    many = [*(f"file {n}" for n in range(MOST_SOURCES) for _ in range(2)), "small", "smaller"]
    [rest] = [part for part in parts(many, [None] * len(many)) if part.name == "2 other sources"]
    assert rest.pairs == (24, 25)
