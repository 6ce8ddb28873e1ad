"""The new-feedback sensor on a real instance: held against what was read and against the runs that there are."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dpo_assets.assets.pipeline import Pipeline
from dpo_assets.assets.turn import Holder
from dpo_assets.automation import new_feedback_sensor, refresh_job
from dpo_assets.automation.sensor import FEEDBACK
from dpo_assets.recipe import parse_recipe
from dpo_assets.resources.artifacts import ArtifactStore
from dpo_assets.resources.gpu_time import gpu_runs
from dpo_assets_tests.pipelines import materialize, trl_feedback, trl_recipe


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral(str(tmp_path)) as opened:
        yield opened


def tick(instance: dg.DagsterInstance, recipe: dict[str, Any], cursor: str | None = None) -> Any:
    pipeline = Pipeline("demo", parse_recipe(recipe))
    sensor = new_feedback_sensor(pipeline, refresh_job(pipeline))
    with dg.build_sensor_context(instance, cursor, resources={"demo_artifacts": ArtifactStore()}) as context:
        return sensor.evaluate_tick(context)  # As the daemon does: a call would hand resources over as arguments.


def asked(result: Any) -> list[dg.RunRequest]:
    return list(result.run_requests or [])


def said(result: Any) -> str:
    return str(result.skip_message)


def settled(path: Path) -> Path:
    """The file with a time outside the settling window, another one for another size."""
    os.utime(path, (1_700_000_000, 1_700_000_000 + path.stat().st_size))
    return path


def a_run(instance: dg.DagsterInstance, status: dg.DagsterRunStatus, key: str) -> None:
    """A run of the refresh job as Dagster records one: its steps are of no matter to the sensor."""
    instance.create_run_for_job(dg.GraphDefinition("demo_refresh").to_job(), status=status, tags={FEEDBACK: key})


def test_content_that_was_read_is_not_asked_for_and_content_that_came_back_is(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    path = settled(trl_feedback(tmp_path / "a.jsonl", pairs=5))
    recipe = trl_recipe(path)
    first = tick(instance, recipe)
    [request_a] = asked(first)
    assert materialize(recipe, instance, ["raw_preferences"]).success
    # With its cursor, without one, and with one of an earlier version: it has been read.
    for cursor in (first.cursor, None, '{"listing": [], "digest": "x"}'):
        result = tick(instance, recipe, cursor)
        assert not asked(result)
        assert "nothing new in 1 source" in said(result)
    assert "the cursor was damaged" in said(result)

    settled(trl_feedback(path, pairs=6))
    second = tick(instance, recipe, first.cursor)
    [request_b] = asked(second)
    assert materialize(recipe, instance, ["raw_preferences"]).success
    settled(trl_feedback(path, pairs=5))
    third = tick(instance, recipe, second.cursor)
    [again_a] = asked(third)
    # Dagster starts one run for each key: the third needs one of its own.
    assert len({request_a.run_key, request_b.run_key, again_a.run_key}) == 3
    assert request_a.tags[FEEDBACK] == again_a.tags[FEEDBACK]
    assert "new feedback" in again_a.tags["dpo_assets/asked_for"]


def test_runs_of_the_instance_decide_what_a_tick_asks_for(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    recipe = trl_recipe(settled(trl_feedback(tmp_path / "a.jsonl", pairs=5)))
    first = tick(instance, recipe)
    key = asked(first)[0].tags[FEEDBACK]
    a_run(instance, dg.DagsterRunStatus.STARTED, "")
    under_way = tick(instance, recipe, first.cursor)
    assert not asked(under_way)
    assert "is under way" in said(under_way)
    for run in instance.get_runs():
        instance.report_run_canceled(run)
    assert asked(tick(instance, recipe, first.cursor)), "what somebody else cancelled was not this feedback's refresh"
    a_run(instance, dg.DagsterRunStatus.FAILURE, key)
    assert "failed; it is asked for again at" in said(tick(instance, recipe, first.cursor))
    a_run(instance, dg.DagsterRunStatus.CANCELED, key)
    assert "was cancelled" in said(tick(instance, recipe, first.cursor))


def test_new_pairs_are_counted_from_what_was_read(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    path = settled(trl_feedback(tmp_path / "a.jsonl", pairs=5))
    recipe = trl_recipe(path) | {"refresh": {"min_new_pairs": 4}}
    assert asked(tick(instance, recipe))
    assert materialize(recipe, instance, ["raw_preferences"]).success
    settled(trl_feedback(path, pairs=8))
    few = tick(instance, recipe)
    assert not asked(few)
    assert "3 new pairs in" in said(few)
    settled(trl_feedback(path, pairs=9))
    assert asked(tick(instance, recipe, few.cursor))


def test_missing_feedback_is_a_skip_with_the_reason_and_others_go_on(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    recipe = trl_recipe(tmp_path / "none.jsonl")
    result = tick(instance, recipe)
    assert not asked(result)
    assert "matches no file" in said(result)
    there = settled(trl_feedback(tmp_path / "a.jsonl", pairs=5))
    recipe["feedback"]["sources"].append({"path": str(there), "format": "trl"})
    assert asked(tick(instance, recipe, result.cursor))


def test_runs_that_spent_the_gpu_budget_hold_new_feedback(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    recipe = trl_recipe(settled(trl_feedback(tmp_path / "a.jsonl", pairs=5)))
    recipe["refresh"] = {"gpu_hours": 2.0, "gpu_days": 1.0}
    job = dg.GraphDefinition("by_hand").to_job()

    def used(pipeline: str, seconds: float, status: dg.DagsterRunStatus) -> None:
        tags = {**gpu_runs(pipeline), f"dpo_assets/gpu_seconds.{pipeline}__dpo_adapter": f"{seconds:.1f}"}
        instance.create_run_for_job(job, status=status, tags=tags)

    used("another", 9e6, dg.DagsterRunStatus.SUCCESS)
    both = gpu_runs("demo") | gpu_runs("another") | {"dpo_assets/gpu_seconds.another__dpo_adapter": "9000000.0"}
    instance.create_run_for_job(job, status=dg.DagsterRunStatus.SUCCESS, tags=both)
    used("demo", 3600, dg.DagsterRunStatus.FAILURE)
    half = tick(instance, recipe)
    [request] = asked(half)
    assert "1.00 of 2 GPU hours of the last 1 days are spent, 1.00 are left" in request.tags["dpo_assets/asked_for"]
    used("demo", 3601, dg.DagsterRunStatus.STARTED)  # By hand, and under way.
    spent = tick(instance, recipe, half.cursor)
    assert not asked(spent)
    assert "feedback waits: no refresh before" in said(spent)
    assert asked(tick(instance, recipe | {"refresh": {"gpu_hours": 2.1, "gpu_days": 1.0}}, half.cursor))


def test_a_refresh_whose_process_is_gone_has_failed_and_its_gpu_time_ends(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    """As after a reboot: nobody is left to say so, and the next run's turn would overwrite its last trace."""
    recipe = trl_recipe(settled(trl_feedback(tmp_path / "a.jsonl", pairs=5)))
    recipe["refresh"] = {"gpu_hours": 9.0, "gpu_days": 1.0}
    first = tick(instance, recipe)
    tags = {
        FEEDBACK: asked(first)[0].tags[FEEDBACK],
        **gpu_runs("demo"),
        "dpo_assets/gpu_seconds.demo__dpo_adapter": f"0.0 and since {time.time() - 3600:.1f}",
    }
    job = dg.GraphDefinition("demo_refresh").to_job()
    lost = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED, tags=tags)
    note = ArtifactStore().tree(instance, "demo").root / "turn.json"
    mine = Holder.of_this_process(lost.run_id, "", 0)
    note.write_text(mine.model_dump_json(), encoding="utf-8")
    assert "is under way" in said(tick(instance, recipe, first.cursor))
    note.write_text(mine.model_copy(update={"born": 1.0}).model_dump_json(), encoding="utf-8")
    failed = tick(instance, recipe, first.cursor)
    assert f"refresh {lost.run_id} failed" in said(failed)
    assert "1.00 of 9 GPU hours" in said(failed)
    note.unlink()
    later = tick(instance, recipe, first.cursor)
    assert f"refresh {lost.run_id} failed" in said(later)
    assert "1.00 of 9 GPU hours" in said(later)
