"""Fields of rows: text, numbers, times and ids as exports write them, or a fault that says what they are not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from dpo_assets.feedback.cells import Binary, NotFinite
from dpo_assets.feedback.readers import Row, RowFault, keys_of

_MILLISECONDS = 1e11  # Seconds of the year 5138, milliseconds of 1973.
_YES, _NO = ("true", "1", "yes"), ("false", "0", "no")


def field(row: Row, name: str, inside: str = "") -> Any:
    """The value of a key.

    Raises:
        RowFault: `missing_field`, with the keys that are there.
    """
    value = row.get(name)
    if value is None:
        raise RowFault("missing_field", f"no `{inside}{name}`; {_owner(inside)} has: {keys_of(row)}")
    return value


def other_shape(row: Row, expected: str) -> RowFault:
    """The fault of a row that is not of the format at all."""
    return RowFault("wrong_shape", f"expected {expected}; the row has: {keys_of(row)}")


def other_type(value: Any, where: str, expected: str) -> RowFault:
    """The fault of a value that a format wants to be of another type."""
    if isinstance(value, Binary):
        return RowFault(
            "invalid_utf8", f"`{where}` holds {len(value)} bytes that are no UTF-8 text; expected {expected}"
        )
    return RowFault("wrong_type", f"`{where}` is {type(value).__name__}; expected {expected}{_hint(value)}")


def mapping(value: Any, where: str, expected: str = "an object") -> Row:
    if not isinstance(value, Mapping):
        raise other_type(value, where, expected)
    return value


def section(row: Row, name: str) -> Row:
    """The object under `name`.

    Raises:
        RowFault: `missing_field` or `wrong_type`, with the keys that the row has.
    """
    return mapping(field(row, name), name)


def listed(value: Any, where: str, expected: str = "a list") -> list[Any]:
    if not isinstance(value, list):
        raise other_type(value, where, expected)
    return value


def _hint(value: Any) -> str:
    """What to do about a value that is JSON in text, as SQL and CSV have it."""
    is_json = isinstance(value, str) and value.lstrip()[:1] in ("{", "[")
    return "; if its text is JSON, name the column under `json_columns`" if is_json else ""


def others(row: Row, *used: str) -> dict[str, Any]:
    """The columns that became no part of the pair, where they say something."""
    return {name: value for name, value in row.items() if name not in used and value is not None}


def needed_text(row: Row, name: str, inside: str = "") -> str:
    value = field(row, name, inside)
    if not isinstance(value, str):
        raise other_type(value, f"{inside}{name}", "text")
    return value


def number(value: Any) -> float | None:
    """A finite number, or text that is one (as CSV exports have it).

    Raises:
        RowFault: `invalid_number` for an infinite one.
    """
    if isinstance(value, NotFinite):
        raise RowFault("invalid_number", f"a number is {value}")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and "_" in value:  # `float` reads "1_0" as 10, which no export means.
        return None
    try:
        result = float(value)
    except (OverflowError, ValueError):
        return None
    return result if math.isfinite(result) else None


def needed_number(row: Row, name: str) -> float:
    value = number(field(row, name))
    if value is None:
        raise RowFault("wrong_type", f"`{name}` is {_shown(row[name])}; expected a number")
    return value


def truth(value: Any) -> bool | None:
    """True or False, also as 1 and 0 or as text (as CSV exports have it)."""
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower() if isinstance(value, int | str) else ""
    return True if text in _YES else False if text in _NO else None


def moment(value: Any) -> datetime | None:
    """A point in time: ISO 8601 (UTC where it names no zone), seconds or milliseconds since 1970, or MongoDB's
    `{"$date": ...}`.

    MongoDB counts milliseconds (Extended JSON v2, canonical form `{"$date": {"$numberLong": "..."}}`).
    """
    milliseconds = isinstance(value, Mapping)
    if isinstance(value, Mapping):
        value = value.get("$date")
        if isinstance(value, Mapping):
            value = number(value.get("$numberLong"))
    try:
        if isinstance(value, str):
            read = datetime.fromisoformat(value.strip())
            return read.replace(tzinfo=UTC) if read.tzinfo is None else read.astimezone(UTC)
        if (since := number(value)) is not None:
            return datetime.fromtimestamp(since / 1000 if milliseconds or since > _MILLISECONDS else since, UTC)
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


def identifier(value: Any) -> str | None:
    """An id as text: a string, a number, or MongoDB's `{"$oid": ...}`; None for nothing else."""
    if isinstance(value, Mapping):
        value = value.get("$oid")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value else None


def from_json(value: Any, where: str) -> Any:
    """What a column that holds JSON as text holds; other values as they are.

    Raises:
        RowFault: `invalid_json`, or `invalid_utf8` for a lone surrogate that the outer JSON could not show.
    """
    if not isinstance(value, str):
        return value
    try:
        result = json.loads(value)
        json.dumps(result, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise RowFault("invalid_utf8", f"`{where}` holds a lone surrogate escape, which is not text") from None
    except RecursionError:
        raise RowFault("too_deep", f"`{where}` is nested too deeply") from None
    except ValueError:
        raise RowFault("invalid_json", f"`{where}` is text that is not JSON") from None
    return result


def _owner(inside: str) -> str:
    return f"`{inside.rstrip('.')}`" if inside else "the row"


def _shown(value: Any) -> str:
    return repr(value)[:40]
