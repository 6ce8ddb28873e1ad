"""OpenAI preference JSONL, which Azure, Together and Fireworks read too: `input`, `preferred_output`, the other one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dpo_assets.feedback.pair import Pair
from dpo_assets.feedback.readers import Format, Row, has
from dpo_assets.feedback.readers.conversations import answer_in, messages
from dpo_assets.feedback.readers.modality import tools_text
from dpo_assets.feedback.readers.shapes import At, by_row
from dpo_assets.feedback.readers.values import field, mapping, other_shape, others

_PARTS = ("input", "preferred_output", "non_preferred_output")


@by_row("id")
def read(row: Row, at: At) -> Iterator[Pair]:
    """`input.messages` is the prompt; both outputs are lists of messages. Tools of the input belong to the prompt."""
    if not any(name in row for name in _PARTS):
        raise other_shape(row, "input, preferred_output and non_preferred_output")
    given = mapping(field(row, "input"), "input", "{messages}")
    prompt = messages(field(given, "messages", "input."), "input.messages")
    chosen, rejected = answer_in(row, "preferred_output"), answer_in(row, "non_preferred_output")
    pair = at.pair(prompt, chosen, rejected, others(row, "id", *_PARTS))
    yield replace(pair, tools=tools_text(given.get("tools") or given.get("functions"), "input.tools"))


FORMAT = Format(
    name="openai",
    title="OpenAI preference JSONL (also Azure OpenAI, Together, Fireworks)",
    example='{"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}',
    documented="OpenAI, Direct preference optimization, Data format; Microsoft Learn, Direct preference optimization",
    fits=lambda row: 1.0 if has(row, "preferred_output", "non_preferred_output") else 0.0,
    read=read,
)
