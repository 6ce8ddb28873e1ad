"""The ordered rules of a release: challenger against champion, or against its start where nothing is published yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dpo_assets.checks.evidence.ledger import Decided, Decision, Ledger, Override, Primary
from dpo_assets.checks.evidence.measured import Comparison
from dpo_assets.checks.evidence.power import FEWEST_PROMPTS, can_decide
from dpo_assets.checks.statistics import holm

TOLERANCE = 0.05  # Accuracy that a guard may lose: five points, what about 600 to 900 pairs can rule out.


@dataclass(frozen=True)
class Evidence:
    """What one decision may look at.

    Args:
        primaries: challenger against champion on fresh prompts (`Ledger.fresh`), by name. Promoted is what is better on
            one of them after Holm, and worse on none.
        guards: the same on the frozen set, by name: no loss beyond `TOLERANCE`.
        failures: hard guards that failed, by name, with their reasons (weights not finite, secret found, no licence).
        fewest: prompts that each primary needs; never less than `FEWEST_PROMPTS`.
        against_start: challenger against its own start on the fresh prompts, by name, where nothing is live yet and no
            frozen set is there that could rule a loss out: none measured above `TOLERANCE`, and none beyond chance.
    """

    primaries: Mapping[str, Comparison]
    guards: Mapping[str, Comparison] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    fewest: int = FEWEST_PROMPTS
    against_start: Mapping[str, Comparison] = field(default_factory=dict)


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
    2. Fewer fresh prompts than the floor: `insufficient_evidence`. Nothing is looked at, so nothing is spent.
    3. A primary is worse beyond chance: `reject`.
    4. A guard on the frozen set may have lost more than the tolerance, or has too few prompts to tell; or, without a
       champion, the challenger lost against its own start: `hold`.
    5. A primary is better at the level of this test, after Holm: `promote`, or `first_publication` without a champion.
    6. Else `hold`: what is live stays.

    An override then turns any of 2 to 6 into its decision; what the rules found, and what it cost, stays on record.
    """
    level = ledger.budget().level
    if evidence.failures:
        told = "; ".join(f"{name}: {reason}" for name, reason in evidence.failures.items())
        return Outcome("reject", told, level)
    outcome = _by_evidence(evidence, level, first=ledger.champion is None)
    return _overridden(outcome, override, first=ledger.champion is None) if override else outcome


def _by_evidence(evidence: Evidence, level: float, *, first: bool) -> Outcome:
    floor = max(evidence.fewest, FEWEST_PROMPTS)
    fewest = min((one.clusters for one in evidence.primaries.values()), default=0)
    if not can_decide(fewest, level, floor):
        told = f"{fewest} held-out prompts that no decision saw, and {floor} are needed"
        return Outcome("insufficient_evidence", told, level)
    adjusted = holm({name: one.p_better for name, one in evidence.primaries.items()})
    worse = [name for name, one in evidence.primaries.items() if one.high < 0]
    lost = [name for name, one in evidence.guards.items() if one.clusters < floor or not one.low > -TOLERANCE]
    best = min(adjusted, key=lambda name: adjusted[name])
    shown = f"{best} {evidence.primaries[best]}, adjusted p {adjusted[best]:.2g}, level {level:.2g}"
    if worse:
        return Outcome("reject", f"worse beyond chance: {_shown(evidence.primaries, worse)}", level, adjusted)
    if lost:
        told = _shown(evidence.guards, lost)
        return Outcome("hold", f"may have lost more than {TOLERANCE:g} on the frozen set: {told}", level, adjusted)
    behind = [n for n, one in evidence.against_start.items() if not (one.difference >= -TOLERANCE and one.high >= 0)]
    if behind:
        return Outcome("hold", f"worse than its start: {_shown(evidence.against_start, behind)}", level, adjusted)
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
        saw: the fresh prompts of the primaries.
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
