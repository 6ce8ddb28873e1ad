"""The promotion benchmark decides as the rules do, and draws what it says it draws."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.promotion import Trickle, history, previewed, steady
from benchmarks.simulated import CORRELATION, DIFFER, Metrics, Pairs, chances, drawn, judged, knowing
from dpo_assets.checks.evidence.measured import Comparison
from dpo_assets.checks.evidence.paired import DRAWN_UP_TO, compare
from dpo_assets.checks.evidence.power import FEWEST_PROMPTS
from dpo_assets.checks.evidence.rules import Evidence, judge
from dpo_assets.checks.evidence.spending import budget_after
from dpo_assets_tests.checks.test_evidence_release import AFTER_FIRST


def compared(metrics: Metrics, metric: int, trial: int) -> Comparison:
    """By the pairs themselves: all that a conversation's sum does not tell are pairs on which both are right."""
    wins: list[tuple[float, float, int]] = []
    for conversation, (doubled, size) in enumerate(zip(metrics.sums[metric, trial], metrics.sizes[trial], strict=True)):
        apart = abs(int(doubled)) // 2
        wins += [(float(doubled > 0), float(doubled < 0), conversation)] * apart + [(1.0, 1.0, conversation)] * (
            int(size) - apart
        )
    challenger, champion, conversations = zip(*wins, strict=True)
    return compare(challenger, champion, conversations, draws=20)


@pytest.mark.parametrize("effect", [0.0, 0.08])
def test_simulated_decisions_are_those_of_the_rules(effect: float) -> None:
    """With guards, above the size whose interval is drawn: below it one end differs by what the draws do."""
    rng, trials = np.random.default_rng(11), 40
    fresh = drawn(rng, Pairs(DRAWN_UP_TO + 1, 1, 3, 0.3), trials, effect)
    known = drawn(rng, Pairs(DRAWN_UP_TO + 1), trials, -0.05)
    found = judged(fresh, np.full(trials, budget_after([]).level), known.of)
    for trial in range(trials):
        evidence = Evidence(
            {str(k): compared(fresh, k, trial) for k in range(2)}, {str(k): compared(known, k, trial) for k in range(2)}
        )
        outcome = judge(evidence, AFTER_FIRST)
        better = min(outcome.adjusted.values()) <= outcome.level
        assert (outcome.decision == "promote") == found.promoted[trial]
        assert (outcome.decision == "hold" and better) == found.held[trial]
    assert (found.promoted.sum() > 5 and found.held.any()) == (effect > 0)


def test_a_simulated_comparison_is_the_paired_one() -> None:
    metrics = drawn(np.random.default_rng(15), Pairs(DRAWN_UP_TO + 1, 1, 4, 0.3), 2, 0.05)
    ours, theirs = metrics.comparison(1, 1), compared(metrics, 1, 1)
    for name in ("difference", "error", "low", "high", "p_better", "n", "clusters"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-3), name


def test_the_second_metric_goes_with_the_first_as_far_as_is_said() -> None:
    sums = drawn(np.random.default_rng(16), Pairs(400), 400).sums
    assert np.corrcoef(sums[0].ravel(), sums[1].ravel())[0, 1] == pytest.approx(CORRELATION, abs=0.01)


@pytest.mark.parametrize("conversations", [50, 100, 400])
def test_known_conversations_seldom_hold_who_is_better_on_fresh_ones_and_as_good_on_them(conversations: int) -> None:
    """Two guards at half a correlation: at 50 conversations 42 % were held, when 5 points as measured held."""
    rng, trials = np.random.default_rng(17), 300
    fresh = drawn(rng, Pairs(400), trials, 0.1)
    levels = np.full(trials, budget_after([]).level)
    assert judged(fresh, levels, knowing(rng, conversations, 0.0)).held.mean() <= 0.15
    assert judged(fresh, levels, knowing(rng, conversations, 0.05)).held.mean() <= 0.05
    assert judged(fresh, levels, knowing(rng, 400, -0.1)).held.mean() >= 0.8


def test_pairs_of_a_conversation_agree_as_far_as_is_said() -> None:
    rng = np.random.default_rng(12)
    for agreement in (0.0, 0.3, 1.0):
        chance = chances(rng, 0.6, agreement, (20_000,))
        assert chance.mean() == pytest.approx(0.6, abs=0.02)
        assert chance.var() == pytest.approx(agreement * 0.6 * 0.4, abs=0.01)


def test_a_challenger_is_better_by_what_is_said() -> None:
    metrics = drawn(np.random.default_rng(13), Pairs(200), 500, 0.1)
    assert metrics.sums.mean(axis=(1, 2)) / 2 == pytest.approx(0.1, abs=0.005)
    assert metrics.differences().mean() == pytest.approx(0.1, abs=0.005)
    assert (metrics.sums != 0).mean() == pytest.approx(DIFFER, abs=0.01)


def test_conversations_that_trickle_in_wait_until_they_are_enough() -> None:
    trickle, rng = Trickle(), np.random.default_rng(14)
    looked = [found.sizes.shape[1] for refresh in range(20) if (found := trickle(rng, 3, refresh)) is not None]
    assert 0 < len(looked) < 20
    assert min(looked) >= FEWEST_PROMPTS


def test_the_budget_holds_where_two_and_a_half_percent_each_do_not() -> None:
    budgeted, unbudgeted, _ = history(steady(Pairs(60, 1, 5, 0.5)), 0, histories=150, refreshes=40)
    assert budgeted.mean() <= 0.08
    assert unbudgeted.mean() >= 0.4


def test_dry_runs_of_policies_that_are_no_better_find_one_where_looks_do_not_share_the_level() -> None:
    once, each = (
        previewed(np.random.default_rng(18), 600, 1, policies=20, shared=shared).mean() for shared in (True, False)
    )
    assert once <= 0.025
    assert each >= 0.1


def test_a_few_conversations_are_very_long_where_that_is_said() -> None:
    pairs = Pairs(400, 1, 3, 0.5, long=0.05)
    sizes = pairs.sizes(np.random.default_rng(19), 200)
    assert (sizes == 30).mean() == pytest.approx(0.05, abs=0.005)
    assert sizes[sizes != 30].max() == 3
    assert sizes.sum(axis=1).mean() == pytest.approx(pairs.expected, rel=0.01)
