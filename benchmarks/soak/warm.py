"""Workers that begin without the seconds in which torch and Transformers are imported.

One process imports them; a stage is a fork of it with the environment, folder and standard streams that the launcher
gave. What the launcher starts in its place of an interpreter is a client of a few milliseconds, which hands these over
and ends as the stage ends. The stage is the real one, in a process and group of its own. While the file `cold` exists
the client becomes an ordinary interpreter instead.

    with warm_workers(folder) as warm: LocalLauncher(python=warm.python)
"""

from __future__ import annotations

import array
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

COLD = "cold"
STREAMS = 3
CLIENT = """\
#!{python} -IS
import array, json, os, signal, socket, sys
if os.path.exists({cold!r}):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
line.connect({address!r})
told = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
streams = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
line.sendmsg([len(told).to_bytes(8, "big")], streams)
line.sendall(told)
status = int.from_bytes(line.recv(4), "big", signed=True)
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@dataclass(frozen=True)
class Warm:
    """What takes the place of a worker's interpreter, and the process that has imported everything."""

    python: str
    pid: int


@contextmanager
def warm_workers(folder: Path, patience: float = 300.0) -> Iterator[Warm]:
    """Serves workers for as long as the block lasts."""
    address, client = folder / "warm.socket", folder / "warm-python"
    script = CLIENT.format(python=sys.executable, cold=str(folder / COLD), address=str(address))
    client.write_text(script, encoding="utf-8")
    client.chmod(0o755)
    with (folder / "warm.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", __name__, str(address)], stdout=log, stderr=log, stdin=subprocess.PIPE
        )
    try:
        deadline = time.monotonic() + patience
        while not address.exists():
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "warm.log").read_text(encoding="utf-8", errors="replace"))
            time.sleep(0.1)
        yield Warm(str(client), server.pid)
    finally:
        server.kill()
        server.wait()
        address.unlink(missing_ok=True)


def serve(address: Path) -> None:
    """Forks a stage for each client."""
    gc.disable()
    worker = importlib.import_module("dpo_assets.training.__main__")
    for name in get_args(worker.Stage):
        if name not in ("gguf", "harness"):
            importlib.import_module(f"dpo_assets.training.stages.{name}")
    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    waiting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    beside = address.with_suffix(".beside")
    waiting.bind(str(beside))
    waiting.listen()
    beside.rename(address)
    while True:
        line, _ = waiting.accept()
        if os.fork() == 0:
            waiting.close()
            os._exit(_attend(line, worker))
        line.close()


def _attend(line: socket.socket, worker: object) -> int:
    """A process that stays with one stage and tells its client how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    given = array.array("i")
    size, ancillary, _, _ = line.recvmsg(8, socket.CMSG_LEN(STREAMS * given.itemsize))
    given.frombytes(ancillary[0][2])
    left, told = int.from_bytes(size, "big"), b""
    while len(told) < left:
        told += line.recv(left - len(told))
    arguments, environment, folder = json.loads(told)
    stage = os.fork()
    if stage == 0:
        line.close()
        os.setsid()
        for number, stream in enumerate(given):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        _run_stage(arguments[2:], worker)
    for stream in given:
        os.close(stream)
    _, status = os.waitpid(stage, 0)
    line.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
    return 0


def _run_stage(arguments: list[str], worker: object) -> None:
    """As `python -m dpo_assets.training` would; never returns."""
    import tempfile
    import traceback

    tempfile.tempdir = None
    status = 1
    try:
        status = worker.main(arguments)  # type: ignore[attr-defined]
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 2
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
