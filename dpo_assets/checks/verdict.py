"""The result of one check: the value, the band it is held against, where the band comes from, and the way out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Level = Literal["pass", "warn", "error"]
_ORDER: dict[Level, int] = {"pass": 0, "warn": 1, "error": 2}


@dataclass(frozen=True)
class Verdict:
    """`warn` shows and does not block; `error` blocks everything downstream."""

    check: str
    level: Level
    value: float | int | str
    band: str
    source: str = ""
    fix: str = ""
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.level == "pass"

    @property
    def headline(self) -> str:
        """One line for logs and summaries."""
        shown = f"{self.value:.6g}" if isinstance(self.value, float) else str(self.value)
        return f"{self.check}: {shown} (band: {self.band})"


def worst(*levels: Level) -> Level:
    """The most severe of several levels."""
    return max(levels, key=lambda level: _ORDER[level], default="pass")


def upper_limit(value: float, warn: float, error: float) -> Level:
    """Level of a value that should stay below two limits. NaN and infinity are errors, whatever the limits are."""
    if not math.isfinite(value) or value > error:
        return "error"
    return "warn" if value > warn else "pass"
