"""JSON values that follow each other, in an array or one after another over any number of lines, cut by their brackets.

Nothing is parsed here: a value's end is found by counting brackets outside strings, and its bytes are then parsed by
themselves, like a line. Damage costs the value that it is in: the next one is looked for at a line that begins as the
damaged one's line did.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

from dpo_assets.feedback.sources import FileRefused

PIECE = 64 * 1024
MOST_OPEN = 10_000  # Brackets of one value; one that opens more is no row, and has no end worth looking for.
MOST_PIECES = 100_000  # Of one value; one with more lines is taken for one that is too long.
# What reading again behind damaged values may cost, a piece counting for its bytes and some more.
READ_AGAIN, OF_A_PIECE = 64 * 2**20, 64
_BETWEEN = re.compile(rb"[\s,]*+")
_BRACKET = re.compile(rb'"[^"\\\n]*+(?:\\[^\n][^"\\\n]*+)*+"|[{\[]++|[}\]]++|"')
_IN_STRING = re.compile(rb'["\\\n]')
_SCALAR = re.compile(rb'"[^"\\\n]*+(?:\\[^\n][^"\\\n]*+)*+"|[}\]]++|[^\s,{}\[\]]++')
_OPENED_BY = {ord("}"): ord("{"), ord("]"): ord("[")}
_INDENT = re.compile(rb"[ \t]*+")


class JsonValues:
    """Iterates over the bytes of each value. One longer than `limit` comes out cut to one byte more than that.

    `unfinished` is set where the text ends inside a value or before an array is closed.
    """

    def __init__(self, stream: io.BufferedReader, limit: int) -> None:
        self._stream, self._limit = stream, limit
        # The piece at hand: at most a line, so that each begins a line or goes on with one.
        self._piece, self._begins_line, self._at = b"", True, 0
        self._indent = b""
        self._later: list[tuple[bytes, bool]] = []  # Pieces to read again, the next one last.
        self._read_again = 0
        self.unfinished = False

    def __iter__(self) -> Iterator[bytes]:
        in_array = self._skip() == b"["
        self._at += in_array
        while byte := self._skip():
            if in_array and byte == b"]":
                in_array, self._at = False, self._at + 1
            elif byte in b"{[":
                yield self._value()
            else:
                yield self._scalar()
        self.unfinished |= in_array

    def _next_piece(self) -> bool:
        """The next piece into hand; False at the end of the text."""
        before = self._piece
        if self._later:
            self._piece, self._begins_line = self._later.pop()
        else:
            self._piece = self._stream.readline(PIECE)
            self._begins_line = not before or before.endswith(b"\n")
        self._at = 0
        if self._begins_line:
            indent = _INDENT.match(self._piece)
            assert indent is not None
            self._indent = indent[0]
        return bool(self._piece)

    def _skip(self) -> bytes:
        """The byte that comes after white space and commas; nothing at the end."""
        while True:
            between = _BETWEEN.match(self._piece, self._at)
            assert between is not None
            self._at = between.end()
            if self._at < len(self._piece):
                return self._piece[self._at : self._at + 1]
            if not self._next_piece():
                return b""

    def _scalar(self) -> bytes:
        """A number, a word, a string or stray brackets: no row, but it is accounted for."""
        while True:
            scalar = _SCALAR.match(self._piece, self._at)
            if scalar is not None and (scalar.end() < len(self._piece) or scalar[0].endswith(b'"')):
                self._at = scalar.end()
                return scalar[0][: self._limit + 1]
            rest = self._piece[self._at :]
            if rest.endswith(b"\n") or len(rest) > self._limit or not self._next_piece():
                break
            self._piece, self._begins_line = rest + self._piece, False
        # It does not end where it should: all of its line is one.
        while not self._piece.endswith(b"\n") and self._next_piece():
            pass
        self._at = len(self._piece)
        return self._trimmed(rest[: self._limit + 1])

    def _value(self) -> bytes:
        """An object or an array, to its closing bracket."""
        first = self._begins_line and not self._piece[: self._at].strip()
        next_line = _same_indent(self._indent) if first else _LITTLE_INDENT
        brackets, seen, size = _Brackets(), [(self._piece[self._at :], False)], 0
        while True:
            end = brackets.close(self._piece, self._at)
            if end is not None:
                piece, begins_line = seen[-1]
                seen[-1] = piece[: len(piece) - (len(self._piece) - end)], begins_line
                self._at = end
                return self._joined(seen)
            size += len(self._piece) - self._at
            if brackets.broken or size > self._limit or len(seen) > MOST_PIECES:
                return self._recover(brackets, seen, next_line)
            if not self._next_piece():
                self.unfinished = True
                return self._recover(brackets, seen, next_line)
            seen.append((self._piece, self._begins_line))

    def _recover(self, brackets: _Brackets, seen: list[tuple[bytes, bool]], next_line: re.Pattern[bytes]) -> bytes:
        """A value that is damaged or over the limit: to the next line that a value begins on, seen already or not.

        One that is only too long may find its end before that.
        """
        for n, (piece, begins_line) in enumerate(seen):
            if n and begins_line and next_line.match(piece):
                self._read_again += sum(len(again) + OF_A_PIECE for again, _ in seen[n:])
                if self._read_again > READ_AGAIN:
                    message = "its brackets do not match in too many places for its rows to be told apart"
                    raise FileRefused("damaged_file", message)
                self._later += reversed(seen[n:])
                self._piece, self._at, self.unfinished = b"", 0, False
                return self._trimmed(self._joined(seen[:n]))
        value = bytearray(self._joined(seen))
        while self._next_piece():
            if self._begins_line and next_line.match(self._piece):
                return self._trimmed(bytes(value))
            if len(value) <= self._limit:
                value += self._piece[: self._limit + 1 - len(value)]
            elif not brackets.broken and (end := brackets.close(self._piece, 0)) is not None:
                self._at = end
                return bytes(value)
        self.unfinished = True
        return self._trimmed(bytes(value))

    def _trimmed(self, value: bytes) -> bytes:
        """Without white space behind it, unless it was cut: its length says so."""
        return value if len(value) > self._limit else value.rstrip()

    def _joined(self, pieces: list[tuple[bytes, bool]]) -> bytes:
        return b"".join(piece for piece, _ in pieces)[: self._limit + 1]


class _Brackets:
    """Follows the brackets and strings of one value through the pieces that hold it."""

    def __init__(self) -> None:
        # A line break inside a string, or a bracket that closes another kind: a quote or a bracket is missing.
        self.broken = False
        self._open, self._in_string, self._escaped = bytearray(), False, False

    def close(self, piece: bytes, at: int) -> int | None:
        """Where the value ends in `piece`, looked at from `at` on; None where it goes on or is broken."""
        while True:
            if self._escaped and at < len(piece):
                at, self._escaped = at + 1, False
            token = (_IN_STRING if self._in_string else _BRACKET).search(piece, at)
            if token is None:
                return None
            text, at = token[0], token.end()
            if self._in_string:
                self.broken = text == b"\n"
                self._in_string = self._escaped = text == b"\\"
            elif text == b'"':
                self._in_string = True
            elif text[0] in b"{[":
                self._open += text
                self.broken = len(self._open) > MOST_OPEN
            elif text[0] in b"}]":
                for n, bracket in enumerate(text, 1):
                    if self._open.pop() != _OPENED_BY[bracket]:
                        self.broken = True
                        break
                    if not self._open:
                        return token.start() + n
            if self.broken:
                return None


# What shares its line with a bracket tells no indentation; in an array its neighbours have one or two steps of it.
_LITTLE_INDENT = re.compile(rb"[ \t]{0,2}[{\[]")


def _same_indent(indent: bytes) -> re.Pattern[bytes]:
    return re.compile(re.escape(indent) + rb"[{\[]")
