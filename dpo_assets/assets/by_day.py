"""What a recipe asks of the days of its feedback: a window that is trained on, and windows that are compared."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any, Self

from dpo_assets.artifact import Artifact
from dpo_assets.checks.bands import Bands, Limit
from dpo_assets.checks.drift import CHECK, DRIFT
from dpo_assets.checks.evidence.drift import drift_report
from dpo_assets.feedback.batches import PAIR_ID
from dpo_assets.feedback.dated import NUMBERS, dated_pairs
from dpo_assets.feedback.pool import Pool, stored
from dpo_assets.feedback.splits import sides
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
    def of(cls, feedback: FeedbackSection, bands: Bands, fitted: Sequence[Artifact]) -> Self:
        """Of a recipe and the batches of its pairs; without batches, of no feedback."""
        now, window = today(), None
        if (section := feedback.window) is not None:
            days = _pool(fitted).keys(["day"])["day"] if fitted and section.days is not None else None
            window = window_of(section, newest_day(days, now) if days is not None else None)
        return cls(window, feedback.drift_days, bands.limit(CHECK), now)

    def identity(self) -> dict[str, Any]:
        """What of it decides what the dataset is."""
        compared = {"drift": [self.drift_days, self.drift["conversations"], self.drift["confidence"]]}
        return compared | ({"window": self.window.identity()} if self.window is not None else {})

    def look(
        self, fitted: Sequence[Artifact], feedback: FeedbackSection, kept_in_train: Collection[str]
    ) -> tuple[pl.DataFrame | None, Mapping[str, Any]]:
        """(pairs outside of the window, None where there is none; what the dataset's report says of days)."""
        pool, compared = _pool(fitted), None
        if self.drift_days:
            dated = dated_pairs(pool.keys([*PAIR_ID, *NUMBERS]), self.drift_days, self.now)
            report = drift_report(dated, int(self.drift["conversations"]), self.drift["confidence"])
            compared = report.model_dump(mode="json")
        told = {"window": None, "outside_window": 0, DRIFT: compared}
        if self.window is None:
            return None, told
        facts = pool.keys(["day", "source", "group_id", "draw", "together"])
        facts = facts.with_columns(sides(facts, feedback.eval_fraction, kept_in_train))
        outside = left_out(facts, self.window, self.now)
        told |= {"window": outside.report(self.window), "outside_window": outside.names.height}
        return outside.names, told


def _pool(fitted: Sequence[Artifact]) -> Pool:
    return stored([one.path for one in fitted])
