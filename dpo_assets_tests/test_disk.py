"""A full disk, a closed one, and files that two artefacts hold: what is said, and what a change reaches."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from dpo_assets import disk
from dpo_assets.artifact import ArtifactTree, open_artifact
from dpo_assets.assets import model_files
from dpo_assets.assets import step as step_module
from dpo_assets.assets.model_files import take_over
from dpo_assets.contract import DISK_FULL_EXIT, TokenizeSpec
from dpo_assets.disk import READ_ONLY, copy_file, is_full, refuse_closed, refuse_too_small, share_file
from dpo_assets.errors import ConfigError, CorruptArtifact, DiskFull
from dpo_assets.feedback.ingest import read_file
from dpo_assets.feedback.readers import ReadOptions
from dpo_assets.feedback.sources import files_of
from dpo_assets.feedback.tables import pairs_frame
from dpo_assets.planning.storage import BESIDE, still_to_write, written
from dpo_assets.publishing.commit import stage
from dpo_assets.recipe import FeedbackSource
from dpo_assets.resources.artifacts import ArtifactStore
from dpo_assets_tests.machines import disk_of
from dpo_assets_tests.pipelines import (
    DATA,
    STORIES,
    demo_recipe,
    failures,
    instance_after,
    materialize,
    metadata,
    short_recipe,
)
from dpo_assets_tests.samples import plan

DISK_KIB = 600  # Less than the built-in model.


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral(str(tmp_path / "home")) as opened:
        yield opened


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that is soon full."""
    with disk_of(tmp_path / "disk", DISK_KIB) as folder:
        yield folder


# Copies


def blob_behind_a_link(folder: Path) -> tuple[Path, Path]:
    """A model as the Hub's cache lays it out: its files are links to blobs."""
    blobs, snapshot = folder / "blobs", folder / "snapshot"
    blobs.mkdir(parents=True)
    snapshot.mkdir()
    for path in STORIES.iterdir():
        if path.is_file():
            shutil.copyfile(path, blobs / path.name)
            (snapshot / path.name).symlink_to(blobs / path.name)
    return blobs / "model.safetensors", snapshot


def flip_last_byte(path: Path) -> None:
    with path.open("r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        last = handle.read(1)[0]
        handle.seek(-1, os.SEEK_END)
        handle.write(bytes([last ^ 1]))


def test_a_byte_changed_in_the_users_model_does_not_reach_the_sealed_base_nor_the_other_way_round(
    tmp_path: Path,
) -> None:
    blob, snapshot = blob_behind_a_link(tmp_path)
    before = blob.read_bytes()
    tree = ArtifactTree(tmp_path / "store")
    made, _ = tree.find_or_build("base_model", "0" * 32, lambda folder: take_over(snapshot, folder / "model"), {})
    held = made.path / "model" / "model.safetensors"
    assert not held.is_symlink()
    assert (held.stat().st_nlink, held.stat().st_ino) == (1, held.stat().st_ino)
    flip_last_byte(blob)
    assert open_artifact(made.path) == made
    assert held.read_bytes() == before
    changed = blob.read_bytes()
    flip_last_byte(held)
    assert blob.read_bytes() == changed
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors: differs"):
        open_artifact(made.path)


def test_a_base_that_changes_while_it_is_copied_is_not_kept(
    tmp_path: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "model"
    shutil.copytree(STORIES, source)

    def while_somebody_writes(one: Path, other: Path) -> None:
        copy_file(one, other)
        flip_last_byte(one)

    monkeypatch.setattr(model_files, "copy_file", while_somebody_writes)
    monkeypatch.setattr(step_module, "MAX_RETRIES", 0)
    recipe = demo_recipe(base_model={"source": str(source), "licence": "mit"})
    result = materialize(recipe, instance, ["base_model"])
    assert f"{source} changed while it was copied" in failures(result)[0]
    assert not list(Path(instance.storage_directory()).rglob("*.safetensors"))


def test_a_copy_over_a_second_name_of_a_file_leaves_the_first_as_it_was(tmp_path: Path) -> None:
    one, other, source = tmp_path / "one", tmp_path / "other", tmp_path / "source"
    one.write_bytes(b"first")
    os.link(one, other)
    source.write_bytes(b"second")
    copy_file(source, other)
    assert (one.read_bytes(), other.read_bytes()) == (b"first", b"second")
    with pytest.raises(shutil.SameFileError):
        copy_file(source, source)
    assert source.read_bytes() == b"second"


def test_a_release_takes_no_second_copy_of_the_weights_and_a_changed_byte_is_found_in_both(tmp_path: Path) -> None:
    tree = ArtifactTree(tmp_path)

    def merged(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "model.safetensors").write_bytes(os.urandom(2**20))

    model, _ = tree.find_or_build("merged_model", "1" * 32, merged, {})

    def staged(folder: Path) -> None:
        (folder / "release").mkdir()
        stage(model.path / "model", folder / "release", "# card", {})

    release, _ = tree.find_or_build("published_model", "2" * 32, staged, {})
    weights, same = model.path / "model" / "model.safetensors", release.path / "release" / "model.safetensors"
    blocks = subprocess.run(["du", "-s", "-k", str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(blocks.stdout.split()[0]) < 1.5 * 1024
    assert weights.stat().st_mode & 0o777 == READ_ONLY or weights.stat().st_ino != same.stat().st_ino
    assert (open_artifact(model.path), open_artifact(release.path)) == (model, release)
    weights.chmod(0o644)
    flip_last_byte(same)
    with pytest.raises(CorruptArtifact):
        open_artifact(release.path)
    if weights.stat().st_ino == same.stat().st_ino:
        with pytest.raises(CorruptArtifact):
            open_artifact(model.path)


def test_what_cannot_be_linked_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As between two file systems, which a test cannot have everywhere."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    (tmp_path / "one").write_bytes(b"x")
    monkeypatch.setattr(os, "link", refuse)
    share_file(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == b"x"
    assert (tmp_path / "other").stat().st_nlink == 1


# Room


def test_a_base_that_does_not_fit_is_refused_before_it_is_copied_and_not_tried_again(
    small_disk: Path, instance: dg.DagsterInstance
) -> None:
    recipe = demo_recipe(base_model={"source": str(STORIES), "licence": "mit"})
    result = materialize(recipe, instance, ["base_model"], resources={"artifacts": ArtifactStore(root=str(small_disk))})
    assert not result.success
    [said] = failures(result)
    assert f"a copy of {STORIES} needs about " in said
    assert " KiB free" in said
    assert "dpo-assets retention" in said
    assert dg.DagsterEventType.STEP_UP_FOR_RETRY not in {event.event_type for event in result.all_events}
    assert not list(small_disk.rglob("*.safetensors"))


def test_a_disk_that_fills_up_on_the_way_says_so_and_leaves_nothing_half_written(
    small_disk: Path, instance: dg.DagsterInstance
) -> None:
    (small_disk / "of others").write_bytes(bytes((DISK_KIB - 40) * 1024))
    result = materialize(
        demo_recipe(), instance, ["raw_preferences"], resources={"artifacts": ArtifactStore(root=str(small_disk))}
    )
    assert not result.success
    [said] = failures(result)
    assert "the disk is full" in said
    assert dg.DagsterEventType.STEP_UP_FOR_RETRY not in {event.event_type for event in result.all_events}
    assert not [path for path in small_disk.rglob("*.tmp-*") if path.suffix != ".owner"]


def test_a_worker_that_finds_the_disk_full_ends_with_a_status_of_its_own(tmp_path: Path) -> None:
    """By RLIMIT_FSIZE, which needs no file system of its own: a write beyond it fails as on a full disk."""
    [file] = files_of([FeedbackSource(path="builtin:oasst", format="oasst_tree")])[:1]
    batch = read_file(file, ReadOptions(pairing="best_worst", include_synthetic=False))
    pairs = tmp_path / "pairs.parquet"
    pairs_frame(batch.pairs[:80]).write_parquet(pairs)
    (tmp_path / "out").mkdir()
    spec = TokenizeSpec(output_dir=tmp_path / "out", fingerprint="f" * 32, inputs={}, base_model=STORIES, pairs=pairs)
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    worker = subprocess.run(
        [sys.executable, "-m", "dpo_assets.training", "tokenize", "--spec", str(tmp_path / "spec.json")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
    )
    assert worker.returncode == DISK_FULL_EXIT, worker.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("CUDA out of memory"), False),
    ],
)
def test_a_full_disk_is_known_from_what_libraries_say(error: Exception, full: bool) -> None:
    assert is_full(error) is full
    outer = ValueError("could not be saved")
    outer.__cause__ = error
    assert is_full(outer) is full


def test_too_little_room_is_told_with_what_is_needed_where_and_how_much_is_free(tmp_path: Path) -> None:
    refuse_too_small(tmp_path / "not made yet", 1, "a model")
    with pytest.raises(DiskFull) as refused:
        refuse_too_small(tmp_path / "not made yet", 2**60, "a model")
    assert str(refused.value).startswith(f"a model needs about 1073741824.0 GiB; {tmp_path / 'not made yet'} has ")


def test_a_run_without_room_for_its_model_ends_at_the_plan(
    homes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How much is free is made up: no file system of that size can be had everywhere."""
    with instance_after(short_recipe(), DATA, homes, tmp_path / "home") as opened:
        monkeypatch.setattr(disk, "free_bytes", lambda folder: BESIDE)
        result = materialize(short_recipe(), opened, ["dpo_plan"])
        assert "training, merge and release, with their checkpoints, needs about 2" in failures(result)[0]
        monkeypatch.setattr(disk, "free_bytes", lambda folder: 2 * BESIDE)
        again = materialize(short_recipe(), opened, ["dpo_plan"])
        assert again.success
        assert metadata(again, "dpo_plan")["disk_gib_to_write"] > 0


def test_a_store_that_nothing_can_be_written_to_is_refused_before_any_work(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    """A file stands where the folder should be: permissions do not bind every user who runs this."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="nothing can be written to"):
        refuse_closed(tmp_path / "file" / "store")
    store = ArtifactStore(root=str(tmp_path / "file"))
    result = materialize(demo_recipe(), instance, ["base_model"], resources={"artifacts": store})
    assert "nothing can be written to" in failures(result)[0]


def test_a_plan_says_what_will_be_written_and_counts_nothing_twice() -> None:
    made = plan().model_copy(update={"memory_parts": {"adapter and optimizer": 18.0}, "parameters": 10**9})
    needs = written(made, 3 * 2**30, "merged")
    assert needs == {
        "sft_checkpoint": 4 * 2**30,
        "dpo_adapter": 4 * 2**30,
        "checkpoints": 3 * 12 * 2**30,
        "merged_model": 3 * 2**30,
        "published_model": 0,
    }
    assert written(made, 10**9, "merged")["merged_model"] == 2 * 10**9, "of a quantised base"
    assert still_to_write(needs, []) == sum(needs.values()) + BESIDE
    assert still_to_write(needs, ["sft_checkpoint"]) == (4 + 36 + 3) * 2**30 + BESIDE
    assert still_to_write(needs, ["sft_checkpoint", "dpo_adapter"]) == 3 * 2**30 + BESIDE
    assert still_to_write(needs, ["sft_checkpoint", "dpo_adapter", "merged_model"]) == 0
