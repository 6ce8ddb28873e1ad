"""Who gave the preferences, and who won: accepted pairs by source, by user, by kind of label and by answering model."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from dpo_assets.feedback.quality_numbers import rounded

if TYPE_CHECKING:
    import polars as pl

MOST = 20  # Rows of a table.


def source_report(accepted: pl.DataFrame) -> dict[str, Any]:
    """Pairs, mean margin and how often the longer answer won, by source, user and label kind; win rates of models.

    A user or a source whose preferences follow length alone, or that gives most of all pairs, is seen here.

    Args:
        accepted: `source` and `facts.FACTS` of accepted pairs.
    """
    return {
        "by_source": _by(accepted, "source"),
        "by_user": _by(accepted.filter(accepted["user"].is_not_null()), "user"),
        "by_label_kind": _by(accepted, "label_kind"),
        "models": _models(accepted),
    }


def _by(pairs: pl.DataFrame, column: str) -> list[dict[str, Any]]:
    import polars as pl

    longer = pl.col("chosen_tokens").cast(pl.Int64) - pl.col("rejected_tokens").cast(pl.Int64)
    won = (longer > 0).cast(pl.Float64) + 0.5 * (longer == 0).cast(pl.Float64)
    rows = pairs.group_by(column).agg(pairs=pl.len(), longer_won=won.mean(), margin=pl.col("margin").mean())
    rows = rows.sort("pairs", column, descending=[True, False]).head(MOST)
    return [
        {
            "name": row[column],
            "pairs": row["pairs"],
            "longer_won": rounded(row["longer_won"]),
            "margin": rounded(row["margin"]),
        }
        for row in rows.iter_rows(named=True)
    ]


def _models(pairs: pl.DataFrame) -> list[dict[str, Any]]:
    """Win rates, where a source says which models answered."""
    won: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    some = pairs.filter(pairs["winner"].is_not_null())
    for winner, loser, count in some.group_by("winner", "loser").len().iter_rows():
        won[winner] += count
        lost[loser] += count
    names = sorted(set(won) | set(lost), key=lambda name: (-(won[name] + lost[name]), name))[:MOST]
    return [
        {"name": name, "pairs": won[name] + lost[name], "win_rate": rounded(won[name] / (won[name] + lost[name]))}
        for name in names
    ]


def models(meta: str) -> tuple[str | None, str | None]:
    """(model that gave the chosen answer, model that gave the rejected one), where `meta` names two."""
    if "model" not in meta:
        return None, None
    value = json.loads(meta)
    winner, loser = (_model(value, side) for side in ("chosen", "rejected"))
    return (winner, loser) if winner and loser and winner != loser else (None, None)


def _model(meta: Any, side: str) -> str | None:
    if not isinstance(meta, dict):
        return None
    held = meta.get(side)
    inner = held if isinstance(held, dict) else {}
    for value in (meta.get(f"{side}_model"), meta.get(f"{side}-model"), inner.get("model")):
        if isinstance(value, str) and value:
            return value
    return None
