"""OpenPipe preference data: a conversation whose last message was preferred to `rejected_message`."""

from __future__ import annotations

from collections.abc import Iterator

from dpo_assets.feedback.pair import Pair
from dpo_assets.feedback.readers import Format, Row, has
from dpo_assets.feedback.readers.conversations import answer_in, last_answer, messages
from dpo_assets.feedback.readers.shapes import At, by_row
from dpo_assets.feedback.readers.values import field, other_shape, others


@by_row("id")
def read(row: Row, at: At) -> Iterator[Pair]:
    """`messages` ends with the preferred answer."""
    if "messages" not in row and "rejected_message" not in row:
        raise other_shape(row, "messages and rejected_message")
    prompt, chosen = last_answer(messages(field(row, "messages"), "messages"), "messages")
    rejected = answer_in(row, "rejected_message")
    meta = others(row, "id", "messages", "rejected_message")
    yield at.pair(prompt, chosen, rejected, meta)


FORMAT = Format(
    name="openpipe",
    title="OpenPipe preference data",
    example='{"messages": [..., {"role": "assistant", "content": "Hobart"}], "rejected_message": {...}}',
    documented="OpenPipe documentation, Reward Models, Preparing preference data",
    fits=lambda row: 1.0 if has(row, "messages", "rejected_message") else 0.0,
    read=read,
)
