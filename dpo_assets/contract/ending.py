"""How a worker tells that it is alive, how far it is, and why it ended."""

from __future__ import annotations

import re
import signal
from typing import Literal

from pydantic import BaseModel

FAILURE_FILE = "failure.json"
# Exit status of a worker that explains itself in FAILURE_FILE. Any other non-zero status is an infrastructure failure.
EXPLAINED_EXIT = 65
# That of one that found a disk full: then nobody can rely on a file to tell it.
DISK_FULL_EXIT = 74
# That of one which SIGTERM reached while it trained: it wrote a checkpoint first.
PREEMPTED_EXIT = 128 + signal.SIGTERM
# Ends a worker at once, whatever it is in the middle of; it writes down what it was doing.
END_NOW = signal.SIGUSR1
# Beside the spec: touched by a worker that makes progress.
HEARTBEAT = "heartbeat"
# How allocators other than Python's say that memory ran out: PyTorch's for GPUs and CUDA itself, PyTorch's for the CPU,
# cuBLAS when it gets no workspace, C++, the system. Triton's "out of resource: shared memory" is another fault.
_ALLOCATORS_SAY = (
    "out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "std::bad_alloc", "Cannot allocate memory",
)  # fmt: skip
_PROGRESS = re.compile(r"\[progress\] (?P<stage>\w+) (?P<done>\d+)/(?P<total>\d+)(?: (?P<note>.*))?")


class Failure(BaseModel):
    """Why a worker stopped, for the asset to show. `gate` failures carry the check they failed."""

    kind: Literal["config", "gate", "memory"]
    message: str
    check: str = ""
    value: float | str = ""
    band: str = ""
    source: str = ""
    fix: str = ""


def memory_failure(error: BaseException) -> Failure | None:
    """The failure to report when `error` means that memory ran out, on whatever device; None for any other error.

    `torch.cuda.OutOfMemoryError` is a RuntimeError; the CPU's allocator raises a plain one.
    """
    text = str(error)
    spoken = isinstance(error, RuntimeError | OSError) and any(said in text for said in _ALLOCATORS_SAY)
    if not isinstance(error, MemoryError) and not spoken:
        return None
    first = next((line.strip() for line in text.splitlines() if line.strip()), "Python could not allocate memory")
    return Failure(kind="memory", message=first)


class Progress(BaseModel):
    """One line of progress in a run's log: readable by people, and by whoever draws a bar from it."""

    stage: str
    done: int
    total: int
    note: str = ""

    def line(self) -> str:
        note = " ".join(self.note.splitlines())
        return f"[progress] {self.stage} {self.done}/{self.total}" + (f" {note}" if note else "")


def parse_progress(line: str) -> Progress | None:
    """The progress in a log line, or None."""
    found = _PROGRESS.search(line)
    if found is None:
        return None
    return Progress(stage=found["stage"], done=int(found["done"]), total=int(found["total"]), note=found["note"] or "")
