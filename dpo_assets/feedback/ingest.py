"""Files to batches: the rows of each feedback file, or of one span of it, in batches of bounded size.

Rules that look at one row alone are applied here, where the row's own bytes are at hand; what needs other rows, the
recipe or the model is `screening` and `splits`.
"""

from __future__ import annotations

import re
import sys
import unicodedata
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from dpo_assets.feedback.batches import Batch
from dpo_assets.feedback.pair import JudgedAnswer, Message, Pair, Rejected, digest, hashed_user
from dpo_assets.feedback.readers import FileReader, Item, Place, ReadOptions, Row, RowByRow, RowFault, format_named
from dpo_assets.feedback.rules import answer_fault, differ_in_space_alone, pair_fault
from dpo_assets.feedback.scan import MISREAD
from dpo_assets.feedback.sources import (
    EMPTY_EXPORT,
    NO_ROWS,
    FeedbackFile,
    FileRefused,
    SourceRow,
    Span,
    rows_of,
)
from dpo_assets.feedback.sources.values import CONTROLS, LINE_ENDS
from dpo_assets.feedback.turns import settled_answer, settled_pair

ItemT = TypeVar("ItemT", Pair, JudgedAnswer)

# Keys that tools write beside the row's own: Mongoose into every document (LibreChat), pandas for its index.
OF_TOOLS = frozenset({"__v", "__index_level_0__"})
EMPTY_FILE = "empty_file"
EMPTY = frozenset({EMPTY_FILE, NO_ROWS, EMPTY_EXPORT})  # Refusals of a file that holds nothing.
SPACE_ALONE = "white_space_alone"  # Of a pair: nothing else tells its answers apart.
SHAPES = 20  # Different sets of keys that are counted by name.


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
        self._values: Collection[Any] = ()  # Of the row at hand.
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
            self._values = value.values()
            self._shape_of(value)
            for at, item in reader.read(value, place):
                self.add(item, at)
        except Exception as error:  # A reader's own fault must cost the row that showed it, not the file.
            self.add(_fault_of(error, self._format), place)

    def take(self) -> Batch:
        """The batch so far; what comes goes into another."""
        self._close_rows()
        batch, self.batch = self.batch, Batch()
        return batch

    def _begin(self, number: int, raw: bytes, flags: tuple[str, ...]) -> None:
        self.batch.rows += 1
        self.batch.lines += number != self._number
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
        keys = ",".join(sorted(map(str, row)))  # In whose order somebody wrote them is no other shape.
        if "__" in keys and any(str(key).startswith("__") and key not in OF_TOOLS for key in row):
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
        are_texts = at.line == self._number and self._stand_as_texts(pair)
        prompt, chosen, rejected, flags = _at_the_door((pair.prompt, pair.chosen, pair.rejected), odd)
        pair = _copy(
            pair, prompt=prompt, chosen=chosen, rejected=rejected,
            flags=(*pair.flags, *self._flags, *flags), row_hash=digest(raw), line=at.line, source=self._name,
            user=hashed_user(pair.user, self._user_key),
        )  # fmt: skip
        pair = settled_pair(pair, self._fields, are_texts=are_texts)
        if fault := pair_fault(pair):
            raise RowFault(*fault)
        if differ_in_space_alone(pair):
            pair = _copy(pair, flags=(*pair.flags, SPACE_ALONE))
        self.batch.flags.update(set(pair.flags).difference(self._flags))
        self.batch.pairs.append(pair)

    def _stand_as_texts(self, pair: Pair) -> bool:
        """Whether both answers are the text of a column of the row, as it was written."""
        if len(pair.chosen) != 1 or len(pair.rejected) != 1:
            return False
        texts = [value for value in self._values if isinstance(value, str)]
        return pair.chosen[0]["content"] in texts and pair.rejected[0]["content"] in texts

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
        flags[LINE_ENDS] = None
    if _CONTROL.search(text):
        text = _CONTROL.sub("", text)
        flags[CONTROLS] = None
    if text.isascii():
        return message if text is message["content"] else {**message, "content": text}
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
        flags["nfc"] = None
    if MISREAD.search(text):
        flags["misread_text"] = None
    return message if text is message["content"] else {**message, "content": text}
