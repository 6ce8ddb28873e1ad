"""Anthropic hh-rlhf: two transcripts of Human and Assistant turns that share everything but the last answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from dpo_assets.feedback.pair import Message, Pair
from dpo_assets.feedback.readers import Format, Place, ReadOptions, Row, RowFault
from dpo_assets.feedback.readers.conversations import shared_prefix

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def read(row: Mapping[str, Any], place: Place, options: ReadOptions) -> Iterator[Pair | RowFault]:
    """`{chosen, rejected}`, each a transcript; the longest common run of turns is the prompt."""
    row_id = place.row_id(row.get("id"))
    try:
        if "transcript" in row:
            raise RowFault("wrong_shape", "this is a red-team transcript of hh-rlhf, which holds no pair of answers")
        prompt, chosen, rejected = shared_prefix(_turns(row, "chosen"), _turns(row, "rejected"))
        yield Pair(prompt, chosen, rejected, source=place.source, row=row_id, line=place.line)
    except RowFault as fault:
        yield RowFault(fault.reason, fault.message, row_id)


def _turns(row: Mapping[str, Any], name: str) -> list[Message]:
    text = row.get(name)
    if text is None:
        raise RowFault("missing_field", f"no `{name}`; the row has: {', '.join(sorted(row)) or 'no keys'}")
    if not isinstance(text, str):
        raise RowFault("wrong_type", f"`{name}` is {type(text).__name__}; expected a transcript")
    return turns_of(text, name)


def turns_of(text: str, name: str) -> list[Message]:
    """The turns of a transcript."""
    before, *rest = _TURN.split(text)
    if not rest or before.strip():
        raise RowFault("wrong_shape", f"`{name}` does not open with a Human: or Assistant: turn")
    return [{"role": _ROLES[who], "content": said.strip()} for who, said in zip(rest[::2], rest[1::2], strict=True)]


def _fits(row: Row) -> float:
    answers = [row.get("chosen"), row.get("rejected")]
    return 1.0 if all(isinstance(text, str) and _TURN.match(text) for text in answers) else 0.0


FORMAT = Format(
    name="hh_rlhf",
    title="Anthropic hh-rlhf transcripts",
    example='{"chosen": "\\n\\nHuman: ... \\n\\nAssistant: ...", "rejected": "..."}',
    documented="hh-rlhf README, Disclaimer and data format",
    fits=_fits,
    read=read,
)
