"""A sign of life that a stage which hangs does not give.

A thread looks once a second where the main thread is, and touches a file when that moved or a step was done. A process
that was stopped has no thread that looks, one that waits for a device, a lock or a network for ever stays in one place,
and code that never lets go of Python's lock stops the thread. CPU time would prove nothing: CUDA waits for a device by
asking it all the time.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from pathlib import Path

EVERY_SECONDS = 1.0
_done = itertools.count(1)
_beats = 0


def beat() -> None:
    """Something was done: a step, a part, a line of the log."""
    global _beats
    _beats = next(_done)


def show(path: Path) -> None:
    """Touches `path` from now on as long as the main thread makes progress."""
    path.touch()
    threading.Thread(target=_watch, args=(path,), daemon=True, name="sign-of-life").start()


def _watch(path: Path) -> None:
    seen: object = None
    while True:
        now = (_beats, _place())
        if now != seen:
            try:
                path.touch()
            except FileNotFoundError:
                return  # The launcher's folder is gone, and it with the launcher.
            seen = now
        time.sleep(EVERY_SECONDS)


def _place() -> tuple[tuple[int, int], ...]:
    """Where the main thread is: code and instruction of every frame."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    found = []
    while frame is not None:
        found.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return tuple(found)
