"""Memory and CPUs as control groups leave them, of both versions, nested, in containers and out of them.

A group can be made by root alone, so the kernel's files are written into a folder here, as the kernel documents them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_assets.machine import MemoryKills, cpus, memory_bytes
from dpo_assets.planning import cards

MIB = 2**20
NO_LIMIT = "9223372036854771712"  # What version 1 has where nothing is limited.


def machine(root: Path, groups: str, mounts: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    (root / "proc/self/mountinfo").write_text(mounts)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 25 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:10 - cgroup cgroup rw,cpu,cpuacct\n"
    "32 25 0:28 / /sys/fs/cgroup/memory rw shared:11 - cgroup cgroup rw,memory\n"
    "33 25 0:29 / /sys/fs/cgroup/cpuset rw shared:12 - cgroup cgroup rw,cpuset\n"
)
DOCKER_V1 = "40 39 0:28 /docker/abc /sys/fs/cgroup/memory ro master:11 - cgroup memory rw,memory\n"


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "limit"),
    [
        ("0::/job\n", V2, {"job/memory.max": f"{64 * MIB}"}, 64),
        ("0::/job/step\n", V2, {"job/step/memory.max": "max", "job/memory.max": f"{48 * MIB}"}, 48),
        ("0::/a/b/c\n", V2, {"a/memory.max": f"{32 * MIB}", "a/b/memory.max": f"{96 * MIB}"}, 32),
        ("0::/job\n", V2, {"job/memory.max": f"{64 * MIB}", "job/memory.high": f"{40 * MIB}"}, 40),
        # A container with a namespace of its own: its group is the root that it sees.
        ("0::/\n", V2, {"memory.max": f"{64 * MIB}"}, 64),
        # Moved out of what the namespace shows.
        ("0::/../other\n", V2, {"memory.max": f"{64 * MIB}"}, 64),
        ("8:memory:/job\n4:cpu,cpuacct:/\n", V1, {"memory/job/memory.limit_in_bytes": f"{64 * MIB}"}, 64),
        (
            "8:memory:/job/step\n",
            V1,
            {"memory/job/memory.limit_in_bytes": f"{48 * MIB}", "memory/job/step/memory.limit_in_bytes": NO_LIMIT},
            48,
        ),
        ("8:memory:/docker/abc\n", DOCKER_V1, {"memory/memory.limit_in_bytes": f"{64 * MIB}"}, 64),
        # A job of its own inside a container.
        ("8:memory:/docker/abc/job\n", DOCKER_V1, {"memory/job/memory.limit_in_bytes": f"{64 * MIB}"}, 64),
        # Both versions at once, as systemd mounts them.
        (
            "8:memory:/job\n0::/job\n",
            V1 + V2.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified "),
            {"memory/job/memory.limit_in_bytes": f"{64 * MIB}"},
            64,
        ),
        ("0::/job\n", V2, {"job/memory.max": "max"}, None),
        ("8:memory:/job\n", V1, {"memory/job/memory.limit_in_bytes": NO_LIMIT}, None),
        ("8:memory:/gone\n", V1, {}, None),
        ("", "", {}, None),
    ],
)
def test_memory_is_the_least_limit_of_the_group_and_those_above_it(
    tmp_path: Path, groups: str, mounts: str, files: dict[str, str], limit: int | None
) -> None:
    found = memory_bytes(machine(tmp_path, groups, mounts, files))
    assert found == (limit * MIB if limit else psutil.virtual_memory().total)


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "quota"),
    [
        ("0::/job\n", V2, {"job/cpu.max": "100000 100000"}, 1),
        ("0::/job/step\n", V2, {"job/step/cpu.max": "max 100000", "job/cpu.max": "50000 100000"}, 1),
        ("4:cpu,cpuacct:/job\n", V1, {f"cpu,cpuacct/job/cpu.cfs_{k}_us": "100000" for k in ("quota", "period")}, 1),
        ("4:cpu:/\n", V1, {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, None),
        ("0::/job\n", V2, {"job/cpu.max": "6400000 100000"}, None),
        ("", "", {}, None),
    ],
)
def test_cpus_are_the_least_quota_and_never_more_than_the_affinity(
    tmp_path: Path, groups: str, mounts: str, files: dict[str, str], quota: int | None
) -> None:
    assert cpus(machine(tmp_path, groups, mounts, files)) == (quota or len(os.sched_getaffinity(0)))


def test_a_process_bound_to_one_cpu_has_one() -> None:
    bound = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])"
    script = f"{bound}; from dpo_assets.machine import cpus; print(cpus())"
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "1\n"


@given(text=st.text(max_size=40), mounts=st.text(max_size=80))
def test_files_of_another_form_limit_nothing(tmp_path_factory: pytest.TempPathFactory, text: str, mounts: str) -> None:
    root = tmp_path_factory.mktemp("machine")
    assert memory_bytes(machine(root, text, mounts, {})) == psutil.virtual_memory().total


def test_the_cpu_is_planned_with_what_its_group_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "memory_bytes", lambda: 1900 * MIB)
    assert cards.this_cpu().memory_gib == 1.75


@pytest.mark.parametrize(
    ("groups", "mounts", "file"),
    [("0::/job\n", V2, "job/memory.events"), ("4:memory:/job\n", V1, "memory/job/memory.oom_control")],
    ids=["v2", "v1"],
)
def test_a_kill_for_want_of_memory_is_counted_once_the_group_was_seen(
    tmp_path: Path, groups: str, mounts: str, file: str
) -> None:
    root = machine(tmp_path, groups, mounts, {file: "oom 4\noom_kill 3\noom_group_kill 0"})
    counts = root / "sys/fs/cgroup" / file
    (root / "proc/4711").mkdir()
    (root / "proc/4711/cgroup").write_text(groups, encoding="utf-8")
    kills = MemoryKills(4711, root)
    kills.look()
    assert not kills.happened, "of others, before"
    counts.write_text("oom 5\noom_kill 4\n", encoding="utf-8")
    kills.look()
    assert kills.happened
    counts.unlink()
    assert not kills.happened
