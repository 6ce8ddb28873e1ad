"""What became of a run: the rule that labels it, by held-out behaviour alone. Fixed before any check is scored.

The probe asks all creatures in a wording that no preference pair has; answers are sampled at temperature 1, one a
question (192). They are held against the same model before DPO (eight draws, 1,536 answers). A run is **damaged** when

- `facts`: right answers fell by more than 10 points, or
- `repetition`: answers that say one 4-gram of tokens three times or more rose by more than 15 points, or
- `no_eos`: answers that do not end within 48 tokens rose by more than 15 points, or
- `inverted`: answers in style A fell by more than 10 points, in data that was made to prefer style A (all but
  `near_identical`, whose two answers are both in style A),

each only where the difference is beyond noise (one-sided two-proportion z above 2.326, level 0.01). Everything else is
undamaged: **moved** when style A rose by more than 10 points beyond noise, else **unmoved**. A run that ended in a
number that is not finite left no model to ask and is damaged. No loss, reward, likelihood or KL is looked at, nor
whether any check fired.

Three faults make a run's own evaluation meaningless, whatever its behaviour: `leaked`, `truncated`, `wrong_reference`.
They **must be caught** by the check of that very fault, and count in a column of their own, neither as damaged nor as
undamaged.

What is counted, over the other five kinds of data:

- *detection*: damaged runs with at least one error before `merged_model`;
- *false alarms*, strict: undamaged runs with at least one error, whatever their data;
- *false alarms on sound data*: the same over `clean` and `flipped_40` alone. Pairs that are near-identical, repetitive
  or swapped throughout are faulty also where a small rate keeps them from doing harm, so an error that names that fault
  is what a user would want; it still counts in the strict number.

Thresholds may be tuned on runs of seed 0; results are of seed 1. (The two seeds differ in pairs, split, order, adapter
initialisation and draws.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from benchmarks.collapse.grid_faults import CLEAN, FLIPPED, LEAKED, NEAR, TRUNCATED, WRONG_REFERENCE

Label = Literal["damaged", "moved", "unmoved", "must_be_caught"]
MUST_BE_CAUGHT = (LEAKED, TRUNCATED, WRONG_REFERENCE)
SOUND = (CLEAN, FLIPPED)
TUNED_ON, REPORTED_ON = 0, 1
FALL, RISE = 0.10, 0.15
Z = 2.326
Shares = Mapping[str, float]


def beyond_noise(before: float, after: float, n_before: int, n_after: int) -> bool:
    """Whether two shares differ, by the two-proportion z with the pooled share."""
    pooled = (before * n_before + after * n_after) / (n_before + n_after)
    error = math.sqrt(pooled * (1 - pooled) * (1 / n_before + 1 / n_after))
    return error > 0 and abs(after - before) / error > Z


def damage(before: Shares, after: Shares, fault: str) -> list[str]:
    """The rules of this module that a run broke; shares as `world.Behaviour` names them."""

    def changed(name: str, by: float) -> bool:
        """By more than `by`: a fall where that is below 0."""
        change = after[name] - before[name]
        far = change < by if by < 0 else change > by
        return far and beyond_noise(before[name], after[name], int(before["answers"]), int(after["answers"]))

    found = []
    if changed("facts", -FALL):
        found.append("facts")
    found += [name for name in ("repetition", "no_eos") if changed(name, RISE)]
    if fault != NEAR and changed("style_a", -FALL):
        found.append("inverted")
    return found


def label(before: Shares, after: Shares | None, fault: str) -> Label:
    """The label of a run. `after` is None where it left no model."""
    if fault in MUST_BE_CAUGHT:
        return "must_be_caught"
    if after is None or damage(before, after, fault):
        return "damaged"
    risen = after["style_a"] - before["style_a"] > FALL and beyond_noise(
        before["style_a"], after["style_a"], int(before["answers"]), int(after["answers"])
    )
    return "moved" if risen else "unmoved"
