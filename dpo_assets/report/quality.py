"""Plots and tables of a dataset's measures, by the check that they belong to. Made from the report's numbers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_assets.checks.bands import Bands
from dpo_assets.checks.dataset_quality import BINS, quality_of
from dpo_assets.report.plots import as_markdown
from dpo_assets.report.tables import table

View = Mapping[str, str]  # Title -> Markdown.
TOP_FEATURES = 5
WIDE = 5  # Hundredths of distance in one bar.


def quality_views(report: Mapping[str, Any], bands: Bands) -> dict[str, View]:
    """What to show beside each check of `dpo_dataset` and on the asset: a plot or a few rows, of bounded size.

    Raises:
        ConfigError: for a dataset whose pairs were not measured.
    """
    quality = quality_of(report)
    degenerate, distance, conflicts = quality["degenerate"], quality["distance"], quality["contradictions"]
    limit = bands.limit("degenerate_chosen")["loop_share"]
    faults = [
        [f"loop of {row['loop']:.2f}" if row["fault"] == "loop" else row["fault"], row["row"], row["chosen"]]
        for row in degenerate["examples"]
        if row["fault"] != "loop" or row["loop"] >= limit
    ]
    views: dict[str, View] = {
        "answers_truncated": {
            "max_length that holds a share of answers": table(
                ["share of answers, %", "tokens of prompt and answer"],
                [[p, quality["truncation"]["needed"][p]] for p in ("90", "95", "99", "100")]
                if quality["truncation"]["needed"]
                else [],
            )
        },
        "pair_distance": {
            "edit distance": _distance_plot(distance["bins"], bands.limit("pair_distance")["near"]),
            "nearest pairs": _rows(distance["nearest"], ["distance", "row", "chosen", "rejected"]),
        },
        "length_bias": {"answer lengths": _length_plot(quality["lengths"]["grid"])},
        "label_conflicts": {"contradicting pairs": _rows(conflicts["examples"], ["row", "chosen", "rejected"])},
        "degenerate_chosen": {"degenerate answers": table(["fault", "row", "end of the chosen answer"], faults)}
        if faults
        else {},
        "too_easy": {"AUC of single features": _features(quality["surface"]["features"])},
    }
    return {check: {title: text for title, text in view.items() if text} for check, view in views.items()}


def _rows(examples: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    return table(columns, [[row[name] for name in columns] for row in examples]) if examples else ""


def _features(features: Mapping[str, float]) -> str:
    ordered = sorted(features.items(), key=lambda item: (-abs(item[1] - 0.5), item[0]))[:TOP_FEATURES]
    return table(["chosen minus rejected", "AUC"], [[name, f"{value:.4g}"] for name, value in ordered])


def _distance_plot(bins: Mapping[str, int], near: float) -> str:
    """Pairs by edit distance, with the limit below which two answers count as nearly equal."""
    from matplotlib.figure import Figure

    counts = [sum(bins.get(str(n), 0) for n in range(start, start + WIDE)) for start in range(0, BINS, WIDE)]
    figure = Figure(figsize=(6, 2.6), dpi=80, layout="constrained")
    axes = figure.subplots()
    axes.bar([start / BINS for start in range(0, BINS, WIDE)], counts, width=WIDE / BINS, align="edge", linewidth=0)
    axes.axvline(near, linestyle="--", linewidth=0.8, color="grey")
    axes.set_xlim(0, 1)
    axes.set_xlabel("edit distance of chosen and rejected (0: equal)", fontsize=9)
    axes.set_ylabel("pairs", fontsize=9)
    return as_markdown(figure, "edit distance of chosen and rejected")


def _length_plot(grid: Mapping[str, int]) -> str:
    """Left: answers by length, chosen and rejected. Right: pairs by both lengths; above the line chosen is longer."""
    from matplotlib.figure import Figure

    cells = [(*(int(n) for n in name.split(",")), count) for name, count in grid.items()]
    if not cells:
        return ""
    size = max(max(chosen, rejected) for chosen, rejected, _ in cells) + 1
    edges = [2 ** (n / 2) for n in range(size + 1)]
    figure = Figure(figsize=(7, 2.8), dpi=80, layout="constrained")
    left, right = figure.subplots(1, 2)
    for side, label in enumerate(("chosen", "rejected")):
        counts = [sum(cell[2] for cell in cells if cell[side] == n) for n in range(size)]
        left.stairs(counts, edges, label=label, linewidth=1.2)
    left.legend(fontsize=8)
    left.set_ylabel("answers", fontsize=9)
    left.set_xlabel("tokens", fontsize=9)
    square = [[0.0] * size for _ in range(size)]
    for chosen, rejected, count in cells:
        square[chosen][rejected] = count
    right.pcolormesh(edges, edges, square, cmap="Greys", rasterized=True)
    right.plot([edges[0], edges[-1]], [edges[0], edges[-1]], linewidth=0.8, linestyle="--")
    right.set_xlabel("tokens of rejected", fontsize=9)
    right.set_ylabel("tokens of chosen", fontsize=9)
    right.set_yscale("log", base=2)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
    return as_markdown(figure, "answer lengths in tokens")
