"""From end to end with real processes: Dagster's daemon, the sensor switched on, a file in the folder, a release."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest

from dpo_assets_tests.pipelines import demo_recipe, trl_feedback

LOCATION = ["-m", "dpo_assets_tests.automation.location"]
PATIENCE = 300.0


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "inbox").mkdir()
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}\n", encoding="utf-8")
    recipe = demo_recipe(
        feedback={
            "sources": [{"path": str(tmp_path / "inbox" / "*.jsonl"), "format": "trl"}],
            "max_length": 64,
            "min_pairs": 10,
            "cleaning": {"near_duplicates": "keep"},
        },
        evaluation={"generations": 0},
        checks={"probe_prompts": 0, "sampled_answers": 0, "held_out_pairs": 4},
        refresh={"sensor_interval_seconds": 30},
    )
    (tmp_path / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    return tmp_path


def until(home: Path, seen: Callable[[dg.DagsterInstance], bool], daemon: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        with dg.DagsterInstance.from_config(str(home)) as instance:
            if seen(instance):
                return
        output = (home / "daemon.log").read_text(encoding="utf-8", errors="replace")[-5000:]
        assert time.monotonic() < deadline, output
        assert daemon.poll() is None, output
        time.sleep(1.0)


def test_a_file_dropped_into_the_folder_becomes_a_release_and_nobody_touches_anything(home: Path) -> None:
    environment = os.environ | {
        "DAGSTER_HOME": str(home),
        "RECIPE": str(home / "recipe.json"),
        "NOTES": str(home / "notes"),
        "HOLD": "",
    }
    start = [sys.executable, "-m", "dagster", "sensor", "start", *LOCATION, "demo_new_feedback"]
    subprocess.run(start, env=environment, check=True, capture_output=True, timeout=PATIENCE)
    with (home / "daemon.log").open("wb") as log:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "dagster._daemon", "run", *LOCATION],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        path = trl_feedback(home / "dropped.jsonl", pairs=60)
        os.utime(path, (1_700_000_000, 1_700_000_000))
        path.rename(home / "inbox" / "dropped.jsonl")
        until(home, lambda instance: any(run.is_finished for run in instance.get_runs()), daemon)
        with dg.DagsterInstance.from_config(str(home)) as instance:
            [run] = instance.get_runs()
            failed = [
                event.dagster_event.message
                for event in instance.all_logs(run.run_id)
                if event.dagster_event is not None and event.dagster_event.is_failure
            ]
            assert run.status == dg.DagsterRunStatus.SUCCESS, failed
            assert "new feedback in" in run.tags["dpo_assets/asked_for"]
            [release] = instance.fetch_materializations(dg.AssetKey(["demo", "published_model"]), limit=2).records
            assert release.asset_materialization is not None
            folder = Path(str(release.asset_materialization.metadata["release"].value))
            assert (folder / "model.safetensors").is_file()
            assert release.asset_materialization.metadata["dry_run"].value is True
    finally:
        os.killpg(daemon.pid, signal.SIGTERM)
        daemon.wait(60)
