"""Vertex AI preference tuning for Gemini: `contents` and two scored `completions`."""

from __future__ import annotations

from collections.abc import Iterator

from dpo_assets.feedback.pair import Message
from dpo_assets.feedback.readers import Format, Item, Row, RowFault, has
from dpo_assets.feedback.readers.conversations import message, messages, said, text_of, without_empty_systems
from dpo_assets.feedback.readers.shapes import At, Scored, by_row
from dpo_assets.feedback.readers.values import field, listed, mapping, needed_number, other_shape, others


@by_row("id")
def read(row: Row, at: At) -> Iterator[Item]:
    """Score 1 marks the preferred completion, 0 the other: "the value of the score itself" says no more."""
    if "contents" not in row and "completions" not in row:
        raise other_shape(row, "contents and completions")
    prompt = [*_system(row), *messages(field(row, "contents"), "contents", content="parts")]
    scored: list[Scored] = []
    for n, item in enumerate(listed(field(row, "completions"), "completions")):
        where = f"completions[{n}]"
        one = mapping(item, where, "{score, completion}")
        answer = message(field(one, "completion", f"{where}."), f"{where}.completion", content="parts")
        scored.append(([answer], needed_number(one, "score"), {}))
    if len(scored) != 2:
        raise RowFault("wrong_shape", f"`completions` has {len(scored)} entries; the format has one pair")
    meta = others(row, "id", "contents", "completions", "system_instruction", "systemInstruction")
    yield from at.ranking(prompt, scored, "human_pair", meta)


def _system(row: Row) -> list[Message]:
    for name in ("system_instruction", "systemInstruction"):
        if row.get(name) is not None:
            parts = field(mapping(row[name], name, "{parts}"), "parts", f"{name}.")
            return without_empty_systems([said("system", text_of(parts, f"{name}.parts"))])
    return []


FORMAT = Format(
    name="vertex",
    title="Vertex AI preference tuning (Gemini)",
    example='{"contents": [...], "completions": [{"score": 1, "completion": {"role": "model", "parts": [...]}}, ...]}',
    documented="Google Cloud, Prepare preference tuning data for Gemini models",
    fits=lambda row: 1.0 if has(row, "contents", "completions") else 0.0,
    read=read,
)
