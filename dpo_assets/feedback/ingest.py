"""Files to batches: the rows of each feedback file, or of one span of it, become one batch, keyed by its content.

A batch is a folder of tables: `pairs`, their `keys` (what duplicates and contradictions are found by, without reading a
text), judged `answers`, and the `quarantine`. Rules that look at one row alone are applied here, where the row's own
bytes are at hand; what needs other rows, the recipe or the model is `screening` and `splits`.
"""

from __future__ import annotations

import re
import sys
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dpo_assets.artifact import write_json
from dpo_assets.feedback.near import band_frame
from dpo_assets.feedback.pair import (
    PAIR_COLUMNS,
    JudgedAnswer,
    Message,
    Pair,
    Rejected,
    conversations_id,
    digest,
    hashed_user,
    pair_and_flipped_id,
    polars_schema,
)
from dpo_assets.feedback.pairing import Paired
from dpo_assets.feedback.readers import FileReader, Item, Place, ReadOptions, Row, RowByRow, RowFault, format_named
from dpo_assets.feedback.rules import answer_fault, differ_in_space_alone, pair_fault
from dpo_assets.feedback.scan import MISREAD, with_flags
from dpo_assets.feedback.sources import FeedbackFile, FileRefused, SourceRow, Span, rows_of
from dpo_assets.feedback.tables import answers_frame, pairs_frame, quarantine_frame
from dpo_assets.feedback.turns import SEEN_IN_PAIRS, settled_answer, settled_pair

if TYPE_CHECKING:
    import polars as pl

ItemT = TypeVar("ItemT", Pair, JudgedAnswer)

MONGO_VERSION = "__v"  # Of every document that Mongoose writes, as LibreChat's.
EMPTY_FILE, NO_ROWS = "empty_file", "no_rows"
EMPTY = frozenset({EMPTY_FILE, NO_ROWS})  # Refusals of a file that holds nothing.
SPACE_ALONE = "white_space_alone"  # Of a pair: nothing else tells its answers apart.
PAIRS, KEYS, ANSWERS, QUARANTINE = "pairs.parquet", "keys.parquet", "answers.parquet", "quarantine.parquet"
COUNTS = "counts.json"
ROW_GROUP = 1024  # Rows of a batch; a part of the dataset reads the groups that hold its ids.
SPLIT_GROUP = 8192  # Rows of a split.
SHAPES = 20  # Different sets of keys that are counted by name.


@dataclass
class Batch:
    """What one file, or one span of it, held."""

    pairs: list[Pair] = field(default_factory=list)
    answers: list[JudgedAnswer] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    rows: int = 0  # Rows read. Each is the row of one pair, answer or rejected row at least.
    lost: int = 0  # Rows of which there is none: always 0, and counted on its own so that a check can say so.
    shapes: Counter[str] = field(default_factory=Counter)  # Rows by the keys that they have.
    flags: Counter[str] = field(default_factory=Counter)  # What was seen or changed in the texts of rows.

    @property
    def rows_in(self) -> int:
        return len(self.pairs) + len(self.answers) + len(self.rejected)


@dataclass(frozen=True)
class BatchSize:
    """What one batch may hold: it is in memory while it is made.

    Args:
        rows: at most.
        size: bytes of rows, of which the last one may exceed it.
    """

    rows: int = 2**15  # Objects of some 5 KiB for each pair.
    size: int = 32 * 2**20  # Some 30,000 pairs, which take about 300 MiB while they are made.


BATCH_SIZE = BatchSize()


def read_file(file: FeedbackFile, options: ReadOptions) -> Batch:
    """Every row of a file, as a pair, a judged answer or a rejected row. Never raises for what is in the file."""
    try:
        [batch] = read_batches(file, options, None, BatchSize(sys.maxsize, sys.maxsize))
    except FileRefused as refused:
        return refused_file(file, refused)
    return batch


def refused_file(file: FeedbackFile, refused: FileRefused) -> Batch:
    """The batch of a file of which no row may be used."""
    return Batch(rejected=[Rejected(refused.reason, refused.message, file.name, "", 0, b"")])


def read_batches(
    file: FeedbackFile, options: ReadOptions, span: Span | None, most: BatchSize = BATCH_SIZE
) -> Iterator[Batch]:
    """The rows of a file in batches of bounded size: whatever the file is, only one batch of it is in memory.

    A span of a file is one batch, for it was cut to be one. A format that joins rows decides about them at the end of
    the file, so its file is one batch too.

    Raises:
        FileRefused: the file as a whole may not be used, and no batch of it.
    """
    if file.refused is not None:
        raise file.refused
    rows = rows_of(file, span)
    reader = format_named(file.format).reader(replace(options, fields=file.fields, companion=file.companion))
    sorting = _Sorting(file, options.user_key, keeps_rows=not isinstance(reader, RowByRow))
    whole = span is not None or sorting.keeps_rows
    size = 0
    for row in rows:
        if not whole and (sorting.batch.rows >= most.rows or size >= most.size):
            yield sorting.take()
            size = 0
        sorting.take_in(row, reader)
        size += len(row.raw)
    sorting.finish(reader.finish())
    batch = sorting.take()
    batch.flags.update(rows.flags)
    yield batch


def _fault_of(error: Exception, format_: str) -> RowFault:
    if isinstance(error, RowFault):
        return error
    if isinstance(error, RecursionError):
        return RowFault("too_deep", "nested too deeply")
    return RowFault("reader_failed", f"the {format_} reader failed on it: {type(error).__name__}: {error}")


class _Sorting:
    """Where items go, and which rows have led to one."""

    def __init__(self, file: FeedbackFile, user_key: bytes, keeps_rows: bool) -> None:
        self.batch = Batch()
        self.keeps_rows = keeps_rows
        self._name, self._format = file.name, file.format
        self._fields, self._user_key = file.fields, user_key
        # A format that joins rows may speak of any of them at the end, so all of them are kept, compressed.
        self._kept: dict[int, bytes] | None = {} if keeps_rows else None
        self._open: dict[int, None] = {}  # Rows without an item so far, in order.
        self._number, self._raw = 0, b""
        self._flags: tuple[str, ...] = ()
        self._odd = False

    def take_in(self, row: SourceRow, reader: FileReader) -> None:
        """One row, as its reader reads it."""
        number, raw, value, flags = row
        place = Place(self._name, number)
        self._begin(number, raw, flags)
        try:
            if isinstance(value, RowFault):
                raise value
            self._shape_of(value)
            for at, item in reader.read(value, place):
                self.add(item, at)
        except Exception as error:  # A reader's own fault must cost the row that showed it, not the file.
            self.add(_fault_of(error, self._format), place)

    def take(self) -> Batch:
        """The batch so far; what comes goes into another."""
        self._close_rows()
        batch, self.batch = self.batch, Batch()
        batch.lost = len(self._open)
        return batch

    def _begin(self, number: int, raw: bytes, flags: tuple[str, ...]) -> None:
        self.batch.rows += 1
        if self._kept is not None:
            self._kept[number] = zlib.compress(raw, 1)
        elif self._open:
            self._close_rows()
        self._open[number] = None
        self._number, self._raw, self._flags = number, raw, flags
        escapes = b"\\" in raw and any(escape in raw for escape in _ODD_ESCAPES)
        self._odd = escapes or not raw.isascii() or b"\r" in raw

    def _shape_of(self, row: Row) -> None:
        """Counts the row's keys; a key that is kept for this package's own is a fault of the row."""
        keys = ",".join(map(str, row))
        if "__" in keys and any(str(key).startswith("__") and key != MONGO_VERSION for key in row):
            raise RowFault("reserved_name", f"keys that begin with two underscores are reserved; the row has: {keys}")
        shapes = self.batch.shapes
        shapes[keys if keys in shapes or len(shapes) < SHAPES else "other"] += 1

    def add(self, item: Item, at: Place) -> None:
        self._open.pop(at.line, None)
        raw = self._raw if at.line == self._number else self._row(at.line)
        if isinstance(item, RowFault):
            self._reject(item, at, raw)
            return
        try:
            odd = self._odd or at.line != self._number
            if isinstance(item, Pair):
                self._add_pair(item, at, raw, odd)
            else:
                self._add_answer(item, at, raw, odd)
        except RowFault as fault:
            self._reject(RowFault(fault.reason, fault.message, str(item.row)), at, raw)
        except Exception as error:  # What a reader of another package gave is no pair at all.
            self._reject(_fault_of(error, self._name), at, raw)

    def _add_pair(self, pair: Pair, at: Place, raw: bytes, odd: bool) -> None:
        prompt, chosen, rejected, flags = _at_the_door((pair.prompt, pair.chosen, pair.rejected), odd)
        pair = _copy(
            pair, prompt=prompt, chosen=chosen, rejected=rejected,
            flags=(*pair.flags, *self._flags, *flags), row_hash=digest(raw), line=at.line, source=self._name,
            user=hashed_user(pair.user, self._user_key),
        )  # fmt: skip
        pair = settled_pair(pair, self._fields)
        if fault := pair_fault(pair):
            raise RowFault(*fault)
        if differ_in_space_alone(pair):
            pair = _copy(pair, flags=(*pair.flags, SPACE_ALONE))
        self.batch.flags.update(set(pair.flags).difference(self._flags))
        self.batch.pairs.append(pair)

    def _add_answer(self, answer: JudgedAnswer, at: Place, raw: bytes, odd: bool) -> None:
        prompt, text, _, flags = _at_the_door((answer.prompt, answer.answer, []), odd)
        answer = _copy(
            answer, prompt=prompt, answer=text, flags=(*answer.flags, *self._flags, *flags), raw=raw, line=at.line,
            source=self._name, user=hashed_user(answer.user, self._user_key),
        )  # fmt: skip
        answer = settled_answer(answer, self._fields)
        if fault := answer_fault(answer):
            raise RowFault(*fault)
        self.batch.flags.update(set(answer.flags).difference(self._flags))
        self.batch.answers.append(answer)

    def _reject(self, fault: RowFault, at: Place, raw: bytes) -> None:
        row = fault.row or f"line-{at.line}"
        self.batch.rejected.append(Rejected(fault.reason, fault.message, self._name, row, at.line, raw))

    def _row(self, line: int) -> bytes:
        return zlib.decompress(self._kept[line]) if self._kept is not None and line in self._kept else b""

    def _close_rows(self) -> None:
        """Rows that led to nothing are rejected rows: none is lost, whatever a reader does."""
        for number in list(self._open):
            self.add(RowFault("not_used", "the reader made nothing of this row"), Place(self._name, number))

    def finish(self, last: Iterator[tuple[Place, Item]]) -> None:
        """Takes what only the end decides."""
        try:
            for at, item in last:
                self.add(item, at)
        except Exception as error:
            fault = _fault_of(error, self._format)
            for number in list(self._open) or [self._number]:
                self.add(fault, Place(self._name, number))


# An ASCII row without these holds no carriage return, control character or letter to compose. (A control character as
# it is, is no JSON, and the sources take it out of everything else.)
_ODD_ESCAPES = (b"\\u", b"\\r", b"\\b", b"\\f")
_CONTROL = re.compile(r"[\x01-\x08\x0b\x0c\x0e-\x1f]")


def _copy(item: ItemT, **changes: Any) -> ItemT:
    """`dataclasses.replace`, at a fifth of its cost."""
    made = object.__new__(type(item))
    made.__dict__.update(item.__dict__, **changes)
    return made


Conversations = tuple[Sequence[Message], Sequence[Message], Sequence[Message]]


def _at_the_door(
    conversations: Conversations, odd: bool
) -> tuple[list[Message], list[Message], list[Message], tuple[str, ...]]:
    """The conversations in NFC, with line feeds as line ends and without control characters; and what was changed.

    NUL stays: it is a fault of the row, not a slip.
    """
    flags: dict[str, None] = {}
    if not odd:
        one, two, three = conversations
        return list(one), list(two), list(three), ()
    one, two, three = ([_clean(m, flags) for m in c] for c in conversations)
    return one, two, three, tuple(flags)


def _clean(message: Message, flags: dict[str, None]) -> Message:
    text = message["content"]
    if not isinstance(text, str):
        return message
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        flags["line_ends"] = None
    if _CONTROL.search(text):
        text = _CONTROL.sub("", text)
        flags["controls"] = None
    if text.isascii():
        return message if text is message["content"] else {**message, "content": text}
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
        flags["nfc"] = None
    if MISREAD.search(text):
        flags["misread_text"] = None
    return message if text is message["content"] else {**message, "content": text}


PAIR_ID, FLIPPED_ID, PROMPT_ID = ("pair_a", "pair_b"), ("flipped_a", "flipped_b"), ("prompt_a", "prompt_b")


def keys_frame(pairs: pl.DataFrame, flipped: Sequence[str] | None = None) -> pl.DataFrame:
    """What cross-row rules need of pairs, without their texts; row for row.

    Ids are two whole numbers each, in whose order they sort as their digits do: a third of the memory of the text.

    Args:
        pairs: a table of PAIR_COLUMNS.
        flipped: the ids that the pairs would have with their answers exchanged, where they are known already.
    """
    import polars as pl

    if flipped is None:
        turned = zip(*(pairs[c].to_list() for c in ("prompt", "rejected", "chosen", "tools")), strict=True)
        flipped = [conversations_id(*one, tools=tools) for *one, tools in turned]
    ids = {
        **_halves(PAIR_ID, pairs["pair_id"].to_list()),
        **_halves(FLIPPED_ID, flipped),
        **_halves(PROMPT_ID, pairs["prompt_id"].to_list()),
    }
    own = pairs.select("source", "line", "row", "flags")
    return pl.concat([pl.DataFrame(ids), own, band_frame(pairs)], how="horizontal")


def _halves(names: tuple[str, str], ids: Sequence[str]) -> dict[str, pl.Series]:
    import numpy as np
    import polars as pl

    # An id that is none (the schema will say so) is hashed to one: it must not stop the others.
    sound = [one if _HEX.fullmatch(one) else digest(one.encode()) for one in ids]
    halves = np.frombuffer(bytes.fromhex("".join(sound)), dtype=">u8").astype(np.uint64).reshape(-1, 2)
    return {name: pl.Series(halves[:, n]) for n, name in enumerate(names)}


_HEX = re.compile(r"[0-9a-f]{32}")


def write_batch(batch: Batch, folder: Path) -> dict[str, Any]:
    """The tables of a batch, and its counts, which are returned too."""
    ids = [pair_and_flipped_id(pair) for pair in batch.pairs]
    pairs = with_flags(pairs_frame(batch.pairs, [pair_id for pair_id, _ in ids]))
    write_pairs(pairs, folder, flipped=[flipped for _, flipped in ids])
    answers_frame(batch.answers).write_parquet(folder / ANSWERS, compression="zstd", compression_level=1)
    quarantine_frame(batch.rejected).write_parquet(folder / QUARANTINE, compression="zstd", compression_level=1)
    whole = sum(row.line == 0 for row in batch.rejected)  # A file that is refused as a whole is no row.
    counts = {
        "rows": batch.rows,
        "rows_in": batch.rows_in - whole,
        "pairs": len(batch.pairs),
        "answers": len(batch.answers),
        "rejected": len(batch.rejected) - whole,
        "lost": batch.lost,
        "shapes": dict(sorted(batch.shapes.items())),
        "flags": dict(sorted(batch.flags.items())),
    }
    write_json(folder / COUNTS, counts)
    return counts


def write_paired(paired: Paired, folder: Path) -> dict[str, Any]:
    """The batch of what a pairing policy made of judged answers, and its counts."""
    made = Batch(rejected=list(paired.rejected))
    for pair in paired.pairs:
        # Answers were sound one by one; whether two of them are a pair is seen only now.
        if fault := pair_fault(pair):
            made.rejected.append(Rejected(*fault, pair.source, pair.row, pair.line, b""))
        else:
            made.pairs.append(pair)
            made.flags.update(flag for flag in pair.flags if flag in SEEN_IN_PAIRS)  # Others were counted by answer.
    write_batch(made, folder)
    counts = {
        "pairs": len(made.pairs),
        "used": sum(count["used"] for count in paired.counts.values()),
        "rejected": len(paired.rejected),
        "policies": paired.counts,
        "flags": dict(sorted(made.flags.items())),
        "answers": 0,
    }
    write_json(folder / COUNTS, counts)
    return counts


def write_pairs(pairs: pl.DataFrame, folder: Path, flipped: Sequence[str] | None = None) -> None:
    """`pairs` and their `keys`, in the order of ids."""
    import polars as pl

    keys = keys_frame(pairs, flipped)
    order = pairs.select(pl.arg_sort_by("pair_id", "source", "line", "row")).to_series()
    write_table(pairs[order], folder / PAIRS)
    write_table(keys[order], folder / KEYS)


def write_table(frame: pl.DataFrame, path: Path) -> None:
    """One Parquet file in row groups of ROW_GROUP. Equal tables give equal bytes."""
    import polars as pl
    import pyarrow.parquet as pq

    pq.write_table(frame.to_arrow(compat_level=pl.CompatLevel.oldest()), path, row_group_size=ROW_GROUP, **PARQUET)


PARQUET: dict[str, Any] = {"compression": "zstd", "compression_level": 1, "use_dictionary": ["source", "label_kind"]}


class PairWriter:
    """A Parquet file of pairs, written part by part. `rows` counts them."""

    def __init__(self, path: Path, schema: pl.Schema | None = None) -> None:
        self.rows = 0
        self._path, self._schema = path, schema if schema is not None else polars_schema(PAIR_COLUMNS)
        self._writer: Any = None

    def __enter__(self) -> PairWriter:
        return self

    def write(self, part: pl.DataFrame) -> None:
        import polars as pl
        import pyarrow.parquet as pq

        rows = part.select(list(self._schema)).cast(dict(self._schema)).to_arrow(compat_level=pl.CompatLevel.oldest())
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, rows.schema, **PARQUET)
        self._writer.write_table(rows, row_group_size=SPLIT_GROUP)
        self.rows += part.height

    def __exit__(self, *_: object) -> None:
        import polars as pl

        if self._writer is None:
            self.write(pl.DataFrame(schema=self._schema))
        self._writer.close()
