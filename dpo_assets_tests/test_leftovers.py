"""What killed processes leave is swept by whoever runs next; what a living one writes is not touched."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dpo_assets.artifact import READING, ArtifactTree, open_artifact
from dpo_assets.leftovers import TRASH, UNLOCKED_SECONDS, sweep
from dpo_assets.locks import LOCK, OWN_LOCK, OWNER, shared
from dpo_assets_tests.pipelines import DATA, failures, instance_after, materialize, metadata, short_recipe

KIND, PRINT = "dpo_dataset", "0" * 32

WRITER = """
import os, sys
from pathlib import Path
from dpo_assets.artifact import ArtifactTree
from dpo_assets.feedback.library import scratch_of
from dpo_assets.locks import TEMPORARY, scratch_folder

tree = ArtifactTree(Path(sys.argv[1]), print, "run-of-the-writer")

def build(folder):
    (folder / "half.bin").write_bytes(b"x" * 100)
    (folder.parent / f"{folder.name}.screened.parquet").write_bytes(b"x" * 100)
    with scratch_folder(TEMPORARY) as work, scratch_of(tree, "1" * 32) as reading:
        (work / "worker.log").write_text("so far")
        (reading / "pairs.parquet").write_text("so far")
        print(work, flush=True)
        sys.stdin.readline()

tree.find_or_build("dpo_dataset", "0" * 32, build, {})
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary folder of its own: nothing of this machine's is swept by a test."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)


@contextmanager
def writer(root: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process in the middle of making an artefact, and its temporary folder."""
    command = [sys.executable, "-c", WRITER, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def everything(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_what_a_killed_run_left_is_swept_by_a_run_of_anything_else(tmp_path: Path) -> None:
    root, told = tmp_path / "store", list[str]()
    with writer(root) as (process, work):
        process.kill()
        process.wait()
    assert (work / "worker.log").exists()
    left = everything(root)
    assert {f"{READING}/{'1' * 32}/pairs.parquet", f"{KIND}/{PRINT}{LOCK}{OWNER}"} < left
    assert len([name for name in left if name.endswith((".screened.parquet", "half.bin"))]) == 2
    sweep(root, told.append)
    assert everything(root) == set()
    assert not work.exists()
    assert any("run run-of-the-writer" in one and "ended without finishing" in one for one in told), told
    assert sum("which a killed run left behind" in one for one in told) == 4, told


def test_what_a_living_process_writes_is_not_touched_even_where_it_is_stopped(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with writer(root) as (process, work):
        process.send_signal(signal.SIGSTOP)
        before = everything(root)
        assert sweep(root) == []
        assert everything(root) == before
        assert (work / "worker.log").exists()
        process.send_signal(signal.SIGCONT)
        process.communicate("\n", timeout=30)
        assert process.returncode == 0
    assert f"{KIND}/{PRINT}/half.bin" in everything(root)


def test_a_writer_that_comes_after_a_killed_one_says_who_it_was_and_removes_its_table_too(tmp_path: Path) -> None:
    root, told = tmp_path / "store", list[str]()
    with writer(root) as (process, _):
        process.kill()
    tree = ArtifactTree(root, told.append, "next")
    made, reused = tree.find_or_build(KIND, PRINT, lambda folder: (folder / "a").write_text("1") and None, {})
    assert not reused
    assert everything(root / KIND) == {f"{PRINT}/a", f"{PRINT}/manifest.json", f"{PRINT}{LOCK}"}
    assert made.digest
    [said] = told
    assert f"process {process.pid} on " in said
    assert "run run-of-the-writer" in said


def test_a_writer_that_waits_says_for_whom(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with writer(root) as (first, _):
        command = [sys.executable, "-c", WRITER, str(root)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as second:
            assert second.stdout is not None
            silent = threading.Timer(20, second.kill)
            silent.start()
            said = second.stdout.readline()
            silent.cancel()
            first.communicate("\n", timeout=30)
            assert second.wait(30) == 0
    assert f"waits for process {first.pid} on " in said
    assert "run run-of-the-writer, since " in said


def test_locks_of_artefacts_that_were_never_made_go_and_those_of_others_stay(tmp_path: Path) -> None:
    tree = ArtifactTree(tmp_path / "store")
    tree.find_or_build(KIND, PRINT, lambda folder: (folder / "a").write_text("1") and None, {})
    for name in (f"{'2' * 32}{LOCK}", "notes.txt", f"{'3' * 32}.gates.json"):
        (tree.root / KIND / name).write_text("")
    sweep(tree.root)
    left = everything(tree.root / KIND)
    assert left == {f"{PRINT}/a", f"{PRINT}/manifest.json", f"{PRINT}{LOCK}", "notes.txt", f"{'3' * 32}.gates.json"}


def test_files_that_are_written_in_a_moment_are_swept_after_an_hour_and_not_before(tmp_path: Path) -> None:
    for place in (f"{KIND}/{PRINT}.gates.json.tmp-7", "ledger/promotions.head.tmp-7", "cache/splits/a.tmp-7"):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{")
        assert sweep(tmp_path) == []
        old = time.time() - UNLOCKED_SECONDS - 1
        os.utime(path, (old, old))
        assert [one.path for one in sweep(tmp_path)] == [path]


def test_half_fetched_feedback_is_swept(tmp_path: Path) -> None:
    part = tmp_path / "landing" / "url" / "rows.jsonl.0a.part"
    part.parent.mkdir(parents=True)
    part.write_text("{")
    (part.parent / "rows.jsonl").write_text("{}")
    sweep(tmp_path)
    assert everything(tmp_path / "landing") - {"url/lock"} == {"url/rows.jsonl"}


def test_what_was_to_be_deleted_is_swept_unless_somebody_works_in_the_store(tmp_path: Path) -> None:
    trash = tmp_path / TRASH / "merged_model"
    trash.mkdir(parents=True)
    (trash / "a").write_text("1")
    with shared(tmp_path / "in_use.lock"):
        assert sweep(tmp_path) == []
    assert [one.path for one in sweep(tmp_path)] == [trash]
    assert not (tmp_path / TRASH).exists()


def test_temporary_folders_of_which_nobody_can_say_whose_they_are_stay(tmp_path: Path) -> None:
    folder = Path(tempfile.gettempdir()) / "dpo-assets-unknown"
    folder.mkdir()
    (folder / "file").write_text("1")
    sweep(tmp_path)
    assert (folder / "file").exists()
    (folder / OWN_LOCK).write_text("")
    sweep(tmp_path)
    assert not folder.exists()


RUN = """
import os, signal, sys, threading, time
from pathlib import Path
import dagster as dg
from dpo_assets_tests.pipelines import materialize, short_recipe

def hunt():
    while not list(Path(sys.argv[2]).glob("*.tmp-*/*.parquet")):
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=hunt, daemon=True).start()
with dg.DagsterInstance.from_config(sys.argv[1]) as instance:
    materialize(short_recipe(), instance, ["dpo_dataset"])
"""


def test_a_run_that_is_killed_while_it_writes_the_dataset_leaves_none_and_the_next_one_makes_the_same(
    homes: Path, tmp_path: Path
) -> None:
    with instance_after(short_recipe(), DATA, homes, tmp_path / "home") as instance:
        store = Path(instance.storage_directory()) / "dpo_assets" / "demo" / KIND
        (made,) = (path.parent for path in store.glob("*/manifest.json"))
        digest = open_artifact(made).digest
        shutil.rmtree(made)
        home = Path(instance.root_directory)
        (home / "dagster.yaml").touch()
        killed = subprocess.run(
            [sys.executable, "-c", RUN, str(home), str(store)], capture_output=True, text=True, check=False
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert list(store.glob(f"{made.name}.tmp-*"))
        assert not made.exists()
        again = materialize(short_recipe(), instance, ["dpo_dataset"])
        assert again.success, failures(again)
        assert open_artifact(made).digest == digest == metadata(again, "dpo_dataset")["digest"]
        assert not list(store.glob("*.tmp-*"))
