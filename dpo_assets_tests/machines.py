"""Machines that have little: a file system that is soon full, a control group that is soon out of memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def disk_of(folder: Path, kib: int) -> Iterator[Path]:
    """A file system of its own in `folder`; the test is skipped where none may be mounted."""
    folder.mkdir()
    _mount(folder, f"size={kib}k")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def make_room(folder: Path, kib: int) -> None:
    """Makes a file system of `disk_of` larger."""
    _mount(folder, f"remount,size={kib}k")


def _mount(folder: Path, options: str) -> None:
    if shutil.which("mount") is None:
        pytest.skip("a small file system cannot be mounted here: there is no `mount`")
    told = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if told.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {told.stderr.strip()}")


@contextmanager
def memory_of(mib: int) -> Iterator[Path]:
    """A control group below this process's own, whose processes may use so much memory together.

    The test is skipped where none may be made: under version 2 a group that holds processes has no groups with limits.
    """
    own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()]
    paths = [path for _, controllers, path in own if "memory" in controllers.split(",")]
    folder = Path(f"/sys/fs/cgroup/memory{paths[0] if paths else '/none'}") / f"dpo-assets-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(mib * 2**20), encoding="ascii")
    except OSError as why:
        with suppress(OSError):
            folder.rmdir()
        pytest.skip(f"no control group of its own can be made here: {why}")
    try:
        yield folder
    finally:
        _remove(folder)


def _remove(group: Path) -> None:
    for _ in range(100):  # The kernel lets it go a moment after its last process.
        with suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.05)
