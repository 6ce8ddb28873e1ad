"""The rules that stop a DPO run: each fires on its own sign, none on what healthy runs show."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.checks.bands import default_bands
from dpo_assets.checks.collapse import JUDGED, CollapseLimits, Trigger, first_trigger, healthy, trigger_at
from dpo_assets.recipe import BandOverride

LIMITS = CollapseLimits.of(default_bands(), losses=("sigmoid",), beta=0.1)
LOW_BETA = CollapseLimits.of(default_bands(), losses=("sigmoid",), beta=0.01)
Rows = list[dict[str, float]]
WELL = {"nll_ratio": 1.0, "chosen_nats_per_token": 0.0, "mean_token_accuracy": 0.6, "entropy": 1.2, "loss": 0.6}
PROBED = {
    "probe/answers": 16, "probe/repetition": 0.0, "probe/reference_repetition": 0.0,
    "probe/no_eos": 0.1, "probe/reference_no_eos": 0.1, "probe/kl_per_token": 0.02,
}  # fmt: skip


def run(steps: int = 20, since: int = 8, **changes: float) -> Rows:
    """A run that is well, and from step `since` on has other values."""
    return [{"step": n, **WELL, **(changes if n >= since else {})} for n in range(1, steps + 1)]


def fired(rows: Rows, limits: CollapseLimits = LIMITS) -> Trigger:
    found = first_trigger(rows, limits)
    assert found is not None
    return found


def test_a_run_that_is_well_goes_on() -> None:
    assert first_trigger(run(), LIMITS) is None
    assert first_trigger([], LIMITS) is None
    assert healthy([], LIMITS)
    assert healthy(run(), LIMITS)


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("likelihood", {"nll_ratio": 2.1, "chosen_nats_per_token": -0.4}),
        ("token_accuracy", {"mean_token_accuracy": 0.49, "nll_ratio": 1.2}),
        ("chosen_nats", {"chosen_nats_per_token": -0.6, "mean_token_accuracy": 0.54, "nll_ratio": 1.3}),
        ("entropy", {"entropy": 4.0, "chosen_nats_per_token": -0.3, "nll_ratio": 1.3}),
        ("entropy", {"entropy": 0.2, "chosen_nats_per_token": -0.3, "nll_ratio": 1.3}),
        ("repetition", PROBED | {"probe/repetition": 0.5}),
        ("no_eos", PROBED | {"probe/no_eos": 0.7}),
        ("kl", PROBED | {"probe/kl_per_token": 0.51}),
        ("capability", {"probe/tasks": 16, "probe/tasks_lost": 6, "probe/tasks_gained": 0, "probe/capability": 0.4}),
    ],
)
def test_each_rule_fires_on_its_sign_and_says_where(rule: str, changes: dict[str, float]) -> None:
    found = fired(run(**changes))
    assert found.rule == rule
    assert 8 <= found.step <= 13
    assert found.metric in changes
    assert math.isfinite(found.limit)
    assert found.band
    assert not healthy(run(steps=found.step, **changes), LIMITS)


@pytest.mark.parametrize(
    "changes",
    [
        # NeuralHermes: accuracy 1, loss near 0 before step 50, and a better model for it.
        {"rewards/accuracies": 1.0, "loss": 1e-4, "rewards/margins": 9.0, "grad_norm": 40.0},
        # zephyr-7b-dpo-full ended with chosen rewards of -1.05 at beta 0.01: 105 nats an answer, ratio 1.40.
        {"rewards/chosen": -1.05, "nll_ratio": 1.4, "chosen_nats_per_token": -0.39},
        {"entropy": 0.1},
        {"entropy": 9.0},
        {"chosen_nats_per_token": -0.9, "nll_ratio": 1.45},
        # Other pairs in the batch: accuracy falls, and the reference's likelihood falls with it.
        {"mean_token_accuracy": 0.3},
        # A model sure of its answers: 0.09 nats a token, of which it lost 0.09.
        {"nll_ratio": 2.0, "chosen_nats_per_token": -0.09},
        PROBED | {"probe/answers": 4, "probe/repetition": 0.25},
        PROBED | {"probe/no_eos": 0.9, "probe/reference_no_eos": 0.9},
        {"probe/tasks": 16, "probe/tasks_lost": 3, "probe/tasks_gained": 1, "probe/capability": 0.4},
    ],
)
def test_nothing_that_healthy_runs_show_stops_a_run(changes: dict[str, float]) -> None:
    assert first_trigger(run(**changes), LIMITS) is None


def test_one_bad_log_is_not_a_run() -> None:
    rows = run()
    rows[12] |= {"nll_ratio": 4.0, "chosen_nats_per_token": -1.5, "mean_token_accuracy": 0.3}
    assert first_trigger(rows, LIMITS) is None
    assert not healthy(rows[:13], LIMITS)


def test_the_rules_over_logs_wait_for_the_warm_up() -> None:
    bad = run(since=1, nll_ratio=3.0, chosen_nats_per_token=-2.0)
    assert fired(bad).step == LIMITS.window + 1
    assert fired(bad, LIMITS.model_copy(update={"warmup_steps": 10})).step == 11


def test_a_ratio_that_is_a_sign_stops_no_run_and_is_not_kept() -> None:
    """With 40% of the labels wrong, chosen answers of the other style do become unlikely, in a run that is well."""
    rows = run(steps=60, since=1, nll_ratio=1.6, chosen_nats_per_token=-0.4)
    assert first_trigger(rows, LIMITS) is None
    assert not healthy(rows, LIMITS)


@pytest.mark.parametrize(
    "sign",
    [
        {"probe/kl_per_token": LIMITS.kl_per_token_sign + 0.01},
        {"probe/repetition": LIMITS.answers_rise + 0.01},
        {"probe/no_eos": 0.1 + LIMITS.answers_rise + 0.01},
        {"mean_token_accuracy": WELL["mean_token_accuracy"] - LIMITS.accuracy_fall_sign - 0.01},
        {"entropy": WELL["entropy"] * (LIMITS.entropy_high + 0.1)},
        {"entropy": WELL["entropy"] * (LIMITS.entropy_low - 0.1)},
        {"nll_ratio": LIMITS.nll_ratio_sign + 0.01, "chosen_nats_per_token": -LIMITS.least_fall - 0.01},
    ],
    ids=str,
)
def test_each_sign_by_itself_stops_no_run_and_makes_its_state_none_to_keep(sign: dict[str, float]) -> None:
    rows = run(steps=60, **PROBED | {"probe/answers": 4})
    assert healthy(rows, LIMITS)
    rows = run(steps=60, **PROBED | {"probe/answers": 4} | sign)
    assert first_trigger(rows, LIMITS) is None
    assert not healthy(rows, LIMITS)


def test_a_log_without_the_ratio_is_no_sign_of_a_lost_likelihood() -> None:
    rows = [{"step": n, "loss": 0.6, "chosen_nats_per_token": -0.4} for n in range(1, 21)]
    assert healthy(rows, LIMITS)


def test_a_weak_beta_lets_the_policy_go_further() -> None:
    # Weak by the fact of its loss, as for the advice of a stop: 0.049 for sigmoid, and not 0.001 for sppo_hard.
    def ratio(loss: str, beta: float) -> float:
        return CollapseLimits.of(default_bands(), losses=("sft", loss), beta=beta).nll_ratio

    assert (ratio("sigmoid", 0.05), ratio("sigmoid", 0.049), ratio("sppo_hard", 0.001)) == (2.0, 2.5, 2.0)
    rows = run(since=1, nll_ratio=2.2, chosen_nats_per_token=-0.8)
    assert fired(rows).rule == "likelihood"
    assert first_trigger(rows, LOW_BETA) is None
    assert fired(run(since=1, nll_ratio=2.6, chosen_nats_per_token=-0.8), LOW_BETA).rule == "likelihood"


def test_a_pipelines_own_number_decides() -> None:
    own = default_bands().with_overrides(
        {"collapse": BandOverride(numbers={"kl_per_token": 2.0}, reason="a new language is taught")}
    )
    rows = run(**PROBED | {"probe/kl_per_token": 1.0})
    assert fired(rows).rule == "kl"
    assert first_trigger(rows, CollapseLimits.of(own, losses=("sigmoid",), beta=0.1)) is None


@pytest.mark.parametrize("name", JUDGED)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_passes(name: str, value: float) -> None:
    rows = run(**PROBED | {"probe/capability": 0.5}, since=2)
    rows[1][name] = value
    assert (fired(rows).rule, fired(rows).metric, fired(rows).step) == ("finite", name, 2)
    assert not healthy(rows[:2], LIMITS)


VALUES = st.fixed_dictionaries(
    {},
    optional={
        "nll_ratio": st.floats(0.5, 4), "chosen_nats_per_token": st.floats(-3, 1), "entropy": st.floats(0, 6),
        "mean_token_accuracy": st.floats(0, 1), "probe/kl_per_token": st.floats(-1, 2),
    },
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(values=st.lists(VALUES, max_size=25))
def test_the_first_trigger_is_the_first_row_that_triggers_whatever_keys_are_logged(values: list[Any]) -> None:
    rows = [{"step": n, **row} for n, row in enumerate(values, start=1)]
    each = [trigger_at(rows[:n], LIMITS) for n in range(1, len(rows) + 1)]
    assert first_trigger(rows, LIMITS) == next((found for found in each if found), None)
    assert not any(found and healthy(rows[: n + 1], LIMITS) for n, found in enumerate(each))
