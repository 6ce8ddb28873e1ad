"""The ordered rules of a release: challenger against champion, or against its start where nothing is published yet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

from dpo_assets.checks.evidence.ledger import Decided, Decision, Ledger, Override, Primary
from dpo_assets.checks.evidence.measured import Comparison
from dpo_assets.checks.evidence.power import FEWEST_PROMPTS, can_decide
from dpo_assets.checks.evidence.spending import HIGHEST, share_of_look
from dpo_assets.checks.evidence.task_guards import TaskGuard, fallen
from dpo_assets.checks.statistics import holm

TOLERANCE = 0.05  # Accuracy that a guard may be seen to lose, beside one standard error.


@dataclass(frozen=True)
class Evidence:
    """What one decision may look at.

    Args:
        primaries: challenger against champion on fresh conversations (`Ledger.fresh`), by name. Promoted is what is
            better on one of them after Holm, and worse on none.
        guards: what must not have got worse, by name: the same comparisons on the frozen set; where nothing is live,
            challenger against its own start on the fresh conversations. One without a pair guards nothing.
        tasks: metrics of tasks and benchmarks that a recipe made guards, by name, with the same opponent.
        failures: hard guards that failed, by name, with their reasons (weights not finite, secret found, no licence).
        fewest: conversations that each primary needs; never less than `FEWEST_PROMPTS`.
        look: number of this look at the primaries' conversations, where dry runs looked at them (`Previews.number`).
    """

    primaries: Mapping[str, Comparison]
    guards: Mapping[str, Comparison] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, TaskGuard] = field(default_factory=dict)
    fewest: int = FEWEST_PROMPTS
    look: int = 0

    def level(self, of_test: float) -> float:
        """What this look has of the level of a test."""
        return of_test * share_of_look(self.look) if self.look else of_test


@dataclass(frozen=True)
class Outcome:
    """A decision with its reason. `adjusted` is p by primary after Holm; empty where no primary was looked at."""

    decision: Decision
    reason: str
    level: float
    adjusted: Mapping[str, float] = field(default_factory=dict)
    override: Override | None = None
    found: bool = False

    @property
    def looked(self) -> bool:
        return bool(self.adjusted)


def judge(evidence: Evidence, ledger: Ledger, override: Override | None = None) -> Outcome:
    """The first rule that holds.

    1. A hard guard failed: `reject`. No override lifts it.
    2. Fewer fresh conversations than the floor: `insufficient_evidence`. Nothing is looked at, so nothing is spent.
    3. A primary is worse beyond chance: `reject`.
    4. A guard lost (`has_lost`), or a task (`fallen`): `hold`. That no such loss can be ruled out is no reason to hold:
       it takes some hundred pairs more than the primaries need, and these carry the error.
    5. A primary is better at the level of this test, after Holm: `promote`, or `first_publication` without a champion.
    6. Else `hold`: what is live stays.

    An override then turns any of 2 to 6 into its decision; what the rules found, and what it cost, stays on record.
    """
    level = evidence.level(ledger.budget().level)
    if evidence.failures:
        told = "; ".join(f"{name}: {reason}" for name, reason in evidence.failures.items())
        return Outcome("reject", told, level)
    outcome = by_evidence(evidence, level, first=ledger.champion is None)
    return _overridden(outcome, override, first=ledger.champion is None) if override else outcome


def measured_loss(error: float) -> float:
    """The loss as measured above which a guard holds, given its standard error: the tolerance and one error more.

    The tolerance alone would hold by chance: of 50 prompts on 30 % of which two models differ, one that is as good as
    the other is measured more than 5 points worse by one of two metrics in 41 % of trials (benchmarks/RESULTS.md).
    Pairs whose error is not known, as of a single prompt, show no loss.
    """
    return TOLERANCE + (math.inf if math.isnan(error) else error)


def held_from(error: float) -> float:
    """The loss as measured from which `has_lost` holds, given its standard error: whichever of its two is less."""
    return min(NormalDist().inv_cdf(1 - HIGHEST) * error, measured_loss(error))


def chance_of_hold(loss: float, error: float) -> float:
    """The chance that a guard holds a challenger that truly lost so much, by normal theory and by one metric.

    With 100 pairs on 30 % of which two models differ the error is 0.055: of challengers that are five points worse it
    holds 16 %, and one of two metrics does 25 % (benchmarks/RESULTS.md).
    """
    return NormalDist().cdf((loss - held_from(error)) / error) if error > 0 and math.isfinite(error) else math.nan


def has_lost(guard: Comparison) -> bool:
    """Whether a guard holds a challenger: it lost beyond chance, or more than `measured_loss`.

    Scores that are no numbers hold it. No pairs at all, as where every known prompt left the feedback, say nothing.
    """
    if not guard.n:
        return False
    return not (guard.high >= 0 and guard.difference >= -measured_loss(guard.error))


def by_evidence(evidence: Evidence, level: float, *, first: bool) -> Outcome:
    """Rules 2 to 6 of `judge`, at the level of this test; `first`: nothing is live."""
    floor = max(evidence.fewest, FEWEST_PROMPTS)
    fewest = min((one.clusters for one in evidence.primaries.values()), default=0)
    if not can_decide(fewest, level, floor):
        told = f"{fewest} held-out conversations that no decision saw, and {floor} are needed"
        return Outcome("insufficient_evidence", told, level)
    adjusted = holm({name: one.p_better for name, one in evidence.primaries.items()})
    worse = [name for name, one in evidence.primaries.items() if one.high < 0]
    lost = [name for name, one in evidence.guards.items() if has_lost(one)]
    unguarded = not first and not any(one.n for one in evidence.guards.values())
    best = min(adjusted, key=lambda name: adjusted[name])
    shown = f"{best} {evidence.primaries[best]}, adjusted p {adjusted[best]:.2g}, level {level:.2g}"
    shown += f", for look {evidence.look} with those of dry runs" if evidence.look else ""
    shown += "; no known conversation is left to guard" if unguarded else ""
    if worse:
        return Outcome("reject", f"worse beyond chance: {_shown(evidence.primaries, worse)}", level, adjusted)
    if lost:
        than = "its start" if first else "the champion on known conversations"
        return Outcome("hold", f"worse than {than}: {_shown(evidence.guards, lost)}", level, adjusted)
    if down := fallen(evidence.tasks):
        told = "; ".join(f"{name} {evidence.tasks[name].shown}" for name in down)
        return Outcome(
            "hold", f"worse than {'its start' if first else 'the champion'} on tasks: {told}", level, adjusted
        )
    if evidence.tasks:
        tested = sum(one.tested for one in evidence.tasks.values())
        shown += f"; {tested} of {len(evidence.tasks)} guarding metrics compared, none fell"
    if adjusted[best] <= level:
        return Outcome("first_publication" if first else "promote", f"better: {shown}", level, adjusted, found=True)
    return Outcome("hold", f"this may be chance: {shown}", level, adjusted)


def _shown(comparisons: Mapping[str, Comparison], names: list[str]) -> str:
    return "; ".join(f"{name} {comparisons[name]}" for name in names)


def _overridden(outcome: Outcome, override: Override, *, first: bool) -> Outcome:
    decision: Decision = "hold"
    if override.decision == "promote":
        decision = "first_publication" if first else "promote"
    told = f"by override ({override.reason}); the rules say {outcome.decision}: {outcome.reason}"
    return Outcome(decision, told, outcome.level, outcome.adjusted, override, outcome.found)


def decided_by(
    outcome: Outcome,
    evidence: Evidence,
    ledger: Ledger,
    *,
    challenger: str,
    inputs: Mapping[str, str],
    saw: frozenset[str],
    at: str,
) -> Decided:
    """The line of an outcome, to be appended to the ledger that it was judged by.

    Args:
        inputs: digests by name of all that was looked at.
        saw: the fresh conversations of the primaries.
        at: ISO 8601, UTC.
    """
    primaries = {
        name: Primary(
            difference=one.difference,
            low=one.low,
            high=one.high,
            p_better=one.p_better,
            adjusted=outcome.adjusted[name],
            pairs=one.n,
            prompts=one.clusters,
        )
        for name, one in evidence.primaries.items()
        if outcome.looked
    }
    return Decided(
        number=len(ledger.lines) + 1,
        before=ledger.head,
        at=at,
        champion=ledger.champion,
        challenger=challenger,
        inputs=dict(inputs),
        primaries=primaries,
        level=outcome.level if outcome.looked else None,
        saw=tuple(sorted(saw)) if outcome.looked else (),
        decision=outcome.decision,
        found=outcome.found,
        reason=outcome.reason,
        override=outcome.override,
    )
