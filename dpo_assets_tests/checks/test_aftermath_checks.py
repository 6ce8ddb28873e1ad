"""Checks of what DPO did to the policy: each has reports that pass it, warn and fail it, and none that cheats it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.checks import aftermath
from dpo_assets.checks.aftermath import OLDER, aftermath_verdicts, collapse_verdict, displacement
from dpo_assets.checks.bands import default_bands
from dpo_assets.checks.collapse import SIGNS, CollapseLimits
from dpo_assets.checks.reports import Aftermath
from dpo_assets.checks.statistics import wilson
from dpo_assets_tests.samples import aftermath_report, dpo_report

BANDS = default_bands()
LIMITS = CollapseLimits.of(BANDS, losses=("sigmoid",), beta=0.1)
CHECKS = ("learned", "kl_budget", "generation_health", "capability_retention", "adapter_norm")


def changed(where: str, **changes: Any) -> dict[str, Any]:
    """The report of a good adapter with one part changed; `where` may lead into it with dots."""
    report = copy.deepcopy(aftermath_report())
    part = report
    for name in where.split("."):
        part = part[name]
    part.update(changes)
    return report


def level(check: str, report: dict[str, Any]) -> str:
    [verdict] = [v for v in aftermath_verdicts(Aftermath.model_validate(report), BANDS) if v.check == check]
    assert verdict.band
    assert verdict.source
    assert bool(verdict.fix) == (not verdict.passed)
    return verdict.level


def test_a_good_adapter_passes() -> None:
    assert [v.level for v in aftermath_verdicts(Aftermath.model_validate(aftermath_report()), BANDS)] == ["pass"] * 5


@pytest.mark.parametrize(
    ("right", "pairs", "margin", "expected"),
    [
        (70, 100, 5.0, "pass"), (50, 100, 5.0, "warn"), (55, 100, 5.0, "warn"), (70, 100, -0.1, "warn"),
        (41, 100, -2.0, "warn"), (30, 100, -2.0, "error"), (0, 20, -9.0, "error"), (3, 3, 1.0, "warn"),
        (70, 100, math.nan, "error"),
    ],
)  # fmt: skip
def test_learning_too_little_warns_and_learning_the_opposite_blocks(
    right: int, pairs: int, margin: float, expected: str
) -> None:
    report = changed("held_out", accuracy=wilson(right, pairs).as_dict(), margin_nats=margin)
    assert level("learned", report) == expected


@pytest.mark.parametrize(
    ("value", "low", "expected"),
    [
        (0.15, 0.1, "pass"), (0.16, 0.1, "warn"), (0.5, 0.4, "warn"), (0.51, 0.4, "error"), (0.51, 0.1, "warn"),
        (-0.01, -0.1, "pass"), (math.nan, 0.1, "error"), (math.inf, 0.1, "error"), (math.nan, math.nan, "error"),
    ],
)  # fmt: skip
def test_divergence_blocks_where_its_interval_holds_no_harmless_value(value: float, low: float, expected: str) -> None:
    assert level("kl_budget", changed("answers.kl", per_token=value, low=low)) == expected


def test_divergence_of_a_single_answer_only_warns() -> None:
    report = changed("answers")
    report["answers"]["kl"] = {"per_token": 3.0}
    assert level("kl_budget", report) == "warn"


@pytest.mark.parametrize("share", ["repetition", "no_eos", "empty"])
@pytest.mark.parametrize(
    ("before", "after", "prompts", "expected"),
    [
        (0.0, 0.0, 32, "pass"), (0.0, 0.5, 32, "error"), (0.5, 0.0, 32, "pass"), (1.0, 1.0, 32, "pass"),
        (0.0, 0.0625, 32, "pass"), (0.5, 0.65625, 32, "warn"), (0.02, 0.12, 200, "warn"), (0.0, 0.5, 2, "warn"),
        (0.0, math.nan, 32, "error"),
    ],
)  # fmt: skip
def test_a_rise_blocks_only_beyond_chance(share: str, before: float, after: float, prompts: int, expected: str) -> None:
    report = changed("answers", prompts=prompts)
    report["answers"]["reference"][share], report["answers"]["policy"][share] = before, after
    assert level("generation_health", report) == expected


@pytest.mark.parametrize(
    ("times", "longer", "shorter", "expected"),
    [
        (1.5, 20, 10, "pass"), (1.6, 25, 5, "warn"), (1.6, 17, 13, "pass"), (2.6, 30, 2, "error"),
        (2.6, 17, 13, "pass"), (0.6, 5, 25, "pass"), (0.5, 5, 25, "warn"), (math.nan, 0, 0, "error"),
    ],
)  # fmt: skip
def test_length_is_compared_answer_by_answer(times: float, longer: int, shorter: int, expected: str) -> None:
    report = changed("answers", longer=longer, shorter=shorter)
    report["answers"]["policy"]["mean_tokens"] = 40.0 * times
    assert level("generation_health", report) == expected


@pytest.mark.parametrize(("variety", "expected"), [(0.9, "pass"), (0.46, "pass"), (0.44, "warn"), (math.nan, "warn")])
def test_a_loss_of_variety_warns(variety: float, expected: str) -> None:
    report = changed("answers.policy", distinct_2=variety)
    report["answers"]["reference"]["distinct_2"] = 0.9
    assert level("generation_health", report) == expected


@pytest.mark.parametrize(
    ("policy", "lost", "gained", "expected"),
    [
        (0.60, 0, 0, "pass"), (0.575, 6, 0, "pass"), (0.56, 6, 0, "warn"), (0.49, 30, 8, "error"), (0.49, 9, 5, "warn"),
        (0.70, 0, 10, "pass"), (math.nan, 0, 0, "error"),
    ],
)  # fmt: skip
def test_a_lost_capability_blocks_where_the_paired_test_says_so(
    policy: float, lost: int, gained: int, expected: str
) -> None:
    report = changed("capability", reference=0.6, policy=policy, lost=lost, gained=gained)
    assert level("capability_retention", report) == expected


@pytest.mark.parametrize(
    ("largest", "expected"),
    [(0.05, "pass"), (0.051, "warn"), (0.3, "warn"), (0.31, "error"), (math.nan, "error"), (math.inf, "error")],
)
def test_the_size_of_the_adapter_is_held_against_its_limits(largest: float, expected: str) -> None:
    assert level("adapter_norm", changed("adapter_norm", largest=largest)) == expected


@pytest.mark.parametrize(
    ("ratio", "nats", "expected"),
    [
        (1.4, -0.39, "pass"), (1.51, -0.5, "warn"), (2.1, -1.0, "error"), (2.1, -0.09, "pass"),
        (math.nan, -1.0, "error"), (math.inf, -0.05, "error"), (1.6, math.nan, "warn"),
    ],
)  # fmt: skip
def test_displacement_is_judged_on_held_out_pairs(ratio: float, nats: float, expected: str) -> None:
    report = dpo_report(**changed("held_out", nll_ratio=ratio, chosen_nats_per_token=nats), nll_ratio=1.0)
    assert displacement(report, BANDS).level == expected


def test_without_held_out_pairs_displacement_is_judged_by_the_log() -> None:
    verdict = displacement(dpo_report(nll_ratio=3.0, held_out={"not_measured": "no pairs"}), BANDS)
    assert (verdict.level, verdict.note) == ("error", "training pairs, mean of the last logs")


@pytest.mark.parametrize("part", ["held_out", "answers", "capability", "adapter_norm"])
@pytest.mark.parametrize("old", [True, False])
def test_what_was_not_measured_warns_with_the_reason(part: str, old: bool) -> None:
    report = aftermath_report()
    if old:
        del report[part]
    else:
        report[part] = {"not_measured": "no pairs were held out"}
    verdicts = aftermath_verdicts(Aftermath.model_validate(report), BANDS)
    blind = [v for v in verdicts if str(v.value).startswith("not measured: ")]
    assert blind
    assert {v.level for v in blind} == {"warn"}
    assert all((OLDER if old else "no pairs were held out") in str(v.value) for v in blind)
    assert all(v.fix for v in blind)


def test_the_report_of_an_earlier_version_crashes_nothing() -> None:
    verdicts = [*aftermath_verdicts(Aftermath(), BANDS), collapse_verdict(dpo_report(), [], LIMITS, BANDS)]
    assert [v.check for v in verdicts] == [*CHECKS, "collapse"]
    assert {v.level for v in verdicts} == {"warn"}


# collapse


STOPPED = {
    "rule": "kl", "metric": "probe/kl_per_token", "step": 12, "value": 0.9, "limit": 0.5, "band": "at most 0.5",
    "check": "collapse", "source": "arXiv 2406.02900", "fix": "lower dpo.learning_rate", "kept_step": 6,
    "steps_saved": 48, "of_steps": 60,
}  # fmt: skip
BROKEN = [{"step": n, "probe/kl_per_token": 0.1 * n} for n in range(1, 9)]


def test_a_run_that_was_stopped_fails_with_what_stopped_it() -> None:
    verdict = collapse_verdict(dpo_report(stopped=STOPPED, trigger=STOPPED), [], LIMITS, BANDS)
    assert (verdict.level, verdict.value) == ("error", "probe/kl_per_token 0.9 at step 12 of 60")
    assert (verdict.band, verdict.source, verdict.fix) == ("at most 0.5", "arXiv 2406.02900", "lower dpo.learning_rate")
    assert "step 6" in verdict.note
    assert "48 steps were not run" in verdict.note


def test_a_run_that_went_on_is_judged_by_its_log_and_the_limits_of_now() -> None:
    report = dpo_report(stopped=None, trigger=None)
    assert collapse_verdict(report, BROKEN[:5], LIMITS, BANDS).passed
    verdict = collapse_verdict(report, BROKEN, LIMITS, BANDS)
    assert (verdict.level, verdict.value) == ("error", "probe/kl_per_token 0.6 at step 6")
    assert verdict.fix
    assert collapse_verdict(report, BROKEN, LIMITS.model_copy(update={"kl_per_token": 2.0}), BANDS).passed


@pytest.mark.parametrize("rows", [[], [{"step": 1.0, "loss": 0.69, "grad_norm": 1.0}]], ids=["no log", "loss alone"])
def test_a_log_that_tells_no_sign_of_a_collapse_is_no_sign_of_health(rows: list[dict[str, float]]) -> None:
    verdict = collapse_verdict(dpo_report(stopped=None, trigger=None), rows, LIMITS, BANDS)
    assert (verdict.level, str(verdict.value)[:12]) == ("warn", "not measured")
    assert "likelihood of chosen answers" in str(verdict.value)


def test_signs_that_a_run_did_not_log_are_named() -> None:
    report, row = dpo_report(stopped=None, trigger=None), dict.fromkeys(SIGNS.values(), 0.1)
    assert collapse_verdict(report, [row | {"step": 1.0}], LIMITS, BANDS).note == ""
    verdict = collapse_verdict(report, [{"step": 1.0, "nll_ratio": 1.0, "entropy": 1.0}], LIMITS, BANDS)
    assert verdict.passed
    assert verdict.note.endswith("token accuracy, sampled answers, divergence")


@settings(max_examples=80, deadline=None)
@given(value=st.floats(), name=st.sampled_from(["held_out", "capability", "adapter_norm"]))
def test_no_number_that_is_not_finite_passes(value: float, name: str) -> None:
    key = {"held_out": "margin_nats", "capability": "policy", "adapter_norm": "largest"}[name]
    check = {"held_out": "learned", "capability": "capability_retention", "adapter_norm": "adapter_norm"}[name]
    verdict = getattr(aftermath, check)(Aftermath.model_validate(changed(name, **{key: value})), BANDS)
    assert math.isfinite(value) or not verdict.passed or value == (math.inf if name != "adapter_norm" else None)
