"""Reading in several processes: a large file is cut into spans, and each span is a batch of its own.

What cannot be cut without reading it (compressed files, JSON arrays, CSV, Parquet) is read in one pass that writes one
batch after another.

A process is `python -m dpo_assets.feedback.worker`, started afresh, so nothing depends on how the caller was started
(multiprocessing would run the caller's main module again). It takes one job after another from its standard input and
ends when that closes, so it never outlives its parent. Results come back by the number of their job: which process did
what, and when, changes nothing.
"""

from __future__ import annotations

import gc
import hashlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

from dpo_assets.errors import InfrastructureError
from dpo_assets.feedback.batches import write_batch
from dpo_assets.feedback.ingest import BATCH_SIZE, BatchSize, read_batches, refused_file
from dpo_assets.feedback.readers import ReadOptions, format_named
from dpo_assets.feedback.sources import FeedbackFile, FileRefused, Span, spans_of
from dpo_assets.feedback.sources.files import open_inside
from dpo_assets.machine import cpus
from dpo_assets.secret_shapes import masked, says_secret

PROCESSES = 2
UNCUT = 2**22  # A file of so few bytes is one batch: some thousand pairs.
WORTH_A_PROCESS = 2 * BATCH_SIZE.size  # Below, starting one takes longer than reading.


@dataclass(frozen=True)
class Job:
    """One span of a file (None: all of it), read into `folder`: its batches as the folders 0, 1 and so on in it."""

    file: FeedbackFile
    span: Span | None
    options: ReadOptions
    folder: Path


Outcome = list[dict[str, Any]] | FileRefused


def run_job(job: Job) -> Outcome:
    """The counts of the batches that were written, in order, or why no row of the file may be used."""
    # A batch is hundreds of thousands of objects without a cycle: looking for cycles among them takes half of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        counts = []
        for number, batch in enumerate(read_batches(job.file, job.options, job.span)):
            folder = job.folder / str(number)
            folder.mkdir()
            counts.append(write_batch(batch, folder))
        return counts
    except FileRefused as refused:
        return refused
    finally:
        if collecting:
            gc.enable()


def write_refused(file: FeedbackFile, refused: FileRefused, folder: Path) -> dict[str, Any]:
    """The batch of a file of which no row may be used: its name and the reason."""
    return write_batch(refused_file(file, refused), folder)


def cut(file: FeedbackFile, most: BatchSize = BATCH_SIZE) -> list[Span] | None:
    """The spans of a file that are read one by one; None for a file that is read in one pass.

    Raises:
        FileRefused: its bytes are no text.
    """
    if file.refused is not None or file.size <= min(most.size, UNCUT) or format_named(file.format).open is not None:
        return None
    return spans_of(file, most.size, most.rows)


def span_sha256(file: FeedbackFile, span: Span) -> str:
    """Digest of the bytes of a span: what was appended to a file leaves its earlier spans as they were."""
    digest = hashlib.sha256()
    left = span.stop - span.start
    with open_inside(file.path, file.root) as handle:  # It may have become a pipe, which would never end.
        handle.seek(span.start)
        while left and (block := handle.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def run_jobs(jobs: Sequence[Job], processes: int = PROCESSES) -> list[Outcome]:
    """The outcome of every job, in their order.

    Raises:
        InfrastructureError: a process died (out of memory, most likely). Worth another try.
    """
    size = sum(job.span.stop - job.span.start if job.span else job.file.size for job in jobs)
    count = min(processes, len(jobs), cpus())
    if count < 2 or size < WORTH_A_PROCESS:
        return [run_job(job) for job in jobs]
    waiting: SimpleQueue[int] = SimpleQueue()
    for number in range(len(jobs)):
        waiting.put(number)
    outcomes: dict[int, Outcome] = {}

    def work() -> None:
        with _Process() as process:
            while True:
                try:
                    number = waiting.get_nowait()
                except Empty:
                    return
                outcomes[number] = process.run(jobs[number])

    with ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(work) for _ in range(count)]:
            done.result()
    return [outcomes[number] for number in range(len(jobs))]


def _without_secrets() -> dict[str, str]:
    """This process's environment without what its name or its value says is secret, as a URL with a password does:
    files that were fetched before are read without a credential."""
    return {k: v for k, v in os.environ.items() if not says_secret(k) and masked(v) == v}


class _Process:
    """A worker, for as long as the context lasts."""

    def __enter__(self) -> _Process:
        # One thread each: the processes are the threads.
        one = dict.fromkeys(("POLARS_MAX_THREADS", "OMP_NUM_THREADS", "ARROW_NUM_THREADS"), "1")
        path = os.pathsep.join(p for p in sys.path if p)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dpo_assets.feedback.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_without_secrets() | one | {"PYTHONPATH": path},
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # Closing flushes, and a process that died takes nothing more.
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def run(self, job: Job) -> Outcome:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump(job, self._process.stdin)
            self._process.stdin.flush()
            outcome: Outcome | BaseException = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            status = self._process.wait()
            message = f"the process that read {job.file.name} died (exit status {status})"
            raise InfrastructureError(message) from None
        if isinstance(outcome, BaseException) and not isinstance(outcome, FileRefused):
            raise outcome
        return outcome


def serve(jobs: IO[bytes], outcomes: IO[bytes], do: Callable[[Job], Outcome] = run_job) -> None:
    """The worker's side: jobs in, outcomes out, until there are no more."""
    while True:
        try:
            job = pickle.load(jobs)
        except EOFError:
            return
        try:
            outcome: Any = do(job)
        except Exception as error:
            outcome = error
        pickle.dump(outcome, outcomes)
        outcomes.flush()
