"""The new-feedback sensor of a pipeline: looks, decides (`waiting`), asks for a refresh, and says why or why not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import dagster as dg

from dpo_assets.assets.pipeline import Pipeline
from dpo_assets.assets.raw_preferences import read_options
from dpo_assets.assets.turn import end_lost
from dpo_assets.assets.watched import last_read, look_at, shelf_of
from dpo_assets.automation.alerts import Waiting, note_waiting
from dpo_assets.automation.waiting import Cursor, GpuUse, Outcome, Refresh, Tick
from dpo_assets.feedback.sources import Limits
from dpo_assets.feedback.watching import SETTLE_SECONDS, Content, Look, Shelf, new_pairs
from dpo_assets.publishing.secrets import scrub
from dpo_assets.resources.artifacts import ArtifactStore
from dpo_assets.resources.gpu_time import gpu_runs, gpu_seconds

FEEDBACK, WHY = "dpo_assets/feedback", "dpo_assets/asked_for"  # Tags of a run that the sensor asked for.
RECENT = 25  # Runs of the refresh job that a tick looks at.
OUTCOMES: dict[dg.DagsterRunStatus, Outcome] = {
    dg.DagsterRunStatus.SUCCESS: "succeeded",
    dg.DagsterRunStatus.FAILURE: "failed",
    dg.DagsterRunStatus.CANCELED: "cancelled",
}


def new_feedback_sensor(pipeline: Pipeline, job: dg.UnresolvedAssetJobDefinition) -> dg.SensorDefinition:
    """Asks for a refresh when the feedback sources hold something else than what was read of them last."""
    store_key = pipeline.resource_key("artifacts")

    @dg.sensor(
        name=f"{pipeline.name}_new_feedback",
        job=job,
        minimum_interval_seconds=pipeline.recipe.refresh.sensor_interval_seconds,
        default_status=dg.DefaultSensorStatus.STOPPED,
        required_resource_keys={store_key},
        description="Asks for a refresh when feedback sources have new content.",
    )
    def sense(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        store = getattr(context.resources, store_key)
        assert isinstance(store, ArtifactStore)
        recipe, tree = pipeline.recipe, store.tree(context.instance, pipeline.name)
        end_lost(context.instance, tree)  # Or they would be under way for ever, and use a GPU for as long.
        now, (cursor, damaged) = time.time(), Cursor.of(context.cursor)
        shelf, limits = Shelf.at(shelf_of(tree)), Limits.of(recipe.feedback)
        kept = shelf.model_copy(deep=True)
        looks = look_at(recipe.feedback.sources, shelf, _patience(cursor, now, recipe.refresh.max_wait_hours))

        def count(look: Look, read: Content | None) -> int | None:
            return new_pairs(look, read, shelf, recipe.refresh.min_new_pairs, read_options(recipe), limits)

        answer = Tick(
            now=now,
            cursor=cursor,
            looks=looks,
            read=last_read(context.instance, pipeline.key("raw_preferences")),
            refreshes=list(_refreshes(context.instance, job.name)),
            settings=recipe.refresh,
            count=count,
            gpu=list(_gpu_use(context.instance, pipeline, now)) if recipe.refresh.gpu_hours is not None else (),
        ).answer()
        if shelf != kept:
            shelf.keep(shelf_of(tree))
        waits = answer.waits_since
        note_waiting(tree, Waiting(since=waits, seen=now, reason=scrub(answer.reason)) if waits is not None else None)
        reason = scrub("; ".join(filter(None, (answer.reason, damaged))))
        if not answer.asks:
            return dg.SensorResult(skip_reason=reason, cursor=answer.cursor.model_dump_json())
        context.log.info(reason)
        # A key of this moment: the same feedback may come again, and must then be read again. A request that was
        # launched, of a tick whose cursor was not kept, is found as a run under way.
        request = dg.RunRequest(run_key=f"{answer.key[:16]}-{now:.3f}", tags={FEEDBACK: answer.key, WHY: reason[:200]})
        return dg.SensorResult(run_requests=[request], cursor=answer.cursor.model_dump_json())

    return sense


def _patience(cursor: Cursor | None, now: float, hours: float) -> float:
    """Seconds that a file must have been as it is; none for one that was being written for the longest wait."""
    waits = cursor is not None and cursor.busy_since is not None and now - cursor.busy_since > hours * 3600
    return 0.0 if waits else SETTLE_SECONDS


def _refreshes(instance: dg.DagsterInstance, job_name: str) -> Iterator[Refresh]:
    """The latest runs of the refresh job, newest first."""
    for record in instance.get_run_records(dg.RunsFilter(job_name=job_name), limit=RECENT):
        run = record.dagster_run
        outcome = OUTCOMES.get(run.status, "under way")
        started = record.create_timestamp.timestamp()
        ended = None if outcome == "under way" else (record.end_time or record.update_timestamp.timestamp())
        yield Refresh(run.run_id, outcome, started, ended, run.tags.get(FEEDBACK, ""))


def _gpu_use(instance: dg.DagsterInstance, pipeline: Pipeline, now: float) -> Iterator[GpuUse]:
    """What runs of the pipeline used of GPUs in the period of its budget, whoever started them."""
    since = datetime.fromtimestamp(now, UTC) - timedelta(days=pipeline.recipe.refresh.gpu_days)
    for record in instance.get_run_records(dg.RunsFilter(tags=gpu_runs(pipeline.name), updated_after=since)):
        run = record.dagster_run
        ended = (record.end_time or record.update_timestamp.timestamp()) if run.is_finished else now
        yield GpuUse(ended, gpu_seconds(run.tags, pipeline.name, ended) / 3600)
