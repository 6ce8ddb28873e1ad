"""Starts a worker stage and stays with it: its log lines reach the run live, and it never outlives the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path

import dagster as dg
from pydantic import Field

from dpo_assets.contract import EXPLAINED_EXIT, FAILURE_FILE, Failure, PlannedSpec, Spec, Stage
from dpo_assets.errors import ConfigError, DpoAssetsError, GateError, InfrastructureError, OutOfMemory
from dpo_assets.publishing.secrets import SECRET_VARIABLES, scrub

TAIL_LINES = 30


class WorkerDied(InfrastructureError):
    """The worker ended without explaining itself: killed, or a crash."""


class TrainingLauncher(dg.ConfigurableResource, ABC):  # type: ignore[type-arg]
    """Runs `python -m dpo_assets.training <stage>` somewhere. Assets know this class only."""

    @abstractmethod
    def run(self, context: dg.AssetExecutionContext, stage: Stage, spec: Spec, timeout_seconds: float) -> None:
        """Returns when the stage has sealed its artefact.

        Raises:
            GateError: a check stopped the stage.
            ConfigError: the stage cannot work as configured.
            OutOfMemory: the device has too little memory for the stage's forwards.
            WorkerDied: anything else.
        """


class LocalLauncher(TrainingLauncher):
    """A subprocess of this machine, in a process group of its own, connected by Dagster Pipes."""

    python: str = Field(default=sys.executable, description="Interpreter of the worker; it may be another environment.")
    grace_seconds: float = Field(default=10.0, ge=0.0, description="Time between SIGTERM and SIGKILL.")

    def run(self, context: dg.AssetExecutionContext, stage: Stage, spec: Spec, timeout_seconds: float) -> None:
        with tempfile.TemporaryDirectory(prefix="dpo-assets-") as scratch:
            work = Path(scratch)
            (work / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
            log = work / "worker.log"
            status = self._run_to_end(context, stage, spec, work, log, timeout_seconds)
            output = scrub(log.read_text(encoding="utf-8", errors="replace"))
            print(output)  # noqa: T201 - the step's standard output is what Dagster keeps as its compute log
            if status == 0:
                return
            if status == EXPLAINED_EXIT and (work / FAILURE_FILE).is_file():
                raise _as_error(Failure.model_validate_json((work / FAILURE_FILE).read_bytes()))
            raise WorkerDied(_describe(stage, status, output))

    def _run_to_end(
        self, context: dg.AssetExecutionContext, stage: Stage, spec: Spec, work: Path, log: Path, timeout_seconds: float
    ) -> int:
        command = [
            self.python,
            "-m",
            "dpo_assets.training",
            stage,
            "--spec",
            str(work / "spec.json"),
            "--follow-parent",
        ]
        with (
            dg.open_pipes_session(
                context=context,
                context_injector=dg.PipesEnvContextInjector(),
                message_reader=dg.PipesTempFileMessageReader(),
            ) as session,
            log.open("wb") as output,
        ):
            process = subprocess.Popen(
                command,
                # Its temporary files lie in this run's scratch folder, so they go also when it is killed.
                env={**_worker_environment(spec), "TMPDIR": str(work), **session.get_bootstrap_env_vars()},
                # Held open as long as this process lives: its end tells the worker that the run is gone.
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            context.log.info(f"started worker stage `{stage}`, process group {process.pid}")
            try:
                return _wait(process, stage, timeout_seconds)
            finally:
                self._end_group(process)

    def _end_group(self, process: subprocess.Popen[bytes]) -> None:
        """Ends whatever is left of the worker's process group, its children included."""
        for sign, patience in (
            (signal.SIGTERM, self.grace_seconds if process.poll() is None else 0),
            (signal.SIGKILL, 5.0),
        ):
            try:
                os.killpg(process.pid, sign)
            except ProcessLookupError:
                break
            try:
                process.wait(timeout=patience)
            except subprocess.TimeoutExpired:
                continue
        if process.stdin:
            process.stdin.close()
        process.wait()


def _wait(process: subprocess.Popen[bytes], stage: str, timeout_seconds: float) -> int:
    deadline = time.monotonic() + timeout_seconds
    while (status := process.poll()) is None:
        if time.monotonic() > deadline:
            raise WorkerDied(
                f"stage `{stage}` ran longer than {timeout_seconds / 60:.1f} minutes (hardware.timeout_minutes)"
            )
        time.sleep(0.1)
    return status


def _worker_environment(spec: Spec) -> dict[str, str]:
    """The environment without secrets: the worker is offline and needs none.

    It sees the one GPU that was planned for: with several in sight, Transformers multiplies the batch by their number.
    """
    environment = {k: v for k, v in os.environ.items() if k not in SECRET_VARIABLES}
    environment |= {"OMP_NUM_THREADS": str(spec.threads), "PYTHONUNBUFFERED": "1"}
    if isinstance(spec, PlannedSpec) and spec.plan.device == "cuda" and "CUDA_VISIBLE_DEVICES" not in environment:
        environment |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": str(spec.plan.device_index)}
    return environment


def _as_error(failure: Failure) -> DpoAssetsError:
    message = scrub(failure.message)
    if failure.kind == "config":
        return ConfigError(message)
    if failure.kind == "memory":
        return OutOfMemory(message)
    return GateError(
        failure.check, message, value=failure.value, band=failure.band, source=failure.source, fix=failure.fix
    )


def _describe(stage: str, status: int, output: str) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        hint = "; SIGKILL often means out of memory" if -status == signal.SIGKILL else ""
        cause = f"was ended by {name}{hint}"
    else:
        cause = f"ended with status {status}"
    tail = "\n".join(output.strip().splitlines()[-TAIL_LINES:])
    return f"stage `{stage}` {cause}. Nothing half-written is kept. Its last output:\n{tail}"
