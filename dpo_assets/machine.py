"""What this process may use of its machine: memory and CPUs, as its control groups and its affinity leave them.

A container or a batch job sees the whole machine in /proc/meminfo and is killed at a fraction of it. Limits stand in
files of the group and of every group above it, and the least of them holds (Linux kernel documentation, Control Group
v2; for v1 the memory and CPU controllers).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

V2 = "cgroup2"
STEP_GIB = 0.25


def in_steps(size: int) -> float:
    """Bytes as GiB, rounded down to steps: what a machine has differs a little by the hour, and plans must repeat."""
    return size / 2**30 // STEP_GIB * STEP_GIB


def memory_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process may use: the machine's, or the least limit of its control groups where that is less.

    Args:
        root: where `proc` and `sys` lie.
    """
    import psutil

    limits = [int(psutil.virtual_memory().total)]
    for folder in _groups("memory", root):
        # `high` is no hard limit, but from it on the kernel stalls the process to reclaim memory.
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limits += _numbers(folder / name)[:1]
    return min(limits)


def cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may use, at least one: those of its affinity, or the least quota of its control groups."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _groups("cpu", root):
        pair = _numbers(folder / "cpu.max") or [
            *_numbers(folder / "cpu.cfs_quota_us"),
            *_numbers(folder / "cpu.cfs_period_us"),
        ]
        if len(pair) == 2 and pair[0] > 0 and pair[1] > 0:  # v1 writes -1 for no quota, v2 the word `max`.
            allowed = min(allowed, math.ceil(pair[0] / pair[1]))
    return max(1, allowed)


class MemoryKills:
    """Whether the kernel kills what runs in the control groups of a process, because they may use no more memory.

    The kernel ends a process by SIGKILL as anybody does, but counts it: in `memory.events` of version 2, in
    `memory.oom_control` of version 1.

    Args:
        process: its number.
        root: where `proc` and `sys` lie.
    """

    def __init__(self, process: int, root: Path = Path("/")) -> None:
        self._process, self._root = process, root
        self._before: dict[Path, int] = {}  # Kills when a group was first seen.
        self._named: list[str] = []

    def look(self) -> None:
        """Notes the groups that the process is in; once it has ended nobody can say."""
        named = _lines(self._root / "proc" / str(self._process) / "cgroup")
        if named == self._named:
            return
        self._named = named
        for folder in _groups("memory", self._root, str(self._process)):
            if folder not in self._before:
                self._before[folder] = _kills(folder)

    @property
    def happened(self) -> bool:
        """Whether there was one since the process was first seen in its groups."""
        return any(_kills(folder) > before for folder, before in self._before.items())


def _kills(group: Path) -> int:
    for name in ("memory.events", "memory.oom_control"):
        for line in _lines(group / name):
            word, _, count = line.partition(" ")
            if word == "oom_kill" and count.isdigit():
                return int(count)
    return 0


def _numbers(path: Path) -> list[int]:
    """The numbers of a file; none where it is not there, and none for `max`."""
    try:
        words = path.read_text(encoding="ascii").split()
        return [int(word) for word in words] if words[:1] != ["max"] else []
    except (OSError, ValueError):
        return []


def _groups(controller: str, root: Path, process: str = "self") -> Iterator[Path]:
    """Folders of the groups of a process that may limit `controller`, from its own to the topmost in sight."""
    mine = _own_groups(root, process)
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, described = before.split(), after.split()
        if len(fields) < 5 or len(described) < 3:
            continue
        key = "" if described[0] == V2 else controller
        if key not in mine or (key and controller not in described[2].split(",")):
            continue
        top, mounted = root / fields[4].lstrip("/"), Path(fields[3])
        path = Path(mine[key])
        # In a container what is mounted may be the container's own group, under the path that the machine has for it.
        inside = path.relative_to(mounted) if path.is_relative_to(mounted) else Path()
        folder = top / inside
        yield from (group for group in (folder, *folder.parents) if group.is_relative_to(top))


def _own_groups(root: Path, process: str) -> dict[str, str]:
    """Controller -> path of the process's group, of version 1; of version 2 the controller is empty."""
    groups = {}
    for line in _lines(root / "proc" / process / "cgroup"):
        _, _, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")
        if separator:
            groups.update(dict.fromkeys(controllers.split(","), path))
    return groups


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # Another system than Linux.
        return []
