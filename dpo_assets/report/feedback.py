"""Tables of where preferences come from and what is in quarantine, for the asset pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_assets.report.tables import table


def trend_table(runs: Sequence[tuple[str, Mapping[str, int]]]) -> str:
    """Rows in quarantine by reason, one column a run, the newest first."""
    reasons = sorted({reason for _, counts in runs for reason in counts}, key=lambda r: (-runs[0][1].get(r, 0), r))
    if not reasons:
        return "none in any of these runs"
    rows = [[reason, *(counts.get(reason, 0) for _, counts in runs)] for reason in reasons]
    rows.append(["all", *(sum(counts.values()) for _, counts in runs)])
    return table(["reason", *(name for name, _ in runs)], rows)


def released_table(released: Sequence[Mapping[str, Any]]) -> str:
    """What the recipe takes out of quarantine, and why."""
    return table(
        ["reason", "source", "rows", "note"], [[r["reason"], r["source"], r["rows"], r["note"]] for r in released]
    )


def source_views(report: Mapping[str, Any]) -> dict[str, str]:
    """Pairs by source, user, label kind and model; views without a row are left out."""
    views = {}
    for key, title in (("by_source", "sources"), ("by_user", "users"), ("by_label_kind", "label kinds")):
        rows = [[r["name"], r["pairs"], _number(r["longer_won"]), _number(r["margin"])] for r in report[key]]
        if rows:
            views[title] = table([title, "pairs", "the longer answer won", "mean margin"], rows)
    if report["models"]:
        rows = [[r["name"], r["pairs"], _number(r["win_rate"])] for r in report["models"]]
        views["win rate by model"] = table(["model", "pairs", "win rate"], rows)
    return views


def window_said(report: Mapping[str, Any]) -> str:
    """What a window of days left out of a dataset, in a sentence; empty where there is none."""
    told = report.get("window")
    if not told:
        return ""
    undated = told["without_date"]
    where = f" ({', '.join(f'{name} {count}' for name, count in undated.items())})" if undated else ""
    what = f"{told['left_out_undated']} were left out" if told["left_out_undated"] else "they are trained on"
    return (
        f"trained on from {told['start']} (UTC) on: {told['older']} older pairs were left out; {told['held_out']} stay "
        f"because they are held out, so that models are judged by the same pairs as before. "
        f"{sum(undated.values())} pairs have no date{where}"
        + (f", {what}" if undated else "")
        + (f"; {ahead} are dated in the future" if (ahead := report.get("in_future", 0)) else "")
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
