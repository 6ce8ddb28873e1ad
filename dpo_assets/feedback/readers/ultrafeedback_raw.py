"""UltraFeedback as its authors publish it: four completions of one instruction, each rated on four aspects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import fmean

from dpo_assets.feedback.readers import Format, Item, Place, Row, RowFault
from dpo_assets.feedback.readers.shapes import (
    assistant,
    by_row,
    field,
    judged,
    listed,
    mapping,
    needed_text,
    number,
    other_shape,
    user,
)

_ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


@by_row("id")
def read(row: Row, place: Place, row_id: str) -> Iterator[Item]:
    """A judged answer for each completion; one without a rating becomes a fault of its own.

    The score is the mean of the aspects' ratings, as in Argilla's cleaned version: `overall_score` is known to mark
    some of the worst answers 10. It is used where an answer has nothing else.
    """
    if not _completions(row):
        raise other_shape(row, "an instruction and completions with a response each")
    prompt, scored = [user(needed_text(row, "instruction"))], []
    for n, item in enumerate(listed(row["completions"], "completions")):
        where = f"completions[{n}]"
        try:
            one = mapping(item, where, "a completion")
            answer = [assistant(needed_text(one, "response", f"{where}."))]
            model = {"model": one["model"]} if isinstance(one.get("model"), str) else {}
            scored.append((answer, _score(one, where), model))
        except RowFault as fault:
            yield RowFault(fault.reason, fault.message, f"{row_id}.{n}")
    meta = {"source": row["source"]} if isinstance(row.get("source"), str) else {}
    yield from judged(prompt, [(a, s, {**meta, **m}) for a, s, m in scored], place, row_id, "judge_rating")


def _score(completion: Row, where: str) -> float:
    annotations = completion.get("annotations")
    ratings = []
    for aspect in _ASPECTS:
        told = annotations.get(aspect) if isinstance(annotations, Mapping) else None
        # A rating is text and may be "N/A": such an aspect says nothing.
        if isinstance(told, Mapping) and (rating := number(told.get("Rating"))) is not None:
            ratings.append(rating)
    if ratings:
        return fmean(ratings)
    for name in ("fine-grained_score", "overall_score"):
        if (score := number(completion.get(name))) is not None:
            return score
    field(completion, "annotations", f"{where}.")
    raise RowFault("missing_field", f"`{where}` has no rating that is a number")


def _completions(row: Row) -> bool:
    found = row.get("completions")
    return isinstance(found, list) and any(isinstance(one, Mapping) and "response" in one for one in found)


FORMAT = Format(
    name="ultrafeedback_raw",
    title="UltraFeedback, raw completions",
    example='{"instruction": "...", "completions": [{"response": "...", "annotations": {...}}, ...]}',
    documented="UltraFeedback README (OpenBMB), Dataset Format; Argilla's card on overall_score",
    fits=lambda row: 1.0 if isinstance(row.get("instruction"), str) and _completions(row) else 0.0,
    read=read,
)
