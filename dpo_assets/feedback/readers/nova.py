"""Amazon Nova DPO data: the last message holds two candidates with a preference label."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpo_assets.feedback.readers import Format, Item, Row, RowFault
from dpo_assets.feedback.readers.conversations import messages, spoken, with_system
from dpo_assets.feedback.readers.modality import UNSUPPORTED, filled
from dpo_assets.feedback.readers.shapes import At, Scored, by_row
from dpo_assets.feedback.readers.values import field, listed, mapping, other_shape, others

_LABELS = {"preferred": 1.0, "non-preferred": 0.0}


@by_row("id")
def read(row: Row, at: At) -> Iterator[Item]:
    """All messages but the last are the prompt."""
    if _candidates(row) is None:
        raise other_shape(row, "messages whose last one holds candidates")
    if filled(row.get("toolConfig")):
        raise RowFault(UNSUPPORTED, "`toolConfig` is filled: these tools have another form; give them as `tools`")
    *before, last = row["messages"]
    prompt = with_system(row, messages(before, "messages"))
    scored: list[Scored] = []
    for n, item in enumerate(listed(last["candidates"], "candidates")):
        where = f"candidates[{n}]"
        candidate = mapping(item, where, "{content, preferenceLabel}")
        label = field(candidate, "preferenceLabel", f"{where}.")
        if not isinstance(label, str) or label not in _LABELS:
            raise RowFault("wrong_type", f"`{where}.preferenceLabel` is none of: {', '.join(_LABELS)}")
        answer = spoken("assistant", field(candidate, "content", f"{where}."), f"`{where}.content`")
        scored.append(([answer], _LABELS[label], {}))
    meta = others(row, "id", "messages", "system", "schemaVersion")
    yield from at.ranking(prompt, scored, "human_pair", meta)


def _candidates(row: Row) -> Any:
    turns = row.get("messages")
    last = turns[-1] if isinstance(turns, list) and turns else None
    return last.get("candidates") if isinstance(last, dict) else None


FORMAT = Format(
    name="nova",
    title="Amazon Nova DPO data",
    example='{"messages": [..., {"role": "assistant", "candidates": [{"preferenceLabel": "preferred", ...}, ...]}]}',
    documented="Amazon Nova user guide, Direct preference optimization (DPO), Data format requirements",
    fits=lambda row: 1.0 if _candidates(row) is not None else 0.0,
    read=read,
)
