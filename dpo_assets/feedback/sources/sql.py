"""SQL tables: what is new in one is written down as a JSONL file, once, and read like any other file from then on.

With a watermark each ingest asks for the rows at or above the highest value seen so far, and leaves out those of that
very value that are in an earlier file. Beside each file lies what it covers; the newest of these notes is the state, so
that a file and the state that led to it cannot come apart. A row that comes again, because somebody changed their vote,
stands in two files; the ids beside each file tell which lines of the earlier one no longer hold.

Rows come in the order of watermark and id, so the same table gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

from dpo_assets.errors import ConfigError
from dpo_assets.feedback.sources.databases import Database, described, open_database
from dpo_assets.recipe import SqlSource

_ALIAS = "dpo_assets_feedback"


@dataclass(frozen=True)
class Extract:
    """A file of rows, the watermarks between which they lie, and the lines of rows that a later extract has again."""

    path: Path
    number: int
    since: str
    until: str
    rows: int
    superseded: tuple[int, ...] = ()
    sha256: str = ""


def extracts(source: SqlSource, landing: Path) -> list[Extract]:
    """All files of a source's rows, the one of rows that are new included.

    Raises:
        ConfigError: database, table, column or variable do not exist, or rows lack an id or a watermark.
        InfrastructureError: the server does not answer.
    """
    from filelock import FileLock

    folder = landing / "sql" / _key(source)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        known = _known(folder)
        with closing(open_database(source)) as database:
            new = _extract(source, database, folder, known)
        if source.watermark is None:
            # The whole table each time: the newest extract is the table, earlier ones are what it was.
            known = [] if new else known[-1:]
        found = [note["extract"] for note in ([*known, new] if new else known)]
    return _without_superseded(found) if len(found) > 1 else found


def glance(source: SqlSource) -> list[str]:
    """The highest watermark and the number of rows, or of rows alone: enough to see that something changed."""
    highest = f"MAX({_quoted(source.watermark)})" if source.watermark else "NULL"
    with closing(open_database(source)) as database:
        [row] = database.rows(f"SELECT COUNT(*) AS n, {highest} AS highest FROM {_relation(source)}", [])
    return [str(row["n"]), str(row["highest"])]


def _without_superseded(found: Sequence[Extract]) -> list[Extract]:
    """The same, each with the lines whose row a later one has again."""
    import polars as pl

    rows = pl.concat(
        pl.read_parquet(_ids_of(one.path)).with_columns(
            pl.lit(one.number).alias("extract"), pl.int_range(1, pl.len() + 1).alias("line")
        )
        for one in found
    )
    old = rows.filter(pl.col("extract") < pl.col("extract").max().over("id"))
    lines = {number: part["line"].to_list() for (number,), part in old.partition_by("extract", as_dict=True).items()}
    return [replace(one, superseded=tuple(lines.get(one.number, ()))) for one in found]


def _ids_of(rows: Path) -> Path:
    """Where the ids of an extract's rows lie, in the order of its lines."""
    return rows.with_suffix(".ids.parquet")


def _key(source: SqlSource) -> str:
    """A folder for each table or query as it is written; credentials are not known here, only their variable."""
    return hashlib.sha256(json.dumps(source.model_dump(), sort_keys=True).encode()).hexdigest()[:20]


def _known(folder: Path) -> list[dict[str, Any]]:
    """The notes of complete extracts, oldest first."""
    notes = []
    for path in sorted(folder.glob("*.note.json")):
        note = json.loads(path.read_text("utf-8"))
        rows = folder / f"{path.name.removesuffix('.note.json')}.jsonl"
        needed = [rows] if note["watermark"] is None else [rows, _ids_of(rows)]
        for gone in (path for path in needed if not path.is_file()):
            raise ConfigError(
                f"{gone} is missing: what was read from the table is kept there. Put it back, or remove {folder}, "
                "and the whole table is read again."
            )
        extract = Extract(rows, note["number"], note["since"], note["until"], note["rows"], sha256=note["sha256"])
        notes.append({**note, "extract": extract})
    return notes


def _extract(
    source: SqlSource, database: Database, folder: Path, known: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Writes what is new as one more extract; None when nothing is."""
    import polars as pl

    last = known[-1] if known else None
    number = last["number"] + 1 if last else 1
    part = folder / "rows.part"
    state = _State(source, last)
    digest = hashlib.sha256()
    with part.open("wb") as target:
        for row in database.rows(*_statement(source, database.mark, last)):
            _check(source, row)
            if state.take(row):
                line = _line(row)
                digest.update(line)
                target.write(line)
    if not state.rows or (last and source.watermark is None and last["sha256"] == digest.hexdigest()):
        part.unlink()
        return None
    note = {
        "number": number,
        "since": _shown(last["watermark"]) if last and source.watermark else "",
        "until": _shown(state.watermark),
        "rows": state.rows,
        "sha256": digest.hexdigest(),
        "watermark": state.watermark,
        "ids_at_watermark": state.ids,
        "table": source.table,
        "query": source.query,
    }
    path = folder / f"{number:06d}.jsonl"
    if source.watermark is not None:
        pl.DataFrame({"id": state.all_ids}, schema={"id": pl.String}).write_parquet(_ids_of(path))
    os.replace(part, path)
    unfinished = folder / "note.part"
    unfinished.write_text(json.dumps(note, indent=1), "utf-8")
    os.replace(unfinished, folder / f"{number:06d}.note.json")
    extract = Extract(path, number, note["since"], note["until"], state.rows, sha256=note["sha256"])
    return {**note, "extract": extract}


class _State:
    """The watermark as rows go by, and the ids of the rows that have its highest value."""

    def __init__(self, source: SqlSource, last: Mapping[str, Any] | None) -> None:
        self.rows = 0
        self.all_ids: list[str] = []  # Of rows that were not read before, in their order.
        self.watermark: Any = last["watermark"] if last else None
        self.ids: list[str] = list(last["ids_at_watermark"]) if last and source.watermark else []
        self._seen, self._source = set(self.ids), source

    def take(self, row: Mapping[str, Any]) -> bool:
        """Whether a row was not read before."""
        name, watermark = str(row[self._source.id]), self._source.watermark
        if watermark is not None:
            at = _kept(row[watermark])
            if at != self.watermark:
                self.watermark, self.ids, self._seen = at, [], set()
            elif name in self._seen:
                return False
            self.ids.append(name)
            self._seen.add(name)
            self.all_ids.append(name)
        self.rows += 1
        return True


def _relation(source: SqlSource) -> str:
    if source.query is not None:
        return f"({source.query.strip().rstrip(';')}) AS {_ALIAS}"
    return ".".join(_quoted(part) for part in str(source.table).split("."))


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _statement(source: SqlSource, mark: str, last: Mapping[str, Any] | None) -> tuple[str, list[Any]]:
    identity = _quoted(source.id)
    if source.watermark is None:
        return f"SELECT * FROM {_relation(source)} ORDER BY {identity}", []
    watermark = _quoted(source.watermark)
    # Rows without a watermark come too, and are refused: they would never be read otherwise.
    relation, parameters = _relation(source), [_given_back(last["watermark"])] if last else []
    if parameters and mark == "%s":
        relation, watermark, identity = (text.replace("%", "%%") for text in (relation, watermark, identity))
    since = f" WHERE {watermark} >= {mark} OR {watermark} IS NULL" if last else ""
    return f"SELECT * FROM {relation}{since} ORDER BY {watermark}, {identity}", parameters


def _check(source: SqlSource, row: Mapping[str, Any]) -> None:
    for name in filter(None, (source.id, source.watermark)):
        if name not in row:
            raise ConfigError(f"{described(source)} has no column `{name}`; it has: {', '.join(row)}")
        if row[name] is None:
            raise ConfigError(
                f"{described(source)} has rows without `{name}`, which could not be told from rows read before; leave "
                "them out, or give them a value, in a `query` (COALESCE)."
            )


# What a watermark can be, written down so that it comes back as what it was.
def _kept(value: Any) -> Any:
    if isinstance(value, datetime):
        return {"datetime": (value.astimezone(UTC) if value.tzinfo else value).isoformat()}
    if isinstance(value, date):
        return {"date": value.isoformat()}
    if isinstance(value, Decimal):
        return {"decimal": str(value)}
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ConfigError(f"a watermark is a time, a number or a text, not {type(value).__name__}")
    return value


def _given_back(kept: Any) -> Any:
    if not isinstance(kept, dict):
        return kept
    [(kind, text)] = kept.items()
    back: dict[str, Callable[[str], Any]] = {
        "datetime": datetime.fromisoformat,
        "date": date.fromisoformat,
        "decimal": Decimal,
    }
    return back[kind](text)


def _shown(kept: Any) -> str:
    return str(next(iter(kept.values())) if isinstance(kept, dict) else "" if kept is None else kept)


def _line(row: Mapping[str, Any]) -> bytes:
    value = {name: _plain(cell) for name, cell in row.items()}
    # Text that is not UTF-8 keeps its bytes: only its row is refused when the file is read.
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n"


def _plain(value: Any) -> Any:
    """A cell as JSON has it. Texts stay texts, whatever they look like."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float | Decimal):
        number = float(value)
        if math.isnan(number):
            return None
        return number if math.isfinite(number) else str(value)
    if isinstance(value, datetime):
        return (value.astimezone(UTC) if value.tzinfo else value).isoformat()
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bytes | memoryview):
        raw = bytes(value)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(raw).decode("ascii")}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, UUID) else repr(value)
