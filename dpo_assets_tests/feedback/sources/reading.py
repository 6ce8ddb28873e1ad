"""Short ways to what the sources make of bytes and files, for their tests."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_assets.feedback.readers import RowFault
from dpo_assets.feedback.sources import (
    FeedbackFile,
    FileRefused,
    Limits,
    SourceRow,
    files_of,
    rows_of,
)
from dpo_assets.recipe import FeedbackSource

ROWS: list[dict[str, Any]] = [{"prompt": f"q{n}", "chosen": "yes", "rejected": "no"} for n in range(3)]


def row(number: int = 0, **changes: Any) -> bytes:
    return json.dumps(
        {"prompt": f"q{number}", "chosen": "yes", "rejected": "no"} | changes, ensure_ascii=False
    ).encode()


def jsonl(rows: Sequence[Mapping[str, Any]] = ROWS) -> bytes:
    return b"".join(json.dumps(one, ensure_ascii=False).encode() + b"\n" for one in rows)


@dataclass(frozen=True)
class Outcome:
    """Everything that came of one file: rows or a refusal, never both in the end."""

    file: FeedbackFile
    rows: list[SourceRow]
    flags: Counter[str]
    refused: FileRefused | None

    @property
    def values(self) -> list[Mapping[str, Any]]:
        return [one.value for one in self.rows if not isinstance(one.value, RowFault)]

    @property
    def faults(self) -> list[tuple[int, str]]:
        return [(one.number, one.value.reason) for one in self.rows if isinstance(one.value, RowFault)]

    @property
    def reason(self) -> str:
        assert self.refused is not None
        assert self.refused.message
        return self.refused.reason


def outcome(file: FeedbackFile, limits: Limits | None = None) -> Outcome:
    rows = rows_of(replace(file, limits=limits) if limits is not None else file)
    try:
        return Outcome(file, list(rows), rows.flags, None)
    except FileRefused as refused:
        return Outcome(file, [], rows.flags, refused)


def read(
    folder: Path, content: bytes, name: str = "export.jsonl", limits: Limits | None = None, **source: Any
) -> Outcome:
    """What comes of a file with this content and name."""
    (folder / name).write_bytes(content)
    return outcome(found(folder / name, **source), limits)


def found(path: Path | str, **source: Any) -> FeedbackFile:
    [file] = files_of([FeedbackSource(path=str(path), **source)])
    return file
