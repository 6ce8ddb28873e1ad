"""CSV as text: every cell is the text that stands there, never a number, a date or nothing.

A row keeps the bytes of its lines. Quotes are read strictly (RFC 4180): what stands behind a closing quote is no cell,
for reading on would join texts that nobody wrote. A quote that is not closed swallows the rows behind it until the next
one closes it; here it costs the line that it is on, and the next line is read afresh.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dpo_assets.feedback.readers import RowFault
from dpo_assets.feedback.sources import FileRefused
from dpo_assets.feedback.sources.streams import MARK_INSIDE

DELIMITERS = ",;\t|"
ROWS_IN_A_CELL = "lines_like_rows_in_a_cell"  # The flag of a sound record that may be several, or hold a table.
MOST_LINES = 100_000  # Of one row.
MOST_ASKED = 1_000  # Lines of a damaged row that are asked whether they are rows.
# What reading again behind quotes that do not match may cost: so many bytes, and so many for each byte of the file.
READ_AGAIN, READ_AGAIN_OF_ALL = 2**28, 16
_DECLARED = re.compile(rb"sep=([,;\t|])\r?\n")  # Excel's first line, which is no header.


class Record(NamedTuple):
    """The lines of one record, the number of the first, and its cells or what is wrong with it."""

    number: int
    lines: list[bytes]
    cells: list[str] | RowFault


class CsvRows:
    """Iterates over (line, bytes, row or fault) of each record behind the header.

    `unfinished` is set where the text ends inside a record, `has_header` once there was one.
    """

    def __init__(self, stream: io.BufferedReader, limit: int, flags: Counter[str], delimiter: str | None) -> None:
        # The csv module's own limit is one for the whole process, and lower than a row may be here.
        csv.field_size_limit(max(csv.field_size_limit(), 2 * limit))
        self._stream, self._limit, self._flags = stream, limit, flags
        self._line = 0  # Lines read so far.
        if declared := _DECLARED.match(stream.peek()):
            delimiter = declared[1].decode()
            stream.read(declared.end())
            self._line = 1
        self._delimiter = delimiter or _delimiter_of(stream.peek())
        self._width = 0  # Columns of the header.
        self._read = self._read_again = 0  # Bytes.
        self._again: deque[bytes] = deque()
        self.unfinished = self.has_header = False

    def __iter__(self) -> Iterator[tuple[int, bytes, Mapping[str, Any] | RowFault]]:
        if self._delimiter != ",":
            self._flags[f"delimiter {self._delimiter!r}"] = 1
        header: list[str] | None = None
        for number, lines, cells in self._records():
            raw = b"".join(lines).rstrip(b"\r\n")
            if not raw.strip():
                continue
            if header is None:
                header = _header(cells)
                self._width, self.has_header = len(header), True
            elif isinstance(cells, RowFault):
                yield number, raw, cells
            elif len(cells) != self._width and self._reads_as_rows(lines):
                message = "a quote that closes lines later, and each of these lines reads as a row: a quote is missing"
                for n, line in enumerate(lines):
                    yield number + n, line.rstrip(b"\r\n"), RowFault("invalid_csv", message)
            else:
                if len(cells) == self._width and self._reads_as_rows(lines):
                    self._flags[ROWS_IN_A_CELL] += 1
                yield number, raw, self._row(header, cells, raw)

    def _records(self) -> Iterator[Record]:
        while True:
            number, feed = self._line + 1, _Feed(self)
            try:
                cells: list[str] | RowFault = next(self._reader(feed))
            except StopIteration:
                return
            except csv.Error as error:
                cells = RowFault("invalid_csv", _said(error))
            if feed.mark:
                self._flags[MARK_INSIDE] += 1
            first = feed.taken[0]
            if len(first) > self._limit:
                yield Record(number, [first[: self._limit + 1]], self._too_large())
            elif isinstance(cells, RowFault) or feed.asked_in_vain:
                yield self._damaged(number, feed, cells)
            else:
                yield Record(number, feed.taken, cells)

    def _reader(self, lines: Iterator[str]) -> Iterator[list[str]]:
        return csv.reader(lines, delimiter=self._delimiter, strict=True)

    def _too_large(self) -> RowFault:
        return RowFault("row_too_large", f"longer than {self._limit} bytes")

    def _damaged(self, number: int, feed: _Feed, cells: list[str] | RowFault) -> Record:
        """A record that is none: its first line, and those behind it that are no rows of their own."""
        first, *rest = feed.taken
        own = 1 + self._inside(first, rest, ends=feed.asked_in_vain)
        self._give_back(feed.taken[own:])
        if feed.asked_in_vain:  # Only inside a quoted cell is a further line asked for.
            self.unfinished |= feed.at_end and own == len(feed.taken)
            if not feed.at_end and own > 1:
                return Record(number, [b"".join(feed.taken[:own])[: self._limit + 1]], self._too_large())
            cells = RowFault("unclosed_quote", "a quote is opened on this line and never closed")
        elif own < len(feed.taken):
            message = f"a quote is opened on this line and not closed before line {number + len(rest)}"
            cells = RowFault("invalid_csv", message)
        return Record(number, feed.taken[:own], cells)

    def _inside(self, first: bytes, rest: Sequence[bytes], ends: bool) -> int:
        """How many of the lines behind the first one of a damaged record are the inside of its cells, and no rows.

        A row has as many cells as the header; where lines before it have not, it must be sure. The last line is where
        the quotes were seen not to match: by a quote that opens a cell of another row, or by one of this row's own.
        Where the text `ends` there, or the limit is reached, it is a line like the others.
        """
        if not rest:
            return 0
        inner = rest if ends else rest[:-1]
        rows = [not line.strip() or len(self._alone(line)) == self._width for line in inner[:MOST_ASKED]]
        if not (ends or self._begins_row(first, rest[-1]) or (rows and all(rows))):
            return len(rest)
        inside = 0 if all(rows) else len(rows)
        while inside and rows[inside - 1] and not self._is_prose(inner[inside - 1]):
            inside -= 1
        return len(rest) if ends and inside == len(rows) else inside

    def _begins_row(self, first: bytes, line: bytes) -> bool:
        """Whether the quote that does not match opens a cell of another row than that of the `first` line."""
        before, quote, _ = line.partition(b'"')
        if not quote or before[-1:] not in (b"", self._delimiter.encode()) or self._is_prose(before):
            return False
        return before[:1] != self._delimiter.encode() or first.count(self._delimiter.encode()) >= self._width - 1

    def _is_prose(self, text: bytes) -> bool:
        """Whether delimiters stand in it as commas do, before a space."""
        return self._delimiter.encode() + b" " in text

    def _alone(self, line: bytes) -> list[str]:
        """The cells of a line that is a record by itself; none where it is not."""
        try:
            return next(self._reader(iter([line.decode("utf-8", "surrogateescape")])), [])
        except csv.Error:
            return []

    def _reads_as_rows(self, lines: Sequence[bytes]) -> bool:
        """Whether every line of a record of several lines is a row where its quotes are taken for text.

        So it is where one quote was not closed and another, rows later, not opened. In a cell of prose or of code not
        every line has just as many delimiters as the header, and none before a space. In one that holds a table they
        may: a record with as many cells as the header is sound (RFC 4180), and only flagged.
        """
        if len(lines) < 3 or self._width < 2:
            return False
        delimiter = self._delimiter.encode()
        return all(line.count(delimiter) == self._width - 1 and not self._is_prose(line) for line in lines)

    def _row(self, header: list[str], cells: list[str], raw: bytes) -> Mapping[str, Any] | RowFault:
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            return RowFault("invalid_utf8", f"byte {error.start} is not UTF-8")
        if [cell.strip() for cell in cells] == header:
            return RowFault("invalid_csv", "the header once more, as where files were put together; it is no row")
        if len(cells) == len(header):
            return dict(zip(header, cells, strict=True))
        self.unfinished |= len(cells) < len(header) and not self._stream.peek(1) and not self._again
        return RowFault("wrong_cells", f"{len(cells)} cells under the {len(header)} columns {', '.join(header)}")

    def _give_back(self, lines: Sequence[bytes]) -> None:
        """Lines to be read again.

        Raises:
            FileRefused: `damaged_file` when that was too many.
        """
        self._again.extendleft(reversed(lines))
        self._line -= len(lines)
        self._read_again += sum(map(len, lines))
        if self._read_again > READ_AGAIN + READ_AGAIN_OF_ALL * self._read:
            raise FileRefused(
                "damaged_file", "its quotes do not match in too many places for its rows to be told apart"
            )

    def next_line(self) -> bytes:
        """The next line with its end, or nothing; one over the limit is cut, and its rest skipped."""
        if self._again:
            self._line += 1
            return self._again.popleft()
        line = self._stream.readline(self._limit + 2)
        self._line += bool(line)
        self._read += len(line)
        end = line
        while end and not end.endswith(b"\n"):
            end = self._stream.readline(self._limit)
        return line


class _Feed:
    """The lines of one record, for the csv module; what was taken can be given back."""

    def __init__(self, rows: CsvRows) -> None:
        self.taken: list[bytes] = []
        self.asked_in_vain = self.at_end = self.mark = False
        self._rows, self._room = rows, rows._limit

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._rows.next_line() if self._room >= 0 and len(self.taken) < MOST_LINES else b""
        self.at_end = not line and self._room >= 0
        self.asked_in_vain = not line
        if not line:
            raise StopIteration
        if not self.taken and line.startswith(codecs.BOM_UTF8):  # Of a file that was put behind another.
            line, self.mark = line.removeprefix(codecs.BOM_UTF8), True
        self.taken.append(line)
        self._room -= len(line)
        return line.decode("utf-8", "surrogateescape")


def _said(error: csv.Error) -> str:
    if "expected after" in str(error):
        return 'text behind a closing quote: inside a cell quotes are doubled ("")'
    if "new-line" in str(error):
        return (
            "a lone carriage return outside quotes, in a file whose lines end in line feeds: make all ends line feeds"
        )
    return str(error)


def _delimiter_of(head: bytes) -> str:
    """What stands most often outside quotes in the first line; a comma in a line of one column."""
    first = head.split(b"\n", 1)[0].decode("utf-8", "replace")
    bare = "".join(first.split('"')[::2])
    return max(DELIMITERS, key=bare.count)


def _header(cells: list[str] | RowFault) -> list[str]:
    if isinstance(cells, RowFault):
        raise FileRefused("bad_header", f"its first line is no header: {cells.message}")
    names = [name.strip() for name in cells]
    if any(not name.isprintable() or "\udc80" <= max(name, default="") <= "\udcff" for name in names):
        raise FileRefused("bad_header", "its first line is no header: the names of columns are not printable UTF-8")
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise FileRefused("bad_header", f"columns given twice: {', '.join(repr(name) for name in twice)}")
    return names
