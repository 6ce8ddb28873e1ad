"""Verdicts in plain words, and as JSON, for the command line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_assets.checks.verdict import Verdict

WORD = {"pass": "pass", "warn": "warning", "error": "BLOCKED"}


def verdict_rows(verdicts: Sequence[Verdict], reasons: Mapping[str, str] = {}) -> Iterator[tuple[str, str]]:
    """(label, sentence) pairs: level, value and band of each verdict; source and way out where it does not pass.

    `reasons`: check -> why its pipeline changed its band.
    """
    for verdict in verdicts:
        yield verdict.check, f"{WORD[verdict.level]}: {_value(verdict)}; band: {verdict.band}"
        if verdict.check in reasons:
            yield "", f"band {reasons[verdict.check]}"
        if not verdict.passed:
            for label, text in (("source", verdict.source), ("note", verdict.note), ("what to change", verdict.fix)):
                if text:
                    yield "", f"{label}: {text}"


def _value(verdict: Verdict) -> str:
    return f"{verdict.value:.3g}" if isinstance(verdict.value, float) else str(verdict.value)


def verdict_json(verdict: Verdict, reasons: Mapping[str, str] = {}) -> dict[str, Any]:
    """One verdict as a flat object. A value that is no finite number is told as text: JSON has no NaN."""
    value = verdict.value
    return {
        "check": verdict.check,
        "level": verdict.level,
        "value": str(value) if isinstance(value, float) and not math.isfinite(value) else value,
        "band": verdict.band,
        "band_changed": reasons.get(verdict.check, ""),
        "source": verdict.source,
        "fix": verdict.fix,
        "note": verdict.note,
    }
