"""What a pipeline may change about its checks, and how a check is asked again without making anything."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_assets import build_dpo_defs
from dpo_assets.checks.bands import BETA, LEARNING_RATE, default_bands
from dpo_assets.checks.catalog import CHECKS, VITAL, severity_of
from dpo_assets.checks.verdict import Level, Verdict, with_severity
from dpo_assets.errors import ConfigError
from dpo_assets.recipe import BandOverride
from dpo_assets_tests.pipelines import DATA, instance_after, materialize, trl_feedback, trl_recipe

UP_TO_PLAN = (*DATA, "dpo_plan")
HOT = {"learning_rate": 3e-4, "epochs": 1.0, "batch_size": 16}
RAISED = {"learning_rate_band": {"numbers": {"error_above": 1e-3}, "reason": "a sweep over 6 seeds kept every fact"}}


@pytest.fixture(scope="module")
def feedback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trl_feedback(tmp_path_factory.mktemp("feedback") / "pairs.jsonl", pairs=120)


@pytest.fixture
def with_data(feedback: Path, homes: Path, tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """An instance in which the dataset of the recipe stands; a pipeline may change its checks without another."""
    with instance_after(trl_recipe(feedback), DATA, homes, tmp_path / "with_data") as opened:
        yield opened


def again(recipe: Mapping[str, Any], instance: dg.DagsterInstance, *checks: str) -> dg.ExecuteInProcessResult:
    """Executes checks of `dpo_plan` alone, as the UI's button does."""
    keys = [dg.AssetCheckKey(dg.AssetKey(["demo", "dpo_plan"]), name) for name in checks]
    job = dg.define_asset_job("only_checks", selection=dg.AssetSelection.checks(*keys))
    defs = dg.Definitions.merge(build_dpo_defs("demo", recipe), dg.Definitions(jobs=[job]))
    return defs.resolve_job_def("only_checks").execute_in_process(instance=instance, raise_on_error=False)


@pytest.mark.parametrize(
    ("level", "severity", "expected"),
    [
        ("error", "warn", "warn"), ("error", "error", "error"), ("error", "strict", "error"),
        ("warn", "warn", "warn"), ("warn", "error", "warn"), ("warn", "strict", "error"),
        ("pass", "warn", "pass"), ("pass", "error", "pass"), ("pass", "strict", "pass"),
    ],
)  # fmt: skip
def test_a_severity_caps_or_lifts_a_verdict(level: Level, severity: Any, expected: Level) -> None:
    assert with_severity(Verdict("finite", level, 1.0, "-"), severity).level == expected


def test_without_a_choice_a_check_has_its_own_severity() -> None:
    assert {severity_of(c.name, {}) for c in CHECKS if c.blocking} == {"error"}
    assert {severity_of(c.name, {}) for c in CHECKS if not c.blocking} == {"warn"}


def test_a_severity_for_a_check_that_is_none_is_refused_with_the_names_that_are(feedback: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no check `lenght_bias`; there are: revision_pinned"):
        build_dpo_defs("demo", trl_recipe(feedback) | {"checks": {"severity": {"lenght_bias": "warn"}}})


@pytest.mark.parametrize("name", sorted(VITAL))
def test_a_vital_check_cannot_be_lowered(name: str, feedback: Path) -> None:
    with pytest.raises(ConfigError, match=rf"checks.severity.{name}: this check cannot be lowered"):
        build_dpo_defs("demo", trl_recipe(feedback) | {"checks": {"severity": {name: "warn"}}})


def test_every_vital_name_is_a_check() -> None:
    assert {check.name for check in CHECKS} >= VITAL


@pytest.mark.parametrize(
    ("check", "numbers", "said"),
    [
        ("learning_rate", {"error_above": 1.0}, "no check `learning_rate` has bands"),
        (LEARNING_RATE, {"error": 1.0}, "no number is called error; it has ok_low, reference, ok_high, error_above"),
        ("displacement", {"warm": 1.0}, "no number is called warm; it has warn, error"),
    ],
)
def test_a_band_that_does_not_exist_is_refused(
    check: str, numbers: dict[str, float], said: str, feedback: Path
) -> None:
    changed = {"checks": {"bands": {check: {"numbers": numbers, "reason": "because we say so"}}}}
    with pytest.raises(ConfigError, match=said):
        build_dpo_defs("demo", trl_recipe(feedback) | changed)


def test_a_band_without_a_reason_is_refused(feedback: Path) -> None:
    with pytest.raises(ConfigError, match=r"checks\.bands\.displacement\.reason"):
        build_dpo_defs("demo", trl_recipe(feedback) | {"checks": {"bands": {"displacement": {"numbers": {"warn": 2}}}}})


@given(value=st.floats(1e-9, 1e3), number=st.sampled_from(["ok_low", "ok_high"]))
def test_an_override_changes_its_number_and_no_other(value: float, number: str) -> None:
    before = default_bands()
    override = BandOverride(numbers={number: value}, reason="measured on our own runs")
    for check in (LEARNING_RATE, BETA):
        after = before.with_overrides({check: override})
        assert f"{number} {value:g}" in after.reasons[check]
        assert after.limits == before.limits
    row = before.with_overrides({LEARNING_RATE: override}).learning_rate("lora", 0.1)
    others = {"ok_low", "reference", "ok_high", "error_above"} - {number}
    assert getattr(row, number) == value
    assert all(getattr(row, name) == getattr(before.learning_rate("lora", 0.1), name) for name in others)
    assert default_bands() == before
    assert math.isinf(before.limit("budget").warn)


def test_a_raised_band_lets_a_run_pass_and_shows_its_reason(feedback: Path, with_data: dg.DagsterInstance) -> None:
    recipe = trl_recipe(feedback) | {"dpo": HOT}
    assert not materialize(recipe, with_data, ["dpo_plan"]).success
    result = materialize(recipe | {"checks": {"bands": RAISED}}, with_data, ["dpo_plan"])
    assert result.success
    check = next(c for c in result.get_asset_check_evaluations() if c.check_name == "learning_rate_band")
    assert "a sweep over 6 seeds" in str(check.metadata["band changed"].value)


def test_a_lowered_check_warns_and_lets_downstream_start(feedback: Path, with_data: dg.DagsterInstance) -> None:
    recipe = trl_recipe(feedback) | {"dpo": HOT, "checks": {"severity": {"learning_rate_band": "warn"}}}
    result = materialize(recipe, with_data, UP_TO_PLAN)
    check = next(c for c in result.get_asset_check_evaluations() if c.check_name == "learning_rate_band")
    assert result.success
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)


def test_a_check_is_executed_again_by_itself_with_the_bands_of_now(
    feedback: Path, with_data: dg.DagsterInstance
) -> None:
    recipe = trl_recipe(feedback) | {"dpo": HOT}
    materialize(recipe, with_data, ["dpo_plan"])
    made = with_data.fetch_materializations(dg.AssetKey(["demo", "dpo_plan"]), limit=10).records
    # The rate of the recipe has changed too, and nothing was planned with it: the check stands on what was made.
    changed = recipe | {"checks": {"bands": RAISED}, "dpo": {**HOT, "learning_rate": 9e-3}}
    result = again(changed, with_data, "learning_rate_band", "budget")
    found = {c.check_name: c for c in result.get_asset_check_evaluations()}
    assert result.success
    assert set(found) == {"learning_rate_band", "budget"}
    assert (found["learning_rate_band"].metadata["value"].value, found["learning_rate_band"].severity) == (
        3e-4,
        dg.AssetCheckSeverity.WARN,
    )
    assert with_data.fetch_materializations(dg.AssetKey(["demo", "dpo_plan"]), limit=10).records == made


def test_a_check_of_an_asset_that_was_never_made_says_so(feedback: Path, instance: dg.DagsterInstance) -> None:
    result = again(trl_recipe(feedback), instance, "budget")
    assert not result.success
