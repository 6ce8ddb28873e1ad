"""A code location for tests with real processes: a real pipeline whose assets note when their bodies run.

Environment: RECIPE (JSON file), NOTES (file of lines `run asset begins|ends time`), HOLD (asset whose body waits until
the file HOLD_UNTIL exists).
"""
# No `from __future__ import annotations` here: Dagster reads the annotation of an op's `context` as a class.

import json
import os
import time
from pathlib import Path

from dpo_assets import DpoPipeline
from dpo_assets.assets.node import Node
from dpo_assets.assets.step import Events, Step, guarded
from dpo_assets.recipe import parse_recipe


def note(step: Step, what: str) -> None:
    with open(os.environ["NOTES"], "a", encoding="utf-8") as file:
        file.write(f"{step.context.run_id} {step.node} {what} {time.time()}\n")


def noted(step: Step, body: Events) -> Events:
    note(step, "begins")
    if os.environ.get("HOLD") == step.node:
        while not Path(os.environ["HOLD_UNTIL"]).exists():
            time.sleep(0.1)
    yield from body
    note(step, "ends")


class NotingPipeline(DpoPipeline):
    """Also what holds a body up is inside its turn."""

    def execute(self, step: Step, nodes: tuple[Node, ...]) -> Events:
        yield from guarded(step, nodes[-1].name, noted(step, nodes[-1].body(step)))


recipe = parse_recipe(json.loads(Path(os.environ["RECIPE"]).read_text(encoding="utf-8")))
defs = NotingPipeline("demo", recipe).build_defs()
