"""The result of one check: the value, the band it is held against, where the band comes from, and the way out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from dpo_assets.recipe import Severity

Level = Literal["pass", "warn", "error"]
_ORDER: dict[Level, int] = {"pass": 0, "warn": 1, "error": 2}


@dataclass(frozen=True)
class Verdict:
    """`warn` shows and does not block; `error` blocks everything downstream, unless the check's severity is `warn`."""

    check: str
    level: Level
    value: float | int | str
    band: str
    source: str = ""
    fix: str = ""
    note: str = ""
    shown: Mapping[str, str] = field(default_factory=dict)  # Tables and plots by title, as Markdown.

    @property
    def passed(self) -> bool:
        return self.level == "pass"

    @property
    def headline(self) -> str:
        """One line for logs and summaries."""
        shown = f"{self.value:.6g}" if isinstance(self.value, float) else str(self.value)
        return f"{self.check}: {shown} (band: {self.band})"


def with_severity(verdict: Verdict, severity: Severity) -> Verdict:
    """The verdict under a severity: `warn` never blocks, `strict` blocks warnings too."""
    level = verdict.level
    if severity == "warn" and level == "error":
        level = "warn"
    if severity == "strict" and level == "warn":
        level = "error"
    return replace(verdict, level=level)


def worst(*levels: Level) -> Level:
    """The most severe of several levels."""
    return max(levels, key=lambda level: _ORDER[level], default="pass")


def upper_limit(value: float, warn: float, error: float) -> Level:
    """Level of a value that should stay below two limits. NaN and infinity are errors, whatever the limits are."""
    if not math.isfinite(value) or value > error:
        return "error"
    return "warn" if value > warn else "pass"
