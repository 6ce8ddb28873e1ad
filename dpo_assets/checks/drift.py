"""Verdict on whether the newest feedback is like the feedback before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dpo_assets.checks.bands import Bands, Limit
from dpo_assets.checks.evidence.drift import SHARES, DriftReport, Shift
from dpo_assets.checks.verdict import Verdict
from dpo_assets.errors import ConfigError

CHECK = "feedback_drift"
DRIFT = "drift"  # Of a dataset's report.
NAMED = 5  # Shifts that a verdict names.


def drift_of(report: Mapping[str, Any]) -> DriftReport | None:
    """The windows of a dataset's feedback; None where the recipe asks for none.

    Raises:
        ConfigError: for a dataset of an earlier version.
    """
    if DRIFT not in report:
        raise ConfigError("this `dpo_dataset` is of an earlier version, without windows; materialise it again.")
    return None if report[DRIFT] is None else DriftReport.model_validate(report[DRIFT])


def feedback_drift(report: Mapping[str, Any], bands: Bands) -> Verdict:
    """Measures of the newest window that moved against the window before, beyond chance and beyond their band."""
    drift, limit = drift_of(report), bands.limit(CHECK)
    seen = [shift for shift in drift.shifts if shift.p is not None] if drift is not None else []
    moved = sorted((shift for shift in seen if has_moved(shift, limit)), key=lambda s: -_in_bands(s, limit))
    return Verdict(
        CHECK,
        "warn" if moved else "pass",
        f"{len(moved)} of {len(seen)} measures moved" if seen else "no two windows to compare",
        f"beyond chance ({limit['confidence']:.0%} for all together, by Holm) no share moves by more than "
        f"{limit['share']:g}, no length by more than a factor of {limit['length']:g}, no margin by more than "
        f"{limit['margin']:g} standard deviations",
        limit.source,
        f"see who gave the new feedback and what they were shown: {_named(moved)}. feedback.window trains on the "
        "newest days alone; `checks.severity.feedback_drift: strict` holds such feedback"
        if moved
        else "",
        _compared(drift, limit),
    )


def has_moved(shift: Shift, limit: Limit) -> bool:
    """Whether a shift is beyond chance, all shifts together, and beyond its band."""
    return shift.p is not None and shift.p <= 1 - limit["confidence"] and _in_bands(shift, limit) > 1


def _in_bands(shift: Shift, limit: Limit) -> float:
    """How many times its band a measure moved."""
    if shift.measure in SHARES:
        band = limit["share"]
    else:
        band = limit["margin"] if shift.measure == "margin" else math.log(limit["length"])
    return abs(shift.difference) / band


def _named(moved: list[Shift]) -> str:
    more = f"; and {len(moved) - NAMED} more" if len(moved) > NAMED else ""
    return "; ".join(map(str, moved[:NAMED])) + more


def _compared(drift: DriftReport | None, limit: Limit) -> str:
    if drift is None:
        return "feedback.drift_days is 0"
    if not drift.windows:
        return f"no pair is dated ({drift.undated} without a date)"
    shown = [f"{w.first} to {w.last}: {w.pairs} pairs in {w.conversations} conversations" for w in drift.windows[:2]]
    few = "" if any(s.p is not None for s in drift.shifts) else f"; {limit['conversations']:g} a window would tell"
    return f"{' against '.join(shown)}; {drift.undated} pairs without a date{few}"
