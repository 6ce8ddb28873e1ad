"""ms-swift: `messages` (or query, response) with a `rejected_response`, whole `rejected_messages`, or a KTO `label`."""

from __future__ import annotations

from collections.abc import Iterator

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
from dpo_assets.feedback.readers.values import field, needed_text, other_shape, others

_PARTS = ("id", "messages", "rejected_response", "rejected_messages", "query", "response", "history", "system", "label")


@by_row("id")
def read(row: Row, at: At) -> Iterator[Item]:
    """The conversation's last answer is the chosen one."""
    if "messages" not in row and "query" not in row:
        raise other_shape(row, "messages or query")
    whole = _conversation(row)
    meta = others(row, *_PARTS)
    if has(row, "rejected_messages"):
        other = with_system(row, messages(row["rejected_messages"], "rejected_messages"))
        prompt, chosen, rejected = shared_prefix(whole, other)
        yield at.pair(prompt, chosen, rejected, meta)
        return
    prompt, answer = last_answer(whole, "messages")
    if has(row, "rejected_response"):
        rejected = answer_in(row, "rejected_response")
        yield at.pair(prompt, answer, rejected, meta)
        return
    if not isinstance(field(row, "label"), bool):
        raise RowFault("wrong_shape", "`label` is not true or false, so this is a row for classification")
    yield at.thumb(prompt, answer, row["label"], meta)


def _conversation(row: Row) -> list[Message]:
    if row.get("messages") is not None:
        return with_system(row, messages(row["messages"], "messages"))
    asked, said = user(needed_text(row, "query")), assistant(needed_text(row, "response"))
    return with_system(row, [*history(row), asked, said])


def _fits(row: Row) -> float:
    if not isinstance(row.get("messages"), list) and not has(row, "query", "response"):
        return 0.0
    if has(row, "rejected_response") or has(row, "rejected_messages"):
        return 1.0
    return 0.9 if isinstance(row.get("label"), bool) else 0.0


FORMAT = Format(
    name="ms_swift",
    title="ms-swift: messages with rejected_response, or with a KTO label",
    example='{"messages": [..., {"role": "assistant", "content": "Sunny."}], "rejected_response": "No idea."}',
    documented="ms-swift documentation, Custom Dataset, RLHF",
    fits=_fits,
    read=read,
)
