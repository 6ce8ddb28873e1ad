"""What killed runs left behind, swept by the next run, whatever that makes.

Nobody's is what its writer's lock says: the operating system lets a lock go with its process, and whoever is alive
holds it, stopped or not. Files that are written in a moment, under no lock, are nobody's after an hour.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dpo_assets.artifact import READING, is_fingerprint, remove
from dpo_assets.disk import size_of
from dpo_assets.locks import IN_USE, LOCK, OWN_LOCK, OWNER, TEMPORARY, if_nobodys, noted_owner, owner_file

TRASH, HASHED = "_trash", "_hashed"
DAY = 86_400.0
UNLOCKED_SECONDS = 3600.0
Say = Callable[[str], None]
_PRINT = 32  # Digits of a fingerprint.


@dataclass(frozen=True)
class Leftover:
    """What was removed: `size` in bytes."""

    path: Path
    size: int


def sweep(root: Path, say: Say = lambda _: None) -> list[Leftover]:
    """Removes from a pipeline's store, and from this machine's temporary folder, what nobody writes any more.

    Args:
        say: is told of each folder or file that held something, and of each run that ended without finishing.
    """
    gone: list[Leftover] = []
    for find in (_unfinished, _partial, _trashed, _fetched):
        with suppress(OSError):  # A store that only reads is not swept; nor is what somebody else removes meanwhile.
            gone += find(root, say)
    gone += _temporary()
    for one in gone:
        if one.size:
            say(f"removed {one.path} ({one.size} bytes), which a killed run left behind")
    return gone


def _unfinished(root: Path, say: Say) -> Iterator[Leftover]:
    """Scratch folders and tables of artefacts, notes of their writers, and locks of what was never made."""
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    for folder in folders:
        beside: dict[str, set[str]] = {}
        for entry in os.scandir(folder):
            if is_fingerprint(entry.name[:_PRINT]):
                beside.setdefault(entry.name[:_PRINT], set()).add(entry.name[_PRINT:])
        for print_, endings in beside.items():
            made = "" in endings and folder.name != READING
            scratch = {one for one in endings if one.startswith(".tmp-") or (one == "" and not made)}
            if scratch or LOCK + OWNER in endings or (LOCK in endings and not made):
                yield from _of_one(folder, print_, scratch, made, say)


def _of_one(folder: Path, print_: str, scratch: set[str], made: bool, say: Say) -> Iterator[Leftover]:
    lock = folder / (print_ + LOCK)
    with if_nobodys(lock) as free:
        if not free:
            return
        if owner_file(lock).exists():
            who = noted_owner(lock) or "somebody"
            say(f"{who} ended without finishing {folder.name} {print_[:12]}; nothing of it is kept")
            owner_file(lock).unlink(missing_ok=True)
        for name in sorted(scratch):
            yield _removed(folder / (print_ + name))
        if not made and not (folder / print_).exists():
            # Held while it goes: whoever opened it meanwhile sees that it has no name any more, and makes a new one.
            lock.unlink(missing_ok=True)


def _partial(root: Path, _: Say) -> Iterator[Leftover]:
    """Files that were to be renamed in the next moment, and what the steps of a run told each other."""
    for path in (root / HASHED).glob("*.jsonl"):  # A run that goes on hashes again.
        if time.time() - path.stat().st_mtime > DAY:
            yield _removed(path)
    for pattern in ("*/*.json.tmp-*", "ledger/*.tmp-*", "cache/splits/*.tmp-*", "writable.tmp-*"):
        for path in root.glob(pattern):
            if path.is_file() and time.time() - path.stat().st_mtime > UNLOCKED_SECONDS:
                yield _removed(path)


def _trashed(root: Path, _: Say) -> Iterator[Leftover]:
    """What retention had taken out of the store when it was killed."""
    if (root / TRASH).is_dir():
        with if_nobodys(root / IN_USE) as free:
            for path in (root / TRASH).glob("*") if free else ():
                yield _removed(path)
        with suppress(OSError):
            (root / TRASH).rmdir()


def _fetched(root: Path, _: Say) -> Iterator[Leftover]:
    """Copies of feedback from elsewhere that did not come to their end."""
    for path in (root / "landing").rglob("*.part"):
        with if_nobodys(path.parent / "lock") as free:
            if free:
                yield _removed(path)


def _temporary() -> Iterator[Leftover]:
    """Folders of workers and of those who started them, on this machine and of this user."""
    for folder in Path(tempfile.gettempdir()).glob(f"{TEMPORARY}*"):
        with suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid() or not (folder / OWN_LOCK).is_file():
                continue  # Somebody else's, or one of which nobody can say whether it is in use.
            with if_nobodys(folder / OWN_LOCK) as free:
                if free:
                    yield _removed(folder)


def _removed(path: Path) -> Leftover:
    size = path.lstat().st_size if path.is_file() else size_of(path)
    remove(path)
    return Leftover(path, size)
