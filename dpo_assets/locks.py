"""Who works on what: locks of the operating system, which go with the process that holds them, and a note of who it is.

A note without a lock is of somebody who died.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

Say = Callable[[str], None]
LOCK, OWNER = ".lock", ".owner"
IN_USE = "in_use.lock"  # Of a store: shared by those who read artefacts, alone by who deletes some.
TEMPORARY = "dpo-assets-"  # How temporary folders begin.
OWN_LOCK = "owner.lock"  # In a scratch folder.
SAY_AGAIN = 600.0  # Seconds.


class Owner(BaseModel):
    """Who holds a lock."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    pid: int
    host: str
    run: str
    since: str

    @classmethod
    def this(cls, run: str) -> Owner:
        """This process, for a run (empty: none)."""
        return cls(
            pid=os.getpid(), host=socket.gethostname(), run=run, since=datetime.now(UTC).isoformat(timespec="seconds")
        )

    def __str__(self) -> str:
        run = f", run {self.run}" if self.run else ""
        return f"process {self.pid} on {self.host}{run}, since {self.since}"


def owner_file(lock: Path) -> Path:
    """Where the holder of a lock says who it is. Not in the lock file: whoever tries a lock may empty it."""
    return lock.with_name(lock.name + OWNER)


def noted_owner(lock: Path) -> Owner | None:
    """Who held the lock last, if that is known: who holds it, or who died."""
    try:
        return Owner.model_validate_json(owner_file(lock).read_bytes())
    except (OSError, ValidationError):
        return None


@contextmanager
def exclusive(path: Path, run: str = "", say: Say = lambda _: None) -> Iterator[None]:
    """Holds the lock `path` alone. Whom it waits for is said, and who held it last and did not finish."""
    lock = FileLock(path)
    _acquire(lock, path, say)
    try:
        if owner_file(path).exists():
            say(f"{noted_owner(path) or 'somebody'} did not finish {path.name.removesuffix(LOCK)}; it is begun anew")
        _note(path, run)
        try:
            yield
        finally:
            owner_file(path).unlink(missing_ok=True)
    finally:
        lock.release()


def _note(path: Path, run: str) -> None:
    with suppress(OSError):  # On a full disk: the lock holds without it.
        owner_file(path).write_text(Owner.this(run).model_dump_json(), encoding="utf-8")


def _acquire(lock: FileLock, path: Path, say: Say) -> None:
    wait = 0.0
    while True:
        try:
            lock.acquire(timeout=wait)
        except Timeout:
            say(f"waits for {noted_owner(path) or 'another process'}, which holds {path}")
            wait = SAY_AGAIN
        else:
            return


@contextmanager
def if_nobodys(path: Path) -> Iterator[bool]:
    """Holds the lock `path` if nobody else does, and says whether that is so. It never waits."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def shared(path: Path, say: Say = lambda _: None) -> Iterator[None]:
    """Holds the lock `path` together with others of its kind; whoever wants it alone waits, or gives up."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        told = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    say(f"waits for {noted_owner(path) or 'another process'}, which holds {path}")
                told = True
                time.sleep(0.1)  # Not in the lock itself: whoever waits can be interrupted.
        yield
    finally:
        os.close(descriptor)


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A temporary folder of this process. Of one that was killed, whoever sweeps next finds the lock free."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    with FileLock(folder / OWN_LOCK):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
