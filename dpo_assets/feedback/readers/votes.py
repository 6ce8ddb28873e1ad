"""Several annotators' verdicts on one comparison: the majority's, with their agreement as its strength."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dpo_assets.feedback.readers import RowFault


def majority(votes: Sequence[str]) -> tuple[str, float]:
    """The verdict that most annotators gave, and the share of them who gave it (above 0, at most 1).

    Raises:
        RowFault: `tie` where two verdicts have equally many votes, `unjudged` where there is none.
    """
    ranked = Counter(votes).most_common(2)
    if not ranked:
        raise RowFault("unjudged", "nobody has judged it")
    if len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
        raise RowFault("tie", f"{ranked[0][0]} and {ranked[1][0]} have equally many votes ({ranked[0][1]})")
    return ranked[0][0], ranked[0][1] / len(votes)


def mean_ranks(rankings: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean rank of every answer that all annotators ranked; 1 is best."""
    shared = [name for name in rankings[0] if all(name in ranking for ranking in rankings)] if rankings else []
    return {name: sum(ranking[name] for ranking in rankings) / len(rankings) for name in shared}
