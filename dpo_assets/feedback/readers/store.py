"""Joins across rows in bounded memory: rows wait in a private SQLite file until the end of the export.

SQLite keeps about 2 MiB of such a file in memory, writes the rest to the folder for temporary files, and deletes it
when the connection closes ("SQLite: Temporary Files Used By SQLite", section 2.8; `connect("")`). Only the rows of one
group (a conversation, a comparison) are Python objects at a time.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_assets.errors import ConfigError
from dpo_assets.feedback.lines import parse_line, read_lines
from dpo_assets.feedback.readers import Item, Place, ReadOptions, Row, RowFault


@dataclass(frozen=True)
class Identity:
    """What joins a row to others.

    Args:
        id: equal ids are versions of one thing, of which the latest counts; None for a row that stands alone.
        version: when this version was written, in seconds since 1970; of equal ones the later row counts.
        group: rows that must be seen together; None for a row that needs no other.
    """

    id: str | None = None
    version: float = -math.inf
    group: str | None = None


@dataclass(frozen=True)
class Stored:
    """A row that waited, in its latest version."""

    place: Place
    row: Row


ReadGroup = Callable[[Sequence[Stored], ReadOptions], Iterator[tuple[Place, Item]]]


def _scratch() -> sqlite3.Connection:
    # One reader uses it, but the ingester may close it from another thread.
    database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("PRAGMA synchronous = OFF")
    database.execute("BEGIN")  # One transaction, never committed: nothing outlives the connection.
    return database


def _key(text: str | None) -> bytes | None:
    # Bytes, because SQLite refuses text with lone surrogates.
    return None if text is None else text.encode("utf-8", "surrogatepass")


class GroupedReader:
    """A FileReader whose rows are decided at the end of the file, group by group, outdated versions set aside.

    Args:
        identify: a row to its Identity. Must not raise.
        read_group: the rows of a group, in the file's order, to their items: at least one for each row.
        options: handed on to `read_group`.
    """

    def __init__(self, identify: Callable[[Row], Identity], read_group: ReadGroup, options: ReadOptions) -> None:
        self._identify, self._read_group, self._options = identify, read_group, options
        self._source = ""
        self._database = _scratch()
        self._database.execute(
            "CREATE TABLE row (number INTEGER PRIMARY KEY, line INTEGER, id BLOB, version REAL, bundle BLOB,"
            " superseded_by INTEGER, body TEXT)"
        )
        self._database.execute("CREATE UNIQUE INDEX latest ON row (id) WHERE superseded_by IS NULL")
        self._database.execute("CREATE INDEX bundles ON row (bundle)")

    def read(self, row: Row, place: Place) -> Iterator[tuple[Place, Item]]:
        """Keeps the row. Its items come from `finish`."""
        self._source = place.source
        identity = self._identify(row)
        outdated = None
        if identity.id is not None:
            query = "SELECT number, version, line FROM row WHERE id = ? AND superseded_by IS NULL"
            for number, version, line in self._database.execute(query, (_key(identity.id),)).fetchall():
                if identity.version >= version:
                    change = "UPDATE row SET bundle = NULL, body = NULL, superseded_by = ? WHERE number = ?"
                    self._database.execute(change, (place.line, number))
                else:
                    outdated = line
        self._database.execute(
            "INSERT INTO row (line, id, version, bundle, superseded_by, body) VALUES (?, ?, ?, ?, ?, ?)",
            (
                place.line,
                _key(identity.id),
                identity.version,
                _key(identity.group) if outdated is None else None,
                outdated,
                json.dumps(row) if outdated is None else None,
            ),
        )
        yield from ()

    def finish(self) -> Iterator[tuple[Place, Item]]:
        """The items of every row, groups in the order of their first rows."""
        bundles = self._database.execute(
            "SELECT min(number), bundle FROM row GROUP BY coalesce(bundle, number) ORDER BY min(number)"
        )
        for number, bundle in bundles:
            where, value = ("number = ?", number) if bundle is None else ("bundle = ?", bundle)
            rows = self._database.execute(
                f"SELECT line, id, superseded_by, body FROM row WHERE {where} ORDER BY number", (value,)
            ).fetchall()
            line, name, later, body = rows[0]
            if body is None:
                id = name.decode("utf-8", "surrogatepass")
                fault = RowFault("superseded", f"line {later} holds a later version of it", id)
                yield Place(self._source, line), fault
            else:
                yield from self._group([Stored(Place(self._source, row[0]), json.loads(row[3])) for row in rows])
        self._database.close()

    def _group(self, rows: Sequence[Stored]) -> Iterator[tuple[Place, Item]]:
        """The items of a group. A reader's own fault costs the rows of that group, not those that follow it."""
        done = set()
        try:
            for place, item in self._read_group(rows, self._options):
                done.add(place.line)
                yield place, item
        except Exception as error:
            for stored in rows:
                if stored.place.line not in done:
                    yield stored.place, RowFault("reader_failed", f"{type(error).__name__}: {error}")


class Companion:
    """The rows of a second file by id, of which only what `keep` returns is stored.

    Raises:
        ConfigError: when the file is not there.
    """

    def __init__(self, path: Path | None, keep: Callable[[Row], Mapping[str, Any] | None]) -> None:
        if path is None or not path.is_file():
            raise ConfigError(f"companion file `{path}` is not there.")
        self.name, self.unreadable = path.name, 0
        self._database = _scratch()
        self._database.execute(
            "CREATE TABLE row (id BLOB PRIMARY KEY, bundle BLOB, top INTEGER, body TEXT) WITHOUT ROWID"
        )
        for _, line in read_lines(path):
            try:
                kept = keep(parse_line(line))
            except RowFault:
                kept = None
            if kept is None or not isinstance(kept.get("id"), str):
                self.unreadable += 1
                continue
            group, top = kept.get("group"), kept.get("top", False)
            record = (_key(kept["id"]), _key(group), bool(top), json.dumps(kept))
            self._database.execute("INSERT OR REPLACE INTO row VALUES (?, ?, ?, ?)", record)
        # After the rows: building an index once is cheaper than keeping it up.
        self._database.execute("CREATE INDEX bundles ON row (bundle, top)")

    def find(self, id: str) -> dict[str, Any] | None:
        """The row of that id."""
        found = self._database.execute("SELECT body FROM row WHERE id = ?", (_key(id),)).fetchone()
        return None if found is None else dict(json.loads(found[0]))

    def only(self, group: str) -> dict[str, Any] | None:
        """The one top row of a group, or its one row; None where there is none or a choice."""
        for condition in ("AND top", ""):
            query = f"SELECT body FROM row WHERE bundle = ? {condition} LIMIT 2"
            found = self._database.execute(query, (_key(group),)).fetchall()
            if len(found) == 1:
                return dict(json.loads(found[0][0]))
        return None

    def absent(self, what: str) -> RowFault:
        """The fault of a row whose counterpart is not in this file."""
        damaged = f"; {self.unreadable} of its lines are of another shape" if self.unreadable else ""
        return RowFault("no_counterpart", f"{what} is not in the companion file `{self.name}`{damaged}")
