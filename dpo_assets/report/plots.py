"""Curves as small PNG images inside Markdown. They stay in the event log for ever, so their size is bounded."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_assets.checks.reports import read_metrics
from dpo_assets.untrusted import in_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 400
FEW = 20  # So few points need dots: one alone makes no line.


def line_plot(
    metrics: Path, series: Mapping[str, str], title: str, level: float | None = None, mark: float | None = None
) -> str:
    """One curve per key of `series` over the steps of a metrics.jsonl.

    `level` is drawn as a dashed line, `mark` as an upright one at that step.
    """
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    figure = Figure(figsize=(6, 3), dpi=80, layout="constrained")
    axes = figure.subplots()
    for key, label in series.items():
        points = [(row["step"], row[key]) for row in rows if key in row]
        points = points[:: max(1, len(points) // POINTS)]
        dots = "." if len(points) < FEW else ""
        axes.plot([x for x, _ in points], [y for _, y in points], label=label, linewidth=1.2, marker=dots)
    if level is not None:
        axes.axhline(level, linestyle="--", linewidth=0.8, color="grey")
    if mark is not None:
        axes.axvline(mark, linewidth=0.8, color="red")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    if len(series) > 1:
        axes.legend(fontsize=8)
    return as_markdown(figure, title)


def as_markdown(figure: Figure, title: str) -> str:
    """A figure as an image inside Markdown."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return f"![{in_markdown(title)}](data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')})"
