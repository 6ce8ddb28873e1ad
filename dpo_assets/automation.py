"""Job, schedule and new-feedback sensor of an instance. All stopped until someone starts them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence

import dagster as dg

from dpo_assets.assets.graph import nodes_of
from dpo_assets.assets.pipeline import Pipeline
from dpo_assets.errors import ConfigError, InfrastructureError
from dpo_assets.feedback.sources import FeedbackFile, files_of
from dpo_assets.feedback.sources.finding import glance
from dpo_assets.publishing.secrets import scrub
from dpo_assets.recipe import FeedbackSource, is_url

SETTLE_SECONDS = 5.0  # A file touched more recently than this may still be written.


def refresh_job(pipeline: Pipeline) -> dg.UnresolvedAssetJobDefinition:
    """Everything from feedback to release; what is unchanged is reused."""
    return dg.define_asset_job(
        f"{pipeline.name}_refresh",
        selection=dg.AssetSelection.assets(*(pipeline.key(node.name) for node in nodes_of(pipeline.recipe))),
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
        local, others = _apart(pipeline.recipe.feedback.sources)
        try:
            # What the sources look like from outside: no file is read and nothing is fetched, tick after tick.
            here, elsewhere = glance(local), glance(others)
        except (ConfigError, InfrastructureError, OSError) as error:
            return dg.SkipReason(scrub(f"feedback cannot be read: {error}"))
        seen, listing = json.loads(context.cursor) if context.cursor else {}, here + elsewhere
        if seen.get("listing") == listing:
            return dg.SkipReason(f"nothing new in {len(listing)} files")
        if any(time.time() - int(touched) / 1e9 < SETTLE_SECONDS for _, _, touched in here):
            return dg.SkipReason("a feedback file is still being written")
        digest = _content_digest(files_of(local), elsewhere)
        cursor = json.dumps({"listing": listing, "digest": digest})
        requests = [] if seen.get("digest") == digest else [dg.RunRequest(run_key=digest)]
        return dg.SensorResult(run_requests=requests, cursor=cursor)

    return sense


def _apart(sources: Sequence[FeedbackSource]) -> tuple[list[FeedbackSource], list[FeedbackSource]]:
    """Files on this machine, and what lies elsewhere: URLs, Hub datasets, SQL tables."""
    local = [source for source in sources if source.path is not None and not is_url(source.path)]
    return local, [source for source in sources if source not in local]


def _content_digest(files: Sequence[FeedbackFile], elsewhere: Sequence[Sequence[str | int]]) -> str:
    """Digest of names and contents; a file that was only touched gives the same. What lies elsewhere is not read."""
    rows = [[file.name, file.sha256] for file in files]
    return hashlib.sha256(json.dumps([*rows, *elsewhere]).encode()).hexdigest()[:32]
