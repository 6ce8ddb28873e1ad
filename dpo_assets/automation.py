"""Job, schedule and new-feedback sensor of an instance. All stopped until someone starts them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence

import dagster as dg

from dpo_assets.artifact import file_sha256
from dpo_assets.assets.graph import NODES
from dpo_assets.assets.step import Pipeline
from dpo_assets.errors import FeedbackError
from dpo_assets.feedback.sources import FeedbackFile, files_of

SETTLE_SECONDS = 5.0  # A file touched more recently than this may still be written.


def refresh_job(pipeline: Pipeline) -> dg.UnresolvedAssetJobDefinition:
    """Everything from feedback to release; what is unchanged is reused."""
    return dg.define_asset_job(
        f"{pipeline.name}_refresh",
        selection=dg.AssetSelection.assets(*(pipeline.key(node.name) for node in NODES)),
        description=f"Feedback to release for `{pipeline.name}`. Unchanged inputs are reused, not trained again.",
    )


def refresh_schedule(pipeline: Pipeline, job: dg.UnresolvedAssetJobDefinition) -> dg.ScheduleDefinition:
    """The refresh job at the recipe's hours."""
    return dg.ScheduleDefinition(
        name=f"{pipeline.name}_schedule",
        job=job,
        cron_schedule=pipeline.recipe.refresh.schedule,
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="Refreshes at fixed hours.",
    )


def new_feedback_sensor(pipeline: Pipeline, job: dg.UnresolvedAssetJobDefinition) -> dg.SensorDefinition:
    """Requests a refresh when the content of the feedback files changed, once per content."""

    @dg.sensor(
        name=f"{pipeline.name}_new_feedback",
        job=job,
        minimum_interval_seconds=pipeline.recipe.refresh.sensor_interval_seconds,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="Requests a refresh when feedback files have new content.",
    )
    def sense(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        try:
            files = files_of(pipeline.recipe.feedback.sources)
            listing = _listing(files)
        except (FeedbackError, OSError) as error:
            return dg.SkipReason(f"feedback cannot be read: {error}")
        seen = json.loads(context.cursor) if context.cursor else {}
        if seen.get("listing") == listing:
            return dg.SkipReason(f"nothing new in {len(files)} files")
        if any(time.time() - file.path.stat().st_mtime < SETTLE_SECONDS for file in files):
            return dg.SkipReason("a feedback file is still being written")
        digest = _content_digest(files)
        cursor = json.dumps({"listing": listing, "digest": digest})
        requests = [] if seen.get("digest") == digest else [dg.RunRequest(run_key=digest)]
        return dg.SensorResult(run_requests=requests, cursor=cursor)

    return sense


def _listing(files: Sequence[FeedbackFile]) -> list[list[str | int]]:
    """Path, size and time of every file: cheap enough for every tick."""
    return [[str(f.path), f.path.stat().st_size, f.path.stat().st_mtime_ns] for f in files]


def _content_digest(files: Sequence[FeedbackFile]) -> str:
    """Digest of names and contents; a file that was only touched gives the same."""
    rows = [[file.name, file_sha256(file.path)] for file in files]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]
