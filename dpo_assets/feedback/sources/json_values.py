"""JSON rows in any layout: in arrays, one after another, over any number of lines, cut by their brackets.

Nothing is parsed here that is sound: a value's end is found by counting brackets outside strings, and its bytes are
then parsed by themselves, like a line. Arrays, also in one another, and an object that wraps one and is the whole file
(`wrappers`) hold rows and are none.

Damage costs the row that it is in. A missing bracket or quote makes the rows behind it part of the value; where they
are is told by JSON's own grammar, which breaks near the damage, and by how the file's rows begin: `{"prompt":`, with
these very quotes, cannot stand inside a string.
"""

from __future__ import annotations

import codecs
import io
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from dpo_assets.feedback.sources import FileRefused
from dpo_assets.feedback.sources.json_grammar import Brackets, Grammar, breaks, grammar_of, parsed
from dpo_assets.feedback.sources.streams import MARK_INSIDE
from dpo_assets.feedback.sources.wrappers import judge_rest, rows_begin_in, rows_in, something_behind

PIECE = 64 * 1024
CHECKED_FROM = 64 * 1024  # A value that is longer is asked on the way whether it is still JSON.
MOST_ARRAYS = 3  # In one another, that hold rows.
MOST_OPENINGS = 16  # Keys that rows of one file begin with.
# What reading again behind damaged values may cost: so many bytes, and so many for each byte of the file.
READ_AGAIN, READ_AGAIN_OF_ALL = 2**28, 16
WRAPPED = "rows_in_a_wrapper"
_LOOKED_AT_BEHIND = 256  # Bytes in which what comes behind a value is looked for.
_TAIL = 4096  # Kept of what is skipped, so that the beginning of a row is found across pieces.

_MARK = codecs.BOM_UTF8  # Of a file that was put behind another.
_BETWEEN = re.compile(rb"(?:[\s,]|" + _MARK + rb")*+")
_SCALAR = re.compile(rb'"[^"\\\n]*+(?:\\[^\n][^"\\\n]*+)*+"|\}++|\]++|[^\s,{}\[\]]++')
# One between values, and not the rest of a row that closed too early.
_WHOLE_SCALAR = re.compile(rb'(?:null|true|false|-?[0-9][0-9.eE+-]*+|"[^"\\\n]*+(?:\\[^\n][^"\\\n]*+)*+")\s*+[,\]]')
_KEY = re.compile(rb'("[^"\\]{1,200}+")\s*+:')
_OPENING = re.compile(rb'\{\s*+("[^"\\]{1,200}+")\s*+:')
_ANY_OPENING = re.compile(rb'\{\s*+"[^"\\]*+"\s*+:')
_LAST_NAME = re.compile(rb'"([^"\\]*+)"\s*+:\s*+\Z')
_HOLDS_ROWS = re.compile(rb"\[\s*+[{\[]")


class JsonValues:
    """Iterates over the bytes of each row. One longer than `limit` comes out cut to one byte more than that.

    `unfinished` is set where the text ends inside a value or before an array is closed, `has_lists` where there was an
    array for rows, empty or not.
    """

    def __init__(self, stream: io.BufferedReader, limit: int, flags: Counter[str] | None = None) -> None:
        self._stream, self._limit = stream, limit
        self._flags: Counter[str] = Counter() if flags is None else flags
        self._text, self._at, self._ended = b"", 0, False  # The text at hand, from its beginning or what comes next.
        self._ahead = io.BytesIO()  # What was read to see the end of the first value, and is still to be cut.
        self._inside = bytearray()  # What closes the arrays and the wrapper that it stands in.
        self._wrapper = ""  # What the list of rows in the wrapper is called, when the file is one.
        self._rows = _Rows()
        self._read = self._read_again = 0
        self.unfinished = self.has_lists = False

    def __iter__(self) -> Iterator[bytes]:
        if self._skip() == b"{":
            self._open_wrapper()
        while byte := self._skip():
            if self._wrapper and not self._inside:
                raise something_behind()
            if byte in b"]}" and self._inside[-1:] == byte:
                self._inside.pop()
                self._at += 1
            elif self._inside[-1:] == b"}":
                yield from self._end_of_wrapper()
            elif byte == b"[" and self._holds_rows():
                self._inside += b"]"
                self._at += 1
                self.has_lists = True
            elif byte in b"{[":
                yield self._value()
            else:
                yield self._scalar()
        self.unfinished |= bool(self._inside)

    # The text at hand

    def _more(self) -> bool:
        """More text, behind what is at hand; False at its end."""
        rest = self._text[self._at :]
        size = max(PIECE, len(rest))
        piece = self._ahead.read(size) or self._stream.read(size)
        self._text, self._at = rest + piece, 0
        self._read += len(piece)
        self._ended |= not piece
        return bool(piece)

    def _reach(self, size: int) -> None:
        """As much text as `size`, or all that there is."""
        while len(self._text) - self._at < size and self._more():
            pass

    def _skip(self) -> bytes:
        """The byte that comes after white space, commas and marks of files put together; nothing at the end."""
        while True:
            self._reach(len(_MARK))
            between = _BETWEEN.match(self._text, self._at)
            assert between is not None
            if marks := between[0].count(_MARK):
                self._flags[MARK_INSIDE] += marks
            self._at = between.end()
            if len(self._text) - self._at >= len(_MARK) or self._ended:
                return self._text[self._at : self._at + 1]

    # Arrays and wrappers

    def _holds_rows(self) -> bool:
        if not self._inside:
            return True
        self._reach(_TAIL)
        return len(self._inside) < MOST_ARRAYS and _HOLDS_ROWS.match(self._text, self._at) is not None

    def _open_wrapper(self) -> None:
        """Goes to the rows where the file is an object that wraps them. A row that looks like one is seen whole.

        Raises:
            FileRefused: `ambiguous_rows`.
        """
        end = self._end_of_first()
        head = self._text[self._at :]
        begin = None
        try:
            if end is None:
                begin = rows_begin_in(head)
            elif not head[end:].strip():
                begin = rows_in(head[:end])
        except (ValueError, RecursionError):
            begin = rows_begin_in(head)
        if begin is not None:
            opening = _LAST_NAME.search(head[:begin])
            self._wrapper = opening[1].decode("utf-8", "replace") if opening else "its list"
            self._flags[WRAPPED] += 1
            self._inside += b"}]"
            self.has_lists = True
            self._at += begin + 1
        self._ahead = io.BytesIO(self._text[self._at + PIECE :])
        self._text, self._ended = self._text[: self._at + PIECE], False
        self._read = len(self._text)

    def _end_of_first(self) -> int | None:
        """Where the first value ends, with something of what follows it at hand; None when it is longer than a row."""
        brackets, seen = Brackets(), 0
        while (end := brackets.close(self._text, self._at + seen)) is None:
            seen = len(self._text) - self._at
            if brackets.broken or seen > self._limit or not self._more():
                return None
        size = end - self._at
        if size > self._limit:
            return None
        while not self._text[self._at + size :].strip() and self._more():
            pass
        return size

    def _end_of_wrapper(self) -> Iterator[bytes]:
        """What stands behind the rows, to the wrapper's end: nothing when it is plain, a value when it is damaged.

        Raises:
            FileRefused: `ambiguous_rows` where it may be what the rows are.
        """
        behind = self._value(b"{")
        self._inside.pop()
        if not judge_rest(self._wrapper, behind):
            yield behind

    # Values

    def _scalar(self) -> bytes:
        """A number, a word, a string or stray brackets: no row, but it is accounted for."""
        self._reach(_LOOKED_AT_BEHIND)
        key = _KEY.match(self._text, self._at)
        if key is not None and self._rows.has_key(key[1]):  # Of a row that lost its opening brace.
            return self._to_next_row(self._at)
        while True:
            scalar = _SCALAR.match(self._text, self._at)
            line = self._text.find(b"\n", self._at)
            if scalar is not None and (scalar.end() < len(self._text) or self._ended or scalar[0].endswith(b'"')):
                end = scalar.end()
                break
            if scalar is None and line >= 0:  # It does not end where it should: all of its line is one.
                end = line
                break
            if len(self._text) - self._at > self._limit:
                return self._to_next_row(self._at, line_ends=True)
            if not self._more():
                end = len(self._text)
        begins = self._rows.begins().search(self._text, self._at) if self._rows.last else None
        if begins is not None and begins.start() < end:
            end = begins.start()
        value, self._at = self._text[self._at : end], end
        return value[: self._limit + 1].rstrip()

    def _value(self, opened: bytes = b"") -> bytes:
        """An object or an array, to its closing bracket."""
        brackets, seen, checked = Brackets(opened), 0, CHECKED_FROM
        while True:
            end = brackets.close(self._text, self._at + seen)
            if end is not None:
                return self._closed(end, is_row=not opened)
            seen = len(self._text) - self._at
            if brackets.broken:
                return self._damaged()
            if seen > checked:
                checked = 2 * seen
                if breaks(self._text[self._at :]):
                    return self._damaged()
            if seen > self._limit:
                found = self._to_row_at_hand(self._grammar())
                return self._too_long(brackets) if found is None else found
            if not self._more():
                self.unfinished = True
                return self._damaged()

    def _closed(self, end: int, is_row: bool) -> bytes:
        """A value whose brackets match. They may do so by chance: it must be one, and no text may go on behind it."""
        value = self._text[self._at : end]
        self._reach(len(value) + _LOOKED_AT_BEHIND)
        end = self._at + len(value)
        if is_row:
            found = parsed(value)
            if found is None:
                return self._damaged()
            between = _BETWEEN.match(self._text, end)
            assert between is not None
            goes_on = self._text[between.end() : between.end() + 1] not in b"{[]}"
            goes_on = goes_on and _WHOLE_SCALAR.match(self._text, between.end()) is None
            if goes_on and not self._rows.same_keys(found):
                return self._to_next_row(end)
            self._rows.saw(value)
        self._at = end
        return value

    def _damaged(self) -> bytes:
        """A value that is none, to where the next row begins."""
        grammar = self._grammar()
        if (value := self._to_row_at_hand(grammar)) is not None:
            return value
        end = len(self._text) if grammar.open and self._ended else grammar.end
        if end is None:
            return self._to_next_row(len(self._text))
        value, self._at = self._text[self._at : end], end
        return self._cut(value)

    def _grammar(self) -> Grammar:
        """How far the text at hand is a value, which is read again for it.

        Raises:
            FileRefused: `damaged_file` when that was too much.
        """
        self._read_again += len(self._text) - self._at
        if self._read_again > READ_AGAIN + READ_AGAIN_OF_ALL * self._read:
            message = "its brackets do not match in too many places for its rows to be told apart"
            raise FileRefused("damaged_file", message)
        return grammar_of(self._text, self._at)

    def _to_row_at_hand(self, grammar: Grammar) -> bytes | None:
        """The value to where another row begins in the text at hand; None where none does.

        Where JSON's grammar breaks, that is behind the break, or before it where the grammar sees a string, or an
        object inside the value: a row whose end is missing takes in the next one.
        """
        begins = self._rows.begins(self._text, self._at)
        end = len(self._text) if grammar.end is None else grammar.end
        for found in _ANY_OPENING.finditer(self._text, self._at + 1, end):
            nested = found.start() in grammar.objects
            if self._rows.like(self._text[found.start() : found.start() + CHECKED_FROM], begins, nested):
                self.unfinished = False
                value, self._at = self._text[self._at : found.start()], found.start()
                return self._cut(value)
        return None

    def _to_next_row(self, searched: int, line_ends: bool = False) -> bytes:
        """All to where a row is seen to begin, or a line ends, behind what was searched already; cut to the limit."""
        begins = self._rows.begins(self._text, self._at)
        head = self._text[self._at : self._at + self._limit + 1]
        size, at = len(self._text) - self._at, self._at + 1
        while True:
            ends = [one.start() for one in begins.finditer(self._text, at) if one.end() > searched][:1]
            if line_ends and (line := self._text.find(b"\n", max(at, searched))) >= 0:
                ends.append(line)
            if ends:
                size -= len(self._text) - min(ends)
                self._at = min(ends)
                return self._cut(head[:size])
            self._at = max(self._at, len(self._text) - _TAIL)
            searched = len(self._text) - self._at
            if not self._more():
                self.unfinished, self._at = True, len(self._text)
                return self._cut(head)
            at = 1
            added = self._text[searched:]
            head += added[: max(0, self._limit + 1 - len(head))]
            size += len(added)

    def _too_long(self, brackets: Brackets) -> bytes:
        """A value over the limit, to its end, of which only the beginning is kept."""
        head = self._text[self._at : self._at + self._limit + 1]
        while not brackets.broken:
            self._at = len(self._text)
            if not self._more():
                self.unfinished = True
                return head
            if (end := brackets.close(self._text, 0)) is not None:
                self._at = end
                return head
        self._to_next_row(self._at)
        return head

    def _cut(self, value: bytes) -> bytes:
        """Without white space behind it, unless it was cut: its length says so."""
        return value[: self._limit + 1] if len(value) > self._limit else value.rstrip()


class _Rows:
    """How the rows of a file look, from those that were sound."""

    def __init__(self) -> None:
        self.last = b""  # The last sound one.
        self._openings: dict[bytes, None] = {}
        self._begins: re.Pattern[bytes] | None = None

    def saw(self, value: bytes) -> None:
        self.last = value
        opening = _OPENING.match(value)
        if opening is not None and opening[1] not in self._openings and len(self._openings) < MOST_OPENINGS:
            self._openings[opening[1]] = None
            self._begins = None

    def begins(self, text: bytes = b"", at: int = 0) -> re.Pattern[bytes]:
        """What a row begins with, where `text` holds a damaged one at `at`."""
        own = _OPENING.match(text, at)
        keys = {*self._openings, own[1]} if own is not None else {*self._openings}
        if not keys:
            return _ANY_OPENING
        if self._begins is None or keys != {*self._openings}:
            pattern = re.compile(rb"\{\s*+(?:" + rb"|".join(map(re.escape, sorted(keys))) + rb")\s*+:")
            if keys != {*self._openings}:
                return pattern
            self._begins = pattern
        return self._begins

    def has_key(self, key: bytes) -> bool:
        """Whether the last sound row has a key, which is given with its quotes."""
        known = parsed(self.last)
        return isinstance(known, dict) and parsed(key) in known

    def same_keys(self, found: Any) -> bool:
        """Whether a value has the keys of the last sound row; of the first one nothing else is known."""
        known = parsed(self.last)
        return not isinstance(known, dict) or (isinstance(found, dict) and found.keys() == known.keys())

    def like(self, text: bytes, begins: re.Pattern[bytes], nested: bool) -> bool:
        """Whether what begins a text may be a row: an object with most of the keys that the last sound one has.

        Args:
            text: where a row may begin.
            begins: what rows begin with. What begins so may be a damaged row too.
            nested: it is an object inside a value that may be sound and only not whole. So are the nodes of a tree,
                which begin as the tree does: where rows hold such objects, an object inside is none.
        """
        found, known = parsed(text), parsed(self.last)
        begins_so = begins.match(text) is not None
        if nested and (begins.search(self.last, 1) is not None or not isinstance(found, dict)):
            return False
        if not isinstance(found, dict):
            return begins_so
        if not isinstance(known, dict):
            return begins_so and not (nested and begins.search(text[: _length(text)], 1))
        return 2 * len(found.keys() & known.keys()) >= len(known)


def _length(text: bytes) -> int:
    """Of the value that a text begins with, brackets and all."""
    return Brackets().close(text, 0) or len(text)
