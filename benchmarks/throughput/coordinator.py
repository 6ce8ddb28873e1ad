"""Starts the arms, lets them load side by side, and times them one at a time. Knows no torch."""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from benchmarks.throughput.gate import CONTEXT_GIB, Gate, resting_gib
from benchmarks.throughput.models import COMPLETE
from benchmarks.throughput.shapes import SHAPES

ROOT = Path(__file__).resolve().parent.parent.parent
LOG_TAIL = 600
T = TypeVar("T")
# No network, no telemetry, no progress bars, for any arm.
QUIET = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


class WorkerProcess:
    """The coordinator's end of one arm."""

    def __init__(self, arm: str, shape: str, folder: Path, logs: Path) -> None:
        self.arm = arm
        self.log = logs / f"{shape}-{arm}.log"
        reading, writing = os.pipe()
        scratch = Path(tempfile.mkdtemp(prefix=f"dpo-throughput-{shape}-{arm}-"))
        # Unsloth writes the trainer that it generates into the working directory, unless told otherwise.
        environment = (
            QUIET
            | os.environ
            | {
                "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
                # As the worker does, and Unsloth: without it fragments count against the cap, by size of forwards.
                "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
                "UNSLOTH_COMPILE_LOCATION": str(scratch / "unsloth_compiled"),
            }
        )
        command = [sys.executable, "-m", "benchmarks.throughput.worker", "--arm", arm, "--shape", shape]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, "--folder", str(folder), "--answers", str(writing)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=scratch,
                env=environment,
                pass_fds=[writing],
                text=True,
            )
        os.close(writing)
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, args=(reading,), daemon=True).start()

    def _read(self, descriptor: int) -> None:
        with os.fdopen(descriptor) as lines:
            for line in lines:
                self._answers.put(json.loads(line))
        self._answers.put(None)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, **command: Any) -> None:
        if not self.alive:
            return
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass

    def receive(self, timeout: float) -> dict[str, Any]:
        """The next answer. A worker that is dead or too slow is ended, and its answer is an error."""
        try:
            answer = self._answers.get(timeout=max(0.1, timeout))
        except queue.Empty:
            self.end()
            return {"error": f"no answer within {timeout:.0f} s", "out_of_memory": False}
        if answer is None:
            self._answers.put(None)
            status = self._process.wait()
            return {"error": f"worker ended with status {status}: {self.tail()}", "out_of_memory": False}
        return answer

    def tail(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:]

    def end(self) -> None:
        self.send(do="release")
        try:
            self._process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Record:
    """Every result goes to a JSON-lines file at once, and a line about it to the terminal."""

    def __init__(self, path: Path, common: dict[str, Any]) -> None:
        self.path, self.common = path, common
        self.started = time.monotonic()
        self._writing = threading.Lock()  # Models are built side by side.
        path.parent.mkdir(parents=True, exist_ok=True)

    def of(self, **common: Any) -> Record:
        """The same file and clock, with more in every row."""
        part = Record(self.path, self.common | common)
        part.started, part._writing = self.started, self._writing
        return part

    def write(self, kind: str, **values: Any) -> None:
        row = {"kind": kind, "at_s": round(time.monotonic() - self.started, 1), **self.common, **values}
        with self._writing, self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
            out.flush()
        self.say(_line(kind, {"model": self.common.get("model")} | values))

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", flush=True)


def _line(kind: str, values: dict[str, Any]) -> str:
    words = [kind, *(str(values[key]) for key in ("case", "arm", "what") if values.get(key))]
    words += [f"{short} {values[key]}" for key, short in (("micro_batch", "mb"), ("repeat", "r")) if key in values]
    if "error" in values:
        return " ".join([*words, "ERROR", str(values["error"])[:300]])
    formats = {
        "pairs_per_s": "{:.2f} pairs/s", "cold_pairs_per_s": "cold {:.2f}", "share_of_limit": "{:.1%} of limit",
        "peak_allocated_gib": "peak {:.2f} GiB", "first_loss_minus_ln2": "first loss ln2 {:+.1e}",
        "load_seconds": "{:.1f} s", "cosine": "cosine {:.6f}", "norm_ratio": "norm ratio {:.5f}",
        "largest_loss_difference": "largest loss difference {:.1e}",
    }  # fmt: skip
    words += [text.format(values[key]) for key, text in formats.items() if values.get(key) is not None]
    if values.get("kernels_note"):
        words.append(f"(on {values['kernels']}: {values['kernels_note'][:120]})")
    if values.get("warm_error"):
        words.append(f"(its warm-up block failed: {values['warm_error'][:120]})")
    if plan := values.get("plan"):
        words.append(
            f"[{plan['kernels']}, budget {plan['token_budget']}, recomputed {plan['recomputed_layers']}, "
            f"estimate {plan['memory_gib']:.2f} GiB]"
        )
    return " ".join(words)


class Session:
    """The workers of one model, its folder, and the time that is left.

    Sessions of several models share a gate: all arms of all models load at once, as far as they fit the device.
    """

    def __init__(
        self, shape: str, record: Record, deadline: float | None, block_timeout: float, logs: Path, gate: Gate
    ) -> None:
        self.shape, self.record, self.block_timeout, self.logs, self.gate = shape, record, block_timeout, logs, gate
        self._ends = time.monotonic() + deadline if deadline else None
        self._loads: dict[str, Future[dict[str, Any]]] = {}
        self._built: Future[None] | None = None
        self.workers: dict[str, WorkerProcess] = {}
        self.out_of_memory: set[str] = set()  # Arms whose first block did not fit.
        self.folder = model_folder(shape)
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.keep_only(())

    def time_left(self) -> bool:
        return self._ends is None or time.monotonic() < self._ends

    def start(self, arms: dict[str, tuple[dict[str, Any], dict[str, Any]]], timeout: float) -> None:
        """Starts the arms and lets them load; each also trains its (block, rows), untimed, to have compiled.

        They import their libraries while the model is still being made.
        """
        built = self._built = self._built or _in_background(lambda: self._build(timeout))
        for arm, (block, rows) in arms.items():
            worker = self.workers[arm] = WorkerProcess(arm, self.shape, self.folder, self.logs)
            self._loads[arm] = _in_background(lambda w=worker, b=block, r=rows: self._load(w, built, b, r, timeout))  # type: ignore[misc]

    def _build(self, timeout: float) -> None:
        gib = SHAPES[self.shape].gib
        with self.gate.hold(f"{self.shape} being made", gib + CONTEXT_GIB, 0.0, timeout):
            build_model(self.shape, self.folder, self.record)

    def _load(
        self, worker: WorkerProcess, built: Future[None], block: dict[str, Any], rows: dict[str, Any], timeout: float
    ) -> dict[str, Any]:
        built.result()
        with self._room(worker.arm, block.get("cap_gib") if block else None, timeout):
            worker.send(do="load", block=block, rows=rows)
            return worker.receive(timeout)

    def _room(self, arm: str, cap_gib: float | None, timeout: float) -> Any:
        resting = resting_gib(SHAPES[self.shape].gib, arm.partition("-")[2])
        working = None if cap_gib is None else cap_gib + CONTEXT_GIB
        return self.gate.hold(f"{self.shape} {arm}", working, resting, timeout)

    def loaded(self, arm: str, timeout: float) -> bool:
        """Waits for an arm to have loaded; False, and said why, when it has not."""
        left = timeout if self._ends is None else min(timeout, self._ends - time.monotonic())
        try:
            answer = self._loads[arm].result(max(0.1, left))
        except FutureTimeout as error:
            answer = {"error": str(error) or f"not loaded within {left:.0f} s"}
        except Exception as error:  # The model could not be made.
            answer = {"error": f"{type(error).__name__}: {error}"}
        self.record.write("load", arm=arm, **{k: v for k, v in answer.items() if v is not None})
        if answer.get("warm_out_of_memory"):
            self.out_of_memory.add(arm)
        if "error" in answer:
            self._end(arm)
            return False
        return True

    def train(self, arm: str, block: dict[str, Any], rows: dict[str, Any]) -> dict[str, Any]:
        """One block of one arm, or an error."""
        worker = self.workers.get(arm)
        if worker is None:
            return {"error": "arm did not load", "out_of_memory": False}
        try:
            with self._room(arm, block.get("cap_gib"), self.block_timeout):
                worker.send(do="train", block=block, rows=rows)
                answer = worker.receive(self.block_timeout)
        except TimeoutError as error:
            return {"error": str(error), "out_of_memory": False}
        if not worker.alive:
            self._end(arm)
        return answer

    def device(self) -> dict[str, Any]:
        """Facts of the machine, from any worker."""
        for worker in self.workers.values():
            worker.send(do="device")
            return worker.receive(60.0)
        return {}

    def keep_only(self, arms: tuple[str, ...] | set[str]) -> None:
        """Ends the arms that are not needed any more: their weights lie on the device."""
        for arm in [arm for arm in self.workers if arm not in arms]:
            self._end(arm)

    def _end(self, arm: str) -> None:
        if worker := self.workers.pop(arm, None):
            worker.end()
            self.gate.release(f"{self.shape} {arm}")


def _in_background(work: Callable[[], T]) -> Future[T]:
    """Runs on a thread that does not keep this process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def model_folder(shape: str) -> Path:
    """Memory-backed where there is room: every arm reads the weights once."""
    need = 1.2 * SHAPES[shape].gib * 2**30 + 2**26
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and (shutil.disk_usage(shared).free > need or (shared / _name(shape) / COMPLETE).exists())
    return (shared if roomy else Path(tempfile.gettempdir())) / _name(shape)


def _name(shape: str) -> str:
    return f"dpo-throughput-model-{shape}"


def build_model(shape: str, folder: Path, record: Record) -> None:
    """Builds the model in a process of its own, so that its device memory is free again."""
    if (folder / COMPLETE).exists():
        return
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.throughput.models", shape, str(folder)],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        cwd=tempfile.gettempdir(),
    )
    if done.returncode:
        raise RuntimeError(f"{shape} could not be made: {done.stderr[-LOG_TAIL:]}")
    record.write("model", what=folder.name, load_seconds=time.monotonic() - begun)
