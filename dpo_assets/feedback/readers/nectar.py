"""Nectar: a transcript and several `answers`, each with its rank (1 is best)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dpo_assets.feedback.pair import Message
from dpo_assets.feedback.readers import Format, Item, Row, RowFault, has
from dpo_assets.feedback.readers.conversations import assistant, user
from dpo_assets.feedback.readers.hh_rlhf import turns_of
from dpo_assets.feedback.readers.shapes import At, by_row
from dpo_assets.feedback.readers.values import listed, mapping, needed_number, needed_text, other_shape


@by_row("id")
def read(row: Row, at: At) -> Iterator[Item]:
    """The prompt is plain text, or a transcript that ends with an empty turn of the assistant."""
    if not has(row, "prompt", "answers"):
        raise other_shape(row, "prompt and answers")
    prompt, scored = _prompt(needed_text(row, "prompt")), []
    for n, item in enumerate(listed(row["answers"], "answers")):
        one = mapping(item, f"answers[{n}]", "{answer, rank}")
        model = {"model": one["model"]} if isinstance(one.get("model"), str) else {}
        answer = [assistant(needed_text(one, "answer", f"answers[{n}]."))]
        scored.append((answer, 0.0 - needed_number(one, "rank"), model))
    yield from at.ranking(prompt, scored, "judge_rating", {})


def _prompt(text: str) -> list[Message]:
    if not text.lstrip(" ").startswith("\n\nHuman:"):
        return [user(text)]
    found = turns_of(text, "prompt")
    if found[-1] == assistant(""):
        found.pop()
    if not found:
        raise RowFault("wrong_shape", "`prompt` is a transcript without a Human: turn")
    return found


def _ranked(row: Row) -> bool:
    found = row.get("answers")
    one = found[0] if isinstance(found, list) and found else None
    return isinstance(one, Mapping) and "answer" in one and "rank" in one


FORMAT = Format(
    name="nectar",
    title="Nectar: answers with ranks",
    example='{"prompt": "\\n\\nHuman: Hi\\n\\nAssistant: ", "answers": [{"answer": "Hello!", "rank": 1.0}, ...]}',
    documented="Dataset card of berkeley-nest/Nectar; Axolotl documentation, RLHF, zephyr.nectar",
    fits=lambda row: 1.0 if isinstance(row.get("prompt"), str) and _ranked(row) else 0.0,
    read=read,
)
