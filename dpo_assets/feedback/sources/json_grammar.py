"""JSON's brackets and grammar, followed through text that may be damaged or not there yet as a whole."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

MOST_OPEN = 1_000_000  # Brackets of one value; one that opens more is no row, and has no end worth looking for.
STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_BRACKET = re.compile(STRING + rb'|[{\[]++|[}\]]++|"', re.DOTALL)
_IN_STRING = re.compile(rb'["\\]')
_TOKEN = re.compile(rb"\s*+(?:(" + STRING + rb')|([{\[])|([}\]])|([:,])|([^\s"{}\[\]:,]++)|(")|\Z)', re.DOTALL)
_OPENED_BY = {ord("}"): ord("{"), ord("]"): ord("[")}


def parsed(text: bytes) -> Any:
    """The value that a text begins with, however often a key stands in it; None where it is none."""
    try:
        return _LENIENT.raw_decode(text.decode("utf-8", "surrogateescape"))[0]
    except (ValueError, RecursionError):
        return None


def breaks(text: bytes) -> bool:
    """Whether the beginning of a value is no JSON whatever follows."""
    decoded = text.decode("utf-8", "surrogateescape")
    try:
        _LENIENT.raw_decode(decoded)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Expecting") and error.pos < len(decoded) - _LONGEST_SCALAR
    except (ValueError, RecursionError):
        return False
    return False


_LENIENT = json.JSONDecoder(strict=False)  # Line breaks and controls in strings cost their row, but not its end.
_LONGEST_SCALAR = 5_000  # Digits; one that a text ends in is not whole.


class Grammar(NamedTuple):
    """How far a text is a JSON value.

    `end` is behind it, None where it breaks or goes on; `open` says that it goes on. `objects` are the places of the
    objects in it, as far as it was followed.
    """

    end: int | None
    open: bool
    objects: frozenset[int]


def grammar_of(text: bytes, at: int) -> Grammar:
    """Follows a value by JSON's grammar (RFC 8259, 2). The insides of strings and of scalars are not looked at."""
    opened, objects = bytearray(), set[int]()
    expected = "value"
    while True:
        token = _TOKEN.match(text, at)
        if token is None or not token.lastindex or token[6] is not None:
            return Grammar(None, True, frozenset(objects))  # The end, perhaps inside a string.
        string, opens, closes, mark, scalar = token.group(1, 2, 3, 4, 5)
        at = token.end()
        in_object = opened[-1:] == b"{"
        if closes is not None:
            if expected not in ("next", "first") or not opened or opened.pop() != _OPENED_BY[closes[0]]:
                break
            expected = "next"
            if not opened:
                return Grammar(at, False, frozenset(objects))
        elif mark is not None:
            if mark == b":" and expected == "colon":
                expected = "value"
            elif mark == b"," and expected == "next":
                expected = "key" if in_object else "value"
            else:
                break
        elif string is not None and in_object and expected in ("first", "key"):
            expected = "colon"
        elif expected == "value" or (expected == "first" and not in_object):
            if opens is not None:
                if opens == b"{" and opened:
                    objects.add(token.start(2))
                opened += opens
                expected = "first"
            else:
                assert string is not None or scalar is not None
                expected = "next"
        else:
            break
    return Grammar(None, False, frozenset(objects))


class Brackets:
    """Follows the brackets and strings of one value through the pieces that hold it."""

    def __init__(self, opened: bytes = b"") -> None:
        self.broken = False  # A bracket closes another kind: a quote or a bracket is missing.
        self._open, self._in_string, self._escaped = bytearray(opened), False, False

    def close(self, text: bytes, at: int) -> int | None:
        """Where the value ends in `text`, looked at from `at` on; None where it goes on or is broken."""
        while True:
            if self._escaped and at < len(text):
                at, self._escaped = at + 1, False
            token = (_IN_STRING if self._in_string else _BRACKET).search(text, at)
            if token is None:
                return None
            found, at = token[0], token.end()
            if self._in_string:
                self._in_string = self._escaped = found == b"\\"
            elif found == b'"':
                self._in_string = True
            elif found[0] in b"{[":
                self._open += found
                self.broken = len(self._open) > MOST_OPEN
            elif found[0] in b"}]":
                for n, bracket in enumerate(found, 1):
                    if self._open.pop() != _OPENED_BY[bracket]:
                        self.broken = True
                        break
                    if not self._open:
                        return token.start() + n
            if self.broken:
                return None
