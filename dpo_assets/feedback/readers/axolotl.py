"""Axolotl's DPO names: a question under one of several keys, `chosen` or `chosen_response`, and the rejected one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dpo_assets.feedback.pair import Message, Pair
from dpo_assets.feedback.readers import Format, Row, has
from dpo_assets.feedback.readers.conversations import answer_in, messages, prompt_and_answers, user, with_system
from dpo_assets.feedback.readers.shapes import At, by_row
from dpo_assets.feedback.readers.values import needed_text, other_shape, others

_QUESTIONS = ("question", "instruction", "input", "prompt")
_ANSWERS = (("chosen_response", "rejected_response"), ("chosen", "rejected"))


@by_row("id")
def read(row: Row, at: At) -> Iterator[Pair]:
    """`messages` (chat_template.default) or a question as text (argilla, intel, icr), after an optional `system`."""
    names = next((names for names in _ANSWERS if has(row, *names)), None)
    asked = next((name for name in ("messages", *_QUESTIONS) if row.get(name) is not None), None)
    if names is None or asked is None:
        raise other_shape(
            row, f"messages or one of {', '.join(_QUESTIONS)}, and chosen(_response), rejected(_response)"
        )
    chosen, rejected = answer_in(row, names[0]), answer_in(row, names[1])
    prompt, chosen, rejected = prompt_and_answers(_prompt(row, asked), chosen, rejected)
    meta = others(row, "id", asked, "system", *names)
    yield at.pair(prompt, chosen, rejected, meta)


def _prompt(row: Row, asked: str) -> list[Message]:
    if asked == "messages":
        return with_system(row, messages(row["messages"], "messages"))
    return with_system(row, [user(needed_text(row, asked))])


def _fits(row: Row) -> float:
    asked = {name for name in _QUESTIONS if isinstance(row.get(name), str)}
    if has(row, "chosen_response", "rejected_response"):
        return 0.95 if asked else 0.0
    if not has(row, "chosen", "rejected"):
        return 0.0
    if isinstance(row.get("messages"), list) and isinstance(row["chosen"], Mapping):
        return 0.95
    own = "question" in asked or asked == {"input"} or ("prompt" in asked and isinstance(row.get("system"), str))
    return 0.95 if own else 0.5 if asked else 0.0


FORMAT = Format(
    name="axolotl",
    title="Axolotl's DPO columns (argilla, intel, icr, chat_template)",
    example='{"system": "...", "question": "Hi", "chosen": "Hello!", "rejected": "What."}',
    documented="Axolotl documentation, RLHF (docs/rlhf.qmd), DPO, dataset types chatml.* and chat_template.default",
    fits=_fits,
    read=read,
)
