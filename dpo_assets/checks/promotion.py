"""Whether a policy is released, and whether its scores can be believed.

What decides are the rules of `checks.evidence.rules`, for the first release as for every later one; here is what the
checks show of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from pydantic import BaseModel, ConfigDict

from dpo_assets.artifact import Artifact, read_kept
from dpo_assets.checks.bands import Bands
from dpo_assets.checks.evidence.ledger import Decided, Override
from dpo_assets.checks.reports import EvaluationReport, HeldOutPairs, NotMeasured
from dpo_assets.checks.verdict import Level, Verdict, upper_limit, worst
from dpo_assets.errors import ConfigError

CHANCE = 0.5
KEPT = 0.5  # Of the adapter's held-out margin.


@dataclass(frozen=True)
class Margins:
    """Held-out margins of an adapter, and by `pair_id` those of the weights that it was merged into, in nats."""

    adapter: HeldOutPairs
    merged: Mapping[str, float]

    def means(self) -> tuple[float, float, int]:
        """(before the merge, after it, pairs) of the pairs that both were asked: an adapter is measured on a part."""
        same = self.adapter.margins.keys() & self.merged.keys()
        if not same:
            return math.nan, math.nan, 0
        return fmean(self.adapter.margins[pair] for pair in same), fmean(self.merged[pair] for pair in same), len(same)


Learned = Margins | NotMeasured | None  # None: of an earlier version.
SOURCE = (
    "exact paired tests over conversations, error spent over all decisions (arXiv 1910.04900); benchmarks/RESULTS.md"
)
OUTCOME = "outcome.json"
REASON = 10  # Characters that the reason of an override has at least.


class PromotionOutcome(BaseModel):
    """A decision as the artefact of `promotion` keeps it.

    A preview, of a dry run, is in no ledger. `held_out` are all conversations of the evaluation, which a release makes
    known; `outlook` is how the pipeline stood before the decision, in rows for a table.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    decided: Decided
    preview: bool
    held_out: tuple[str, ...]
    fresh_prompts: int
    outlook: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, artifact: Artifact) -> PromotionOutcome:
        """That of a sealed artefact.

        Raises:
            ConfigError: it is one of an earlier version.
        """
        return read_kept(artifact, OUTCOME, cls)


def override_of(decision: str, reason: str) -> Override | None:
    """The launchpad's override, or None.

    Raises:
        ConfigError: it is no decision, or has no reason.
    """
    word, why = decision.strip(), reason.strip()
    if not word:
        if why:
            raise ConfigError(
                "`reason` is that of an override: set `override` to `promote` or `hold`, or leave both empty"
            )
        return None
    words: dict[str, Literal["promote", "hold"]] = {"promote": "promote", "hold": "hold"}
    if word not in words:
        raise ConfigError(
            f"`override: {word}` is no decision; `promote` and `hold` are, and empty leaves it to the rules"
        )
    if len(why) < REASON:
        raise ConfigError(f"an override needs a `reason` of at least {REASON} characters: ledger and card show it")
    return Override(decision=words[word], reason=why)


def promotion_verdict(outcome: PromotionOutcome, *, dry_run: bool) -> Verdict:
    """Blocks a release that evidence does not carry.

    A hold with a champion warns: the old model stays live, which is no fault of the run. Without one a dry run warns,
    as it sends nothing, and a release that was asked for is an error.
    """
    decided = outcome.decided
    level: Level = "pass"
    if decided.decision == "reject":
        level = "error"
    elif not decided.releases:
        level = "warn" if dry_run or decided.champion is not None else "error"
    stands = "; ".join(f"{what}: {how}" for what, how in outcome.outlook)
    by_hand = "a person may decide otherwise with `override` and a `reason` in the launchpad of `promotion`"
    fixes = {
        "hold": f"collect more pairs, or train longer inside the learning-rate band; {by_hand}. {stands}",
        "insufficient_evidence": f"collect more feedback or raise feedback.eval_fraction; {by_hand}. {stands}",
        "reject": "look at the pairs: labels may be inverted",
    }
    return Verdict(
        "promotion_verdict",
        level,
        decided.decision,
        "better at the level of this test, on conversations that no decision saw, and no loss on those known",
        SOURCE,
        fixes.get(decided.decision, ""),
        decided.reason,
    )


def evaluation_verdicts(
    report: EvaluationReport, bands: Bands, *, seen: int, learned: Learned, merged: bool
) -> list[Verdict]:
    """All checks of `eval_scores`.

    Args:
        seen: of its pairs, those with an opening message that the model was trained on.
        learned: what was measured of the adapter before it was merged, and of the same pairs afterwards.
        merged: whether the merged weights were scored.
    """
    return [
        held_out_unseen(report, seen),
        kept_by_merge(learned, merged=merged),
        greedy_health(report, bands),
    ]


def held_out_unseen(report: EvaluationReport, seen: int) -> Verdict:
    """Scored pairs against the record that the trainer left of what it trained on."""
    return Verdict(
        "held_out_unseen",
        "error" if seen else "pass",
        f"{seen} of {report.pairs} scored pairs",
        "0 pairs with an opening message that the SFT or DPO adapter was trained on",
        "held-out scores on seen prompts measure memory",
        "train on the dataset that is scored: materialise dpo_plan and everything after it again" if seen else "",
    )


def kept_by_merge(before: Learned, *, merged: bool) -> Verdict:
    """How much of the adapter's held-out margin is left in the weights that are released.

    Merged weights are rounded to the base's format, and a small change of a weight is lost there: a run of 14 steps at
    5e-5 on SmolLM2-135M kept 32 % of 0.33 nats in bf16 (benchmarks/RESULTS.md). The faithful merge of an adapter that
    moved little is green all the same. Judged where the adapter learned something beyond chance.
    """
    band = f"at least {KEPT:.0%} of the margin that the adapter had before it was merged"
    source = "16-bit rounding of small updates: benchmarks/RESULTS.md"
    if not isinstance(before, Margins):
        why = "it is of an earlier version" if before is None else before.not_measured
        fix = "set checks.held_out_pairs above 0, and materialise dpo_adapter again"
        return Verdict("kept_by_merge", "warn", f"not measured: the adapter's margin: {why}", band, source, fix)
    if not merged:
        said = "not measured: what was scored is the adapter on its base, not the merged weights"
        return Verdict("kept_by_merge", "warn", said, band, source, "evaluate where the merged model fits in 16 bit")
    learned, after, pairs = before.means()
    if not pairs:
        said = "not measured: none of the adapter's held-out pairs was scored after the merge"
        return Verdict("kept_by_merge", "warn", said, band, source, "materialise dpo_adapter again")
    if not before.adapter.accuracy.low > CHANCE or not before.adapter.margin_nats > 0:
        note = "the adapter learned too little to tell"
        return Verdict("kept_by_merge", "pass", f"{after:.3f} nats", band, source, note=note)
    share = after / learned if learned else math.nan
    lost = not share >= KEPT
    return Verdict(
        "kept_by_merge",
        "warn" if lost else "pass",
        f"{share:.0%}: {after:.3f} of {learned:.3f} nats",
        band,
        source,
        "train longer, or at a higher rate inside its band; or release the adapter itself, which rounds nothing "
        "(publishing.artifact: adapter)"
        if lost
        else "",
        f"{pairs} held-out pairs, scored before and after",
    )


def greedy_health(report: EvaluationReport, bands: Bands) -> Verdict:
    """Rise over SFT in the shares of the merged model's greedy answers that repeat themselves, and that never end."""
    limit = bands.limit("greedy_health")
    sft, policy = report.generation.sft, report.generation.policy
    if not policy.answers:
        way_out = "set evaluation.generations above 0, and evaluation.max_new_tokens so that prompts leave room for it"
        return Verdict("greedy_health", "warn", "not measured: nothing was answered", "measured", limit.source, way_out)
    rises = {name: getattr(policy, name) - getattr(sft, name) for name in ("repetition", "no_eos", "empty", "marks")}
    levels = {name: upper_limit(rise, limit.warn, limit.error) for name, rise in rises.items()}
    level = worst(*levels.values())
    shown = max(rises, key=lambda name: (levels[name] == level, math.isnan(rises[name]), rises[name]))
    return Verdict(
        "greedy_health",
        level,
        f"{shown} {rises[shown]:+.3f}",
        f"at most +{limit.warn:g} over SFT, blocked above +{limit.error:g}",
        limit.source,
        "" if level == "pass" else "lower dpo.learning_rate, and read the answers beside this check",
        f"{policy.answers} greedy answers each",
    )
