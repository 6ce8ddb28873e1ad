"""Files that are one JSON object around a list of rows, as an API's answer is: `{"data": [...], "page": {"n": 1}}`.

A row can look like one, for rows have columns that are lists too. So a wrapper is only what a whole file is, with
nothing beside its list that a row would be made of: numbers, booleans, null, and objects of such.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from dpo_assets.feedback.sources import FileRefused

AMBIGUOUS = "ambiguous_rows"
NAMES = frozenset({
    "data", "rows", "records", "examples", "samples", "results", "entries", "feedback", "preferences", "train",
})  # fmt: skip
_SPACE = re.compile(r"[ \t\r\n]*")
_OPENS_ROWS = re.compile(r"\[[ \t\r\n]*[{\]]")
_TEXT_CELL = re.compile(rb':\s*+"')
_DECODER = json.JSONDecoder(strict=False)


class Member(NamedTuple):
    """A name of an object, its value, and where in its bytes the value begins."""

    name: str
    value: Any
    at: int


class _OpenList:
    """The value of a list that was not read to its end."""


OPEN = _OpenList()


def members(text: bytes, stop_at_rows: bool = False) -> Iterator[Member]:
    """The members of the object that a text begins with, a name that stands twice twice.

    Args:
        text: from the object's opening brace on.
        stop_at_rows: end at the first list of objects under one of NAMES, whose value is OPEN then.

    Raises:
        ValueError: the object is damaged, or goes on behind the text.
        RecursionError: it is nested too deeply.
    """
    # One character for each byte, so that places are places of bytes; JSON's own characters are the same in both.
    said, at = text.decode("latin-1"), 1
    while said[(at := _after_space(said, at)) : at + 1] != "}":
        name, at = _DECODER.raw_decode(said, at)
        at = _after_space(said, at)
        if not isinstance(name, str) or said[at : at + 1] != ":":
            raise ValueError("no member of an object")
        at = _after_space(said, at + 1)
        if stop_at_rows and name in NAMES and _OPENS_ROWS.match(said, at):
            yield Member(name, OPEN, at)
            return
        value, end = _DECODER.raw_decode(said, at)
        yield Member(name.encode("latin-1", "replace").decode("utf-8", "replace"), value, at)
        at = _after_space(said, end)
        if said[at : at + 1] == ",":
            at += 1
        elif said[at : at + 1] != "}":
            raise ValueError("no comma between two members")


def _after_space(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    assert space is not None
    return space.end()


def rows_in(object_: bytes) -> int | None:
    """Where the list of rows begins in the bytes of a whole object; None where it is a row itself.

    Raises:
        FileRefused: `ambiguous_rows` where several lists may be the rows.
        ValueError, RecursionError: see `members`.
    """
    return _only_list(list(members(object_)))


def rows_begin_in(head: bytes) -> int | None:
    """The same for an object that is not known to its end: longer than a row may be, or damaged.

    What stands behind its list is for `judge_rest`.
    """
    found: list[Member] = []
    try:
        found.extend(members(head, stop_at_rows=True))
    except (ValueError, RecursionError):
        return None
    return _only_list(found) if found and found[-1].value is OPEN else None


def _only_list(found: list[Member]) -> int | None:
    lists = [one for one in found if one.value is OPEN or _holds_objects(one.value)]
    rows = [one for one in lists if one.name in NAMES] or [
        one for one in found if one.name in NAMES and one.value == []
    ]
    beside = [one for one in found if one not in lists and not (rows and one is rows[0])]
    if not rows or not all(_is_plain(one.value) for one in beside) or any(_is_conversation(one.value) for one in lists):
        return None
    if len(lists) > 1:
        raise _ambiguous([one.name for one in lists])
    return rows[0].at


def judge_rest(name_of_rows: str, rest: bytes) -> bool:
    """Whether what a wrapper holds behind its list is plain; False where it is damaged and has to be told.

    Args:
        name_of_rows: of the list.
        rest: of the object, from behind the list's comma to its closing brace.

    Raises:
        FileRefused: `ambiguous_rows` where it holds more than that.
    """
    try:
        behind = list(members(b"{" + rest))
    except (ValueError, RecursionError):
        if b"[" in rest or _TEXT_CELL.search(rest):
            raise _ambiguous([name_of_rows, "what stands behind it"]) from None
        return False
    lists = [one.name for one in behind if _holds_objects(one.value)]
    if lists or not all(_is_plain(one.value) for one in behind):
        raise _ambiguous([name_of_rows, *(lists or [one.name for one in behind if not _is_plain(one.value)])])
    return True


def _ambiguous(names: list[str]) -> FileRefused:
    keys = " and ".join(f"`{name}`" for name in names)
    ways = " or ".join(f"jq -c '.{name}[]' FILE > {name}.jsonl" for name in names if re.fullmatch(r"\w+", name))
    return FileRefused(
        AMBIGUOUS,
        f"it is one object that holds {keys}, and which of them is for training only you can say: take the rows out "
        f"({ways}) and name the new file",
    )


def something_behind() -> FileRefused:
    """The refusal of a file of which a wrapper is not all."""
    return FileRefused(
        AMBIGUOUS,
        "more follows behind the object that its rows lie in, so whether that is a row or holds rows cannot be told: "
        "take the rows out with jq -c '.NAME[]' FILE > rows.jsonl, NAME being the key that they are under",
    )


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(one, dict) for one in value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or value == [] or isinstance(value, bool | int | float)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) and ("role" in one or "from" in one) for one in value)
