"""The promotion benchmark decides as the rules do, and draws what it says it draws."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.promotion import DIFFER, Pairs, Trickle, chances, differences, history, promoted, steady
from dpo_assets.checks.evidence.ledger import Ledger
from dpo_assets.checks.evidence.paired import compare
from dpo_assets.checks.evidence.power import FEWEST_PROMPTS
from dpo_assets.checks.evidence.rules import Evidence, judge
from dpo_assets.checks.evidence.spending import budget_after


@pytest.mark.parametrize("effect", [0.0, 0.08])
def test_simulated_decisions_are_those_of_the_rules(effect: float) -> None:
    rng, pairs = np.random.default_rng(11), Pairs(60, 1, 4, 0.3)
    sums = differences(rng, pairs, 150, effect)
    level = budget_after([]).level
    shortcut = promoted(sums, np.full(150, level))
    for row, found in zip(sums, shortcut, strict=True):
        challenger = [float(one > 0) for one in row for _ in range(abs(one) // 2)]
        names = [prompt for prompt, one in enumerate(row) for _ in range(abs(one) // 2)]
        alike = [prompt for prompt in range(60) if not row[prompt]]  # Prompts on which both are right.
        comparison = compare(
            [*challenger, *(1.0 for _ in alike)], [*(1 - win for win in challenger), *(1.0 for _ in alike)],
            [*names, *alike], draws=20,
        )  # fmt: skip
        outcome = judge(Evidence({"accuracy": comparison}), Ledger())
        assert outcome.found == found
    assert shortcut.any() == (effect > 0) or shortcut.sum() <= 12


def test_pairs_of_a_prompt_agree_as_far_as_is_said() -> None:
    rng = np.random.default_rng(12)
    for agreement in (0.0, 0.3, 1.0):
        chance = chances(rng, 0.6, agreement, (20_000,))
        assert chance.mean() == pytest.approx(0.6, abs=0.02)
        assert chance.var() == pytest.approx(agreement * 0.6 * 0.4, abs=0.01)


def test_a_challenger_is_better_by_what_is_said() -> None:
    sums = differences(np.random.default_rng(13), Pairs(200), 500, 0.1)
    assert sums.mean() / 2 == pytest.approx(0.1, abs=0.005)
    assert (sums != 0).mean() == pytest.approx(DIFFER, abs=0.01)


def test_prompts_that_trickle_in_wait_until_they_are_enough() -> None:
    trickle, rng = Trickle(), np.random.default_rng(14)
    looked = [sums.shape[1] for refresh in range(20) if (sums := trickle(rng, 3, refresh)) is not None]
    assert 0 < len(looked) < 20
    assert min(looked) >= FEWEST_PROMPTS


def test_the_budget_holds_where_two_and_a_half_percent_each_do_not() -> None:
    budgeted, unbudgeted, _ = history(steady(Pairs(60, 1, 5, 0.5)), 0, histories=150, refreshes=40)
    assert budgeted.mean() <= 0.08
    assert unbudgeted.mean() >= 0.4
