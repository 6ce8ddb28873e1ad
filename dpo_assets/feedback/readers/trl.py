"""TRL's preference shapes: explicit prompt or a shared prefix, text or messages (TRL docs, "Dataset formats")."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from dpo_assets.feedback.pair import Message, Pair
from dpo_assets.feedback.readers import Format, Place, ReadOptions, Row, RowFault, has


def read(row: Mapping[str, Any], place: Place, options: ReadOptions) -> Iterator[Pair | RowFault]:
    """`{prompt, chosen, rejected}` as text or message lists; `{chosen, rejected}` as conversations with one prefix."""
    row_id = place.row_id(row.get("id"))
    try:
        for name in ("chosen", "rejected"):
            if row.get(name) is None:
                raise RowFault("missing_field", f"no `{name}`; the row has: {', '.join(sorted(row)) or 'no keys'}")
        chosen, rejected = _messages(row, "chosen", "assistant"), _messages(row, "rejected", "assistant")
        if row.get("prompt") is not None:
            prompt = _messages(row, "prompt", "user")
        else:
            prompt, chosen, rejected = shared_prefix(chosen, rejected)
        extra = {k: v for k, v in row.items() if k not in ("prompt", "chosen", "rejected", "id", "margin")}
        yield Pair(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            source=place.source,
            row=row_id,
            line=place.line,
            margin=_margin(row.get("margin")),
            meta=extra,
        )
    except RowFault as fault:
        yield RowFault(fault.reason, fault.message, row_id)


def _margin(value: Any) -> float | None:
    """The strength of a preference, where it is a finite number, or text that is one (as CSV exports have it)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and "_" in value:  # `float` reads "1_0" as 10, which no export means.
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError):
        return None
    return number if math.isfinite(number) else None


def shared_prefix(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Splits two conversations into their common prompt and the two answers.

    Raises:
        RowFault: when they share nothing, or one is the beginning of the other.
    """
    length = 0
    while length < min(len(chosen), len(rejected)) and chosen[length] == rejected[length]:
        length += 1
    if length == len(chosen) == len(rejected):
        raise RowFault("no_preference", "chosen and rejected are the same conversation")
    if length == 0:
        raise RowFault("no_shared_prompt", "no `prompt`, and chosen and rejected begin with different messages")
    if length == min(len(chosen), len(rejected)):
        raise RowFault("no_shared_prompt", "one conversation is the beginning of the other, so an answer is missing")
    return chosen[:length], chosen[length:], rejected[length:]


def _messages(row: Mapping[str, Any], name: str, role: str) -> list[Message]:
    """The field as messages; plain text becomes one message of `role`."""
    value = row[name]
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise RowFault("wrong_type", f"`{name}` is {type(value).__name__}; expected text or a list of messages")
    messages: list[Message] = []
    for n, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise RowFault("wrong_type", f"`{name}[{n}]` is {type(item).__name__}; expected {{role, content}}")
        given, content = item.get("role"), item.get("content")
        if not isinstance(given, str) or not isinstance(content, str):
            raise RowFault("wrong_type", f"`{name}[{n}]` needs text in `role` and `content`; it has: {sorted(item)}")
        messages.append({"role": given, "content": content})
    return messages


def _fits(row: Row) -> float:
    if not has(row, "chosen", "rejected"):
        return 0.0
    return 0.9 if has(row, "prompt") or isinstance(row["chosen"], list) else 0.3


FORMAT = Format(
    name="trl",
    title="TRL: prompt, chosen, rejected as text or messages",
    example='{"prompt": "Hi", "chosen": "Hello!", "rejected": "What."}',
    documented="TRL documentation, Dataset formats and types, Preference",
    fits=_fits,
    read=read,
)
