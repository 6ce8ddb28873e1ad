"""Several verdicts on one comparison: the majority, mean ranks, and which answers of a ranking to compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import TypeVar

from dpo_assets.feedback.readers import RowFault

Ranked = TypeVar("Ranked")


def compared(order: Sequence[Ranked], pairing: str) -> list[tuple[Ranked, Ranked]]:
    """(better, worse) of a ranking, best first: its ends, its neighbours (`adjacent`), or all (`all_above_margin`)."""
    if len(order) < 2:
        return []
    if pairing == "adjacent":
        return list(pairwise(order))
    return list(combinations(order, 2)) if pairing == "all_above_margin" else [(order[0], order[-1])]


def majority(votes: Sequence[str]) -> tuple[str, float]:
    """The verdict that most annotators gave, and the share of them who gave it (above 0, at most 1).

    Raises:
        RowFault: `tie` where two verdicts have equally many votes, `no_feedback` where there is none.
    """
    ranked = Counter(votes).most_common(2)
    if not ranked:
        raise RowFault("no_feedback", "nobody has judged it")
    if len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
        raise RowFault("tie", f"{ranked[0][0]} and {ranked[1][0]} have equally many votes ({ranked[0][1]})")
    return ranked[0][0], ranked[0][1] / len(votes)


def mean_ranks(rankings: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean rank of every answer that all annotators ranked; 1 is best."""
    shared = [name for name in rankings[0] if all(name in ranking for ranking in rankings)] if rankings else []
    return {name: sum(ranking[name] for ranking in rankings) / len(rankings) for name in shared}
