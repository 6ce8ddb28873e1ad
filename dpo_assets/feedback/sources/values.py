"""The value of a row: its columns mapped to the names that a reader knows, its text without what is no text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_assets.feedback.readers import RowFault, keys_of

# What may stand for a control character in JSON; a raw one is no JSON. Looked for before anything is walked through.
_ESCAPED = re.compile(rb"\\(?:[rbf]|u00[018][0-9a-fA-F]|u007[fF])")
_RAW = bytes([*range(9), *range(0x0B, 0x20), 0x7F])
_LINE_ENDS = re.compile("\r\n?")
_CONTROLS = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]")
LINE_ENDS, CONTROLS = "line_ends_in_text", "controls_removed"


def may_hold_controls(raw: bytes, is_json: bool) -> bool:
    """Whether a row's text can hold a control character, so that it has to be walked through."""
    return (b"\\" in raw and _ESCAPED.search(raw) is not None) or (
        not is_json and len(raw.translate(None, _RAW)) < len(raw)
    )


def clean(value: Any, flags: set[str]) -> Any:
    """A value with line ends as LF and without other control characters than tab and LF.

    Raises:
        RowFault: `nul_character`. It is the end of text for some tools, and never meant.
    """
    if isinstance(value, str):
        if "\x00" in value:
            raise RowFault("nul_character", "a NUL character in the text")
        if "\r" in value:
            value = _LINE_ENDS.sub("\n", value)
            flags.add(LINE_ENDS)
        if _CONTROLS.search(value):
            value = _CONTROLS.sub("", value)
            flags.add(CONTROLS)
        return value
    if isinstance(value, Mapping):
        return {clean(name, flags): clean(item, flags) for name, item in value.items()}
    if isinstance(value, list):
        return [clean(item, flags) for item in value]
    return value


def too_deep(raw: bytes, limit: int) -> bool:
    """Whether brackets nest deeper than `limit`. Brackets inside strings do not count."""
    if raw.count(b"[") + raw.count(b"{") <= limit:
        return False
    depth = 0
    for token in _TOKEN.finditer(raw):
        if token[0] in b"[{":
            depth += 1
            if depth > limit:
                return True
        elif token[0] in b"]}":
            depth -= 1
    return False


_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[{}\[\]]', re.DOTALL)


def mapped(row: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """The row under the names that a reader knows: `columns` says where each of them is found.

    A source is a key of the row, or a path into it: `input.question`, `messages.0.content`. Other keys stay; one whose
    name is taken by a mapped column stays as `<name>.original`.

    Raises:
        RowFault: `missing_field` when a source is not there.
    """
    found = {name: _at(row, source) for name, source in columns.items()}
    moved = set(columns.values())
    rest = {(f"{k}.original" if k in found else k): v for k, v in row.items() if k not in moved}
    return {**rest, **found}


def _at(row: Mapping[str, Any], path: str) -> Any:
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes) and part.lstrip("-").isdecimal():
            if not -len(value) <= int(part) < len(value):
                raise RowFault("missing_field", f"no `{path}`: the list ends before {part}")
            value = value[int(part)]
        else:
            raise RowFault("missing_field", f"no column `{path}`; the row has: {keys_of(row)}")
    return value


def unpacked(row: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
    """The row with the JSON text of some columns parsed: what CSV and SQL have for lists of messages.

    Raises:
        RowFault: `invalid_json`.
    """
    parsed = {}
    for name in names:
        text = row.get(name)
        if isinstance(text, str) and text.strip():
            parsed[name] = _parsed(name, text)
    return {**row, **parsed}


def _parsed(name: str, text: str) -> Any:
    from dpo_assets.feedback.lines import parse_line

    try:
        return parse_line(f'{{"value": {text}}}'.encode("utf-8", "surrogatepass"))["value"]
    except (RowFault, KeyError) as fault:
        message = fault.message if isinstance(fault, RowFault) else "not one value"
        raise RowFault("invalid_json", f"`{name}` is not JSON: {message}") from None
