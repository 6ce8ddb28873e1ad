"""sha256 of files, each computed once as long as the file stays as it is: by a process, and by the steps of a run."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

SETTLED_NS = 2_000_000_000  # The coarsest times that a file system keeps, FAT's.
Looks = tuple[int, int, int]  # Both times of a file, in nanoseconds, and its size.

_known: dict[tuple[int, int], tuple[Looks, str]] = {}  # By device and inode.
_record: Path | None = None


def file_sha256(path: Path) -> str:
    """sha256 of a file, which is read for it."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """sha256 of a file, which is read for it once as long as it stays as it is.

    A file is the same while its inode, size and both times are: renaming a folder moves no inode, and whoever sets the
    modification time back changes the other one. Two changes within one tick of a file system's clock look alike, so
    what was changed less than SETTLED_NS before it was read is read again the next time. Bytes that rot on the disk
    during a run change no time; the next run reads them.
    """
    now = time.time_ns()
    with path.open("rb") as handle:
        before = os.fstat(handle.fileno())
        inode, looks = (before.st_dev, before.st_ino), _looks(before)
        known = _known.get(inode)
        if known is not None and known[0] == looks:
            return known[1]
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        after = os.fstat(handle.fileno())
    if looks == _looks(after) and now - max(before.st_mtime_ns, before.st_ctime_ns) > SETTLED_NS:
        _known[inode] = (looks, digest)
        _add(inode, looks, digest)
    else:
        _known.pop(inode, None)
    return digest


def is_file_of(path: Path, sha256: str) -> bool:
    """Whether a file has that sha256. Nothing is called different by a digest that was only remembered."""
    return known_sha256(path) == sha256 or file_sha256(path) == sha256


def share_hashes(record: Path) -> None:
    """From here on this process takes up what other steps of its run hashed, and tells them what it hashes.

    Whoever finds a file different by a digest from here reads it himself before he says so: a record may be damaged.
    """
    global _record
    _record = record
    with suppress(OSError):
        for line in record.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, TypeError):
                device, inode, modified, changed, size, digest = json.loads(line)
                _known[device, inode] = ((modified, changed, size), str(digest))


def _add(inode: tuple[int, int], looks: Looks, digest: str) -> None:
    if _record is not None:
        with suppress(OSError):  # What is not told is hashed again.
            _record.parent.mkdir(exist_ok=True)
            with _record.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps([*inode, *looks, digest]) + "\n")


def _looks(stat: os.stat_result) -> Looks:
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size
