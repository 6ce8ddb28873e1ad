"""Stage `tasks`: whether lm-evaluation-harness knows what it will be asked, and has the documents, before training."""

from __future__ import annotations

import contextlib
from pathlib import Path

from dpo_assets.artifact import write_json
from dpo_assets.contract import LOOKED_UP, TasksSpec
from dpo_assets.training.reporting import Reporter
from dpo_assets.training.stages.harness import cannot_run, installed, manager_of


def run(spec: TasksSpec, reporter: Reporter) -> None:
    """Writes `looked_up.json`: the version of lm-eval, and the tasks. Each is made as a run makes it, dataset included.

    Raises:
        ConfigError: lm-eval is not installed, knows a task not, or finds no dataset for one.
    """
    version = installed()
    with contextlib.chdir(spec.include_path or Path.cwd()):
        manager = manager_of(spec)
        try:
            manager.load(list(spec.tasks))
        except Exception as error:  # Whatever a task's own code or the dataset's raises.
            raise cannot_run(spec.tasks, error) from error
    write_json(spec.output_dir / LOOKED_UP, {"lm_eval": version, "tasks": list(spec.tasks)})
    reporter.log(f"tasks: lm-eval {version} has {', '.join(spec.tasks)}")
