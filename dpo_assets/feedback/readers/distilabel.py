"""distilabel: `generations` with `ratings` (its UltraFeedback task), or pairs (FormatTextGenerationDPO)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpo_assets.feedback.pair import Message
from dpo_assets.feedback.readers import Format, Item, Row, RowFault, has
from dpo_assets.feedback.readers.conversations import messages, turns, user, with_system
from dpo_assets.feedback.readers.shapes import At, by_row, rated_pair
from dpo_assets.feedback.readers.values import field, listed, needed_text, number, other_shape

# Besides what the pair takes. `distilabel_metadata` repeats the raw prompts and outputs of the judge.
_HEAVY = ("generations", "ratings", "rationales", "rationales-for-ratings", "types", "distilabel_metadata", "messages")


@by_row("id", "prompt_id")
def read(row: Row, at: At) -> Iterator[Item]:
    """A formatted row is the pair that the pipeline chose; any other row ranks its generations by rating."""
    if has(row, "chosen", "rejected"):
        left_out = ("prompt_id", "instruction", "system_prompt", *_HEAVY)
        yield rated_pair(row, at, "chosen_rating", "rejected_rating", left_out)
        return
    if not has(row, "generations"):
        raise other_shape(row, "generations and ratings, or chosen and rejected")
    generations = listed(row["generations"], "generations")
    ratings = listed(field(row, "ratings"), "ratings")
    if len(ratings) != len(generations):
        raise RowFault("wrong_shape", f"{len(generations)} `generations`, but {len(ratings)} `ratings`")
    named = [row[name] for name in ("generation_models", "model_names") if isinstance(row.get(name), list)]
    models: list[Any] = named[0] if named else []
    prompt, scored = _prompt(row), []
    for n, (given, told) in enumerate(zip(generations, ratings, strict=True)):
        rating = number(told)
        if given is None or rating is None:
            what = "`generations` is null" if given is None else "`ratings` is no number"
            yield RowFault("missing_field", f"entry {n} of {what}", f"{at.row}.{n}")
            continue
        meta: dict[str, Any] = {"model": models[n]} if n < len(models) and isinstance(models[n], str) else {}
        scored.append((turns(given, f"generations[{n}]", "assistant"), rating, meta))
    yield from at.ranking(prompt, scored, "judge_rating", {})


def _prompt(row: Row) -> list[Message]:
    if row.get("instruction") is not None:
        return with_system(row, [user(needed_text(row, "instruction"))], "system_prompt")
    return messages(field(row, "messages"), "messages")


def _fits(row: Row) -> float:
    if has(row, "chosen", "rejected", "chosen_rating", "rejected_rating"):
        return 1.0
    rated = isinstance(row.get("generations"), list) and isinstance(row.get("ratings"), list)
    return 1.0 if rated and (has(row, "instruction") or has(row, "messages")) else 0.0


FORMAT = Format(
    name="distilabel",
    title="distilabel: generations with ratings, or formatted pairs",
    example='{"instruction": "...", "generations": ["...", "..."], "ratings": [5, 2]}',
    documented="distilabel documentation, Components gallery, UltraFeedback and FormatTextGenerationDPO",
    fits=_fits,
    read=read,
)
