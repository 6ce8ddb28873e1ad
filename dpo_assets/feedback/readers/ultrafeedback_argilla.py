"""UltraFeedback cleaned by Argilla: columns with hyphens, `chosen-rating` and `rejected-rating`."""

from __future__ import annotations

from collections.abc import Iterator

from dpo_assets.feedback.pair import Pair
from dpo_assets.feedback.readers import Format, Row, has
from dpo_assets.feedback.readers.shapes import At, by_row, rated_pair
from dpo_assets.feedback.readers.values import other_shape


@by_row("id")
def read(row: Row, at: At) -> Iterator[Pair]:
    """`chosen` and `rejected` are whole conversations, or texts after `prompt`; the margin is that of the ratings."""
    if not has(row, "chosen", "rejected"):
        raise other_shape(row, "prompt, chosen, chosen-rating, rejected and rejected-rating")
    yield rated_pair(row, at, "chosen-rating", "rejected-rating")


FORMAT = Format(
    name="ultrafeedback_argilla",
    title="UltraFeedback cleaned (Argilla)",
    example='{"prompt": "...", "chosen": [...], "chosen-rating": 4.75, "rejected": [...], "rejected-rating": 2.5}',
    documented="Dataset card of argilla/ultrafeedback-binarized-preferences-cleaned, Dataset structure",
    fits=lambda row: 1.0 if has(row, "chosen", "rejected", "chosen-rating", "rejected-rating") else 0.0,
    read=read,
)
