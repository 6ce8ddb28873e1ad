"""Checkpoints of one running stage on disk: each is written beside its name, its marker last, and only one that
verifies is taken up.

Transformers writes a checkpoint in place, takes the highest number for the newest, and goes on from one that lacks its
optimizer or holds flipped bytes without a word (its issues 35525 and 35782).
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_assets.artifact import FileEntry, sync_directory
from dpo_assets.hashing import file_sha256
from dpo_assets.training.reporting import Reporter

MARKER = "checkpoint.json"
KEPT = 2  # Checkpoints of a stage: when the newest is damaged, the one before it is there.
# Between two that are flushed to the disk: a flush takes longer than all else of a small checkpoint, and nothing that
# a killed process wrote waits for it.
FLUSH_SECONDS = 5.0
REACHED, TRIES = "reached", "tries.jsonl"
REJECTED = "_rejected"


class Marker(BaseModel):
    """What a complete checkpoint is of, and its files."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    step: int
    identity: dict[str, str]
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder, and the optimizer steps that were done."""

    path: Path
    step: int


class Unusable(Exception):
    """Why a checkpoint is not taken up."""


class CheckpointFolder:
    """The checkpoints of a stage.

    Args:
        folder: where they lie; made if it is not there.
        identity: what a stage must have in common with a checkpoint to go on from it: name -> digest or value.
        stage: what its log lines begin with.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str], stage: str) -> None:
        self.folder, self.identity, self.stage = folder, dict(identity), stage
        self._flushed: Path | None = None
        self._flushed_at = -math.inf
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, fill: Callable[[Path], None]) -> Checkpoint:
        """A checkpoint of `step`, whose files `fill` writes into an empty folder.

        From here on it survives the process, and the machine once it is flushed (`flush`). What a loss of power tore
        does not verify.
        """
        final = self.folder / f"step-{step:09d}"
        partial = final.with_name(f"{final.name}.tmp-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            fill(partial)
            files = {path.name: _entry(path) for path in sorted(partial.iterdir())}
            marker = Marker(step=step, identity=self.identity, files=files)
            (partial / MARKER).write_text(marker.model_dump_json(indent=1), encoding="utf-8")
            if final.exists():  # Damaged, or it would have been gone on from.
                shutil.rmtree(final)
            partial.rename(final)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)  # A full disk must not stay full of what cannot be read.
            raise
        return Checkpoint(final, step)

    def flush(self, checkpoint: Checkpoint, *, at_once: bool) -> None:
        """Flushes it to the disk, where none was for some seconds or `at_once`. Older ones go.

        What stays are the last two, and the last that was flushed.

        Raises:
            OSError: it could not be flushed, and is removed.
        """
        if at_once or time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
            try:
                for path in checkpoint.path.iterdir():
                    with path.open("rb") as handle:
                        os.fsync(handle.fileno())
                sync_directory(checkpoint.path)
                sync_directory(self.folder)
            except OSError:
                shutil.rmtree(checkpoint.path, ignore_errors=True)
                raise
            self._flushed, self._flushed_at = checkpoint.path, time.monotonic()
        for old in sorted(self._complete())[:-KEPT]:
            if old != self._flushed:
                shutil.rmtree(old, ignore_errors=True)

    def newest(self, reporter: Reporter) -> Checkpoint | None:
        """The newest checkpoint that verifies and is of this very stage, or None.

        One that is damaged or of something else is moved to `_rejected` beside the folder. What a writer that died left
        half-written is removed. Both are told.
        """
        for partial in self.folder.glob("step-*.tmp-*"):
            reporter.log(f"{self.stage}: {partial.name} was never finished and is removed")
            shutil.rmtree(partial, ignore_errors=True)
        for path in sorted(self._complete(), reverse=True):
            try:
                return self._verified(path)
            except Unusable as why:
                target = self.folder.parent / REJECTED / f"{self.folder.name}-{path.name}-{os.urandom(4).hex()}"
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
                reporter.log(
                    f"{self.stage}: checkpoint {path.name} is not gone on from: {why}. It is set aside as {target}"
                )
        return None

    def _complete(self) -> Iterator[Path]:
        return (path for path in self.folder.iterdir() if re.fullmatch(r"step-\d{9}", path.name) and path.is_dir())

    def _verified(self, path: Path) -> Checkpoint:
        """Raises:
        Unusable: naming the file and its damage, or what it is of.
        """
        try:
            marker = Marker.model_validate_json((path / MARKER).read_bytes())
        except FileNotFoundError:
            raise Unusable(f"{MARKER} is missing") from None
        except (OSError, ValidationError):
            raise Unusable(f"{MARKER} cannot be read") from None
        for name, entry in marker.files.items():
            file = path / name
            if not file.is_file():
                raise Unusable(f"{name} is missing")
            if (size := file.stat().st_size) != entry.size:
                raise Unusable(f"{name} has {size} bytes and not {entry.size}")
            if file_sha256(file) != entry.sha256:
                raise Unusable(f"{name} is not what was written (its sha256 differs)")
        present = {file.name for file in path.iterdir()} - {MARKER}
        if extra := present - set(marker.files):
            raise Unusable(f"it holds {', '.join(sorted(extra))}, which nobody wrote there")
        if path.name != f"step-{marker.step:09d}":
            raise Unusable(f"its marker is that of step {marker.step}")
        names = sorted({*self.identity, *marker.identity})
        if others := [name for name in names if self.identity.get(name) != marker.identity.get(name)]:
            raise Unusable(f"it is of another run ({', '.join(others)} differ)")
        return Checkpoint(path, marker.step)


@dataclass(frozen=True)
class Tries:
    """What the tries of a stage have cost, this one included."""

    resumed: int  # How often it went on from a checkpoint.
    steps_again: int  # Optimizer steps that were done a second time.


class Reached:
    """How far a try came, written at every step, so that the next one can tell what it does twice.

    Sixteen bytes in place: they survive the end of the process, and nothing is decided by them.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.tries = folder / REACHED, folder / TRIES
        self._descriptor = -1

    def begin(self, step: int) -> Tries:
        """A try that goes on after `step`, which is 0 for one from the start."""
        before = self._read()
        with self.tries.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"from": step, "reached": max(step, before)}) + "\n")
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        self.at(step)
        lines = []
        for line in self.tries.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # One that a full disk cut off.
                lines.append(json.loads(line))
        return Tries(sum(one["from"] > 0 for one in lines), sum(one["reached"] - one["from"] for one in lines))

    def at(self, step: int) -> None:
        os.pwrite(self._descriptor, f"{step:15d}\n".encode(), 0)

    def _read(self) -> int:
        try:
            return int(self.path.read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):
            return 0


def _entry(path: Path) -> FileEntry:
    return FileEntry(sha256=file_sha256(path), size=path.stat().st_size)
