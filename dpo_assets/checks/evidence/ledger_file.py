"""The file of a ledger: one writer at a time, whole lines or none, and beside it its head and a second copy."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_assets.checks.evidence.ledger import FIRST, Ledger
from dpo_assets.errors import ConfigError
from dpo_assets.locks import Say, exclusive

FOLDER, NAME = "ledger", "promotions.jsonl"


class Head(BaseModel):
    """The last line as its writer left it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lines: int
    digest: str


@dataclass(frozen=True)
class LedgerFile:
    """`promotions.jsonl`, `promotions.bak.jsonl` with the same lines, and `promotions.head` with the last one's digest.

    A line counts once its end of line is there. Whoever is killed while writing leaves a part without one, which no
    decision and no release stands on yet: readers pass it over, and the next writer puts it aside. Lines that are lost
    at the end are found by the head, which is written after them; the copy is written before the head, so that it holds
    every line that the head names.
    """

    path: Path

    @classmethod
    def of(cls, store: Path) -> LedgerFile:
        """That of a pipeline's folder of artefacts."""
        return cls(store / FOLDER / NAME)

    @property
    def head_path(self) -> Path:
        return self.path.with_suffix(".head")

    @property
    def copy_path(self) -> Path:
        """The same lines once more, for whoever lost the ledger."""
        return self.path.with_suffix(f".bak{self.path.suffix}")

    @property
    def lock_path(self) -> Path:
        """The lock of `going_live`."""
        return self.path.with_name("release.lock")

    @property
    def torn_path(self) -> Path:
        """What was cut off from half-written ends, one after the other."""
        return self.path.with_suffix(".torn")

    @contextmanager
    def going_live(self, run: str, say: Say) -> Iterator[None]:
        """Held by whoever makes a release live, from reading the ledger to the line that says so.

        In between the Hub is written to, and two that do so by turns leave there what the ledger does not say. Whoever
        waits says for whom. Decisions are written meanwhile all the same.

        Args:
            run: who holds it, for those who wait.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(self.lock_path, run, say):
            yield

    def read(self) -> Ledger:
        """The ledger as it is now; empty where none was begun.

        Raises:
            ConfigError: it was changed, or lines at its end are lost; with the copy to put back.
        """
        return self._read()[0]

    def extend(self, change: Callable[[Ledger], Ledger]) -> Ledger:
        """Appends the lines that `change` adds to the ledger, and returns it with them. Nobody else writes meanwhile.

        Raises:
            ConfigError: as `read`.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            before, torn = self._read()
            after = change(before)
            if after.lines[: len(before.lines)] != before.lines:
                raise ValueError("a ledger only grows")
            if len(after.lines) > len(before.lines):
                if torn:
                    self._set_aside(torn)
                added = "".join(f"{line.text}\n" for line in after.lines[len(before.lines) :])
                self._append(added.encode())
                self._replace(self.copy_path, after.text)
                self._replace(self.head_path, Head(lines=len(after.lines), digest=after.head).model_dump_json())
            return after

    def _read(self) -> tuple[Ledger, bytes]:
        """The ledger, and what is left of a line whose writer did not finish."""
        whole, end, torn = (self.path.read_bytes() if self.path.exists() else b"").rpartition(b"\n")
        try:
            ledger = Ledger.of_text((whole + end).decode("utf-8", errors="replace"))
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}. {self._way_out()}") from error
        head, kept_in = self._head()
        written = ledger.lines[head.lines - 1].digest if 0 < head.lines <= len(ledger.lines) else FIRST
        if written != head.digest:
            raise ConfigError(
                f"{self.path} has lost lines: it holds {len(ledger.lines)}, and {kept_in.name} beside it names "
                f"line {head.lines} as {head.digest[:12]}. {self._way_out()}"
            )
        return ledger, torn

    def _way_out(self) -> str:
        if self.copy_path.exists():
            return f"Put it back from the copy beside it: cp {self.copy_path} {self.path}"
        return "Put the folder back from a backup"

    def _head(self) -> tuple[Head, Path]:
        """The last line that was written, and by which file that is known: where the head is gone, by the copy."""
        if not self.head_path.exists():
            return self._head_of_copy(), self.copy_path
        try:
            return Head.model_validate_json(self.head_path.read_bytes()), self.head_path
        except ValidationError:
            raise ConfigError(
                f"{self.head_path} cannot be read. Delete it: {self.copy_path.name} beside it knows the last line too"
                if self.copy_path.exists()
                else f"{self.head_path} cannot be read; put it back from a backup, or delete it if {self.path} is whole"
            ) from None

    def _head_of_copy(self) -> Head:
        lines = self.copy_path.read_bytes().split(b"\n")[:-1] if self.copy_path.exists() else []
        return Head(lines=len(lines), digest=hashlib.sha256(lines[-1]).hexdigest() if lines else FIRST)

    def _append(self, data: bytes) -> None:
        made = not self.path.exists()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            while data:
                data = data[os.write(descriptor, data) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if made:
            _sync(self.path.parent)

    def _replace(self, path: Path, text: str) -> None:
        """Writes a file beside the ledger, whole or not at all."""
        partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        with partial.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)
        _sync(self.path.parent)

    def _set_aside(self, torn: bytes) -> None:
        with self.torn_path.open("ab") as kept:
            kept.write(torn + b"\n")
            os.fsync(kept.fileno())
        with self.path.open("r+b") as handle:
            handle.truncate(self.path.stat().st_size - len(torn))
            os.fsync(handle.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
