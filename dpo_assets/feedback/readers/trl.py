"""TRL's shapes: pairs with an explicit prompt or a shared prefix, single answers with a label; text or messages."""

from __future__ import annotations

from collections.abc import Iterator

from dpo_assets.feedback.pair import JudgedAnswer, Pair
from dpo_assets.feedback.readers import Format, Item, Place, ReadOptions, Row, RowFault, has
from dpo_assets.feedback.readers.conversations import is_whole, prompt_and_answers, shared_prefix, turns
from dpo_assets.feedback.readers.shapes import At
from dpo_assets.feedback.readers.values import field, number, others, truth

_PARTS = frozenset({"prompt", "chosen", "rejected", "id", "margin"})


def read(row: Row, place: Place, options: ReadOptions) -> Iterator[Item]:
    """`{prompt, chosen, rejected}`, `{chosen, rejected}` with one prefix, or `{prompt, completion, label}`."""
    row_id = place.row_id(row.get("id"))  # Not `by_row`: rows of this format come by the million.
    try:
        if row.get("chosen") is None and has(row, "completion", "label"):
            yield _judged(row, At(place, row_id, options))
            return
        chosen = turns(field(row, "chosen"), "chosen", "assistant")
        rejected = turns(field(row, "rejected"), "rejected", "assistant")
        if row.get("prompt") is None:
            prompt, chosen, rejected = shared_prefix(chosen, rejected)
        else:
            prompt = turns(row["prompt"], "prompt", "user")
            if is_whole(chosen):
                prompt, chosen, rejected = prompt_and_answers(prompt, chosen, rejected)
        yield Pair(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            source=place.source,
            row=row_id,
            line=place.line,
            margin=number(row.get("margin")),
            meta={k: v for k, v in row.items() if k not in _PARTS},
        )
    except RowFault as fault:
        yield RowFault(fault.reason, fault.message, row_id)


def _judged(row: Row, at: At) -> JudgedAnswer:
    """An unpaired row: the label is a thumb. Pairing it with others of the same prompt is a policy's work."""
    liked = truth(row["label"])
    if liked is None:
        raise RowFault("wrong_type", f"`label` is {type(row['label']).__name__}; expected true or false")
    prompt = turns(field(row, "prompt"), "prompt", "user")
    answer = turns(row["completion"], "completion", "assistant")
    return at.thumb(prompt, answer, liked, others(row, "prompt", "completion", "label", "id"))


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
