"""Runs a demo job in a process of its own and draws its progress from the event log, as any watcher could."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dpo_assets.assets.graph import NODES
from dpo_assets.contract import parse_progress
from dpo_assets.errors import DpoAssetsError

TAG = "dpo_assets/demo"
POLL_SECONDS = 0.4
INSTANCE_CONFIG = """\
telemetry:
  enabled: false
nux:
  enabled: false
concurrency:
  pools:
    default_limit: 1
"""


class DemoError(DpoAssetsError):
    """The demo could not be run at all."""


def prepare_home() -> Path:
    """DAGSTER_HOME, made ready: the variable if it is set, `.dagster_home` in the working directory otherwise."""
    home = Path(os.environ.get("DAGSTER_HOME") or Path.cwd() / ".dagster_home").absolute()
    home.mkdir(parents=True, exist_ok=True)
    config = home / "dagster.yaml"
    if not config.exists():
        config.write_text(INSTANCE_CONFIG, encoding="utf-8")
    os.environ["DAGSTER_HOME"] = str(home)
    return home


def run_job(pipeline: str, ops: Mapping[str, Any], home: Path, console: Console) -> tuple[dg.DagsterInstance, str]:
    """Runs `<pipeline>_refresh` to its end; returns the instance and the run's id.

    Raises:
        DemoError: when no run came into being.
    """
    mark = uuid.uuid4().hex
    config = home / "demo_run_config.yaml"
    config.write_text(yaml.safe_dump({"ops": dict(ops)}), encoding="utf-8")
    output = home / "demo_run.log"
    command = [sys.executable, "-m", "dagster", "job", "execute", "-m", "dpo_assets.definitions"]
    command += ["-j", f"{pipeline}_refresh", "-c", str(config), "--tags", json.dumps({TAG: mark})]
    instance = dg.DagsterInstance.get()
    with output.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            _watch(instance, mark, process, console)
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()
    runs = instance.get_runs(filters=dg.RunsFilter(tags={TAG: mark}))
    if not runs:
        tail = "\n".join(output.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
        raise DemoError(f"the run did not start; the end of {output}:\n{tail}")
    return instance, runs[0].run_id


def _watch(instance: dg.DagsterInstance, mark: str, process: subprocess.Popen[bytes], console: Console) -> None:
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        assets = bars.add_task("assets", total=len(NODES), note="")
        stages: dict[str, Any] = {}
        seen: set[str] = set()
        for message in _messages(instance, mark, process):
            if message.startswith("+"):
                seen.add(message[1:])
                bars.update(assets, completed=len(seen), note=f"{len(seen)}/{len(NODES)} {message[1:]}")
            elif progress := parse_progress(message):
                if progress.stage not in stages:
                    stages[progress.stage] = bars.add_task(f"  {progress.stage}", total=progress.total, note="")
                note = f"{progress.done}/{progress.total} {progress.note}"
                bars.update(stages[progress.stage], completed=progress.done, total=progress.total, note=note)


def _messages(instance: dg.DagsterInstance, mark: str, process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Log lines of the run as they come, and `+asset` for each materialisation."""
    position = 0
    ended = False
    while True:
        runs = instance.get_runs(filters=dg.RunsFilter(tags={TAG: mark}), limit=1)
        # From where the last look ended: a run has hundreds of entries and minutes to be looked at.
        entries = instance.logs_after(runs[0].run_id, position - 1) if runs else []
        for entry in entries:
            event = entry.dagster_event
            if event is None:
                yield entry.user_message
            elif event.is_step_materialization and event.asset_key:
                yield "+" + event.asset_key.path[-1]
        position += len(entries)
        if ended:
            return
        ended = process.poll() is not None
        if not ended:
            time.sleep(POLL_SECONDS)
