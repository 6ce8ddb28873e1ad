"""One training process on a GPU at a time, on this machine, whatever a dagster.yaml says of pools.

A plan counts on the memory that was free when it was made. The pool of the recipe (`hardware.pool`) keeps runs apart
where it has a limit; without one nothing in Dagster does, and another instance never does. The lock is the operating
system's: it goes with the process that held it.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

SAID_EVERY = 60.0  # Seconds.


def lock_path(gpu: str) -> Path:
    """The lock of a GPU, by its UUID: of everybody who uses this machine's folder of temporary files."""
    return Path(tempfile.gettempdir()) / f"dpo_assets-gpu-{hashlib.sha256(gpu.encode()).hexdigest()[:16]}.lock"


@contextmanager
def gpu_held(gpu: str, log: logging.Logger) -> Iterator[None]:
    """Keeps a GPU to itself; waits for whoever has it, and says so. Without a GPU nothing is waited for."""
    if not gpu:
        yield
        return
    path, patience = lock_path(gpu), 0.0
    lock = FileLock(path, mode=0o666)
    while True:
        try:
            lock.acquire(timeout=patience)
            break
        except Timeout:
            log.warning(f"waits for the GPU {gpu}: another training process of this machine has it ({path})")
            patience = SAID_EVERY
        except PermissionError:
            log.warning(f"{path} is another user's: nothing here keeps a second training process off the GPU {gpu}")
            break
    with suppress(OSError):  # Of another user, who made it: the umask took their write access away from the mode.
        path.chmod(0o666)
    try:
        yield
    finally:
        lock.release()
