"""Artefacts: what is damaged is never read, what is half written is never seen, what is equal is built once."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets import artifact as module
from dpo_assets.artifact import (
    MANIFEST,
    VOLATILE,
    Artifact,
    ArtifactTree,
    fingerprint,
    open_artifact,
    rewrite_json,
    seal,
    write_json,
)
from dpo_assets.errors import CorruptArtifact
from dpo_assets.version import __version__

KIND, PRINT = "dpo_adapter", "0" * 32
Files = dict[str, bytes]

# Names that cannot collide with each other as file and folder.
_names = st.sampled_from(["weights.safetensors", "report.json", "empty", ".hidden", "plots/loss.png", "a/b/c.txt"])
_files = st.dictionaries(_names, st.binary(max_size=20), min_size=1)


def write(folder: Path, files: Files) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def sealed(folder: Path, files: Files) -> Artifact:
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, files)
    return seal(folder, kind=KIND, fingerprint=PRINT, inputs={"base_model": "f" * 64})


def builder(files: Files) -> Callable[[Path], None]:
    return lambda folder: write(folder, files)


def entries(tree: ArtifactTree) -> set[str]:
    """What lies beside the artefacts of KIND, locks aside."""
    return {path.name for path in (tree.root / KIND).iterdir() if path.suffix not in (".lock", ".owner")}


# Verification


@settings(max_examples=20, deadline=None)
@given(files=_files)
def test_a_sealed_folder_opens_with_its_files_listed(files: Files) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = sealed(Path(folder), files)
        opened = open_artifact(Path(folder))
    assert opened == made
    assert set(opened.manifest.files) == set(files)
    assert opened.size == sum(len(data) for data in files.values())
    assert opened.manifest.versions == {"dpo_assets": __version__}
    assert opened.manifest.inputs == {"base_model": "f" * 64}


@settings(max_examples=40, deadline=None)
@given(files=_files, data=st.data())
def test_every_single_flipped_cut_grown_removed_or_added_file_is_detected(files: Files, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sealed(folder, files)
        victim = folder / data.draw(st.sampled_from(sorted(files)))
        content = victim.read_bytes()
        kinds = ["grow", "remove", "add", *(["flip", "cut"] if content else [])]
        kind = data.draw(st.sampled_from(kinds))
        if kind == "flip":
            position = data.draw(st.integers(0, len(content) - 1))
            flipped = bytearray(content)
            flipped[position] ^= data.draw(st.integers(1, 255))
            victim.write_bytes(flipped)
        elif kind == "cut":
            victim.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        elif kind == "grow":
            victim.write_bytes(content + b"\0")
        elif kind == "remove":
            victim.unlink()
        else:
            (victim.parent / "new.bin").write_bytes(content)
        with pytest.raises(CorruptArtifact, match="new\\.bin" if kind == "add" else victim.name.replace(".", "\\.")):
            open_artifact(folder)


def test_a_flipped_byte_in_the_timings_is_detected_though_no_digest_counts_them(tmp_path: Path) -> None:
    sealed(tmp_path, {VOLATILE: b"{}", "report.json": b"{}"})
    (tmp_path / VOLATILE).write_bytes(b"[]")
    with pytest.raises(CorruptArtifact, match=r"timings\.json: differs"):
        open_artifact(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"kind"', '"kin"', 1),
        lambda text: text.replace('"size": 2', '"size": "two"', 1),
        lambda text: text.replace('"sha256": "', '"sha256": "0', 1),
        lambda text: text.replace('"report.json"', '"other.json"', 1),
    ],
    ids=["cut", "empty", "a list", "misspelt key", "wrong type", "wrong hash", "renamed file"],
)
def test_a_damaged_manifest_is_detected(tmp_path: Path, damage: Callable[[str], str]) -> None:
    sealed(tmp_path, {"report.json": b"{}"})
    text = (tmp_path / MANIFEST).read_text()
    assert damage(text) != text
    (tmp_path / MANIFEST).write_text(damage(text))
    with pytest.raises(CorruptArtifact):
        open_artifact(tmp_path)


def test_a_folder_without_a_manifest_has_an_unfinished_writer(tmp_path: Path) -> None:
    write(tmp_path, {"report.json": b"{}"})
    with pytest.raises(CorruptArtifact, match="the writer did not finish"):
        open_artifact(tmp_path)
    with pytest.raises(CorruptArtifact, match="the writer did not finish"):
        open_artifact(tmp_path / "missing")


def test_a_writer_that_dies_before_the_last_step_leaves_no_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", die)
    with pytest.raises(OSError, match="no space"):
        sealed(tmp_path, {"report.json": b"{}"})
    assert not (tmp_path / MANIFEST).exists()


# Identity


@settings(max_examples=15, deadline=None)
@given(one=_files, other=_files)
def test_equal_content_and_only_equal_content_gives_equal_digests(one: Files, other: Files) -> None:
    with tempfile.TemporaryDirectory() as name:
        first, second, third = (Path(name) / part for part in ("1", "2", "3"))
        reordered = dict(reversed(one.items()))
        assert sealed(first, one).digest == sealed(second, reordered).digest
        assert (sealed(third, other).digest == sealed(first.with_name("4"), one).digest) == (one == other)


def test_moving_bytes_from_one_file_to_the_next_changes_the_digest(tmp_path: Path) -> None:
    one = sealed(tmp_path / "1", {"a": b"xy", "b": b"z"})
    assert one.digest != sealed(tmp_path / "2", {"a": b"x", "b": b"yz"}).digest
    assert one.digest != sealed(tmp_path / "3", {"b": b"xy", "a": b"z"}).digest


def test_timings_do_not_change_the_digest_but_a_file_of_that_name_in_a_folder_does(tmp_path: Path) -> None:
    plain = sealed(tmp_path / "1", {"report.json": b"{}"})
    assert sealed(tmp_path / "2", {"report.json": b"{}", VOLATILE: b"1"}).digest == plain.digest
    assert sealed(tmp_path / "3", {"report.json": b"{}", f"model/{VOLATILE}": b"1"}).digest != plain.digest


def test_a_fingerprint_ignores_key_order_and_sees_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    one = fingerprint("sft", {"rank": 8, "alpha": 16}, {"base": "a", "data": "b"})
    assert one == fingerprint("sft", {"alpha": 16, "rank": 8}, {"data": "b", "base": "a"})
    others = {
        fingerprint("dpo", {"rank": 8, "alpha": 16}, {"base": "a", "data": "b"}),
        fingerprint("sft", {"rank": 16, "alpha": 8}, {"base": "a", "data": "b"}),
        fingerprint("sft", {"rank": 8, "alpha": 16}, {"base": "b", "data": "a"}),
        fingerprint("sft", {"rank": 8, "alpha": 16}, {}),
    }
    monkeypatch.setattr(module, "__version__", "9.9.9")
    others.add(fingerprint("sft", {"rank": 8, "alpha": 16}, {"base": "a", "data": "b"}))
    assert len(others | {one}) == 6
    assert all(len(value) == 32 and set(value) <= set("0123456789abcdef") for value in others | {one})


def test_json_of_equal_values_is_equal_in_bytes_and_reads_back(tmp_path: Path) -> None:
    write_json(tmp_path / "1", {"b": 1, "ä": ["…"]})
    write_json(tmp_path / "2", {"ä": ["…"], "b": 1})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert "ä" in (tmp_path / "1").read_text(encoding="utf-8")
    (tmp_path / "art").mkdir()
    write_json(tmp_path / "art" / "report.json", {"b": 1})
    assert seal(tmp_path / "art", kind=KIND, fingerprint=PRINT, inputs={}).json("report.json") == {"b": 1}


def test_numbers_that_json_has_no_word_for_are_null_in_what_this_package_writes(tmp_path: Path) -> None:
    write_json(tmp_path / "own", {"a": [math.nan, (1.5, math.inf)], "b": {"c": -math.inf}, "d": 2})
    assert json.loads((tmp_path / "own").read_text()) == {"a": [None, [1.5, None]], "b": {"c": None}, "d": 2}


def test_a_config_of_another_program_keeps_its_infinity(tmp_path: Path) -> None:
    """Mamba 2's `time_step_limit` ends there; null in its place is no config that its class reads."""
    config = json.loads('{"time_step_limit": [0.0, Infinity]}')
    rewrite_json(tmp_path / "config.json", config)
    assert json.loads((tmp_path / "config.json").read_text()) == config


# Finding and building


@pytest.fixture
def tree(tmp_path: Path) -> ArtifactTree:
    return ArtifactTree(tmp_path / "store")


def test_an_artefact_is_built_once_and_then_reused(tree: ArtifactTree) -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        assert list(folder.iterdir()) == []
        built.append(folder)
        write(folder, {"report.json": b"{}"})

    first, reused_first = tree.find_or_build(KIND, PRINT, build, {"base_model": "d"})
    second, reused_second = tree.find_or_build(KIND, PRINT, build, {"base_model": "d"})
    assert (reused_first, reused_second, len(built)) == (False, True, 1)
    assert first == second == tree.find(KIND, PRINT)
    assert first.path == tree.directory(KIND, PRINT) == tree.root / KIND / PRINT
    assert (first.manifest.kind, first.fingerprint) == (KIND, PRINT)
    assert first.manifest.inputs == {"base_model": "d"}
    assert entries(tree) == {PRINT}


def test_the_newest_artefact_of_equal_inputs_is_found_unless_it_is_damaged(tree: ArtifactTree) -> None:
    for number, inputs in (("1", {"base_model": "d"}), ("2", {"base_model": "d"}), ("3", {"base_model": "other"})):
        made, _ = tree.find_or_build(
            KIND, number * 32, lambda folder, n=number: write(folder, {"a": n.encode()}), inputs
        )
        os.utime(made.path / MANIFEST, (int(number), int(number)))
    newest = tree.latest(KIND, {"base_model": "d"})
    assert newest is not None
    assert newest.fingerprint == "2" * 32
    assert tree.latest(KIND, {"base_model": "third"}) is None
    assert tree.latest("other", {"base_model": "d"}) is None
    (newest.path / "a").write_bytes(b"?")
    older = tree.latest(KIND, {"base_model": "d"})
    assert older is not None
    assert older.fingerprint == "1" * 32


def test_what_is_being_written_and_what_nobody_can_read_are_no_newest_artefact(tree: ArtifactTree) -> None:
    inputs = {"base_model": "d"}
    whole, _ = tree.find_or_build(KIND, PRINT, lambda folder: write(folder, {"a": b""}), inputs)
    scratch = whole.path.with_name(f"{'1' * 32}.tmp-7")
    scratch.mkdir()
    seal(scratch, kind=KIND, fingerprint="1" * 32, inputs=inputs)
    broken = whole.path.with_name("2" * 32)
    broken.mkdir()
    (broken / MANIFEST).write_text("{", encoding="utf-8")
    for number, folder in enumerate((whole.path, scratch, broken), start=1):
        os.utime(folder / MANIFEST, (number, number))
    assert tree.latest(KIND, inputs) == whole
    assert scratch.is_dir()


def test_artefacts_of_another_version_of_the_package_are_not_taken_up(
    tree: ArtifactTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree.find_or_build(KIND, PRINT, lambda folder: write(folder, {"a": b""}), {"base_model": "d"})
    monkeypatch.setattr("dpo_assets.artifact.__version__", "another")
    assert tree.latest(KIND, {"base_model": "d"}) is None


@pytest.mark.parametrize("name", ["", ".", "..", "0" * 31, "G" * 32, f"{PRINT}/..", f"{PRINT}.lock"])
def test_what_is_no_fingerprint_names_no_folder_and_moves_none(tree: ArtifactTree, name: str) -> None:
    tree.find_or_build(KIND, PRINT, builder({"a": b"1"}), {})
    with pytest.raises(ValueError, match="is no fingerprint of a `dpo_adapter`"):
        tree.find(KIND, name)
    assert entries(tree) == {PRINT}
    assert not (tree.root / "_rejected").exists()


def test_an_artefact_that_is_set_aside_while_they_are_listed_is_passed_over(tree: ArtifactTree) -> None:
    for number in "12":
        made, _ = tree.find_or_build(KIND, number * 32, builder({"a": b"1"}), {})
        os.utime(made.path / MANIFEST, (int(number), int(number)))
    listing = tree.listed(KIND)
    assert next(listing).fingerprint == "2" * 32
    shutil.rmtree(tree.directory(KIND, "1" * 32))
    assert list(listing) == []


def test_what_was_never_built_is_not_found(tree: ArtifactTree) -> None:
    assert tree.find(KIND, PRINT) is None
    assert not tree.root.exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_build_that_raises_leaves_nothing_and_the_next_one_succeeds(
    tree: ArtifactTree, error: type[BaseException]
) -> None:
    def build(folder: Path) -> None:
        write(folder, {"half.bin": b"x"})
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        tree.find_or_build(KIND, PRINT, build, {})
    assert entries(tree) == set()
    assert tree.find(KIND, PRINT) is None
    assert tree.find_or_build(KIND, PRINT, builder({"a": b"1"}), {})[1] is False


def test_a_failed_build_leaves_its_neighbours_alone(tree: ArtifactTree) -> None:
    kept, _ = tree.find_or_build(KIND, "1" * 32, builder({"a": b"1"}), {})
    with pytest.raises(FileNotFoundError):
        tree.find_or_build(KIND, PRINT, lambda folder: (folder / "missing").unlink(), {})
    assert entries(tree) == {"1" * 32}
    assert tree.find(KIND, "1" * 32) == kept


def test_a_build_that_seals_itself_keeps_its_own_manifest(tree: ArtifactTree) -> None:
    def build(folder: Path) -> None:
        write(folder, {"a": b"1"})
        seal(folder, kind=KIND, fingerprint=PRINT, inputs={"base_model": "d"}, versions={"torch": "2"})

    made, _ = tree.find_or_build(KIND, PRINT, build, {"base_model": "d"})
    assert made.manifest.versions["torch"] == "2"


def test_a_build_that_seals_other_inputs_than_it_was_given_is_refused_and_leaves_nothing(tree: ArtifactTree) -> None:
    def build(folder: Path) -> None:
        seal(folder, kind=KIND, fingerprint=PRINT, inputs={"base_model": "d"})

    with pytest.raises(CorruptArtifact, match="names other inputs"):
        tree.find_or_build(KIND, PRINT, build, {"base_model": "d", "dpo_dataset": "e"})
    assert entries(tree) == set()


def test_a_build_that_changes_a_file_after_sealing_is_refused_and_leaves_nothing(tree: ArtifactTree) -> None:
    def build(folder: Path) -> None:
        write(folder, {"a": b"1"})
        seal(folder, kind=KIND, fingerprint=PRINT, inputs={})
        (folder / "a").write_bytes(b"2")

    with pytest.raises(CorruptArtifact, match="differs"):
        tree.find_or_build(KIND, PRINT, build, {})
    assert entries(tree) == set()


@pytest.mark.parametrize("stranger", [{"kind": "sft_checkpoint"}, {"fingerprint": "1" * 32}], ids=repr)
def test_an_artefact_of_another_kind_or_fingerprint_is_not_found_under_this_name(
    tree: ArtifactTree, stranger: dict[str, str]
) -> None:
    folder = tree.directory(KIND, PRINT)
    folder.mkdir(parents=True)
    write(folder, {"a": b"1"})
    named = {"kind": KIND, "fingerprint": PRINT} | stranger
    seal(folder, kind=named["kind"], fingerprint=named["fingerprint"], inputs={})
    assert tree.find(KIND, PRINT) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "a").write_bytes(b"2"),
        lambda folder: (folder / "a").unlink(),
        lambda folder: (folder / "b").write_bytes(b""),
        lambda folder: (folder / MANIFEST).unlink(),
    ],
    ids=["changed", "removed", "added", "no manifest"],
)
def test_a_damaged_artefact_is_set_aside_whole_and_built_again_equal(
    tree: ArtifactTree, damage: Callable[[Path], Any]
) -> None:
    first, _ = tree.find_or_build(KIND, PRINT, builder({"a": b"1"}), {})
    damage(first.path)
    left = {path.name: path.read_bytes() for path in first.path.iterdir()}
    again, reused = tree.find_or_build(KIND, PRINT, builder({"a": b"1"}), {})
    assert (reused, again.digest) == (False, first.digest)
    [aside] = (tree.root / "_rejected").iterdir()
    assert aside.name.startswith(f"{KIND}-{PRINT}-")
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == left


def test_a_damaged_artefact_is_found_by_nobody_and_kept_twice_when_it_happens_twice(tree: ArtifactTree) -> None:
    for _ in range(2):
        made, _reused = tree.find_or_build(KIND, PRINT, builder({"a": b"1"}), {})
        (made.path / "a").write_bytes(b"2")
        assert tree.find(KIND, PRINT) is None
    assert len(list((tree.root / "_rejected").iterdir())) == 2


def test_scratch_folders_of_dead_writers_are_removed_and_those_of_other_artefacts_are_not(tree: ArtifactTree) -> None:
    kind = tree.root / KIND
    for name in (f"{PRINT}.tmp-1", f"{PRINT}.tmp-2", f"{'1' * 32}.tmp-1"):
        (kind / name).mkdir(parents=True)
        (kind / name / "half.bin").write_bytes(b"x")
    tree.find_or_build(KIND, PRINT, builder({"a": b"1"}), {})
    assert entries(tree) == {PRINT, f"{'1' * 32}.tmp-1"}


def test_a_damaged_artefact_is_told_with_its_file_the_damage_and_where_it_lies_now(tree: ArtifactTree) -> None:
    made, _ = tree.find_or_build(KIND, PRINT, builder({"weights.safetensors": b"1"}), {})
    (made.path / "weights.safetensors").write_bytes(b"2")
    told: list[str] = []
    assert ArtifactTree(tree.root, told.append).find(KIND, PRINT) is None
    [aside] = (tree.root / "_rejected").iterdir()
    why = f"{made.path / 'weights.safetensors'}: differs from the manifest (size or sha256)"
    assert told == [f"a `{KIND}` is damaged and was set aside as {aside}: {why}"]
    # Whoever misses it later, in another process, is told the same.
    assert tree.missing(KIND, PRINT) == f"was damaged and set aside as {aside}: {why}"
    assert tree.missing(KIND, "1" * 32) == f"is missing from {tree.root / KIND}"


# Other writers

_WRITER = """
import os, signal, sys
from pathlib import Path
from dpo_assets.artifact import ArtifactTree

root, mode = sys.argv[1:]

def build(folder):
    (folder / "a").write_text("1")
    print("building", flush=True)
    if mode == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.readline()

print("asking", flush=True)
artifact, reused = ArtifactTree(Path(root)).find_or_build("dpo_adapter", "0" * 32, build, {})
print(f"{artifact.digest} {reused}", flush=True)
"""


def start_writer(tree: ArtifactTree, mode: str = "wait") -> subprocess.Popen[str]:
    """Another process that asks for the artefact; its build goes on once it is sent a line."""
    command = [sys.executable, "-c", _WRITER, str(tree.root), mode]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(writer: subprocess.Popen[str]) -> str:
    assert writer.stdout is not None
    return writer.stdout.readline().strip()


def test_a_writer_killed_in_the_middle_holds_nobody_up_and_leaves_nothing(tree: ArtifactTree) -> None:
    with start_writer(tree, "die") as writer:
        assert [said(writer), said(writer)] == ["asking", "building"]
    assert writer.returncode == -9
    [scratch] = entries(tree)
    assert scratch.startswith(f"{PRINT}.tmp-")
    assert tree.find(KIND, PRINT) is None
    made, reused = tree.find_or_build(KIND, PRINT, builder({"a": b"1"}), {})
    assert (reused, entries(tree)) == (False, {PRINT})
    assert (made.path / "a").read_bytes() == b"1"


def test_two_processes_that_want_the_same_artefact_build_it_once(tree: ArtifactTree) -> None:
    with start_writer(tree) as first, start_writer(tree) as second:
        assert [said(first), said(second)] == ["asking", "asking"]
        # Either may be the builder; closing both inputs lets whoever builds go on.
        for writer in (first, second):
            assert writer.stdin is not None
            writer.stdin.close()
        outputs = [writer.stdout.read().splitlines() for writer in (first, second) if writer.stdout is not None]
    assert sorted(len(lines) for lines in outputs) == [1, 2]
    results = [lines[-1].split() for lines in outputs]
    assert sorted(reused for _, reused in results) == ["False", "True"]
    assert {digest for digest, _ in results} == {open_artifact(tree.directory(KIND, PRINT)).digest}


def test_two_threads_that_want_the_same_artefact_build_it_once(tree: ArtifactTree) -> None:
    building, go_on = threading.Event(), threading.Event()
    builds: list[int] = []
    results: list[tuple[str, bool]] = []

    def build(folder: Path) -> None:
        builds.append(threading.get_ident())
        building.set()
        assert go_on.wait(10)
        write(folder, {"a": b"1"})

    def want() -> None:
        made, reused = tree.find_or_build(KIND, PRINT, build, {})
        results.append((made.digest, reused))

    threads = [threading.Thread(target=want) for _ in range(2)]
    threads[0].start()
    assert building.wait(10)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert len(builds) == 1
    assert sorted(reused for _, reused in results) == [False, True]
    assert len({digest for digest, _ in results}) == 1


def test_a_copied_artefact_opens_elsewhere_with_the_same_digest(tree: ArtifactTree, tmp_path: Path) -> None:
    made, _ = tree.find_or_build(KIND, PRINT, builder({"a/b": b"1"}), {})
    copied = open_artifact(Path(shutil.copytree(made.path, tmp_path / "copy")))
    assert copied.digest == made.digest
    assert json.loads((copied.path / MANIFEST).read_text())["kind"] == KIND
