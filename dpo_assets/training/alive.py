"""A sign of life that a stage which hangs does not give.

A thread asks the main thread once a second to come by, by a signal, and touches a file when it did. Python runs
a handler between two instructions of the main thread, so none runs while that waits for a device, a lock or a file
system; and a process that was stopped has no thread that asks. CPU time would prove nothing: CUDA waits for a device by
asking it all the time.
"""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType

EVERY_SECONDS = 1.0
# Raised in the thread that asks: sent to the main thread it would interrupt what that waits for.
ASKED = signal.SIGUSR2


def show(path: Path) -> None:
    """Touches `path` from now on as long as the main thread, which must call this, comes back to Python."""
    path.touch()
    sign = _Sign(path)
    signal.signal(ASKED, sign.come_by)
    threading.Thread(target=sign.watch, daemon=True, name="sign-of-life").start()


class _Sign:
    def __init__(self, path: Path) -> None:
        self.path, self.came_by = path, False

    def come_by(self, number: int, frame: FrameType | None) -> None:
        self.came_by = True  # No lock: this may interrupt itself.

    def watch(self) -> None:
        while True:
            if self.came_by:
                self.came_by = False
                try:
                    self.path.touch()
                except FileNotFoundError:
                    return  # The launcher's folder is gone, and it with the launcher.
            signal.raise_signal(ASKED)
            time.sleep(EVERY_SECONDS)
