"""CSV as text: every cell is the text that stands there, never a number, a date or nothing.

A row keeps the bytes of its lines. A quote that is never closed would swallow the rest of the file as one cell; here it
costs the line that it is on, and the next line is read afresh.
"""

from __future__ import annotations

import csv
import io
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any

from dpo_assets.feedback.readers import RowFault
from dpo_assets.feedback.sources import FileRefused

DELIMITERS = ",;\t|"
MOST_LINES = 100_000  # Of one row.
MOST_UNCLOSED = 100  # Quotes that are never closed; a file with more is refused.


class CsvRows:
    """Iterates over (line, bytes, row or fault) of each record behind the header.

    `unfinished` is set where the text ends inside a record.
    """

    def __init__(self, stream: io.BufferedReader, limit: int, flags: Counter[str], delimiter: str | None) -> None:
        # The csv module's own limit is one for the whole process, and lower than a row may be here.
        csv.field_size_limit(max(csv.field_size_limit(), 2 * limit))
        self._stream, self._limit, self._flags = stream, limit, flags
        self._delimiter = delimiter or _delimiter_of(stream.peek())
        self._line = 0  # Lines read so far.
        self._again: deque[bytes] = deque()
        self.unfinished = False

    def __iter__(self) -> Iterator[tuple[int, bytes, Mapping[str, Any] | RowFault]]:
        if self._delimiter != ",":
            self._flags[f"delimiter {self._delimiter!r}"] = 1
        header: list[str] | None = None
        unclosed = 0
        for number, raw, cells in self._records():
            if not raw.strip():
                continue
            if header is None:
                header = _header(cells)
                continue
            if isinstance(cells, list):
                yield number, raw, self._row(header, cells, raw)
                continue
            unclosed += cells.reason == "unclosed_quote"
            if unclosed > MOST_UNCLOSED:
                raise FileRefused("damaged_file", f"more than {MOST_UNCLOSED} of its quotes are never closed")
            yield number, raw, cells

    def _records(self) -> Iterator[tuple[int, bytes, list[str] | RowFault]]:
        while True:
            number, feed = self._line + 1, _Feed(self)
            try:
                cells: list[str] | RowFault = next(csv.reader(feed, delimiter=self._delimiter))
            except StopIteration:
                return
            except csv.Error as error:
                cells = RowFault("invalid_csv", str(error))
            first, *rest = feed.taken
            if len(first) > self._limit:
                rest, cells = [], RowFault("row_too_large", f"longer than {self._limit} bytes")
                first = first[: self._limit + 1]
            elif feed.asked_in_vain:  # Only inside a quoted cell is a further line asked for.
                self._again.extendleft(reversed(rest))
                self._line -= len(rest)
                self.unfinished |= feed.at_end and not rest
                rest, cells = [], RowFault("unclosed_quote", "a quote is opened on this line and never closed")
            yield number, b"".join([first, *rest]).rstrip(b"\r\n"), cells

    def _row(self, header: list[str], cells: list[str], raw: bytes) -> Mapping[str, Any] | RowFault:
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            return RowFault("invalid_utf8", f"byte {error.start} is not UTF-8")
        if len(cells) == len(header):
            return dict(zip(header, cells, strict=True))
        self.unfinished |= len(cells) < len(header) and not self._stream.peek(1) and not self._again
        return RowFault("wrong_cells", f"{len(cells)} cells under the {len(header)} columns {', '.join(header)}")

    def next_line(self) -> bytes:
        """The next line with its end, or nothing; one over the limit is cut, and its rest skipped."""
        if self._again:
            self._line += 1
            return self._again.popleft()
        line = self._stream.readline(self._limit + 2)
        self._line += bool(line)
        end = line
        while end and not end.endswith(b"\n"):
            end = self._stream.readline(self._limit)
        return line


class _Feed:
    """The lines of one record, for the csv module; what was taken can be given back."""

    def __init__(self, rows: CsvRows) -> None:
        self.taken: list[bytes] = []
        self.asked_in_vain = self.at_end = False
        self._rows, self._room = rows, rows._limit

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._rows.next_line() if self._room >= 0 and len(self.taken) < MOST_LINES else b""
        self.at_end = not line and self._room >= 0
        self.asked_in_vain = not line
        if not line:
            raise StopIteration
        self.taken.append(line)
        self._room -= len(line)
        return line.decode("utf-8", "surrogateescape")


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
