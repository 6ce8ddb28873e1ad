"""Plots of an evaluation, pair by pair: what an accuracy counts and does not show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dpo_assets.checks.evidence.candidate import ScoredPairs
from dpo_assets.checks.evidence.clusters import Floats
from dpo_assets.report.plots import as_markdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 40
POINTS = 1500  # Of a scatter, evenly taken.
TAIL = 0.5  # Percent at either end that a histogram draws into its outermost bins.
COLOURS = {
    "SFT": "grey", "policy": "tab:blue", "champion": "tab:orange", "chosen": "tab:green", "rejected": "tab:red",
}  # fmt: skip


def score_plots(pairs: ScoredPairs) -> dict[str, str]:
    """Margins of every model, what moved, and whether length explains it: titles and images inside Markdown.

    A score that is not finite has no place in a plot and is left out; a plot without any is not made.
    """
    margins = {"policy": pairs.reward_margins()}
    gaps = {"SFT": pairs.logp_gaps("sft"), "policy": pairs.logp_gaps()}
    if pairs.has_champion:
        margins["champion"] = pairs.reward_margins("champion", "champion_start")
        gaps["champion"] = pairs.logp_gaps("champion")
    shifts = {answer: _shifts(pairs, answer) for answer in ("chosen", "rejected")}
    longer = [c - r for c, r in zip(pairs.columns["chosen_tokens"], pairs.columns["rejected_tokens"], strict=True)]
    plots = {
        "margins": _margins(margins, gaps),
        "displacement": _displacement(shifts),
        "length against margin": _length(longer, margins["policy"]),
    }
    return {title: plot for title, plot in plots.items() if plot}


def _shifts(pairs: ScoredPairs, answer: str) -> list[float]:
    """Nats per token that answers gained from SFT to policy."""
    of = pairs.columns
    both = zip(of[f"policy_{answer}"], of[f"sft_{answer}"], of[f"{answer}_tokens"], strict=True)
    return [(after - before) / tokens for after, before, tokens in both]


def _margins(rewards: Mapping[str, Sequence[float]], gaps: Mapping[str, Sequence[float]]) -> str:
    """Left: implicit-reward margins, each policy against its own start. Right: what needs no reference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.8), dpi=80, layout="constrained")
    left, right = figure.subplots(1, 2)
    drawn = [
        _histograms(left, rewards, "implicit reward: chosen less rejected, nats"),
        _histograms(right, gaps, "log-probability per token: chosen less rejected"),
    ]
    return as_markdown(figure, "margins of held-out pairs") if any(drawn) else ""


def _displacement(shifts: Mapping[str, Sequence[float]]) -> str:
    """What became of both answers: a margin can grow while chosen answers become less likely."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.8), dpi=80, layout="constrained")
    left, right = figure.subplots(1, 2)
    if not _histograms(left, shifts, "policy less SFT, nats per token"):
        return ""
    chosen, rejected = drawable(shifts["chosen"], shifts["rejected"])
    right.scatter(rejected, chosen, s=4, linewidth=0, alpha=0.5)
    right.axhline(0.0, linewidth=0.6, color="grey")
    right.axvline(0.0, linewidth=0.6, color="grey")
    right.set_xlabel("rejected, nats per token", fontsize=9)
    right.set_ylabel("chosen, nats per token", fontsize=9)
    return as_markdown(figure, "displacement of chosen and rejected answers, policy against SFT")


def _length(longer: Sequence[float], margins: Sequence[float]) -> str:
    """The policy's margins by how much longer the chosen answer is, with the correlation of their ranks."""
    from matplotlib.figure import Figure

    tokens, nats = drawable(longer, margins)
    if not len(tokens):
        return ""
    figure = Figure(figsize=(6, 2.8), dpi=80, layout="constrained")
    axes = figure.subplots()
    axes.scatter(tokens, nats, s=4, linewidth=0, alpha=0.5)
    axes.axhline(0.0, linewidth=0.6, color="grey")
    axes.axvline(0.0, linewidth=0.6, color="grey")
    axes.set_xlabel("tokens of chosen less rejected", fontsize=9)
    axes.set_ylabel("implicit-reward margin, nats", fontsize=9)
    found = rank_correlation(longer, margins)
    axes.set_title("rank correlation: none" if math.isnan(found) else f"rank correlation {found:+.2f}", fontsize=10)
    return as_markdown(figure, "length of the chosen answer against the policy's margin")


def _histograms(axes: Axes, series: Mapping[str, Sequence[float]], label: str) -> bool:
    """All series over the same bins; whether there was anything to draw. Tails are drawn into the outermost bins."""
    kept = {name: drawable(values)[0] for name, values in series.items()}
    together = np.concatenate(list(kept.values()))
    axes.set_xlabel(label, fontsize=9)
    if not len(together):
        return False
    low, high = np.percentile(together, [TAIL, 100 - TAIL])
    if not low < high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BINS + 1)
    for name, values in kept.items():
        counts, _ = np.histogram(np.clip(values, low, high), edges)
        axes.stairs(counts, edges, label=name, linewidth=1.2, color=COLOURS[name])
    axes.axvline(0.0, linestyle="--", linewidth=0.8, color="grey")
    axes.set_ylabel("pairs", fontsize=9)
    axes.legend(fontsize=8)
    return True


def drawable(*columns: Sequence[float]) -> list[Floats]:
    """The rows in which every column is a number; of more than one column `POINTS` at most, evenly taken."""
    rows = np.asarray(columns, dtype=float)
    rows = rows[:, np.isfinite(rows).all(axis=0)]
    step = max(1, math.ceil(rows.shape[1] / POINTS)) if len(columns) > 1 else 1
    return list(rows[:, ::step])


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's, ties at their mean rank; NaN where either is constant. Rows without two numbers are left out."""
    import polars as pl

    rows = np.asarray([one, other], dtype=float)
    table = pl.DataFrame(dict(zip("ab", rows[:, np.isfinite(rows).all(axis=0)], strict=True)))
    found = table.select(pl.corr("a", "b", method="spearman")).item()
    return math.nan if found is None else float(found)
