"""Starts a worker stage and stays with it: its log lines reach the run live, and it never outlives the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import IO

import dagster as dg
from pydantic import Field, field_validator

from dpo_assets.contract import (
    DISK_FULL_EXIT,
    END_NOW,
    EXPLAINED_EXIT,
    FAILURE_FILE,
    HEARTBEAT,
    PREEMPTED_EXIT,
    Failure,
    PlannedSpec,
    Spec,
    Stage,
)
from dpo_assets.disk import full, gib, size_of
from dpo_assets.errors import (
    ConfigError,
    DiskFull,
    DpoAssetsError,
    GateError,
    InfrastructureError,
    OutOfMemory,
    Preempted,
    StageSilent,
    StageTimeout,
)
from dpo_assets.locks import TEMPORARY, scratch_folder
from dpo_assets.machine import MemoryKills, memory_bytes
from dpo_assets.planning.storage import stage_bytes
from dpo_assets.publishing.secrets import is_secret, scrub, scrub_all
from dpo_assets.resources.environment import planned_gpu, worker_environment
from dpo_assets.resources.gpu_lock import gpu_held
from dpo_assets.resources.gpu_time import gpu_timed
from dpo_assets.resources.messages import ScrubbedMessageReader
from dpo_assets.resources.nvml import VISIBLE

TAIL_LINES = 30
LOOK_SECONDS = 1.0  # Longest time between two looks at a worker that counts as its silence.


class WorkerDied(InfrastructureError):
    """The worker ended without explaining itself: killed, or a crash."""


class TrainingLauncher(dg.ConfigurableResource, ABC):  # type: ignore[type-arg]
    """Runs `python -m dpo_assets.training <stage>` somewhere. Assets know this class only."""

    @abstractmethod
    def run(
        self, context: dg.AssetExecutionContext, stage: Stage, spec: Spec, timeout_seconds: float, silent_seconds: float
    ) -> None:
        """Returns when the stage has sealed its artefact.

        Raises:
            GateError: a check stopped the stage.
            ConfigError: the stage cannot work as configured.
            OutOfMemory: the device has too little memory for the stage's forwards.
            StageTimeout: it ran longer than `timeout_seconds`.
            StageSilent: it showed no sign of progress for `silent_seconds`.
            Preempted: it was told to end by somebody else, and wrote a checkpoint.
            WorkerDied: anything else.
        """


class LocalLauncher(TrainingLauncher):
    """A subprocess of this machine, in a process group of its own, connected by Dagster Pipes."""

    python: str = Field(default=sys.executable, description="Interpreter of the worker; it may be another environment.")
    grace_seconds: float = Field(default=10.0, ge=0.0, description="Time that a worker has to end before SIGKILL.")
    environment: list[str] = Field(
        default=[],
        description="Names of further environment variables that the worker gets; secrets are never passed on.",
    )

    @field_validator("environment")
    @classmethod
    def _no_secrets(cls, names: list[str]) -> list[str]:
        if secret := [name for name in names if is_secret(name)]:
            raise ValueError(f"{', '.join(secret)}: a worker is offline and gets no secret; take it off the list.")
        return names

    def run(
        self, context: dg.AssetExecutionContext, stage: Stage, spec: Spec, timeout_seconds: float, silent_seconds: float
    ) -> None:
        with scratch_folder(TEMPORARY) as work:
            (work / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
            log = work / "worker.log"
            output = ""
            try:
                status = self._run_to_end(context, stage, spec, work, log, (timeout_seconds, silent_seconds))
            finally:  # However it ended: by itself, by its time, or with the run.
                if log.is_file():
                    output = scrub(log.read_text(encoding="utf-8", errors="replace"))
                print(output)  # noqa: T201 - the step's standard output is what Dagster keeps as its compute log
            if status == 0:
                return
            if status is Overdue.TIME:
                raise StageTimeout(_out_of_time(stage, timeout_seconds, output))
            if status == DISK_FULL_EXIT:
                raise DiskFull(_out_of_room(stage, spec))
            if status is OUT_OF_HOST_MEMORY:
                raise _out_of_host_memory(stage, spec, output)
            if status is Overdue.SIGN_OF_LIFE:
                raise StageSilent(_silent(stage, silent_seconds, output))
            if status == PREEMPTED_EXIT:
                raise Preempted(_preempted(stage, output))
            if status == EXPLAINED_EXIT and (work / FAILURE_FILE).is_file():
                raise _as_error(Failure.model_validate_json((work / FAILURE_FILE).read_bytes()))
            raise WorkerDied(_describe(stage, status, output))

    def _run_to_end(
        self,
        context: dg.AssetExecutionContext,
        stage: Stage,
        spec: Spec,
        work: Path,
        log: Path,
        patience: tuple[float, float],
    ) -> int | Overdue | OutOfHostMemory:
        """Exit status of the worker, negative for a signal; or for what it was ended."""
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
                message_reader=ScrubbedMessageReader(dg.PipesTempFileMessageReader()),
            ) as session,
            log.open("wb") as output,
            ExitStack() as held,
        ):
            # Its temporary files lie in this run's scratch folder, so they go also when it is killed.
            environment = {**worker_environment(spec, self.environment), "TMPDIR": str(work)}
            held.enter_context(gpu_held(environment[VISIBLE], context.log))
            held.enter_context(gpu_timed(context, environment[VISIBLE]))
            process = self._start(command, {**environment, **session.get_bootstrap_env_vars()}, output)
            context.log.info(f"started worker stage `{stage}`, process group {process.pid}")
            if isinstance(spec, PlannedSpec) and (shown := environment[VISIBLE]) not in ("", planned_gpu(spec.plan)):
                context.log.info(
                    f"the planned GPU {planned_gpu(spec.plan)} is not in sight here; the worker has {shown}, the only "
                    f"other {spec.plan.device_name}"
                )
            try:
                return _wait(process, work / HEARTBEAT, *patience)
            finally:
                self._end_group(process)

    def _start(self, command: list[str], environment: dict[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                command,
                env=environment,
                # Held open as long as this process lives: its end tells the worker that the run is gone.
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise ConfigError(
                f"the worker's interpreter `{self.python}` cannot be started ({error.strerror}); set `python` of the "
                "launcher to that of an environment with this package."
            ) from None

    def _end_group(self, process: subprocess.Popen[bytes]) -> None:
        """Ends whatever is left of the worker's process group, its children included, and at once.

        SIGTERM would let a stage that trains finish its step and write a checkpoint first.
        """
        for sign, patience in (
            (END_NOW, self.grace_seconds if process.poll() is None else 0),
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


class Overdue(Enum):
    """What a worker did not bring in time."""

    TIME = "its end"
    SIGN_OF_LIFE = "a sign of progress"


class OutOfHostMemory(Enum):
    """How the kernel ended a worker."""

    KILLED = "its control groups may use no more memory"


OUT_OF_HOST_MEMORY = OutOfHostMemory.KILLED


def _wait(
    process: subprocess.Popen[bytes], heartbeat: Path, timeout_seconds: float, silent_seconds: float
) -> int | Overdue | OutOfHostMemory:
    deadline, kills = time.monotonic() + timeout_seconds, MemoryKills(process.pid)
    silent, seen, before = 0.0, 0, time.monotonic()
    while (status := process.poll()) is None:
        kills.look()
        now = time.monotonic()
        if now > deadline:
            return Overdue.TIME
        # By this process's clock, whatever the file says of the time; and while this process itself was stopped, as a
        # whole group may be, nobody looked.
        silent += min(now - before, LOOK_SECONDS)
        before = now
        if (beat := _changed(heartbeat)) != seen:
            silent, seen = 0.0, beat
        if silent > silent_seconds:
            return Overdue.SIGN_OF_LIFE
        time.sleep(0.1)
    return OUT_OF_HOST_MEMORY if status == -signal.SIGKILL and kills.happened else status


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _as_error(told: Failure) -> DpoAssetsError:
    failure = Failure.model_validate(scrub_all(told.model_dump()))
    if failure.kind == "config":
        return ConfigError(failure.message)
    if failure.kind == "memory":
        return OutOfMemory(failure.message)
    return GateError(
        failure.check, failure.message, value=failure.value, band=failure.band, source=failure.source, fix=failure.fix
    )


def _out_of_time(stage: str, timeout_seconds: float, output: str) -> str:
    return (
        f"stage `{stage}` ran longer than {timeout_seconds / 60:.3g} minutes (hardware.timeout_minutes) and was ended. "
        "It is not tried again, because it would take as long: raise the limit, or give it less to do. The whole log "
        f"is in this step's standard output. {_tail(output)}"
    )


def _out_of_room(stage: Stage, spec: Spec) -> str:
    needed = stage_bytes(stage, spec.plan, size_of(spec.base_model)) if isinstance(spec, PlannedSpec) else 0
    said = full(spec.output_dir, needed, f"stage `{stage}`")
    return f"{said} It had written {gib(size_of(spec.output_dir))}, which is removed. It is not tried again."


def _out_of_host_memory(stage: Stage, spec: Spec, output: str) -> DpoAssetsError:
    """Smaller forwards help where they are computed in that memory; elsewhere another try may find more of it."""
    said = f"the kernel killed it, because no more than {gib(memory_bytes())} of memory may be used here"
    if isinstance(spec, PlannedSpec) and spec.plan.device == "cpu":
        return OutOfMemory(f"{said}.")
    return WorkerDied(f"stage `{stage}`: {said}. Nothing half-written is kept. {_tail(output)}")


def _silent(stage: str, silent_seconds: float, output: str) -> str:
    return (
        f"stage `{stage}` showed no sign of progress for {silent_seconds / 60:.3g} minutes (hardware.silent_minutes) "
        "and was ended: a device, a file system or a lock that never answers. Where it was stands in its log, "
        f"which is in this step's standard output. {_tail(output)}"
    )


def _preempted(stage: str, output: str) -> str:
    return f"stage `{stage}` was told to end (SIGTERM), not by this run. It wrote a checkpoint first. {_tail(output)}"


def _describe(stage: str, status: int, output: str) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        hint = "; SIGKILL often means out of memory" if -status == signal.SIGKILL else ""
        cause = f"was ended by {name}{hint}"
    else:
        cause = f"ended with status {status}"
    return f"stage `{stage}` {cause}. Nothing half-written is kept. {_tail(output)}"


def _tail(output: str) -> str:
    lines = output.strip().splitlines()[-TAIL_LINES:]
    return "Its last output:\n" + "\n".join(lines) if lines else "It wrote nothing."
