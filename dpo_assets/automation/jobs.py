"""The refresh job of a pipeline, and its schedule."""

from __future__ import annotations

import dagster as dg

from dpo_assets.assets.graph import nodes_of
from dpo_assets.assets.pipeline import Pipeline
from dpo_assets.errors import ConfigError


def refresh_name(pipeline: Pipeline) -> str:
    """The name of the refresh job."""
    return f"{pipeline.name}_refresh"


def refresh_job(pipeline: Pipeline) -> dg.UnresolvedAssetJobDefinition:
    """Everything from feedback to release; what is unchanged is reused."""
    # A job with a partitioned asset in it can only be started for a partition, and reading goes on without that one.
    nodes = [node for node in nodes_of(pipeline.recipe) if node.partitions(pipeline.recipe) is None]
    in_process = pipeline.recipe.refresh.executor == "in_process"
    return dg.define_asset_job(
        refresh_name(pipeline),
        selection=dg.AssetSelection.assets(*(pipeline.key(node.name) for node in nodes)),
        description=f"Feedback to release for `{pipeline.name}`. Unchanged inputs are reused, not trained again.",
        executor_def=dg.in_process_executor if in_process else None,
    )


def refresh_schedule(pipeline: Pipeline, job: dg.UnresolvedAssetJobDefinition) -> dg.ScheduleDefinition:
    """The refresh job at the recipe's hours.

    Raises:
        ConfigError: what stands in the recipe is no cron expression.
    """
    refresh = pipeline.recipe.refresh
    try:
        return dg.ScheduleDefinition(
            name=f"{pipeline.name}_schedule",
            job=job,
            cron_schedule=refresh.schedule,
            execution_timezone=refresh.time_zone,
            default_status=dg.DefaultScheduleStatus.STOPPED,
            description=f"Refreshes at fixed hours ({refresh.time_zone}).",
        )
    except dg.DagsterInvalidDefinitionError:
        raise ConfigError(
            f"refresh.schedule: `{refresh.schedule}` is no cron expression (minute, hour, day of the month, month, day "
            "of the week, as in `0 3 * * *`)"
        ) from None
