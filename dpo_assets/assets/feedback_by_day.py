"""`feedback_by_day`: the files of one day as daily partitions, for sources whose path names the day.

`raw_preferences` reads every day that there is, whether or not its partition was materialised: nothing of what lies in
the sources waits for somebody to launch a partition. A partition is a day by itself: what it held, whether it was read,
and a backfill that reads some days ahead or again. What one of the two read, the other takes up.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path

import dagster as dg

from dpo_assets.artifact import write_json
from dpo_assets.assets.node import Node
from dpo_assets.assets.raw_preferences import read_options
from dpo_assets.assets.step import Events, Step
from dpo_assets.feedback.batches import INDEX
from dpo_assets.feedback.library import read_into
from dpo_assets.feedback.sources import Limits, files_of
from dpo_assets.recipe import Recipe
from dpo_assets.report.tables import table

COUNTED = ("rows", "pairs", "answers", "rejected")


def materialise(step: Step) -> Events:
    """Reads the files of the run's day."""
    day, feedback = step.context.partition_key, step.recipe.feedback
    landing, limits = step.tree.root / "landing", Limits.of(feedback)
    files = files_of(feedback.sources, landing, hub=step.hub.api, limits=limits, day=date.fromisoformat(day))
    read = [read_into(step.tree, file, read_options(step.recipe, step.user_key)) for file in files]
    index = {"day": day, "files": sorted((one.row() for one in read), key=lambda row: row["file"])}

    def make(folder: Path, _: str) -> None:
        write_json(folder / INDEX, index)

    artifact, reused = step.build(NODE.name, index, step.inputs(), make)
    for row in index["files"]:
        if row["unread"]:
            step.context.log.warning(f"{row['file']} was not read: {row['unread']}")
    rows = [[row["file"], *(row[name] for name in COUNTED), row["unread"] or "-"] for row in index["files"]]
    counts = {name: sum(row[name] for row in index["files"]) for name in COUNTED}
    shown = {
        "dagster/partition_row_count": counts["rows"],
        **counts,
        "batches_read_now": sum(one.new for one in read),
        "files": dg.MetadataValue.md(table(["file", *COUNTED, "unread"], rows) if rows else f"no file of {day}"),
    }
    yield from step.result(NODE.name, artifact, reused, metadata=shown)


def days_of(recipe: Recipe) -> dg.DailyPartitionsDefinition | None:
    """The days that are partitions, up to yesterday: today is not over. None: the recipe has none."""
    if (days := recipe.feedback.days) is None:
        return None
    return dg.DailyPartitionsDefinition(start_date=days.start.isoformat(), timezone=days.time_zone)


NODE = Node(
    name="feedback_by_day",
    description="What the dated sources held of each day: a day can be read ahead, or again, by itself.",
    phase="data",
    kinds=frozenset({"parquet"}),
    body=materialise,
    recipe=("feedback",),
    partitions=days_of,
    wanted=lambda recipe: recipe.feedback.days is not None,
)
