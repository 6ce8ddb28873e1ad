"""What a recipe asks of the days of its feedback: a window that is trained on, and windows that are compared."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any, Self

from dpo_assets.artifact import STORED, Artifact
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


# What is told of days and changes no pair: outside of the dataset's digest, so that nothing is trained again for it.
BESIDE = f"{STORED}days.json"


@dataclass(frozen=True)
class ByDay:
    """The days of one dataset. `newest` is the last day of its feedback that is not in the future."""

    window: Window | None
    newest: date | None
    drift_days: int
    drift: Limit
    now: date

    @classmethod
    def of(cls, feedback: FeedbackSection, bands: Bands, fitted: Sequence[Artifact]) -> Self:
        """Of a recipe and the batches of its pairs; without batches, of no feedback."""
        now, window = today(), None
        newest = newest_day(_pool(fitted).keys(["day"])["day"], now) if fitted else None
        if (section := feedback.window) is not None:
            window = window_of(section, newest if section.days is not None else None)
        return cls(window, newest, feedback.drift_days, bands.limit(CHECK), now)

    def identity(self) -> dict[str, Any]:
        """What of it decides what the dataset is, and what is told beside it."""
        compared: dict[str, Any] = {
            "drift": [self.drift_days, self.drift["conversations"], self.drift["confidence"]],
            "newest_day": self.newest.isoformat() if self.newest is not None else None,
        }
        return compared | ({"window": self.window.identity()} if self.window is not None else {})

    def look(
        self, fitted: Sequence[Artifact], feedback: FeedbackSection, kept_in_train: Collection[str]
    ) -> tuple[pl.DataFrame | None, Mapping[str, Any], Mapping[str, Any]]:
        """(pairs outside of the window, None where there is none; what the report says of days; what lies BESIDE)."""
        pool, compared = _pool(fitted), None
        if self.drift_days:
            dated = dated_pairs(pool.keys([*PAIR_ID, *NUMBERS]), self.drift_days, self.now)
            report = drift_report(dated, int(self.drift["conversations"]), self.drift["confidence"])
            compared = report.model_dump(mode="json")
        told: dict[str, Any] = {"window": None, "outside_window": 0}
        if self.window is None:
            return None, told, {DRIFT: compared}
        facts = pool.keys(["day", "source", "group_id", "draw", "together"])
        facts = facts.with_columns(sides(facts, feedback.eval_fraction, kept_in_train))
        outside = left_out(facts, self.window, self.now)
        told |= {"window": outside.report(self.window), "outside_window": outside.names.height}
        return outside.names, told, {DRIFT: compared, "in_future": outside.future}


def report_of(dataset: Artifact) -> dict[str, Any]:
    """A dataset's report with what lies BESIDE it; a dataset of an earlier version has nothing there."""
    report: dict[str, Any] = dataset.json("report.json")
    return report | (dataset.json(BESIDE) if BESIDE in dataset.manifest.files else {})


def _pool(fitted: Sequence[Artifact]) -> Pool:
    return stored([one.path for one in fitted])
