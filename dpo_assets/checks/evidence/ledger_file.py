"""The file of a ledger: one writer at a time, whole lines or none, and its head kept beside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_assets.checks.evidence.ledger import FIRST, Ledger
from dpo_assets.errors import ConfigError

FOLDER, NAME = "ledger", "promotions.jsonl"


class Head(BaseModel):
    """The last line as its writer left it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lines: int
    digest: str


@dataclass(frozen=True)
class LedgerFile:
    """`promotions.jsonl`, and `promotions.head` with the digest of the last line that was written.

    A line counts once its end of line is there. Whoever is killed while writing leaves a part without one, which no
    decision and no release stands on yet: readers pass it over, and the next writer puts it aside. Lines that are lost
    at the end are found by the head, which is written after them.
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
    def torn_path(self) -> Path:
        """What was cut off from half-written ends, one after the other."""
        return self.path.with_suffix(".torn")

    def read(self) -> Ledger:
        """The ledger as it is now; empty where none was begun.

        Raises:
            ConfigError: it was changed, or lines at its end are lost.
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
                self._keep(after)
            return after

    def _read(self) -> tuple[Ledger, bytes]:
        """The ledger, and what is left of a line whose writer did not finish."""
        whole, end, torn = (self.path.read_bytes() if self.path.exists() else b"").rpartition(b"\n")
        ledger = Ledger.of_text((whole + end).decode("utf-8", errors="replace"))
        head = self._head()
        written = ledger.lines[head.lines - 1].digest if 0 < head.lines <= len(ledger.lines) else FIRST
        if written != head.digest:
            raise ConfigError(
                f"{self.path} has lost lines: it holds {len(ledger.lines)}, and {self.head_path.name} beside it names "
                f"line {head.lines} as {head.digest[:12]}. Put it back from a backup, or from the newest "
                "`ledger.jsonl` among the artefacts of `promotion`"
            )
        return ledger, torn

    def _head(self) -> Head:
        if not self.head_path.exists():
            return Head(lines=0, digest=FIRST)
        try:
            return Head.model_validate_json(self.head_path.read_bytes())
        except ValidationError:
            raise ConfigError(
                f"{self.head_path} cannot be read; put it back from a backup, or delete it if {self.path} is whole"
            ) from None

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

    def _keep(self, ledger: Ledger) -> None:
        partial = self.head_path.with_suffix(f".head.tmp-{os.getpid()}")
        with partial.open("w", encoding="utf-8") as handle:
            handle.write(Head(lines=len(ledger.lines), digest=ledger.head).model_dump_json())
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(self.head_path)
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
