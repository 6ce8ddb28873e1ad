"""HelpSteer3 preferences: a context, two responses, and an overall preference from -3 to 3."""

from __future__ import annotations

from collections.abc import Iterator

from dpo_assets.feedback.pair import Pair
from dpo_assets.feedback.readers import Format, Row, has
from dpo_assets.feedback.readers.conversations import assistant, turns
from dpo_assets.feedback.readers.shapes import At, by_row, stronger
from dpo_assets.feedback.readers.values import field, needed_number, needed_text, other_shape, others

_PARTS = ("id", "context", "response1", "response2", "overall_preference", "individual_preference")


@by_row("id")
def read(row: Row, at: At) -> Iterator[Pair]:
    """A negative preference means that `response1` is better."""
    if not has(row, "response1") and not has(row, "response2"):
        raise other_shape(row, "context, response1, response2 and overall_preference")
    first, second = (assistant(needed_text(row, name)) for name in ("response1", "response2"))
    chosen, rejected, margin = stronger(first, second, needed_number(row, "overall_preference"), "overall_preference")
    prompt = turns(field(row, "context"), "context", "user")
    yield at.pair(prompt, chosen, rejected, others(row, *_PARTS), margin=margin)


FORMAT = Format(
    name="helpsteer3",
    title="HelpSteer3 preferences",
    example='{"context": [...], "response1": "...", "response2": "...", "overall_preference": -2}',
    documented="Dataset card of nvidia/HelpSteer3, Preference",
    fits=lambda row: 1.0 if has(row, "context", "response1", "response2", "overall_preference") else 0.0,
    read=read,
)
