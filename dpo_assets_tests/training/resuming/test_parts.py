"""A merge and an evaluation that were ended go on where they were, and make what they would have made, bit for bit."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_assets.contract import DISK_FULL_EXIT, EvaluateSpec, MergeSpec
from dpo_assets.training.resuming.parts import Parts
from dpo_assets_tests.machines import disk_of, make_room
from dpo_assets_tests.training.bases import sharded
from dpo_assets_tests.training.conftest import PlanMaker
from dpo_assets_tests.training.resuming.workers import Workers

NOT_OF_THE_DIGEST = ("timings.json", "manifest.json")
# What a worker runs before its stage: it is killed in the middle of the file, or the batch, of that number.
DIES_IN_A_FILE = """
import os, signal
from dpo_assets.training.models import merging
own, files = merging._write_file, []
def write(merge, file, block, path):
    own(merge, file, block, path)
    files.append(path)
    if len(files) == {at}:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
merging._write_file = write
"""
DIES_ANSWERING = """
import os, signal
from dpo_assets.training.scoring import generation
own, batches = generation._answers, []
def answers(*told):
    batches.append(told)
    if len(batches) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return own(*told)
generation._answers = answers
"""


def made(out: Path) -> dict[str, bytes]:
    """The files that an artefact's digest is of."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name not in NOT_OF_THE_DIGEST
    }


# --- what is kept -------------------------------------------------------------------------------------------------


def test_a_part_is_made_once_as_long_as_what_it_depends_on_stays(tmp_path: Path) -> None:
    asked: list[int] = []

    def make() -> Any:
        asked.append(len(asked))
        return [{"ids": [1, 2], "end": None, "value": 0.1 + 0.2, "nan": float("nan"), "text": "ä\n"}]

    def value(identity: str, **facts: Any) -> Any:
        return repr(Parts(tmp_path / "parts", {"inputs": identity}).value(make, **facts))

    first = value("a", batch=[[1, 2]])
    assert value("a", batch=[[1, 2]]) == first
    assert asked == [0]
    value("a", batch=[[1, 3]])
    value("b", batch=[[1, 2]])
    assert asked == [0, 1, 2]
    Parts(None, {}).value(make)
    assert asked == [0, 1, 2, 3]
    assert not list(tmp_path.rglob("*.tmp-*"))


@pytest.mark.parametrize("damage", ["truncated", "another number", "another kind"])
def test_a_part_that_is_not_what_was_kept_is_made_again_and_counted(tmp_path: Path, damage: str) -> None:
    Parts(tmp_path, {}).value(lambda: [1.5, 2.5], of="it")
    (path,) = tmp_path.iterdir()
    text = path.read_text(encoding="utf-8")
    path.write_text(
        {"truncated": text[:-3], "another number": text.replace("2.5", "2.25"), "another kind": "[]"}[damage],
        encoding="utf-8",
    )
    parts = Parts(tmp_path, {})
    assert parts.value(lambda: [1.5, 2.5], of="it") == [1.5, 2.5]
    assert (parts.taken, parts.dropped) == (0, 1)
    assert "1 of them were not what had been kept" in parts.told
    assert Parts(tmp_path, {}).value(lambda: None, of="it") == [1.5, 2.5]


def test_a_file_takes_no_room_twice_and_a_changed_byte_makes_it_again(tmp_path: Path) -> None:
    folder, asked = tmp_path / "parts", list[Path]()

    def write(path: Path) -> None:
        asked.append(path)
        path.write_bytes(b"weights")

    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    Parts(folder, {}).file(one, write, name="w")
    Parts(folder, {}).file(two, write, name="w")
    assert asked == [one]
    assert one.stat().st_ino == two.stat().st_ino
    one.unlink()
    two.write_bytes(b"wEights")
    parts = Parts(folder, {})
    parts.file(three, write, name="w")
    assert (asked, three.read_bytes(), parts.dropped) == ([one, three], b"weights", 1)


def test_what_cannot_be_kept_is_made_all_the_same_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without a second name for a file, and one that is full: neither can be had everywhere."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    parts = Parts(tmp_path / "parts", {})
    monkeypatch.setattr(os, "link", refuse)
    parts.file(tmp_path / "one", lambda path: path.write_bytes(b"x") and None, name="w")
    monkeypatch.setattr(Path, "replace", refuse)
    assert parts.value(lambda: 1) == 1
    assert (tmp_path / "one").read_bytes() == b"x"
    assert "2 parts could not be kept" in parts.told
    assert not list((tmp_path / "parts").iterdir())


# --- real workers, really killed ----------------------------------------------------------------------------------


@pytest.fixture
def merging(
    plan_for: PlanMaker, dataset: Path, model_folder: Path, sft_adapter: Path, tmp_path: Path
) -> Callable[[str], MergeSpec]:
    base = sharded(model_folder, tmp_path / "base", "200KB")

    def make(parts: str) -> MergeSpec:
        return MergeSpec(
            output_dir=tmp_path / "out", fingerprint="f" * 32, inputs={"base_model": "b", "dpo_adapter": "a"},
            base_model=base, adapter=sft_adapter, dataset=dataset, plan=plan_for(), probe_pairs=2,
            parts=tmp_path / parts if parts else None,
        )  # fmt: skip

    return make


def test_a_merge_that_is_killed_goes_on_after_the_last_whole_file(
    merging: Callable[[str], MergeSpec], worker: Workers, tmp_path: Path
) -> None:
    """Killed in its third file; then the second one is damaged."""
    out, work = tmp_path / "out", tmp_path / "work"
    killed = worker.run("merge", merging("parts"), work, fault=DIES_IN_A_FILE.format(at=3))
    assert killed.status == -signal.SIGKILL, killed.said
    assert not (out / "manifest.json").exists()
    files = sorted(path for path in (tmp_path / "parts").iterdir() if path.suffix != ".json")
    assert len(files) == 2
    data = bytearray(files[1].read_bytes())
    data[-8] ^= 1
    files[1].write_bytes(data)
    last = worker.run("merge", merging("parts"), work)
    assert last.status == 0, last.said
    assert "merge: 1 parts of an earlier try are taken up; 1 of them were not what had been kept" in last.said
    resumed = made(out)
    assert sum(name.endswith(".safetensors") for name in resumed) > 3
    whole = worker.run("merge", merging(""), work)
    assert whole.status == 0, whole.said
    assert resumed == made(out)


def test_a_merge_that_finds_the_disk_full_leaves_nothing_on_it_and_is_whole_once_there_is_room(
    merging: Callable[[str], MergeSpec], worker: Workers, tmp_path: Path
) -> None:
    """A file system of 700 KiB, with room for some of the files and not for all."""
    with disk_of(tmp_path / "disk", 700) as disk:
        places = {"output_dir": disk / "out", "parts": disk / "parts"}
        spec = merging("").model_copy(update=places)
        full = worker.run("merge", spec, tmp_path / "work")
        assert full.status == DISK_FULL_EXIT, full.said
        assert not (disk / "out" / "manifest.json").exists()
        assert not list((disk / "parts").glob("*"))
        make_room(disk, 4000)
        last = worker.run("merge", spec, tmp_path / "work")
        assert last.status == 0, last.said
        assert sum(name.endswith(".safetensors") for name in made(disk / "out")) > 3


@pytest.fixture
def evaluating(
    plan_for: PlanMaker, dataset: Path, model_folder: Path, sft_adapter: Path, tmp_path: Path
) -> Callable[[str], EvaluateSpec]:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Once upon a time there was a cat.\n\nThe sun was warm and the sea was blue.\n", encoding="utf-8")

    def make(kept: str) -> EvaluateSpec:
        return EvaluateSpec(
            output_dir=tmp_path / "out", fingerprint="f" * 32, base_model=model_folder, dataset=dataset,
            inputs={"base_model": "b", "sft_checkpoint": "s", "dpo_adapter": "a", "merged_model": "m"},
            plan=plan_for(), sft_adapter=sft_adapter, policy=model_folder, confidence=0.95, generations=10,
            sampled_answers=10, max_new_tokens=3, min_pairs=1, corpus=corpus,
            parts=tmp_path / kept if kept else None, score_cache=tmp_path / f"{kept}.sqlite" if kept else None,
        )  # fmt: skip

    return make


def test_an_evaluation_that_is_killed_goes_on_after_the_last_whole_batch(
    evaluating: Callable[[str], EvaluateSpec], worker: Workers, tmp_path: Path
) -> None:
    """While the policy draws answers, and while SFT answers: two batches each of the policy's two kinds, two of SFT."""
    out, work, statuses = tmp_path / "out", tmp_path / "work", []
    for at in (2, 4):
        killed = worker.run("evaluate", evaluating("kept"), work, fault=DIES_ANSWERING.format(at=at))
        statuses.append(killed.status)
    assert statuses == [-signal.SIGKILL] * 2
    assert not list(out.glob("*.parquet"))
    last = worker.run("evaluate", evaluating("kept"), work)
    assert last.status == 0, last.said
    # Neutral texts of both, what SFT heard of the policy's and the policy of its own, and four batches of answers.
    assert "evaluate: 8 parts of an earlier try are taken up" in last.said
    resumed, timings = made(out), json.loads((out / "timings.json").read_bytes())
    assert timings["policy_pairs_from_cache"] == timings["sft_pairs_from_cache"] > 0
    whole = worker.run("evaluate", evaluating(""), work)
    assert whole.status == 0, whole.said
    assert resumed == made(out)
