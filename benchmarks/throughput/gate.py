"""Who may use the device's memory now: arms load side by side, but no more of them than fit. Pure Python."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

CONTEXT_GIB = 1.0  # A process's CUDA context and what its libraries keep.
# Bytes of a weight, over those of bf16; embeddings and head of quantised models stay in 16 bit.
RESIDENT = {"4bit": 0.42, "8bit": 0.65, "fp8": 0.65, "fp32": 2.0}


class Gate:
    """Gibibytes of one device. What is at rest holds its weights; what works holds its cap."""

    def __init__(self, gib: float) -> None:
        self.gib = gib
        self._resting: dict[str, float] = {}
        self._working: dict[str, float] = {}
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, who: str, working: float | None, resting: float, timeout: float) -> Iterator[None]:
        """Waits until `working` GiB are there (None: nobody else works), and holds `resting` ones afterwards.

        Raises:
            TimeoutError: when the others do not finish in time.
        """
        need = self.gib if working is None else working
        ends = time.monotonic() + timeout
        with self._changed:
            while self._working and self._used_by_others(who) + need > self.gib:
                if not self._changed.wait(ends - time.monotonic()):
                    raise TimeoutError(f"no {need:.0f} GiB for {who} within {timeout:.0f} s: {self._working}")
            self._working[who] = need
        try:
            yield
        finally:
            with self._changed:
                del self._working[who]
                self._resting[who] = resting
                self._changed.notify_all()

    def release(self, who: str) -> None:
        """Its process has ended."""
        with self._changed:
            self._resting.pop(who, None)
            self._changed.notify_all()

    def _used_by_others(self, who: str) -> float:
        held = self._resting | self._working
        return sum(gib for name, gib in held.items() if name != who)


def device_gib() -> float:
    """Memory of the first GPU; without one, of which there is no end."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits", "--id=0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return float("inf")
    return float(said.split()[0]) / 1024 - 1.0


def resting_gib(weights_gib: float, precision: str) -> float:
    """What a loaded arm keeps while another is timed."""
    return weights_gib * RESIDENT.get(precision, 1.0) + CONTEXT_GIB
