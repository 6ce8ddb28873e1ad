"""NeMo-RL preference data: `context` and ranked `completions` (the lower rank is preferred)."""

from __future__ import annotations

from collections.abc import Iterator

from dpo_assets.feedback.readers import Format, Item, Row, has
from dpo_assets.feedback.readers.conversations import messages
from dpo_assets.feedback.readers.shapes import At, Scored, by_row
from dpo_assets.feedback.readers.values import field, listed, mapping, needed_number, other_shape, others


@by_row("id")
def read(row: Row, at: At) -> Iterator[Item]:
    """Of two completions the lower rank is chosen; of more the recipe's policy makes the pairs."""
    if "context" not in row and "completions" not in row:
        raise other_shape(row, "context and completions")
    prompt = messages(field(row, "context"), "context")
    scored: list[Scored] = []
    for n, item in enumerate(listed(field(row, "completions"), "completions")):
        where = f"completions[{n}]"
        one = mapping(item, where, "{rank, completion}")
        answer = messages(field(one, "completion", f"{where}."), f"{where}.completion")
        scored.append((answer, 0.0 - needed_number(one, "rank"), {}))
    meta = others(row, "id", "context", "completions")
    yield from at.ranking(prompt, scored, "human_ranking", meta)


FORMAT = Format(
    name="nemo_rl",
    title="NeMo-RL preference data",
    example='{"context": [...], "completions": [{"rank": 0, "completion": [...]}, {"rank": 1, "completion": [...]}]}',
    documented="NeMo RL documentation, PreferenceDataset; guides/dpo.md, Datasets",
    fits=lambda row: 1.0 if has(row, "context", "completions") else 0.0,
    read=read,
)
