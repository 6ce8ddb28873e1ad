"""The code location of the soak: one pipeline, whose sensor looks as often as the daemon asks it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import dagster as dg

from dpo_assets import DpoPipeline, LocalLauncher
from dpo_assets.assets.pipeline import Pipeline
from dpo_assets.automation import new_feedback_sensor
from dpo_assets.automation.jobs import refresh_name
from dpo_assets.recipe import parse_recipe

NAME = "soak"
INTERVAL_SECONDS = 2  # Less than a recipe may say: 30 seconds before each of 200 refreshes would show nothing.


def pipeline(path: Path, python: str) -> DpoPipeline:
    """The pipeline of a recipe. `python`: interpreter of its workers."""
    recipe = parse_recipe(json.loads(path.read_text(encoding="utf-8")))
    return DpoPipeline(NAME, recipe, {"launcher": LocalLauncher(python=python)})


def impatient(component: DpoPipeline) -> dg.Definitions:
    """The definitions of a pipeline, with its sensor at another interval."""
    defs, recipe = component.build_defs(), component.pipeline.recipe
    often = recipe.refresh.model_copy(update={"sensor_interval_seconds": INTERVAL_SECONDS})
    watched = Pipeline(NAME, recipe.model_copy(update={"refresh": often}))
    job: Any = next(job for job in defs.jobs or () if job.name == refresh_name(watched))
    return dg.Definitions(
        assets=defs.assets,
        jobs=defs.jobs,
        schedules=defs.schedules,
        sensors=[new_feedback_sensor(watched, job)],
        resources=defs.resources,
    )


if "SOAK_RECIPE" in os.environ:
    defs = impatient(pipeline(Path(os.environ["SOAK_RECIPE"]), os.environ["SOAK_PYTHON"]))
