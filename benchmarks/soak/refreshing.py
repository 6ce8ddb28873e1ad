"""Who asks for refreshes and executes them: the daemon with a code server, or the sensor's ticks in this process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import dagster as dg

from benchmarks.soak.audit import Measured
from benchmarks.soak.location import NAME
from dpo_assets import DpoPipeline
from dpo_assets.assets.pipeline import Pipeline
from dpo_assets.automation import new_feedback_sensor, refresh_job

REPOSITORY = Path(__file__).resolve().parents[2]  # The benchmarks are in no wheel.
LOCATION = ["-m", "benchmarks.soak.location", "--working-directory", str(REPOSITORY)]
SENSOR, JOB = f"{NAME}_new_feedback", f"{NAME}_refresh"
CONFIG = """\
telemetry: {enabled: false}
run_coordinator:
  module: dagster
  class: QueuedRunCoordinator
  config: {dequeue_interval_seconds: 1}
"""
POLL_SECONDS = 0.5


class Refreshing(Protocol):
    """Waits for refreshes that nobody but the sensor asked for."""

    def next_run(self, under_way: Callable[[dg.DagsterRun], None]) -> dg.DagsterRun:
        """The next run that has come to its end. `under_way` is called again and again while it has not.

        Raises:
            TimeoutError: the sensor asked for none, or it did not end.
        """
        ...

    def measured(self) -> Mapping[str, Measured]:
        """The processes that stay, by name."""
        ...

    @property
    def stays(self) -> set[int]:
        """Process numbers of those."""
        ...


@dataclass
class ByDaemon:
    """Dagster's daemon, whose workspace is one code server, as a deployment has them."""

    instance: dg.DagsterInstance
    processes: Mapping[str, subprocess.Popen[bytes]]
    logs: Path
    patience: float
    seen: set[str] = field(default_factory=set)

    @property
    def stays(self) -> set[int]:
        return {process.pid for process in self.processes.values()}

    def measured(self) -> Mapping[str, Measured]:
        return {name: Measured.of(process.pid) for name, process in self.processes.items()}

    def next_run(self, under_way: Callable[[dg.DagsterRun], None]) -> dg.DagsterRun:
        deadline = time.monotonic() + self.patience
        while time.monotonic() < deadline:
            for process in self.processes.values():
                if process.poll() is not None:
                    raise RuntimeError(_told(self.logs))
            for run in self.instance.get_runs(dg.RunsFilter(job_name=JOB), limit=5):
                if run.run_id in self.seen:
                    continue
                if run.is_finished:
                    self.seen.add(run.run_id)
                    return run
                under_way(run)
            time.sleep(POLL_SECONDS)
        raise TimeoutError(_told(self.logs))


@contextmanager
def by_daemon(
    home: Path, environment: Mapping[str, str], instance: dg.DagsterInstance, patience: float
) -> Iterator[ByDaemon]:
    """Starts code server and daemon, switches the sensor on, and ends both at the end."""
    port = _free_port()
    (home / "workspace.yaml").write_text(
        f"load_from:\n  - grpc_server: {{host: localhost, port: {port}, location_name: soak}}\n", encoding="utf-8"
    )
    logs = home / "logs"
    logs.mkdir()
    processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(name: str, arguments: Sequence[str]) -> None:
        with (logs / f"{name}.log").open("wb") as log:
            processes[name] = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                env=environment,
                cwd=home,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    try:
        start("code server", ["dagster", "api", "grpc", *LOCATION, "--host", "localhost", "--port", str(port)])
        _await_port(port, processes["code server"], patience, logs)
        workspace = ["-w", str(home / "workspace.yaml")]
        subprocess.run(
            [sys.executable, "-m", "dagster", "sensor", "start", *workspace, "--location", "soak", SENSOR],
            env=environment, cwd=home, check=True, stdout=subprocess.DEVNULL, timeout=patience,
        )  # fmt: skip
        start("daemon", ["dagster._daemon", "run", *workspace])
        yield ByDaemon(instance, processes, logs, patience)
    finally:
        for process in processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@dataclass
class InProcess:
    """The sensor's ticks evaluated here, one after the other, and what they ask for executed here.

    Args:
        assets: of the refresh job, those that are executed; empty: all.
    """

    instance: dg.DagsterInstance
    component: DpoPipeline
    assets: Sequence[str] = ()
    cursor: str | None = None

    def __post_init__(self) -> None:
        pipeline: Pipeline = self.component.pipeline
        self._sensor = new_feedback_sensor(pipeline, refresh_job(pipeline))
        self._job = self.component.build_defs().resolve_job_def(JOB)
        self._store = {f"{NAME}_artifacts": self.component.resources["artifacts"]}

    @property
    def stays(self) -> set[int]:
        return set()

    def measured(self) -> Mapping[str, Measured]:
        return {"this process": Measured.of(os.getpid())}

    def ticked(self) -> list[dg.RunRequest]:
        """What one tick asks for."""
        with dg.build_sensor_context(self.instance, self.cursor, resources=self._store) as context:
            answer = self._sensor.evaluate_tick(context)
        self.cursor = answer.cursor
        return list(answer.run_requests or [])

    def next_run(self, under_way: Callable[[dg.DagsterRun], None]) -> dg.DagsterRun:
        requests = self.ticked()
        if len(requests) != 1:
            raise TimeoutError(f"a tick asked for {len(requests)} runs")
        chosen = [self.component.pipeline.key(name) for name in self.assets] or None
        result = self._job.execute_in_process(
            instance=self.instance, asset_selection=chosen, tags=dict(requests[0].tags), raise_on_error=False
        )
        run = self.instance.get_run_by_id(result.run_id)
        assert run is not None
        return run


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def _await_port(port: int, server: subprocess.Popen[bytes], patience: float, logs: Path) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.create_connection(("localhost", port), timeout=1.0).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(_told(logs)) from None
            time.sleep(0.2)


def _told(logs: Path) -> str:
    """The last words of the processes."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace")[-3000:] for path in logs.glob("*.log"))
