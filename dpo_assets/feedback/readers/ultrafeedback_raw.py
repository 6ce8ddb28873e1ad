"""UltraFeedback as its authors publish it: four completions of one instruction, each rated on four aspects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import fmean

from dpo_assets.feedback.readers import Format, Item, Row, RowFault
from dpo_assets.feedback.readers.conversations import assistant, user
from dpo_assets.feedback.readers.shapes import At, Scored, by_row
from dpo_assets.feedback.readers.values import listed, mapping, needed_text, number, other_shape

_ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


@by_row("id")
def read(row: Row, at: At) -> Iterator[Item]:
    """The completions ranked by their ratings; one without a rating becomes a fault of its own.

    The score is the mean of the aspects' ratings (1 to 5), as in Argilla's cleaned version: `overall_score` (1 to 10)
    is known to mark some of the worst answers 10. It is used where a row has nothing else, never beside ratings.
    """
    if not _completions(row):
        raise other_shape(row, "an instruction and completions with a response each")
    prompt, completions = [user(needed_text(row, "instruction"))], listed(row["completions"], "completions")
    by_aspect = any(isinstance(one, Mapping) and _mean(one) is not None for one in completions)
    scored: list[Scored] = []
    for n, item in enumerate(completions):
        where = f"completions[{n}]"
        try:
            one = mapping(item, where, "a completion")
            answer = [assistant(needed_text(one, "response", f"{where}."))]
            score = _mean(one) if by_aspect else number(one.get("overall_score"))
            if score is None:
                raise RowFault("missing_field", f"`{where}` has no rating that is a number")
            scored.append((answer, score, {name: one[name] for name in ("model",) if isinstance(one.get(name), str)}))
        except RowFault as fault:
            yield RowFault(fault.reason, fault.message, f"{at.row}.{n}")
    meta = {"source": row["source"]} if isinstance(row.get("source"), str) else {}
    yield from at.ranking(prompt, scored, "judge_rating", meta)


def _mean(completion: Row) -> float | None:
    """The mean rating, of the aspects that have one: a rating is text, and may be "N/A"."""
    found = completion.get("annotations")
    annotations: Row = found if isinstance(found, Mapping) else {}
    ratings = []
    for aspect in _ASPECTS:
        told = annotations.get(aspect)
        if isinstance(told, Mapping) and (rating := number(told.get("Rating"))) is not None:
            ratings.append(rating)
    return fmean(ratings) if ratings else number(completion.get("fine-grained_score"))


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
