"""What the screen says of the next release: error spent, whether the gate can pass at all, and what would decide."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from dpo_assets.checks.evidence.ledger import Ledger
from dpo_assets.checks.evidence.measured import Comparison
from dpo_assets.checks.evidence.power import EFFECT, FEWEST_PROMPTS, POWER, Reach, can_decide, reach_of_comparison
from dpo_assets.checks.evidence.rules import TOLERANCE
from dpo_assets.checks.evidence.spending import ALPHA, Budget


@dataclass(frozen=True)
class Outlook:
    """Where a pipeline stands before its next test.

    `fresh` is the number of held-out prompts that no decision saw, `fewest` how many a test needs, `reach` what the
    pairs of a comparison can show at the level of the test; None before anything was scored. `guard` is what the pairs
    of the frozen set can rule out; None where nothing is live, or the set is empty.
    """

    budget: Budget
    fresh: int
    fewest: int
    can_pass: bool
    reach: Reach | None
    guard: Comparison | None = None

    @classmethod
    def of(
        cls,
        ledger: Ledger,
        fresh: int,
        primary: Comparison | None = None,
        fewest: int = FEWEST_PROMPTS,
        alpha: float = ALPHA,
        guard: Comparison | None = None,
    ) -> Self:
        """From the ledger and the number of fresh prompts; `primary` is a comparison on them, or on pairs like them."""
        budget, floor = ledger.budget(alpha), max(fewest, FEWEST_PROMPTS)
        reach = reach_of_comparison(primary, budget.level) if primary is not None else None
        return cls(budget, fresh, floor, can_decide(fresh, budget.level, floor), reach, guard)

    def rows(self) -> list[tuple[str, str]]:
        """(what, how it stands), for a table."""
        budget = self.budget
        spent = f"{100 * budget.spent:.2f} % of {100 * budget.alpha:g} %; tests so far: {budget.tests}"
        needs = max(self.fewest, math.ceil(-math.log2(budget.level)))
        passes = "yes" if self.can_pass else f"no: {needs} prompts are needed"
        rows = [
            ("error spent", spent),
            ("level of the next test", f"{100 * budget.level:.3g} %, one-sided"),
            ("prompts that no decision saw", f"{self.fresh}, of at least {self.fewest}"),
            ("can the gate pass with these", passes),
        ]
        if self.reach is not None and not math.isfinite(self.reach.detectable):
            rows.append(("what they can show", "not known: on these pairs the two never differ"))
        elif self.reach is not None:
            needed = self.reach.pairs_needed
            shown = f"{needed} pairs" if needed is not None else "no number of pairs"
            rows += [
                (f"found with {POWER:.0%} power", f"{100 * self.reach.detectable:.1f} points"),
                (f"power for {100 * EFFECT:.0f} points", f"{self.reach.power:.0%}"),
                (f"would show {100 * EFFECT:.0f} points", shown),
            ]
        if self.guard is not None:
            rows.append((f"frozen pairs, to rule out a loss of {100 * TOLERANCE:g} points", self._guarded(self.guard)))
        return rows

    def _guarded(self, guard: Comparison) -> str:
        """How many pairs bound a loss at the tolerance, were there none: the interval's own lower half."""
        half = guard.difference - guard.low
        if not half > 0:
            return f"{guard.n}; they do not tell how many are needed"
        return f"{guard.n} of about {math.ceil(guard.n * (half / TOLERANCE) ** 2)}, in {guard.clusters} prompts"
