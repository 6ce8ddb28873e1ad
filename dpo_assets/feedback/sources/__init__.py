"""Where feedback comes from, and how its bytes become rows: files, URLs, Hub datasets and SQL tables.

Two steps, for whoever ingests:

    found = files_of(sources, landing)      # what there is to read: local files, each with its hash, or refused
    rows = rows_of(file)                    # the rows of one of them, in bounded memory
    for row in rows: ...
    rows.flags                              # what was normalised on the way, counted

Whatever the source, what is read is a local file that does not change: URLs and Hub files are copied into `landing`,
and what a SQL query gives that is new is written there as one more JSONL file.

A file is refused as a whole or not at all. `files_of` refuses what can be seen without reading rows (`file.refused`);
`rows_of` raises FileRefused at any moment, also after rows came out of it (a gzip file that turns out to be cut off, a
file that changes while it is read). Whoever ingests drops the rows that it got, records the refusal, and goes on with
the next file; a refusal that `passes` is worth another try.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_assets.errors import DpoAssetsError
from dpo_assets.feedback.readers import RowFault

if TYPE_CHECKING:
    from dpo_assets.feedback.sources.hub import HubAccess
    from dpo_assets.feedback.sources.rows import Parse, Rows
    from dpo_assets.recipe import FeedbackSection, FeedbackSource


CHANGED_WHILE_READ = "changed_while_read"
NO_ROWS, EMPTY_EXPORT = "no_rows", "empty_export"  # The second is whole: an empty array, a header alone.


class FileRefused(DpoAssetsError):
    """A file of which no row may be used. `reason` is a code like those of rows, `str()` the message."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message

    @property
    def passes(self) -> bool:
        """Whether it says nothing of the file, only of the moment: worth another try."""
        return self.reason == CHANGED_WHILE_READ

    def __reduce__(self) -> tuple[type[FileRefused], tuple[str, str]]:  # So that it crosses processes.
        return FileRefused, (self.reason, self.message)


@dataclass(frozen=True)
class Limits:
    """What a source may ask for. Everything above is refused, in memory that does not grow with it.

    What a small file holds once it is unpacked is bounded by what reading costs, bytes and rows, and not by how well
    it compresses: rows that share a long system prompt compress hundreds of times.

    Args:
        row_bytes: of one row; a longer one is the fault `row_too_large` of that row.
        depth: of nested JSON; deeper is the fault `too_deep` of that row.
        file_bytes: of one file as it lies on the disk, or is fetched.
        unpacked_bytes: of one compressed or Parquet file, once unpacked.
        unpacked_rows: of one compressed or Parquet file.
        bad_text_rate: share of lines that are not UTF-8 from which the file is taken to be in another encoding.
    """

    row_bytes: int = 4 * 2**20
    depth: int = 64
    file_bytes: int = 64 * 2**30
    unpacked_bytes: int = 4 * 2**30
    unpacked_rows: int = 2_000_000
    bad_text_rate: float = 0.2

    @classmethod
    def of(cls, feedback: FeedbackSection) -> Limits:
        """As the recipe sets them."""
        return cls(unpacked_bytes=int(feedback.max_unpacked_gib * 2**30), unpacked_rows=feedback.max_unpacked_rows)


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class FeedbackFile:
    """One file to read, or one that is refused.

    Args:
        path: the local file.
        name: how people and quarantine rows refer to it: printable, in NFC, and free of where the project lies.
        format: the reader, never `auto`.
        sha256: of the bytes on disk; empty where they cannot be read.
        size: bytes on disk.
        root: the folder that the file may not lie outside of, by links or otherwise; None for this package's own.
        origin: what the recipe calls the source, without credentials.
        columns: column map of the source, name for the reader -> name in the row, or path into it.
        json_columns: columns whose text is JSON, as CSV and SQL have it for lists of messages.
        fields: of the source, for ReadOptions.
        companion: of the source, for ReadOptions.
        companion_sha256: its hash, empty without one.
        sniffed: what `format: auto` saw and how sure it is; empty for a format that the recipe names.
        facts: what else its source says of it: revision, URL, watermarks.
        superseded: numbers of rows that its source has given again since, as they are now: rows of no use.
        limits: what it may ask for. No part of its identity: rows that were read stay read.
        refused: why the file as a whole is refused, or None.
    """

    path: Path
    name: str
    format: str
    sha256: str = ""
    size: int = 0
    root: Path | None = None
    origin: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    json_columns: tuple[str, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    companion: Path | None = None
    companion_sha256: str = ""
    sniffed: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    superseded: tuple[int, ...] = ()
    limits: Limits = DEFAULT_LIMITS
    refused: FileRefused | None = None

    def identity(self) -> dict[str, Any]:
        """What decides the rows of this file, for the fingerprint of its batch. The rest are ReadOptions."""
        return {
            "sha256": self.sha256,
            "name": self.name,
            "format": self.format,
            "columns": dict(self.columns),
            "json_columns": list(self.json_columns),
            "fields": dict(self.fields),
            "companion_sha256": self.companion_sha256,
            "superseded": list(self.superseded),
        }


class SourceRow(NamedTuple):
    """One row. `number` is its line where rows are lines (JSONL, CSV), else its place among the rows; from 1.

    `raw` holds its bytes: as read for JSON and CSV (a row over the limit is cut), as JSON for Parquet and SQL.
    `value` is the row with the source's column map applied and its text normalised, or why it has none.
    `flags` says what was normalised inside it.
    """

    number: int
    raw: bytes
    value: Mapping[str, Any] | RowFault
    flags: tuple[str, ...] = ()


class Span(NamedTuple):
    """A part of a file's bytes that starts and ends between rows: lines from `line` to before `end`."""

    start: int
    stop: int
    line: int
    end: int


AUTO = "auto"  # The format of a source whose files are looked at to tell it.


def files_of(
    sources: Sequence[FeedbackSource],
    landing: Path | None = None,
    *,
    hub: HubAccess | None = None,
    limits: Limits = DEFAULT_LIMITS,
    day: date | None = None,
) -> list[FeedbackFile]:
    """Every file that `sources` name, in order, each once, refused ones included.

    Args:
        sources: of the recipe, with absolute paths (`recipe.resolve_paths`).
        landing: a folder that lives as long as the pipeline; needed for URLs, Hub datasets and SQL.
        hub: makes a client of the Hub (`HubResource.api`); default: its public address, without a token.
        limits: see Limits; each file takes them along.
        day: only the files of that day, of sources whose path names one; a source may then match no file.

    Raises:
        ConfigError: a source cannot work as it is written; a FeedbackError when it matches no file.
        InfrastructureError: a server did not answer. Worth another try.
    """
    from dpo_assets.feedback.sources.finding import find

    return find(sources, landing, hub, limits, day)


def rows_of(file: FeedbackFile, span: Span | None = None, *, parse: Parse | None = None) -> Rows:
    """The rows of a file, or of one span of it, in order, in bounded memory. Iterate once; then see its `flags`.

    Args:
        file: from `files_of`. Can be sent to another process.
        span: one of `spans_of(file)`.
        parse: JSON bytes to an object, raising RowFault; default `lines.parse_line`. Not called for CSV and Parquet.

    Raises:
        FileRefused: while iterating, at any moment. All rows of the file are void then.
    """
    from dpo_assets.feedback.sources.rows import Rows

    return Rows(file, span, parse)


def spans_of(file: FeedbackFile, size: int = 64 * 2**20, rows: int = 2**16) -> list[Span] | None:
    """Parts that can be read by several processes, or None: read it with `rows_of(file)`.

    A part ends behind the line with which it reaches `size` bytes or `rows` lines, whichever comes first.

    Only plain UTF-8 JSONL can be cut. Who reads by spans calls `verify_unchanged` after the last one; `rows_of`
    without a span does it itself.

    Raises:
        FileRefused: most lines are not UTF-8.
    """
    from dpo_assets.feedback.sources.rows import cut

    return cut(file, size, rows)


def verify_unchanged(file: FeedbackFile) -> None:
    """Raises FileRefused (`changed_while_read`) when the file is not the one that `files_of` saw."""
    from dpo_assets.feedback.sources.files import verify

    verify(file)
