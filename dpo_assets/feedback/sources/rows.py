"""The rows of a file: opened, unpacked, cut into rows, each with its columns mapped and its text cleaned."""

from __future__ import annotations

import codecs
import io
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dpo_assets.feedback.lines import parse_line
from dpo_assets.feedback.readers import RowFault
from dpo_assets.feedback.sources import EMPTY_EXPORT, NO_ROWS, FeedbackFile, FileRefused, Limits, SourceRow, Span
from dpo_assets.feedback.sources.containers import (
    Kind,
    kind_of,
    named_parquet,
    packed_as,
    refuse_strangers,
    unpacked_name,
    unpacker,
)
from dpo_assets.feedback.sources.csv_rows import CsvRows
from dpo_assets.feedback.sources.files import is_appended, open_inside, verify
from dpo_assets.feedback.sources.json_values import JsonValues
from dpo_assets.feedback.sources.streams import MARK_INSIDE, as_utf8, decompressed, unpacked_too_large, with_line_feeds
from dpo_assets.feedback.sources.values import clean, mapped, may_hold_controls, too_deep, unpacked

Parse = Callable[[bytes], Mapping[str, Any]]
# (number, bytes, value): None is JSON that is still to be parsed.
_Raw = tuple[int, bytes, Mapping[str, Any] | RowFault | None]
TRUNCATED = "truncated_tail"
_BLOCK = 1 << 20
FEWEST_BAD_LINES = 10  # Below this a file with lines that are no UTF-8 is damaged, not in another encoding.


class Rows:
    """The rows of one file. `flags` counts what was normalised, complete once the iteration has ended."""

    def __init__(self, file: FeedbackFile, span: Span | None, parse: Parse | None) -> None:
        self.flags: Counter[str] = Counter()
        self._last_is_whole = True
        self._is_whole_without_rows = False
        self._file, self._span, self._parse, self._limits = file, span, parse or parse_line, file.limits
        self._unpack = ""  # What unpacks it by hand, for a file that is packed.
        self._superseded = frozenset(file.superseded)

    def __iter__(self) -> Iterator[SourceRow]:
        if self._file.refused is not None:
            raise self._file.refused
        rows = bad = 0
        with open_inside(self._file.path, self._file.root) as handle:
            for number, raw, value in self.raw_rows(handle):
                rows += 1
                if self._unpack and rows > self._limits.unpacked_rows:
                    raise unpacked_too_large(f"more than {rows - 1} rows", "max_unpacked_rows", self._unpack)
                row = self._finished(number, raw, value)
                if isinstance(row.value, RowFault) and row.value.reason == "invalid_utf8":
                    bad += not _is_utf8(raw)
                for flag in row.flags:
                    self.flags[flag] += 1
                yield row
        if self._span is None:
            refuse_encoding(bad, rows, self._limits)
            if not rows and self._is_whole_without_rows:
                raise FileRefused(EMPTY_EXPORT, "it is whole and holds no row, as an export of nothing does")
            if not rows:
                raise FileRefused(NO_ROWS, "it holds no row")
            verify(self._file)

    def raw_rows(self, handle: io.BufferedReader) -> Iterator[_Raw]:
        """The rows as they are cut from an open file, before anything is parsed."""
        if self._span is not None:
            return self._lines(_part(handle, self._span), self._span.line)
        return self._contents(_as_found(handle, self._file))

    def _contents(self, handle: io.BufferedReader) -> Iterator[_Raw]:
        kind, stream, name = opened(handle, self._file.path.name, self._limits, self.flags)
        self._unpack = unpacker(self._file.path.name)
        if kind == "parquet":
            from dpo_assets.feedback.sources.parquet_rows import ParquetRows

            self._is_whole_without_rows = True  # Its footer was read.
            return iter(ParquetRows(handle, self._limits, self.flags))
        if kind == "csv":
            return self._csv(stream, name)
        return self._lines(stream, 1) if kind == "lines" else self._values(stream)

    def _csv(self, stream: io.BufferedReader, name: str) -> Iterator[_Raw]:
        delimiter = "\t" if name.endswith(".tsv") else None
        rows = CsvRows(with_line_feeds(stream, self.flags), self._limits.row_bytes, self.flags, delimiter)
        yield from rows
        self._is_whole_without_rows = rows.has_header
        self._note(TRUNCATED, rows.unfinished)

    def _lines(self, stream: io.BufferedReader, number: int) -> Iterator[_Raw]:
        """Every line that is not blank. One over the limit is cut to one byte more."""
        limit, returns = self._limits.row_bytes, False
        while line := stream.readline(limit + len(b"\r\n")):
            end, more = line, False
            while end and not end.endswith(b"\n"):
                end = stream.readline(limit)
                more |= bool(end)
            if line.startswith(codecs.BOM_UTF8):  # Of a file that was put behind another.
                line = line.removeprefix(codecs.BOM_UTF8)
                self.flags[MARK_INSIDE] += 1
            content = line.rstrip(b"\r\n")
            returns |= line.endswith(b"\r\n")
            if more or len(content) > limit:
                yield number, line[: limit + 1], _too_long(line, limit)
            elif content.strip():
                self._last_is_whole = bool(end)
                yield number, content, None
            number += 1
        self._note("windows_line_ends", returns)

    def _values(self, stream: io.BufferedReader) -> Iterator[_Raw]:
        limit = self._limits.row_bytes
        values = JsonValues(stream, limit, self.flags)
        for number, raw in enumerate(values, 1):
            yield number, raw[: limit + 1], _too_long(raw, limit) if len(raw) > limit else None
        self._is_whole_without_rows = values.has_lists and not values.unfinished
        self._note(TRUNCATED, values.unfinished)

    def _note(self, flag: str, seen: bool) -> None:
        if seen:
            self.flags[flag] += 1

    def _finished(self, number: int, raw: bytes, value: Mapping[str, Any] | RowFault | None) -> SourceRow:
        """The row with its value parsed where it is JSON, then mapped and cleaned."""
        if isinstance(value, RowFault):
            return SourceRow(number, raw, value)
        if number in self._superseded:
            return SourceRow(number, raw, RowFault("superseded", "its source has given the same row again since"))
        flags: set[str] = set()
        try:
            if value is None and too_deep(raw, self._limits.depth):
                raise RowFault("too_deep", f"nested deeper than {self._limits.depth}")
            row = self._parse(raw) if value is None else value
            if self._file.json_columns:
                row = unpacked(row, self._file.json_columns)
            if self._file.json_columns or may_hold_controls(raw, is_json=value is None):
                row = clean(row, flags)
            if self._file.columns:
                row = mapped(row, self._file.columns)
        except RowFault as fault:
            if fault.reason == "invalid_json" and not self._last_is_whole:
                self.flags[TRUNCATED] += 1
            return SourceRow(number, raw, with_advice(fault, raw))
        except RecursionError:
            return SourceRow(number, raw, RowFault("too_deep", "nested too deeply"))
        return SourceRow(number, raw, row, tuple(sorted(flags)))


def opened(
    handle: io.BufferedReader, name: str, limits: Limits, flags: Counter[str]
) -> tuple[Kind, io.BufferedReader, str]:
    """(kind, its text as UTF-8, its name without compression) of an open file, at its beginning.

    Raises:
        FileRefused: by its name, its first bytes, its encoding or a damaged compression.
    """
    head = handle.peek(512)[:512]
    refuse_strangers(head)
    magic = packed_as(name, head)
    if magic is None and named_parquet(name, head):
        return "parquet", handle, name
    stream = decompressed(handle, magic, limits) if magic else handle
    inner = unpacked_name(name)
    if magic and named_parquet(inner, stream.peek(4)):
        raise FileRefused("wrong_magic", "Parquet compresses by itself: unpack the file")
    text = as_utf8(stream, flags)
    return kind_of(inner, text), text, inner.lower()


def with_advice(fault: RowFault, raw: bytes) -> RowFault:
    """The fault, with how to take out the rows that a line holds where it is none itself."""
    advice = ""
    if fault.reason == "not_an_object" and _LIST_OF_ROWS.match(raw):
        advice = "take its rows out: jq -c 'if type == \"array\" then .[] else . end'"
    elif fault.reason == "invalid_json" and "Extra data" in fault.message:
        advice = "there is more than one value on this line; put a line break between them"
    return RowFault(fault.reason, f"{fault.message}: {advice}", fault.row) if advice else fault


def _too_long(raw: bytes, limit: int) -> RowFault:
    """Of a value over the limit: a list in it may be the rows of the file."""
    listed = _LIST_INSIDE.match(raw)
    advice = f"; if `{listed[1].decode()}` holds rows, take them out: jq -c '.{listed[1].decode()}[]'" if listed else ""
    return RowFault("row_too_large", f"longer than {limit} bytes{advice}")


_LIST_OF_ROWS = re.compile(rb"\s*+\[\s*+\{")
_LIST_INSIDE = re.compile(rb'\s*+\{.{0,4096}?"(\w{1,40})"\s*+:\s*+\[\s*+\{', re.DOTALL | re.ASCII)


def refuse_encoding(bad: int, rows: int, limits: Limits) -> None:
    """Refuses a file of which so many rows are not UTF-8 that it is in another encoding.

    Raises:
        FileRefused: `wrong_encoding`.
    """
    if bad >= FEWEST_BAD_LINES and bad > limits.bad_text_rate * rows:
        message = (
            f"{bad} of its {rows} rows are not UTF-8, so it may be Latin-1 or Windows-1252: "
            "convert it with iconv -f WINDOWS-1252 -t UTF-8"
        )
        raise FileRefused("wrong_encoding", message)


def cut(file: FeedbackFile, size: int, lines: int) -> list[Span] | None:
    """See `sources.spans_of`."""
    limits = file.limits
    with open_inside(file.path, file.root) as handle:
        flags: Counter[str] = Counter()
        kind, stream, _ = opened(handle, file.path.name, limits, flags)
        if kind != "lines" or stream is not handle:
            return None
        first, text = handle.tell(), _TextCheck()
        spans = _spans(handle, size, lines, text, _bytes_found(file))
        if not text.sound:
            rows = bad = 0
            for _, raw, _ in Rows(file, Span(first, spans[-1].stop, 1, spans[-1].end), None).raw_rows(handle):
                rows, bad = rows + 1, bad + (not _is_utf8(raw))
            refuse_encoding(bad, rows, limits)
        return spans or None


class _TextCheck:
    """Whether bytes are UTF-8, fed block by block."""

    def __init__(self) -> None:
        self.sound, self._rest = True, b""

    def feed(self, block: bytes) -> None:
        import pyarrow as pa

        if not self.sound:
            return
        text = self._rest + block
        # What may be the beginning of a letter waits for the rest of it; at the end nothing does.
        whole = len(text) - (_begun(text) if block else 0)
        self._rest = text[whole:]
        try:
            # Arrow looks without making a text of it.
            pa.array([text[:whole]], pa.large_binary()).cast(pa.large_string())
        except pa.ArrowInvalid:
            self.sound = False


def _begun(text: bytes) -> int:
    """How many of the last bytes begin a letter that does not end there."""
    for back in range(1, min(3, len(text)) + 1):
        byte = text[-back]
        if byte >= 0xC0:
            size = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back if back < size else 0
        if byte < 0x80:
            return 0
    return 0


FINER, FINEST = 8, 2**19  # How much smaller the spans of a tail are; bytes below which none is cut again.


def _spans(stream: io.BufferedReader, size: int, lines: int, text: _TextCheck, stop: int, line: int = 1) -> list[Span]:
    """Spans of at least `size` bytes, or of `lines` lines, that end behind a line, over all that is left to `stop`.

    What is left behind the last whole one is cut into spans of an eighth of that, and so on: of a file that has grown
    the last few hundred rows are read again, not the last tens of thousands. Where a span ends depends on the bytes
    before it alone, so the same file is cut in the same way whatever it was before; each byte is read at most once for
    each size.
    """
    spans: list[Span] = []
    start = at = stream.tell()
    first_line = line
    while block := stream.read(max(0, min(_BLOCK, stop - at))):
        text.feed(block)
        begin, inside = 0, block.count(b"\n")
        if start + size - at >= len(block) and line - first_line + inside < lines:  # No span ends in it.
            line, at = line + inside, at + len(block)
            continue
        while end := _end_of_span(block, begin, start + size - at, lines - (line - first_line)):
            line += block.count(b"\n", begin, end)
            begin = end
            spans.append(Span(start, at + begin, first_line, line))
            start, first_line = at + begin, line
        line += block.count(b"\n", begin)
        at += len(block)
    text.feed(b"")
    if at > start and size // FINER >= FINEST and (spans or at - start > size // FINER):
        stream.seek(start)
        return [*spans, *_spans(stream, size // FINER, max(1, lines // FINER), _TextCheck(), stop, first_line)]
    return [*spans, Span(start, at, first_line, line + 1)] if at > start else spans


def _end_of_span(block: bytes, begin: int, size: int, lines: int) -> int:
    """Where a span that goes on at `begin` ends in `block`: behind a line end; 0 where it does not.

    It is the first at or behind `size`, or the one after `lines` lines from `begin` on.
    """
    end = block.find(b"\n", max(begin, size)) + 1
    if block.count(b"\n", begin, end or len(block)) < lines:
        return end
    return len(block) - len(block[begin:].split(b"\n", lines)[-1])


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _as_found(handle: io.BufferedReader, file: FeedbackFile) -> io.BufferedReader:
    """An open file without what was appended to it since it was found."""
    stop = _bytes_found(file)
    return handle if stop == sys.maxsize else _part(handle, Span(0, stop, 1, 1))


def _bytes_found(file: FeedbackFile) -> int:
    """Of a file that may be appended to, and whose bytes are known; all of another."""
    return file.size if file.sha256 and is_appended(file.path.name) else sys.maxsize


class _Part(io.RawIOBase):
    """The bytes of one span."""

    def __init__(self, handle: io.BufferedReader, span: Span) -> None:
        self._handle, self._left = handle, span.stop - span.start
        handle.seek(span.start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        chunk = self._handle.read(min(len(buffer), self._left))
        self._left -= len(chunk)
        buffer[: len(chunk)] = chunk
        return len(chunk)


def _part(handle: io.BufferedReader, span: Span) -> io.BufferedReader:
    return io.BufferedReader(_Part(handle, span), buffer_size=1 << 16)
