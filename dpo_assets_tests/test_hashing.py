"""A file is hashed once as long as it stays as it is, by a process and by the steps of a run; every change is seen."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_assets import hashing
from dpo_assets.artifact import ArtifactTree, open_artifact
from dpo_assets.errors import CorruptArtifact
from dpo_assets.hashing import known_sha256, share_hashes
from dpo_assets.leftovers import HASHED, sweep
from dpo_assets_tests.test_artifact import KIND, PRINT, builder


@pytest.fixture
def tree(tmp_path: Path) -> ArtifactTree:
    return ArtifactTree(tmp_path / "store")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No test tells another what it hashed."""
    yield
    hashing._record = None


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read to be hashed, as long as they look settled as soon as they are written."""
    names: list[str] = []
    digest_of = hashlib.file_digest

    def spy(handle: Any, name: str) -> Any:
        names.append(Path(handle.name).name)
        return digest_of(handle, name)

    monkeypatch.setattr(hashlib, "file_digest", spy)
    monkeypatch.setattr(hashing, "SETTLED_NS", 0)
    return names


def tick(folder: Path) -> None:
    """Waits until the clock of the file system has moved on."""
    probe = folder / "clock"
    probe.write_bytes(b"")
    began = probe.stat().st_mtime_ns
    while probe.stat().st_mtime_ns == began:
        time.sleep(0.001)
        probe.write_bytes(b"")
    probe.unlink()


def test_a_process_hashes_a_file_once_under_whatever_name(
    tree: ArtifactTree, tmp_path: Path, hashed: list[str]
) -> None:
    made, _ = tree.find_or_build(KIND, PRINT, builder({"a": b"1", "b": b"2"}), {})
    tick(tmp_path)
    assert open_artifact(made.path) == made
    hashed.clear()
    assert open_artifact(made.path) == made
    made.path.rename(tmp_path / "moved")
    assert open_artifact(tmp_path / "moved").digest == made.digest
    assert hashed == []


@pytest.mark.parametrize("way", ["in place", "renamed over", "in place, with its time set back"])
def test_a_change_since_a_file_was_hashed_is_seen(
    tree: ArtifactTree, tmp_path: Path, hashed: list[str], way: str
) -> None:
    made, _ = tree.find_or_build(KIND, PRINT, builder({"a": b"1"}), {})
    tick(tmp_path)
    assert open_artifact(made.path) == made
    before = (made.path / "a").stat()
    tick(tmp_path)
    if way == "renamed over":
        (tmp_path / "other").write_bytes(b"2")
        os.utime(tmp_path / "other", ns=(before.st_atime_ns, before.st_mtime_ns))
        (tmp_path / "other").replace(made.path / "a")
    else:
        (made.path / "a").write_bytes(b"2")
    if way.endswith("set back"):
        os.utime(made.path / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CorruptArtifact, match="differs"):
        open_artifact(made.path)


def test_two_changes_within_one_tick_of_the_clock_are_both_seen(
    tmp_path: Path,
) -> None:
    """What was written a moment ago is hashed each time: a change that no time shows could follow. Newer kernels give
    a file that was looked at a finer time, so that is looked at here too, and not only whether a change gets lost."""
    file = tmp_path / "a"
    for n in range(100):
        file.write_bytes(b"%03d" % n)
        assert known_sha256(file) == hashlib.sha256(b"%03d" % n).hexdigest()
    stat = file.stat()
    assert (stat.st_dev, stat.st_ino) not in hashing._known


STEP = """
import hashlib, sys
from pathlib import Path
from dpo_assets.artifact import open_artifact
from dpo_assets.errors import CorruptArtifact
from dpo_assets.hashing import share_hashes

read, real = 0, hashlib.file_digest

def spy(handle, name):
    global read
    read += 1
    return real(handle, name)

hashlib.file_digest = spy
share_hashes(Path(sys.argv[2]))
try:
    open_artifact(Path(sys.argv[1]))
    print(read)
except CorruptArtifact:
    print("damaged")
"""


def step(artefact: Path, record: Path) -> str:
    """What a process of its own, a step of the run of that record, hashed of an artefact."""
    command = [sys.executable, "-c", STEP, str(artefact), str(record)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_steps_of_a_run_hash_a_file_once_and_another_run_hashes_it_again(tree: ArtifactTree) -> None:
    made, _ = tree.find_or_build(KIND, PRINT, builder({"a": b"1", "b": b"2"}), {})
    time.sleep(2.1)  # Until the files count as settled.
    one, other = tree.root / HASHED / "one.jsonl", tree.root / HASHED / "other.jsonl"
    assert [step(made.path, one), step(made.path, one), step(made.path, other)] == ["2", "0", "2"]
    (made.path / "a").write_bytes(b"3")
    assert step(made.path, one) == "damaged"


def test_a_damaged_record_makes_nobody_call_a_whole_file_different(tree: ArtifactTree, tmp_path: Path) -> None:
    made, _ = tree.find_or_build(KIND, PRINT, builder({"a": b"1"}), {})
    stat, record = (made.path / "a").stat(), tmp_path / "record.jsonl"
    line = [stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, "f" * 64]
    record.write_text(f"[1, 2\n{{}}\n7\n{json.dumps(line)}\n")
    share_hashes(record)
    assert known_sha256(made.path / "a") == "f" * 64, "the record was read"
    assert open_artifact(made.path) == made


def test_records_of_runs_go_after_a_day(tree: ArtifactTree) -> None:
    record = tree.root / HASHED / "run.jsonl"
    record.parent.mkdir(parents=True)
    record.write_text("")
    assert sweep(tree.root) == []
    os.utime(record, (time.time() - 90_000,) * 2)
    assert [one.path for one in sweep(tree.root)] == [record]
