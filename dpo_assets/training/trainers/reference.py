"""Reference log-probabilities of training pairs: from the cache where they are known, and finite or nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from dpo_assets.training.batches.packing import Group
from dpo_assets.training.guard.finite import diverged
from dpo_assets.training.scoring.cache import ScoreCache, Scores, kept_scores


def reference_scores(
    groups: Sequence[Group], cache: ScoreCache | None, score: Callable[[Sequence[Group]], Scores]
) -> tuple[Scores, int]:
    """(chosen, rejected) reference log-probabilities of every pair, and how many came from the cache.

    Raises:
        GateError: `finite`, at the first score that is not.
    """

    def finite(part: Sequence[Group]) -> Scores:
        scored = score(part)
        if bad := [value for pair in scored for value in pair if not math.isfinite(value)]:
            raise diverged("finite", "reference log-probability", bad[0], "the reference pass")
        return scored

    return kept_scores(groups, cache, finite)
