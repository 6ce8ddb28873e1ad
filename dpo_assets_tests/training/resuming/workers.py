"""Worker processes that are really killed. What they import is imported once: each is a fork of one that did it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from dpo_assets.contract import Spec, Stage

PATIENCE = 120.0

# A line in is a worker: its arguments, its log, and Python that runs before its stage. A line out is its process, the
# next its status. Nothing computes before the fork, so no thread is lost in it.
SERVER = """
import importlib, json, os, sys, traceback
from dpo_assets.training.__main__ import main
for stage in ("dpo", "merge", "evaluate"):
    importlib.import_module(f"dpo_assets.training.stages.{stage}")
for line in sys.stdin:
    told = json.loads(line)
    reads, writes = os.pipe()  # Its standard input ends with this process, as that of a worker with its run.
    child = os.fork()
    if child == 0:
        os.close(writes)
        os.setsid()
        log = os.open(told["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for number, descriptor in enumerate((reads, log, log)):
            os.dup2(descriptor, number)
        status = 1
        try:
            exec(told["fault"], {})
            status = main(told["arguments"])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(child, flush=True)
    os.close(reads)
    _, ended = os.waitpid(child, 0)
    os.close(writes)
    print(os.waitstatus_to_exitcode(ended), flush=True)
"""


@dataclass
class Ended:
    """How a worker ended, and what it said."""

    status: int
    said: str


class Workers:
    """Runs stages in processes of their own, as the launcher does."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def run(
        self,
        stage: Stage,
        spec: Spec,
        work: Path,
        *,
        fault: str = "",
        until: str = "",
        sign: signal.Signals | None = None,
    ) -> Ended:
        """Runs a stage to its end, in an empty output folder.

        Args:
            work: for its spec and its log.
            fault: Python that the process runs before its stage.
            until: what it says when `sign` is sent.
        """
        assert stage in get_args(Stage)
        shutil.rmtree(spec.output_dir, ignore_errors=True)
        spec.output_dir.mkdir(parents=True)
        work.mkdir(exist_ok=True)
        log = work / "log"
        log.unlink(missing_ok=True)
        (work / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
        arguments = [stage, "--spec", str(work / "spec.json"), "--follow-parent"]
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps({"arguments": arguments, "log": str(log), "fault": fault}) + "\n")
        self._server.stdin.flush()
        process = int(self._line())
        if sign is not None:
            deadline = time.monotonic() + PATIENCE
            while not log.exists() or until.encode() not in log.read_bytes():
                assert _lives(process), log.read_text(encoding="utf-8")
                assert time.monotonic() < deadline, f"waited {PATIENCE:.0f} s for `{until}`"
                time.sleep(0.02)
            os.kill(process, sign)
        return Ended(int(self._line()), log.read_text(encoding="utf-8"))

    def _line(self) -> str:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, "the server of workers ended"
        return line


@contextmanager
def workers() -> Iterator[Workers]:
    """Whatever they are in the middle of, they end with this."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            yield Workers(server)
        finally:
            server.kill()


def _lives(process: int) -> bool:
    """Whether it has not ended; its status may not have been read yet."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    return False
