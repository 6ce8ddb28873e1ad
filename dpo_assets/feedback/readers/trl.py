"""TRL's shapes: pairs with an explicit prompt or a shared prefix, single answers with a label; text or messages."""

from __future__ import annotations

from collections.abc import Iterator

from dpo_assets.feedback.pair import JudgedAnswer, Pair
from dpo_assets.feedback.readers import Format, Item, Place, Row, RowFault, has
from dpo_assets.feedback.readers.shapes import (
    by_row,
    field,
    number,
    others,
    prompt_and_answers,
    shared_prefix,
    thumb,
    truth,
    turns,
)


@by_row("id")
def read(row: Row, place: Place, row_id: str) -> Iterator[Item]:
    """`{prompt, chosen, rejected}`, `{chosen, rejected}` with one prefix, or `{prompt, completion, label}`."""
    if has(row, "completion", "label") and not has(row, "chosen"):
        yield _judged(row, place, row_id)
        return
    for name in ("chosen", "rejected"):
        field(row, name)
    chosen, rejected = turns(row["chosen"], "chosen", "assistant"), turns(row["rejected"], "rejected", "assistant")
    if row.get("prompt") is not None:
        prompt = turns(row["prompt"], "prompt", "user")
        prompt, chosen, rejected = prompt_and_answers(prompt, chosen, rejected)
    else:
        prompt, chosen, rejected = shared_prefix(chosen, rejected)
    yield Pair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        source=place.source,
        row=row_id,
        line=place.line,
        margin=number(row.get("margin")),
        meta={k: v for k, v in row.items() if k not in ("prompt", "chosen", "rejected", "id", "margin")},
    )


def _judged(row: Row, place: Place, row_id: str) -> JudgedAnswer:
    """An unpaired row: the label is a thumb. Pairing it with others of the same prompt is a policy's work."""
    liked = truth(row["label"])
    if liked is None:
        raise RowFault("wrong_type", f"`label` is {type(row['label']).__name__}; expected true or false")
    prompt = turns(field(row, "prompt"), "prompt", "user")
    answer = turns(row["completion"], "completion", "assistant")
    return thumb(prompt, answer, liked, place, row_id, others(row, "prompt", "completion", "label", "id"))


def _fits(row: Row) -> float:
    if has(row, "prompt", "completion") and truth(row.get("label")) is not None:
        return 0.9
    if not has(row, "chosen", "rejected"):
        return 0.0
    return 0.9 if has(row, "prompt") or isinstance(row["chosen"], list) else 0.3


FORMAT = Format(
    name="trl",
    title="TRL: prompt, chosen, rejected as text or messages; or prompt, completion, label",
    example='{"prompt": "Hi", "chosen": "Hello!", "rejected": "What."}',
    documented="TRL documentation, Dataset formats and types, Preference and Unpaired preference",
    fits=_fits,
    read=read,
)
