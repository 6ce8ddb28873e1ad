"""HelpSteer2: one rated response a row, or two responses with the strength of the preference between them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from dpo_assets.feedback.pair import Message, Pair
from dpo_assets.feedback.readers import Format, Item, Row, has
from dpo_assets.feedback.readers.conversations import assistant, user
from dpo_assets.feedback.readers.shapes import At, by_row, stronger
from dpo_assets.feedback.readers.values import needed_number, needed_text, number, other_shape, others

_RATINGS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")  # Between the turns of a prompt of several.


@by_row("id")
def read(row: Row, at: At) -> Iterator[Item]:
    """A rated response scores by its helpfulness, as the card does it; a negative strength prefers `response_1`."""
    if has(row, "response_1", "response_2"):
        yield _pair(row, at)
        return
    if not has(row, "response"):
        raise other_shape(row, "prompt, response and helpfulness, or response_1, response_2 and preference_strength")
    meta: dict[str, Any] = {name: told for name in _RATINGS if (told := number(row.get(name))) is not None}
    prompt, answer = prompt_of(needed_text(row, "prompt")), [assistant(needed_text(row, "response"))]
    meta |= others(row, "id", "prompt", "response", *_RATINGS)
    yield at.judged(prompt, answer, needed_number(row, "helpfulness"), "human_rating", meta)


def _pair(row: Row, at: At) -> Pair:
    first, second = (assistant(needed_text(row, name)) for name in ("response_1", "response_2"))
    chosen, rejected, margin = stronger(first, second, needed_number(row, "preference_strength"), "preference_strength")
    told = {name: row[name] for name in ("preference_statement", "split") if isinstance(row.get(name), str)}
    prompt = prompt_of(needed_text(row, "prompt"))
    return at.pair(prompt, chosen, rejected, told, margin=margin)


def prompt_of(text: str) -> list[Message]:
    """One user message, or the turns of a prompt that holds several."""
    first, *rest = _TURN.split(text)
    return [
        user(first),
        *(user(said) if who == "User" else assistant(said) for who, said in zip(rest[::2], rest[1::2], strict=True)),
    ]


def _fits(row: Row) -> float:
    if has(row, "prompt", "response_1", "response_2", "preference_strength"):
        return 1.0
    return 1.0 if has(row, "prompt", "response", "helpfulness", "correctness") else 0.0


FORMAT = Format(
    name="helpsteer2",
    title="HelpSteer2: ratings or preferences",
    example='{"prompt": "...", "response_1": "...", "response_2": "...", "preference_strength": -2}',
    documented="Dataset card of nvidia/HelpSteer2, HelpSteer2 attributes and Preferences",
    fits=_fits,
    read=read,
)
