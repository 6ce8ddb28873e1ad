"""What the screen says of the next release: error spent, whether the gate can pass at all, and what would decide."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

from dpo_assets.checks.evidence.ledger import Ledger
from dpo_assets.checks.evidence.measured import Comparison
from dpo_assets.checks.evidence.power import EFFECT, FEWEST_PROMPTS, POWER, Reach, can_decide, reach_of_comparison
from dpo_assets.checks.evidence.rules import chance_of_hold, measured_loss
from dpo_assets.checks.evidence.spending import ALPHA, HIGHEST, Budget, share_of_look


@dataclass(frozen=True)
class Outlook:
    """Where a pipeline stands before its next test.

    `fresh` is the number of held-out conversations that no decision saw, `fewest` how many a test needs, `reach` what
    the pairs of a comparison can show at the level of the test; None before anything was scored. `guard` is a
    comparison on the conversations that were known before, or with its start where nothing is live (`first`). `look` is
    the number of this look at the fresh ones where dry runs looked at them, and the level is what it has of the test's.
    """

    budget: Budget
    fresh: int
    fewest: int
    can_pass: bool
    reach: Reach | None
    guard: Comparison | None = None
    first: bool = False
    look: int = 0

    @classmethod
    def of(
        cls,
        ledger: Ledger,
        fresh: int,
        primary: Comparison | None = None,
        fewest: int = FEWEST_PROMPTS,
        alpha: float = ALPHA,
        guard: Comparison | None = None,
        look: int = 0,
    ) -> Self:
        """From the ledger and the number of fresh conversations; `primary` is a comparison on them or on such."""
        budget, floor = ledger.budget(alpha), max(fewest, FEWEST_PROMPTS)
        budget = replace(budget, level=budget.level * share_of_look(look)) if look else budget
        reach = reach_of_comparison(primary, budget.level) if primary is not None else None
        can_pass = can_decide(fresh, budget.level, floor)
        return cls(budget, fresh, floor, can_pass, reach, guard, first=ledger.champion is None, look=look)

    def rows(self) -> list[tuple[str, str]]:
        """(what, how it stands), for a table."""
        budget = self.budget
        spent = f"{100 * budget.spent:.2f} % of {100 * budget.alpha:g} %; tests so far: {budget.tests}"
        needs = max(self.fewest, math.ceil(-math.log2(budget.level)))
        passes = "yes" if self.can_pass else f"no: {needs} conversations are needed"
        rows = [
            ("error spent", spent),
            ("level of the next test", f"{100 * budget.level:.3g} %, one-sided"),
            ("conversations that no decision saw", f"{self.fresh}, of at least {self.fewest}"),
            ("can the gate pass with these", passes),
        ]
        if self.look:
            shared = f"{share_of_look(self.look):.2g} of the level is for this one, look {self.look}; dry runs look"
            rows.insert(2, ("looks at these", shared))
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
        return rows if self.guard is None else [*rows, *self._guarded(self.guard)]

    def _guarded(self, guard: Comparison) -> list[tuple[str, str]]:
        """What a guard would find, and how often it holds who lost: it misses most losses that are small."""
        what = "loss against its start" if self.first else "loss on known conversations"
        if not guard.n:
            return [(what, "nothing guards: no conversation that was known before is left in the feedback")]
        found, told = f"{what}, found with {POWER:.0%} power", f"{guard.n} pairs in {guard.clusters} conversations"
        least = reach_of_comparison(guard, HIGHEST).detectable
        if not math.isfinite(least):
            return [(found, f"not known: on {told} the two never differ")]
        holds = f"more than {100 * measured_loss(guard.error):.1f} points as measured hold a release too"
        often = [
            f"{100 * loss:.0f} points worse: {chance_of_hold(loss, guard.error):.0%}" for loss in (EFFECT / 2, EFFECT)
        ]
        return [
            (found, f"{100 * least:.1f} points, on {told}; {holds}"),
            (f"{what}, how often who lost it is held", ", ".join(often)),
        ]
