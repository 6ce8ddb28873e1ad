"""UltraFeedback binarised (HuggingFaceH4): whole conversations `chosen` and `rejected` with a score each."""

from __future__ import annotations

from collections.abc import Iterator

from dpo_assets.feedback.pair import Pair
from dpo_assets.feedback.readers import Format, Row, has
from dpo_assets.feedback.readers.shapes import At, by_row, rated_pair
from dpo_assets.feedback.readers.values import other_shape


@by_row("id", "prompt_id")
def read(row: Row, at: At) -> Iterator[Pair]:
    """The margin is the difference of the scores; `messages` repeats the chosen conversation and is left out."""
    if not has(row, "chosen", "rejected"):
        raise other_shape(row, "chosen, rejected, score_chosen and score_rejected")
    yield rated_pair(row, at, "score_chosen", "score_rejected", left_out=("prompt_id", "messages"))


FORMAT = Format(
    name="ultrafeedback_binarized",
    title="UltraFeedback binarised (HuggingFaceH4)",
    example='{"prompt": "...", "chosen": [...], "rejected": [...], "score_chosen": 8.5, "score_rejected": 6.0}',
    documented="Dataset card of HuggingFaceH4/ultrafeedback_binarized, Dataset structure",
    fits=lambda row: 1.0 if has(row, "chosen", "rejected", "score_chosen", "score_rejected") else 0.0,
    read=read,
)
