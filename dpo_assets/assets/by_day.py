"""What a recipe asks of the days of its feedback: a window that is trained on, and windows that are compared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any, Self

from dpo_assets.checks.bands import Bands, Limit
from dpo_assets.checks.drift import CHECK, DRIFT
from dpo_assets.checks.evidence.drift import drift_report
from dpo_assets.feedback.dated import dated_pairs
from dpo_assets.feedback.pool import Pool
from dpo_assets.feedback.splits import in_eval_split
from dpo_assets.feedback.window import Window, left_out, newest_day, today, window_of
from dpo_assets.recipe import FeedbackSection

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class ByDay:
    """The days of one dataset."""

    window: Window | None
    drift_days: int
    drift: Limit
    now: date

    @classmethod
    def of(cls, feedback: FeedbackSection, bands: Bands, pool: Callable[[], Pool]) -> Self:
        """Of a recipe and the pairs that were read, which are looked at only where the window needs their days."""
        now, window = today(), None
        if (section := feedback.window) is not None:
            window = window_of(section, newest_day(pool(), now) if section.days is not None else None)
        return cls(window, feedback.drift_days, bands.limit(CHECK), now)

    def identity(self) -> dict[str, Any]:
        """What of it decides what the dataset is."""
        compared = {"drift": [self.drift_days, self.drift["conversations"], self.drift["confidence"]]}
        return compared | ({"window": self.window.identity()} if self.window is not None else {})

    def look(
        self, pool: Pool, feedback: FeedbackSection, kept_in_train: Collection[str]
    ) -> tuple[pl.DataFrame | None, Mapping[str, Any]]:
        """(pairs outside of the window, None where there is none; what the dataset's report says of days)."""
        dated = dated_pairs(pool, self.drift_days, self.now) if self.drift_days else None
        compared = dated and drift_report(dated, int(self.drift["conversations"]), self.drift["confidence"])
        told = {"window": None, "outside_window": 0, DRIFT: compared and compared.model_dump(mode="json")}
        if self.window is None:
            return None, told

        def held_out(group: str) -> bool:
            return in_eval_split(group, feedback.eval_fraction, feedback.seed) and group not in kept_in_train

        outside = left_out(pool, self.window, held_out, self.now)
        return outside.names, told | {
            "window": outside.report(self.window),
            "outside_window": outside.names.height,
        }
