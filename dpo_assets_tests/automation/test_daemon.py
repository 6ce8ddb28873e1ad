"""From end to end with real processes: Dagster's daemon, the sensor switched on, a file in the folder, a release.

The workers are forks of a process that has imported their libraries; that a worker starts as an interpreter of its own
is shown by the demo and by the launcher.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import dagster as dg

from benchmarks.soak.__main__ import RECIPE, a_home, recipe, surroundings
from benchmarks.soak.audit import Refreshed, wrong_rows
from benchmarks.soak.inbox import Inbox
from benchmarks.soak.location import NAME
from benchmarks.soak.refreshing import by_daemon
from benchmarks.soak.warm import warm_workers
from dpo_assets.resources.artifacts import ArtifactStore

PATIENCE = 300.0
PAIRS = 90  # 0.6 of them are held out, and 50 conversations are needed.


def test_a_file_dropped_into_the_folder_becomes_a_release_and_nobody_touches_anything() -> None:
    with a_home(None) as home, warm_workers(home) as warm, dg.DagsterInstance.from_config(str(home)) as instance:
        (home / RECIPE).write_text(json.dumps(recipe(home)), encoding="utf-8")
        with by_daemon(home, surroundings(home, warm), instance, PATIENCE) as refreshing:
            inbox = Inbox(home / "inbox", random.Random(0))
            inbox.begin(PAIRS)
            run = refreshing.next_run(lambda run: None)
        done = Refreshed.of(instance, run, ArtifactStore().tree(instance, NAME))
        assert run.is_success, done.red
        assert "new feedback in" in run.tags["dpo_assets/asked_for"]
        assert list(wrong_rows(done, inbox.expected())) == []
        told = done.metadata["published_model"]
        assert (Path(told["release"]) / "model.safetensors").is_file()
        assert told["dry_run"] is True
