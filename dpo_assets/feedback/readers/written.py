"""Messages that stand in a row as text: JSON, as CSV and SQL have it, or a list as Python and pandas write it.

Such text must never be trained on as what somebody said. Columns are opened before a reader sees the row (`RowByRow`);
text that comes to a message in another way is refused by the dataset's rules.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping
from typing import Any

from dpo_assets.feedback.pair import ROLES
from dpo_assets.feedback.readers.base import ROLE_NAMES, TOOL_ROLES, Row, RowFault

MESSAGES_AS_TEXT = "messages_as_text"
SIDES = ("chosen", "rejected")
ANSWERS = frozenset({*SIDES, "completion", "response", "rejected_response", "answer", "output"})
_FORMS = (("role", "content"), ("from", "value"), ("role", "parts"))  # Of a message: who, and what.
_KNOWN = {*ROLES, *ROLE_NAMES, *TOOL_ROLES}
_LONGEST = 1 << 20  # Characters of Python's text that are parsed: the parser takes about a hundred bytes for each.
_OBJECTS = re.compile(r"""\s*(?:array\()?\s*\[?\s*\{\s*["']""")
_MESSAGES = re.compile(
    r"""\s*(?:array\()?\s*\[\s*\{\s*(?:(["'])(?:role|content|from|value)\1\s*:"""
    r"""|[^{}\[\]]{0,400}?["'](?:role|from)["']\s*:\s*["'](?:user|human|system|assistant|gpt)["'])"""
)
_KEYS = tuple(f"{quote}{key}{quote}" for key in ("role", "from") for quote in "\"'")
WAY_OUT = "write the column as JSON and name it under `json_columns`"


def opened(row: Row) -> tuple[Row, bool]:
    """The row with the messages of its text columns as messages, and whether there were any.

    An answer may be such text by right ("Give me a chat message as JSON"): a column of answers is opened only where its
    messages end with the assistant's, and one of two sides only where the other holds messages too.

    Raises:
        RowFault: `messages_as_text` for text that begins as messages do and cannot be read.
    """
    found: dict[str, Any] = {}
    for name, value in row.items():
        # The first letter first: a million rows have several texts each.
        if type(value) is str and value[:1] in "[{a \n\t" and (said := messages_in(value, f"`{name}`")) is not None:
            found[name] = said
    for name in ANSWERS & found.keys():
        if not _ends_with_an_answer(found[name]):
            del found[name]
    if any(name in found for name in SIDES) and not all(name in found or _holds_messages(row, name) for name in SIDES):
        for name in SIDES:
            found.pop(name, None)
    return ({**row, **found}, True) if found else (row, False)


def _holds_messages(row: Row, name: str) -> bool:
    """Whether a side is not there at all, or is no text."""
    return not isinstance(row.get(name), str)


def _ends_with_an_answer(said: Any) -> bool:
    messages = said["messages"] if isinstance(said, Mapping) and "messages" in said else said
    last = messages[-1] if isinstance(messages, list) else messages
    who = str(last.get("role", last.get("from"))).lower()
    return ROLE_NAMES.get(who, who) == "assistant"


def messages_in(text: str, where: str) -> Any | None:
    """The message, the list of messages, or the object with `messages` that a text is; None for other text.

    Raises:
        RowFault: `messages_as_text` for text that begins as messages do and cannot be read.
    """
    from dpo_assets.feedback.lines import parse_text

    if _OBJECTS.match(text) is None or not any(key in text for key in _KEYS):
        return None
    try:
        value = parse_text(text)
    except RowFault as fault:
        value = _python(text) if fault.reason == "invalid_json" else None
        if value is None and _MESSAGES.match(text) and not _goes_on(text):
            reason = MESSAGES_AS_TEXT if fault.reason == "invalid_json" else fault.reason
            message = f"{where} begins as a list of messages does, but cannot be read ({fault.message}); {WAY_OUT}"
            raise RowFault(reason, message) from None
    return value if is_conversation(value) else None


def is_conversation(value: Any) -> bool:
    """Whether a value is a message, a list of messages or `{"messages": [...]}`."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_message, value))
    if isinstance(value, Mapping) and isinstance(value.get("messages"), list):
        return len(value) == 1 and is_conversation(value["messages"])
    return _is_message(value)


def _is_message(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    return any(
        what in value and isinstance(who := value.get(key), str) and who.lower() in _KNOWN for key, what in _FORMS
    )


def _python(text: str) -> Any | None:
    """The value of Python's literal text: what `str` makes of a list of messages."""
    if len(text) > _LONGEST or "'" not in text:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of backslashes in what turns out to be no Python.
            value = ast.literal_eval(text.strip())
        str(value).encode("utf-8")
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return value


def _goes_on(text: str) -> bool:
    """Whether other text follows the list, so that it is quoted in a sentence; a list that was cut has no end."""
    return "}]" in text and not text.rstrip().endswith(("]", "])", "dtype=object)"))
