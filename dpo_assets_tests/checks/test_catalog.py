"""How severe a check is, which names a recipe may give, and what a pipeline's own numbers change."""

from __future__ import annotations

import math

import pytest

from dpo_assets.checks.bands import default_bands
from dpo_assets.checks.catalog import CHECKS, VITAL, severity_of, validate_severities
from dpo_assets.checks.training import reference_is_start
from dpo_assets.checks.verdict import Level, Verdict, with_severity
from dpo_assets.errors import ConfigError
from dpo_assets.recipe import BandOverride, Severity
from dpo_assets_tests.samples import dpo_report


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a_check_has_its_own_severity_until_the_recipe_gives_it_one(check: object) -> None:
    name, blocking = check.name, check.blocking  # type: ignore[attr-defined]
    assert severity_of(name, {}) == ("error" if blocking else "warn")
    assert severity_of(name, {"another": "strict"}) == ("error" if blocking else "warn")
    assert severity_of(name, {name: "strict"}) == "strict"


def test_a_severity_for_no_check_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"there is no check `lenght_bias`; there are: .*length_bias, "):
        validate_severities({"length_bias": "error", "lenght_bias": "warn"})


@pytest.mark.parametrize("name", sorted(VITAL))
def test_a_vital_check_can_be_raised_and_not_lowered(name: str) -> None:
    validate_severities({name: "strict", "length_bias": "warn"})
    with pytest.raises(ConfigError, match=rf"checks\.severity\.{name}: this check cannot be lowered"):
        validate_severities({name: "warn"})


@pytest.mark.parametrize(
    ("severity", "levels"),
    [
        ("warn", {"pass": "pass", "warn": "warn", "error": "warn"}),
        ("error", {"pass": "pass", "warn": "warn", "error": "error"}),
        ("strict", {"pass": "pass", "warn": "error", "error": "error"}),
    ],
)
def test_a_severity_makes_of_each_level_what_it_says(severity: Severity, levels: dict[Level, Level]) -> None:
    for level, expected in levels.items():
        assert with_severity(Verdict("length_bias", level, 1.0, "band", "source"), severity).level == expected


def test_a_pipelines_own_tolerance_decides_about_its_first_loss() -> None:
    report = dpo_report(first_loss=math.log(2) + 4e-3)
    own = BandOverride(numbers={"error": 5e-3}, reason="measured on our card, 3 runs")
    assert reference_is_start(report, default_bands()).level == "error"
    assert reference_is_start(report, default_bands().with_overrides({"reference_is_start": own})).level == "pass"
