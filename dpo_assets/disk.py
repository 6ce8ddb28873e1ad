"""Files on the disk: copies that no change of their source reaches, room for what is to come, and a full disk."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from dpo_assets.errors import ConfigError, DiskFull

FICLONE = 0x40049409  # <linux/fs.h>: two files share blocks until one of them is written to.
READ_ONLY = 0o444
# Of a full disk, of a quota, and of `ulimit -f`.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# How libraries that raise no OSError say it: safetensors, polars and pyarrow, SQLite.
_FULL_SAID = (
    "No space left on device",
    "os error 28",
    "database or disk is full",
    "Disk quota exceeded",
    "os error 27",
)


def copy_file(source: Path, target: Path) -> None:
    """The bytes of a file in a file of its own: by reflink where the file system has it, else byte for byte.

    Never by a link: whoever writes to one of the two must not change the other.
    """
    if target.exists() and source.samefile(target):
        raise shutil.SameFileError(f"{source} and {target} are one file")
    target.unlink(missing_ok=True)  # It may be a second name of a file that must stay as it is.
    if not _reflink(source, target):
        shutil.copyfile(source, target)


def share_file(source: Path, target: Path) -> None:
    """A second name for a file of a sealed artefact, in another artefact of the same store.

    A reflink, or else a hard link to what is read-only from here on: neither takes room. Where the file system has
    neither, a copy.
    """
    if _reflink(source, target):
        return
    try:
        source.chmod(READ_ONLY)
        os.link(source, target)
    except OSError:
        copy_file(source, target)


def _reflink(source: Path, target: Path) -> bool:
    try:
        with source.open("rb") as reads, target.open("xb") as writes:
            fcntl.ioctl(writes.fileno(), FICLONE, reads.fileno())
    except OSError as error:
        if error.errno in FULL or isinstance(error, FileExistsError | FileNotFoundError):
            raise
        target.unlink(missing_ok=True)
        return False
    return True


def is_full(error: BaseException) -> bool:
    """Whether an error, or what it came from, says that the disk is full."""
    seen: set[int] = set()
    told: BaseException | None = error
    while told is not None and id(told) not in seen:
        seen.add(id(told))
        if isinstance(told, OSError) and told.errno in FULL:
            return True
        if isinstance(told, Exception) and any(said in str(told) for said in _FULL_SAID):
            return True
        told = told.__cause__ or told.__context__
    return False


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; what goes meanwhile counts nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += (Path(parent) / name).lstat().st_size
    return total


def free_bytes(folder: Path) -> int:
    """What this user may still write where `folder` lies, or will lie."""
    return shutil.disk_usage(_existing(folder)).free


def refuse_closed(folder: Path) -> None:
    """A file can be made in `folder`: permissions alone say too little of mounts that are read-only, and of quotas.

    Raises:
        ConfigError: it cannot.
        DiskFull: there is no room for a single byte.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="writable.tmp-") as probe:
            probe.write(b"x")
            probe.flush()
    except OSError as error:
        if error.errno in FULL:
            raise DiskFull(full(folder, 0, "")) from None
        raise ConfigError(
            f"nothing can be written to {folder} ({error.strerror}), where all artefacts go. Let the user of this "
            "process write there, or set `root` of the resource `artifacts` to another folder."
        ) from None


def refuse_too_small(folder: Path, needed: int, what: str) -> None:
    """There is room for `needed` more bytes where `folder` lies.

    Raises:
        DiskFull: there is not.
    """
    if free_bytes(folder) < needed:
        raise DiskFull(full(folder, needed, what))


def full(folder: Path, needed: int, what: str) -> str:
    """What is needed, where, how much is free, and the way out. `needed`: 0 where nobody can say."""
    need = f"{what or 'this step'} needs about {gib(needed)}" if needed else f"the disk is full{what and f': {what}'}"
    return (
        f"{need}; {folder} has {gib(free_bytes(folder))} free. Make room there (`dpo-assets retention` shows what of "
        "earlier models can go), or set `root` of the resource `artifacts` to a folder on a larger disk."
    )


def gib(size: float) -> str:
    """A number of bytes in the unit that a reader counts in."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size:.0f} bytes"


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
