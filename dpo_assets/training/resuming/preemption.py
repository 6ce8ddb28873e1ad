"""SIGTERM while a stage trains: the machine is wanted back, and the step at hand is finished and kept first."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def dump_at(sign: signal.Signals) -> None:
    """`sign` ends this process as it does by default, and what every thread was doing is written to standard error."""
    faulthandler.unregister(sign)  # Registered again it would only be noted, and another handler stay in its place.
    signal.signal(sign, signal.SIG_DFL)
    faulthandler.register(sign, chain=True)


class Preemption:
    """Whether this process was told to end."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """While this lasts, the first SIGTERM is noted for the training loop to see, and the second ends the process.

        Signals reach the main thread alone; elsewhere (a test's thread) nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            if before is signal.SIG_DFL or before is None:
                dump_at(signal.SIGTERM)
            else:
                signal.signal(signal.SIGTERM, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            dump_at(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        self.asked = True
