"""One run of a pipeline at a time: whoever started it, a run makes artefacts only while it is the pipeline's turn.

The turn is a note in the store, taken by the first step of a run and kept until the run has ended: steps can be
processes of their own, so no lock of theirs would last from one to the next. It ends with the run's end in Dagster, or
with the process that the run lives in, whichever comes first: a run that was killed leaves no turn behind, and Dagster,
which would take it for under way for ever, is told. Neither needs a line in a dagster.yaml. A pool of Dagster's would
not do: it counts steps, and two runs would alternate.

Checks that are executed alone make nothing and need no turn, and a rollback must not wait for a training.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import dagster as dg
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_assets.artifact import ArtifactTree
from dpo_assets.errors import DpoAssetsError

POLL_SECONDS, SAID_EVERY = 1.0, 60.0
WAITS = "turn-waits-"  # Begins the name of the note of a run that waits for its turn.


class OutOfTurn(DpoAssetsError):
    """It is another run's turn, and this step may not wait for it where it is: it keeps a slot of a pool."""


class Holder(BaseModel):
    """Whose turn it is.

    Args:
        run_id: the run.
        place: machine and process namespace in which `process` means something.
        process, born: number and start of the process that the run lives in.
        step, step_born: of a child of it that took the turn; in one process that child is the run, and may outlive it.
        since: when its turn began, in seconds since the epoch.
        waited: by step, retries that were spent on waiting, and were no failures.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    run_id: str
    place: str
    process: int
    born: float
    step: int = 0
    step_born: float = 0.0
    since: float
    waited: dict[str, int] = {}

    @classmethod
    def of_this_process(cls, run_id: str, step: str, waited: int) -> Self:
        # A step of several processes is a child of its run's; a run's own process may be a child of the code server,
        # which outlives it, and tells Dagster of the end of its children.
        parent = multiprocessing.parent_process()
        process = parent.pid if parent is not None and parent.pid is not None else os.getpid()
        child = os.getpid() if process != os.getpid() else 0
        return cls(
            run_id=run_id,
            place=_place(),
            process=process,
            born=_born(process) or 0.0,
            step=child,
            step_born=(_born(child) or 0.0) if child else 0.0,
            since=time.time(),
            waited={step: waited} if waited else {},
        )

    @property
    def process_is_gone(self) -> bool:
        """Whether its process has ended, and no step goes on without it; False where that cannot be seen from here."""
        if self.place != _place() or _born(self.process) == self.born:
            return False
        return not self.step or _born(self.step) != self.step_born

    def is_over(self, instance: dg.DagsterInstance) -> bool:
        """Whether its turn has ended."""
        run = instance.get_run_by_id(self.run_id)
        if run is None:  # Of another instance on the same store; or of one that was in memory, of this very process.
            return self.process_is_gone or (self.place == _place() and self.process == os.getpid())
        return run.is_finished or self.process_is_gone


def holder_of(tree: ArtifactTree) -> Holder | None:
    """Whose turn it is or was last; None where nobody's. A note that cannot be read is nobody's."""
    return _read(_note(tree))


def end_lost(instance: dg.DagsterInstance, tree: ArtifactTree) -> None:
    """Reports runs to Dagster whose process is gone without a word, as after a reboot: as failed, or as cancelled.

    Those that had the turn, and those that waited for it. Their note is their last trace: it goes after the report.
    """
    for note in (_note(tree), *_waits_of(tree)):
        holder = _read(note)
        if holder is None or not holder.process_is_gone:
            continue
        # Read behind its process's end: one that ended well has said so by then.
        run = instance.get_run_by_id(holder.run_id)
        if run is not None and run.status == dg.DagsterRunStatus.CANCELING:
            instance.report_run_canceled(run, f"{_gone(holder)} while it was being terminated")
        elif run is not None and not run.is_finished:
            instance.report_run_failed(run, f"{_gone(holder)}; nobody was left to say so")
        if note != _note(tree):
            note.unlink(missing_ok=True)


def await_turn(context: dg.AssetExecutionContext, tree: ArtifactTree) -> None:
    """Returns when it is this run's turn, and says meanwhile whose it is.

    Raises:
        OutOfTurn: this step keeps a slot of a pool, which the other run may need to come to its end.
    """
    began, said = time.monotonic(), 0.0
    while (other := _take(context, tree)) is not None:
        waited = time.monotonic() - began
        if not said or waited - said >= SAID_EVERY:
            context.log.warning(_waits(other, tree))
            said = max(waited, 0.001)
        if context.op_execution_context.op_def.pool is not None:
            raise OutOfTurn(_waits(other, tree))
        time.sleep(POLL_SECONDS)


def retries_waited(context: dg.AssetExecutionContext, tree: ArtifactTree) -> int:
    """How many retries of this step were spent on waiting for its turn."""
    holder = holder_of(tree)
    if holder is None or holder.run_id != context.run_id:
        return context.op_execution_context.retry_number
    return holder.waited.get(_step(context), 0)


def _take(context: dg.AssetExecutionContext, tree: ArtifactTree) -> Holder | None:
    """Takes the turn; the other run's where it is not to be had."""
    note = _note(tree)
    note.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{note}.lock"):
        holder = holder_of(tree)
        if holder is not None and holder.run_id == context.run_id:
            return None
        mine = Holder.of_this_process(context.run_id, _step(context), context.op_execution_context.retry_number)
        waits = note.with_name(f"{WAITS}{context.run_id}.json")
        if holder is not None and not holder.is_over(context.instance):
            if not waits.exists():
                _write(waits, mine)
            return holder
        end_lost(context.instance, tree)
        _write(note, mine)
        waits.unlink(missing_ok=True)
        return None


def _waits(other: Holder, tree: ArtifactTree) -> str:
    since = f"{datetime.fromtimestamp(other.since, UTC):%Y-%m-%d %H:%M} UTC"
    return (
        f"waits for run {other.run_id} of this pipeline, which has had the turn since {since} (process {other.process} "
        f"on {other.place.split()[0]}). It ends with that run; if that run is gone and nobody noticed, terminate it in "
        f"Dagster, or remove {_note(tree)}"
    )


def _step(context: dg.AssetExecutionContext) -> str:
    return context.op_execution_context.op.name


def _note(tree: ArtifactTree) -> Path:
    return tree.root / "turn.json"


def _waits_of(tree: ArtifactTree) -> Iterator[Path]:
    """The notes of runs that wait for the turn, or waited and ended meanwhile."""
    yield from sorted(tree.root.glob(f"{WAITS}*.json"))


def _read(note: Path) -> Holder | None:
    with suppress(OSError, ValidationError):
        return Holder.model_validate_json(note.read_bytes())
    return None


def _write(note: Path, holder: Holder) -> None:
    partial = note.with_name(f"{note.name}.tmp-{os.getpid()}")
    partial.write_text(holder.model_dump_json(), encoding="utf-8")
    partial.replace(note)


def _gone(holder: Holder) -> str:
    return f"the process of this run ({holder.process} on {holder.place.split()[0]}) is gone"


def _place() -> str:
    namespace = ""
    with suppress(OSError):  # Not Linux.
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{platform.node()} {namespace}".strip()


def _born(process: int) -> float | None:
    """When a process started; None where there is none, or only what its parent did not collect yet."""
    import psutil

    try:
        found = psutil.Process(process)
        return None if found.status() == psutil.STATUS_ZOMBIE else float(found.create_time())
    except psutil.Error:
        return None
