"""Text, numbers, times and ids as feedback tools write them, or a fault that says what they are not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from dpo_assets.feedback.pair import Message
from dpo_assets.feedback.readers import ReadOptions, Row, RowFault, keys_of

# Reasoning that a model wrote before its answer is no part of the answer that people judged.
_THOUGHTS = frozenset({"think", "thinking", "redacted_thinking", "reasoning"})
_TEXTS = frozenset({"text", "input_text", "output_text"})


def section(row: Row, name: str) -> Row:
    """The object under `name`.

    Raises:
        RowFault: `missing_field` or `wrong_type`, with the keys that the row has.
    """
    value = row.get(name)
    if value is None:
        raise RowFault("missing_field", f"no `{name}`; the row has: {keys_of(row)}")
    if not isinstance(value, Mapping):
        raise RowFault("wrong_type", f"`{name}` is {type(value).__name__}, expected an object")
    return value


def identifier(value: Any) -> str | None:
    """An id as text: a string, a number, or MongoDB's `{"$oid": ...}`; None for nothing else."""
    if isinstance(value, Mapping):
        value = value.get("$oid")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value else None


def number(value: Any) -> float | None:
    """A finite number, or text that is one (exports write ratings as either); never a boolean."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and "_" in value:  # `float` reads "1_0" as 10, which no export means.
        return None
    try:
        result = float(value)
    except (OverflowError, ValueError):
        return None
    return result if math.isfinite(result) else None


def moment(value: Any) -> datetime | None:
    """A point in time: ISO 8601 (UTC where no offset is given), seconds since 1970, or MongoDB's `{"$date": ...}`.

    MongoDB counts milliseconds (Extended JSON v2, canonical form `{"$date": {"$numberLong": "..."}}`).
    """
    scale = 1.0
    if isinstance(value, Mapping):
        value, scale = value.get("$date"), 1000.0
        if isinstance(value, Mapping):
            value = number(value.get("$numberLong"))
    try:
        if isinstance(value, str):
            read = datetime.fromisoformat(value)
            return read.replace(tzinfo=UTC) if read.tzinfo is None else read.astimezone(UTC)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return datetime.fromtimestamp(value / scale, UTC)
    except (OverflowError, ValueError, OSError):
        return None
    return None


def timestamp(*values: Any) -> str | None:
    """The first of `values` that is a point in time, as ISO 8601 in UTC."""
    for value in values:
        if (read := moment(value)) is not None:
            return read.isoformat()
    return None


def version(*values: Any) -> float:
    """The first of `values` that is a point in time, as seconds since 1970; minus infinity where none is."""
    for value in values:
        if (read := moment(value)) is not None:
            return read.timestamp()
    return -math.inf


def text(value: Any, where: str) -> str:
    """The text of a message: plain, or a list of content parts of which only text and reasoning may be there.

    Reasoning parts are left out, text parts are joined by line breaks.

    Raises:
        RowFault: `missing_text`, `wrong_type`, `invalid_utf8`, or
            `unsupported_modality` for images, files and tool calls.
    """
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        value = "\n".join(piece for part in value if (piece := _part(part, where)) is not None)
    if value is not None and not isinstance(value, str):
        raise RowFault("wrong_type", f"{where} is {type(value).__name__}, expected text")
    if not value or not value.strip():
        raise RowFault("missing_text", f"{where} holds no text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        # JSON inside a string field can hold one although the line itself was valid; it would break Parquet later.
        raise RowFault("invalid_utf8", f"{where} holds a lone surrogate escape, which is not text") from None
    return value


def _part(part: Any, where: str) -> str | None:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise RowFault("wrong_type", f"{where} holds a part that is {type(part).__name__}")
    kind = part.get("type")
    if isinstance(kind, str) and kind in _THOUGHTS:
        return None
    written = part.get("text")
    if isinstance(written, Mapping):  # LibreChat's assistants: {"type": "text", "text": {"value": ...}}
        written = written.get("value")
    if (kind is None or (isinstance(kind, str) and kind in _TEXTS)) and isinstance(written, str):
        return written
    raise RowFault("unsupported_modality", f"{where} holds a part of type {kind!r}; only text can be learnt here")


def said(role: str, content: str) -> Message:
    """One message."""
    return {"role": role, "content": content}


def chosen_field(options: ReadOptions, name: str, row: Row, usual: Sequence[str]) -> str:
    """The key of `row` that plays the part `name`: as the recipe says, or the first of `usual` that is there.

    Raises:
        RowFault: `missing_field`, with the keys that were found and what to write.
    """
    given = options.fields.get(name)
    if given is not None:
        if given in row:
            return given
        raise RowFault("missing_field", f"no `{given}`, which `fields` names as {name}; there are: {keys_of(row)}")
    for key in usual:
        if key in row:
            return key
    raise RowFault(
        "missing_field", f"which of these is the {name}: {keys_of(row)}? Say it as `fields: {{{name}: ...}}`"
    )


def listed(options: ReadOptions, name: str) -> list[str]:
    """A comma-separated list of `fields`; empty where it is not given."""
    return [entry.strip() for entry in options.fields.get(name, "").split(",") if entry.strip()]


def choice_score(options: ReadOptions, choice: str) -> float:
    """What a category is worth, as the recipe says: `fields: {"choice:good": "1"}`.

    A category has no order of its own, so none is assumed.

    Raises:
        RowFault: `unknown_choice`, with what to write.
    """
    worth = number(options.fields.get(f"choice:{choice}"))
    if worth is None:
        raise RowFault("unknown_choice", f'what is {choice!r} worth? Say it as `fields: {{"choice:{choice}": "1"}}`')
    return worth
