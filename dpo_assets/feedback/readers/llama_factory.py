"""LLaMA-Factory: sharegpt pairs (`conversations`, `chosen`, `rejected`), alpaca pairs, KTO rows of both, v1 pairs."""

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
    shared_prefix,
    user,
    with_system,
)
from dpo_assets.feedback.readers.shapes import At, by_row
from dpo_assets.feedback.readers.values import (
    field,
    listed,
    mapping,
    needed_text,
    number,
    other_shape,
    others,
    truth,
)

_TALKS = ("conversations", "messages")
_SIDES = ("chosen_messages", "rejected_messages")
_THUMBS = ("kto_tag", "label")
_PARTS = (
    *("id", "chosen", "rejected", "system", *_TALKS, *_SIDES, *_THUMBS),
    *("instruction", "input", "output", "history"),
)


@by_row("id")
def read(row: Row, at: At) -> Iterator[Item]:
    """Messages are `{from, value}`, or `{role, content}` where the dataset's tags say so.

    `kto_tag`, or `label` as in its own example of KTO, is a thumb. v1 keeps a pair as two whole conversations, of
    messages with content parts and a `loss_weight`, which must be 1 for the answers.
    """
    meta = others(row, *_PARTS)
    if has(row, *_SIDES):
        prompt, chosen, rejected = shared_prefix(*(_answered(row, name) for name in _SIDES))
        yield at.pair(prompt, chosen, rejected, meta)
        return
    if not any(name in row for name in (*_TALKS, "instruction")):
        raise other_shape(row, "conversations, messages or an instruction, with chosen and rejected")
    thumb = next((name for name in _THUMBS if row.get(name) is not None), None)
    if thumb is None or has(row, "chosen", "rejected"):
        prompt, chosen, rejected = _prompt(row), _answer(row, "chosen"), _answer(row, "rejected")
        yield at.pair(prompt, chosen, rejected, meta)
        return
    liked = truth(row[thumb])
    if liked is None:
        raise RowFault("wrong_type", f"`{thumb}` is {type(row[thumb]).__name__}; expected true or false")
    if "output" in row:
        prompt, answer = _prompt(row), [assistant(needed_text(row, "output"))]
    else:
        talk = next((name for name in _TALKS if row.get(name) is not None), _TALKS[0])
        field(row, talk)
        prompt, answer = last_answer(with_system(row, _answered(row, talk)), talk)
    yield at.thumb(prompt, answer, liked, meta)


def _answered(row: Row, name: str) -> list[Message]:
    """A conversation whose last message is the answer, which counts in full (v1's `loss_weight`)."""
    given = listed(row[name], name, "a list of messages")
    last = given[-1] if given else None
    weight = last.get("loss_weight") if isinstance(last, Mapping) else None
    if weight is not None and number(weight) != 1:
        raise RowFault("wrong_shape", f"the answer in `{name}` has a loss_weight other than 1; all answers count alike")
    return messages(given, name, *(_keys(given[0]) if given else ("from", "value")))


def _prompt(row: Row) -> list[Message]:
    if (name := next((name for name in _TALKS if row.get(name) is not None), None)) is not None:
        given = listed(row[name], name, "a list of messages")
        keys = _keys(given[0]) if given else ("from", "value")
        return with_system(row, messages(given, name, *keys))
    asked = needed_text(row, "instruction") + (f"\n{needed_text(row, 'input')}" if row.get("input") else "")
    return with_system(row, [*history(row), user(asked)])


def _answer(row: Row, name: str) -> list[Message]:
    value = field(row, name)
    return answer_in(row, name, *_keys(mapping(value, name))) if isinstance(value, Mapping) else answer_in(row, name)


def _keys(value: object) -> tuple[str, str]:
    return ("role", "content") if isinstance(value, Mapping) and "role" in value else ("from", "value")


def _fits(row: Row) -> float:
    if isinstance(row.get(_SIDES[0]), list) and isinstance(row.get(_SIDES[1]), list):
        return 1.0
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
    documented="LLaMA-Factory, data/README.md, Preference Dataset and KTO Dataset; v1 data processing, DPO",
    fits=_fits,
    read=read,
)
