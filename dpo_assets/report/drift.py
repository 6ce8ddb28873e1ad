"""The windows of feedback as a table and a plot, from the report's numbers alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dpo_assets.checks.bands import Limit
from dpo_assets.checks.drift import has_moved
from dpo_assets.checks.evidence.drift import DriftReport, WindowScore
from dpo_assets.checks.evidence.measured import MeanScore
from dpo_assets.report.plots import as_markdown
from dpo_assets.report.tables import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "feedback by window"


def drift_views(drift: DriftReport | None, limit: Limit) -> dict[str, str]:
    """The newest window against the one before it, and all windows as they follow each other. Empty without dates."""
    views = {}
    if drift is not None and drift.shifts:
        rows = [
            [
                shift.part, shift.measure, f"{shift.before:.3g}", f"{shift.now:.3g}", shift.shown,
                "too few" if shift.p is None else f"{shift.p:.2g}", " / ".join(map(str, shift.pairs)),
                " / ".join(map(str, shift.conversations)), "moved" if has_moved(shift, limit) else "",
            ]
            for shift in drift.shifts
        ]  # fmt: skip
        header = ["part", "measure", "before", "now", "difference", "p", "pairs now / before", "conversations", ""]
        views["newest window against the one before"] = table(header, rows)
    if drift is not None and len(drift.windows) > 1:
        views[TITLE] = _plot(drift.windows)
    return views


def _plot(windows: Sequence[WindowScore]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6), dpi=80, layout="constrained")
    oldest_first = list(reversed(windows))
    panels: tuple[tuple[str, Callable[[WindowScore], MeanScore], Callable[[float], float]], ...] = (
        ("the longer answer won", lambda w: w.longer_won, float),
        ("tokens of chosen answers", lambda w: w.length, math.exp),
        ("mean margin", lambda w: w.margin, float),
    )
    for axes, (title, score, shown) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        _draw(axes, [w.first[5:] for w in oldest_first], [score(w) for w in oldest_first], shown)
        axes.set_title(title, fontsize=9)
    return as_markdown(figure, TITLE)


def _draw(axes: Axes, days: Sequence[str], scores: Sequence[MeanScore], shown: Callable[[float], float]) -> None:
    """Means with their intervals by the first day of their window; what has no mean has no place."""
    points = [(x, one) for x, one in enumerate(scores) if math.isfinite(one.value)]
    xs, ys = [x for x, _ in points], [shown(one.value) for _, one in points]
    low = [y - shown(one.low) if one.low is not None else 0.0 for y, (_, one) in zip(ys, points, strict=True)]
    high = [shown(one.high) - y if one.high is not None else 0.0 for y, (_, one) in zip(ys, points, strict=True)]
    axes.errorbar(xs, ys, yerr=[low, high], marker="o", markersize=3, linewidth=1, capsize=2)
    axes.set_xticks(range(len(days)), days, fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
