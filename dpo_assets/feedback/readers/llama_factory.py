"""LLaMA-Factory: sharegpt pairs (`conversations`, `chosen`, `rejected`), alpaca pairs, and KTO rows of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dpo_assets.feedback.pair import Message
from dpo_assets.feedback.readers import Format, Item, Row, RowFault, has
from dpo_assets.feedback.readers.conversations import (
    answer_in,
    assistant,
    history,
    last_answer,
    messages,
    user,
    with_system,
)
from dpo_assets.feedback.readers.shapes import At, by_row
from dpo_assets.feedback.readers.values import field, listed, mapping, needed_text, other_shape, others

_PARTS = (
    *("id", "conversations", "chosen", "rejected", "system"),
    *("instruction", "input", "output", "history", "kto_tag"),
)


@by_row("id")
def read(row: Row, at: At) -> Iterator[Item]:
    """Messages are `{from, value}`, or `{role, content}` where the dataset's tags say so; `kto_tag` is a thumb."""
    if "conversations" not in row and "instruction" not in row:
        raise other_shape(row, "conversations, or an instruction, with chosen and rejected")
    meta = others(row, *_PARTS)
    if row.get("kto_tag") is None:
        prompt, chosen, rejected = _prompt(row), _answer(row, "chosen"), _answer(row, "rejected")
        yield at.pair(prompt, chosen, rejected, meta)
        return
    if not isinstance(row["kto_tag"], bool):
        raise RowFault("wrong_type", f"`kto_tag` is {type(row['kto_tag']).__name__}; expected true or false")
    prompt, answer = _prompt(row), [assistant(needed_text(row, "output"))] if "output" in row else []
    if not answer:
        prompt, answer = last_answer(prompt, "conversations")
    yield at.thumb(prompt, answer, row["kto_tag"], meta)


def _prompt(row: Row) -> list[Message]:
    if row.get("conversations") is not None:
        given = listed(row["conversations"], "conversations", "a list of messages")
        keys = _keys(given[0]) if given else ("from", "value")
        return with_system(row, messages(given, "conversations", *keys))
    asked = needed_text(row, "instruction") + (f"\n{needed_text(row, 'input')}" if row.get("input") else "")
    return with_system(row, [*history(row), user(asked)])


def _answer(row: Row, name: str) -> list[Message]:
    value = field(row, name)
    return answer_in(row, name, *_keys(mapping(value, name))) if isinstance(value, Mapping) else answer_in(row, name)


def _keys(value: object) -> tuple[str, str]:
    return ("role", "content") if isinstance(value, Mapping) and "role" in value else ("from", "value")


def _fits(row: Row) -> float:
    answers = has(row, "chosen", "rejected")
    if isinstance(row.get("conversations"), list):
        return 1.0 if answers or isinstance(row.get("kto_tag"), bool) else 0.0
    if not isinstance(row.get("instruction"), str):
        return 0.0
    if has(row, "output") and isinstance(row.get("kto_tag"), bool):
        return 1.0
    return 0.9 if answers and all(isinstance(row[name], str) for name in ("chosen", "rejected")) else 0.0


FORMAT = Format(
    name="llama_factory",
    title="LLaMA-Factory preference data (sharegpt, alpaca, KTO)",
    example='{"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", ...}, "rejected": {...}}',
    documented="LLaMA-Factory, data/README.md, Preference Dataset and KTO Dataset",
    fits=_fits,
    read=read,
)
