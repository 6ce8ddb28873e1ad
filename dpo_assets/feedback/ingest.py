"""Files to batches: each feedback file becomes one batch of pairs and rejected rows, keyed by its content."""

from __future__ import annotations

import base64
import glob
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_assets.errors import FeedbackError
from dpo_assets.feedback.lines import parse_line, read_lines
from dpo_assets.feedback.pair import (
    PAIR_COLUMNS,
    QUARANTINE_COLUMNS,
    Pair,
    Rejected,
    pair_record,
    polars_schema,
)
from dpo_assets.feedback.readers import Item, Place, ReadOptions, RowFault, format_named
from dpo_assets.recipe import BUILTIN, FeedbackSource

if TYPE_CHECKING:
    import polars as pl

BUILTIN_FEEDBACK = {"oasst": "data/oasst/oasst_en_100_tree.jsonl"}
EMPTY_FILE = "empty_file"


@dataclass(frozen=True)
class FeedbackFile:
    """One file to read. `name` is how people and quarantine rows refer to it."""

    path: Path
    name: str
    format: str


def find_files(sources: Sequence[FeedbackSource]) -> list[FeedbackFile]:
    """The files that `sources` name, in order, each once.

    Raises:
        FeedbackError: when a source matches no file.
    """
    found: dict[Path, FeedbackFile] = {}
    for source in sources:
        for path in _matches(source):
            found.setdefault(path, FeedbackFile(path, path.name, source.format))
    names = _distinct_names(list(found))
    return [replace(file, name=name) for file, name in zip(found.values(), names, strict=True)]


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart: they must not depend on where the project lies."""
    names = [path.name for path in paths]
    for depth in range(2, max((len(path.parts) for path in paths), default=0) + 1):
        counts = Counter(names)
        if max(counts.values()) == 1:
            break
        names = [
            "/".join(path.parts[-depth:]) if counts[name] > 1 else name for path, name in zip(paths, names, strict=True)
        ]
    return names


def _matches(source: FeedbackSource) -> list[Path]:
    if source.path.startswith(BUILTIN):
        name = source.path.removeprefix(BUILTIN)
        if name not in BUILTIN_FEEDBACK:
            raise FeedbackError(f"there is no `{source.path}`; built in are: {', '.join(BUILTIN_FEEDBACK)}")
        return [Path(str(files("dpo_assets") / BUILTIN_FEEDBACK[name]))]
    if Path(source.path).is_file():  # Also a name that holds brackets, which a pattern would read otherwise.
        return [Path(source.path)]
    paths = sorted(Path(p) for p in glob.glob(source.path, recursive=True))
    paths = [p for p in paths if p.is_file()]
    if not paths:
        raise FeedbackError(
            f"feedback source `{source.path}` matches no file; relative paths start at the folder of the YAML file."
        )
    return paths


@dataclass(frozen=True)
class Batch:
    """What one file held."""

    pairs: list[Pair]
    rejected: list[Rejected]

    @property
    def rows_in(self) -> int:
        return len(self.pairs) + len(self.rejected)


def read_file(file: FeedbackFile, options: ReadOptions) -> Batch:
    """Every row of a file, as a pair or as a rejected row. Never raises for what is in the file."""
    reader = format_named(file.format).reader(options)
    pairs: list[Pair] = []
    rejected: list[Rejected] = []

    def sort(item: Item, place: Place, line: bytes) -> None:
        if isinstance(item, Pair):
            pairs.append(item)
        elif isinstance(item, RowFault):
            rejected.append(_reject(item, place, line))

    for number, line in read_lines(file.path):
        place = Place(file.name, number)
        try:
            for at, item in reader.read(parse_line(line), place):
                sort(item, at, line)
        except RowFault as fault:
            rejected.append(_reject(fault, place, line))
        except RecursionError:
            rejected.append(_reject(RowFault("too_deep", "nested too deeply"), place, line))
        except Exception as error:  # A reader's own fault must cost the row that showed it, not the file.
            message = f"the {file.format} reader failed on it: {type(error).__name__}: {error}"
            rejected.append(_reject(RowFault("reader_failed", message), place, line))
    if not pairs and not rejected:
        rejected.append(Rejected(EMPTY_FILE, "the file holds no row", file.name, "", 0, b""))
    return Batch(pairs, rejected)


def _reject(fault: RowFault, place: Place, raw: bytes) -> Rejected:
    row = fault.row or f"line-{place.line}"
    return Rejected(fault.reason, fault.message, place.source, row, place.line, raw)


def pairs_frame(pairs: Sequence[Pair]) -> pl.DataFrame:
    """Pairs as a table of PAIR_COLUMNS."""
    import polars as pl

    return pl.DataFrame([pair_record(p) for p in pairs], schema=polars_schema(PAIR_COLUMNS))


def quarantine_frame(rejected: Sequence[Rejected]) -> pl.DataFrame:
    """Rejected rows as a table of QUARANTINE_COLUMNS."""
    import polars as pl

    return pl.DataFrame([_quarantine_record(r) for r in rejected], schema=polars_schema(QUARANTINE_COLUMNS))


def _quarantine_record(row: Rejected) -> dict[str, Any]:
    return {
        "reason": row.reason,
        "message": row.message,
        "source": row.source,
        "row": row.row,
        "line": row.line,
        "raw": base64.b64encode(row.raw).decode("ascii"),
    }
