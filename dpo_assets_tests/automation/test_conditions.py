"""Schedule, freshness and declarative automation as the recipe says, evaluated by Dagster."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dpo_assets import build_dpo_defs
from dpo_assets.assets.graph import NODES
from dpo_assets.errors import ConfigError
from dpo_assets.recipe import parse_recipe
from dpo_assets_tests.pipelines import demo_recipe, materialize, trl_feedback, trl_recipe


def specs(**refresh: Any) -> dict[str, dg.AssetSpec]:
    defs = build_dpo_defs("demo", demo_recipe(refresh=refresh))
    return {spec.key.path[-1]: spec for spec in defs.resolve_all_asset_specs()}


def schedule(**refresh: Any) -> dg.ScheduleDefinition:
    return build_dpo_defs("demo", demo_recipe(refresh=refresh)).resolve_schedule_def("demo_schedule")


def test_the_schedule_has_the_hours_of_the_recipes_time_zone() -> None:
    made = schedule(schedule="30 4 * * 1-5", time_zone="Europe/Vienna")
    assert (made.cron_schedule, made.execution_timezone) == ("30 4 * * 1-5", "Europe/Vienna")
    assert schedule().execution_timezone == "UTC"


@pytest.mark.parametrize("automation", ["off", "cron"])
@pytest.mark.parametrize("cron", ["", "at three", "61 * * * *", "0 3 * *"])
def test_what_is_no_cron_expression_is_refused_with_its_field(cron: str, automation: str) -> None:
    with pytest.raises(ConfigError, match=r"refresh\.schedule: `.*` is no cron expression"):
        schedule(schedule=cron, automation=automation)


def test_an_asset_may_become_as_old_as_dagster_can_watch_and_no_younger() -> None:
    assert specs(fresh_hours=0.05)["dpo_dataset"].freshness_policy is not None
    with pytest.raises(ConfigError, match=r"refresh\.fresh_hours"):
        specs(fresh_hours=0.04)


@pytest.mark.parametrize("zone", ["Mars/Olympus", "", "../etc/passwd"])
def test_a_time_zone_that_does_not_exist_is_refused(zone: str) -> None:
    with pytest.raises(ConfigError, match=r"refresh\.time_zone: there is no time zone"):
        parse_recipe(demo_recipe(refresh={"time_zone": zone}))


def test_dataset_and_release_have_the_recipes_freshness_and_nothing_else_has() -> None:
    made = specs(fresh_hours=48.0)
    policy = dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=48), warn_window=timedelta(hours=36))
    assert {name: spec.freshness_policy for name, spec in made.items() if spec.freshness_policy is not None} == {
        "dpo_dataset": policy,
        "published_model": policy,
    }
    assert not any(spec.freshness_policy or spec.automation_condition for spec in specs().values())


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral(str(tmp_path)) as opened:
        yield opened


def requested(instance: dg.DagsterInstance, recipe: dict[str, Any], cursor: Any = None) -> tuple[set[str], Any]:
    result = dg.evaluate_automation_conditions(build_dpo_defs("demo", recipe), instance, cursor=cursor)
    names = {node.name for node in NODES if result.get_num_requested(dg.AssetKey(["demo", node.name]))}
    return names, result.cursor


def test_eager_follows_new_content_and_stops_behind_a_red_gate(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    path = trl_feedback(tmp_path / "a.jsonl", pairs=60)
    recipe = trl_recipe(path) | {"refresh": {"automation": "eager"}}
    assert materialize(recipe, instance, ["base_model", "raw_preferences"]).success
    _, cursor = requested(instance, recipe)
    trl_feedback(path, pairs=70)
    assert materialize(recipe, instance, ["raw_preferences"]).success
    names, cursor = requested(instance, recipe, cursor)
    assert {"dpo_dataset", "quarantined_preferences"} <= names
    _, cursor = requested(instance, recipe, cursor)  # What was asked for counts as handled for a tick.
    # The same content once more: a materialisation, and nothing new.
    assert materialize(recipe, instance, ["raw_preferences"]).success
    names, cursor = requested(instance, recipe, cursor)
    assert names == set()
    # Most rows are gone, which the recipe makes a gate of: the content is new, and nothing follows.
    strict = recipe | {"checks": {"severity": {"feedback_volume": "error"}}}
    trl_feedback(path, pairs=20)
    assert not materialize(strict, instance, ["raw_preferences"]).success
    names, _ = requested(instance, strict, cursor)
    assert names == set()
