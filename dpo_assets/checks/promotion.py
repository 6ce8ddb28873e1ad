"""Whether a policy should be released: held-out evidence against its own start.

A policy that only looks better by chance is held. With no champion published yet, the bar is the SFT policy: the lower
end of the implicit-reward accuracy's interval must lie above one half, and the policy must not rank pairs worse than
SFT did by plain log-probability. Intervals count prompts, not pairs. `checks.evidence.rules` has the rules of every
later release, against the champion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from dpo_assets.checks.bands import Bands
from dpo_assets.checks.evidence.ledger import RELEASED, Decision
from dpo_assets.checks.evidence.power import FEWEST_PROMPTS, chance_error, one_sided, pairs_needed, reach_of_score
from dpo_assets.checks.reports import EvaluationReport, HeldOutPairs, NotMeasured
from dpo_assets.checks.verdict import Level, Verdict, upper_limit, worst
from dpo_assets.recipe import Recipe

CHANCE, TOLERANCE = 0.5, 0.05
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
SOURCE = "interval over prompts, not pairs, and its power (arXiv 2411.00640); coverage: benchmarks/RESULTS.md"


def decide(report: EvaluationReport, min_prompts: int) -> tuple[Decision, str]:
    """The decision and its reason.

    Fewer than `min_prompts` prompts, or than `FEWEST_PROMPTS` whatever the recipe asks for, decide nothing.
    """
    accuracy, prompts = report.implicit_reward_accuracy, report.prompts
    if not math.isfinite(accuracy.value) or not math.isfinite(report.nll_ratio_chosen):
        return "reject", "a score is not finite"
    if accuracy.high < CHANCE:
        return (
            "reject",
            f"held-out accuracy lies below one half ({accuracy.value:.3f}): chosen and rejected look swapped",
        )
    if prompts < min_prompts:
        return "insufficient_evidence", f"{prompts} held-out prompts, evaluation.min_pairs asks for {min_prompts}"
    if prompts < FEWEST_PROMPTS:
        return "insufficient_evidence", f"{prompts} held-out prompts; fewer than {FEWEST_PROMPTS} carry no release"
    if accuracy.clusters is None and report.pairs > prompts:
        return (
            "insufficient_evidence",
            "an earlier version took the pairs of a prompt for independent; materialise `eval_scores` again",
        )
    if not accuracy.low > CHANCE:
        return (
            "hold",
            f"the interval [{accuracy.low:.3f}, {accuracy.high:.3f}] holds one half: this may be chance",
        )
    exact = report.reward_against_chance
    if exact is not None and not exact.p_better <= (level := one_sided(report.confidence)):
        return "hold", f"p of the exact test is {exact.p_better:.3f}, above {level:.3g}: this may be chance"
    if loss := _ranking_loss(report):
        return "hold", loss
    return (
        "first_publication",
        f"better than its start on {accuracy.value:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}]",
    )


def _ranking_loss(report: EvaluationReport) -> str:
    """What plain log-probability lost against SFT: more than the tolerance, or beyond chance. Empty: nothing."""
    drop = report.logp_accuracy_sft.value - report.logp_accuracy_policy.value
    if not drop <= TOLERANCE:
        return f"plain log-probability ranks pairs worse than SFT by {drop:.3f}"
    paired = report.logp_against_sft
    if paired is not None and not paired.high >= 0:
        return f"plain log-probability ranks pairs worse than SFT, beyond chance: {paired}"
    return ""


def power_told(report: EvaluationReport) -> str:
    """What these held-out prompts can show at the level of their interval, and how many pairs would decide."""
    accuracy = report.implicit_reward_accuracy
    level = one_sided(report.confidence)
    seen = accuracy.value - CHANCE
    needed = pairs_needed(seen, chance_error(accuracy), accuracy.n, level)
    told = f"; {needed} pairs would show the {100 * seen:.1f} points seen" if needed else ""
    return f"{reach_of_score(accuracy, level)}{told}"


def evaluation_verdicts(
    report: EvaluationReport, recipe: Recipe, bands: Bands, *, seen: int, learned: Learned, merged: bool
) -> list[Verdict]:
    """All checks of `eval_scores`.

    Args:
        seen: of its pairs, those with an opening message that the model was trained on.
        learned: what was measured of the adapter before it was merged, and of the same pairs afterwards.
        merged: whether the merged weights were scored.
    """
    return [
        held_out_unseen(report, seen),
        promotion_verdict(report, recipe),
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


def promotion_verdict(report: EvaluationReport, recipe: Recipe) -> Verdict:
    """Blocks a release that evidence does not carry. A dry run sends nothing, so there a hold only warns."""
    decision, reason = decide(report, recipe.evaluation.min_pairs)
    level: Level = "pass"
    if decision == "reject":
        level = "error"
    elif decision not in RELEASED:
        level = "warn" if recipe.publishing.dry_run else "error"
    fixes = {
        "hold": f"collect more pairs, or train longer inside the learning-rate band; {power_told(report)}",
        "insufficient_evidence": f"collect more feedback or raise feedback.eval_fraction; {power_told(report)}",
        "reject": "look at the pairs: labels may be inverted",
    }
    return Verdict(
        "promotion_verdict",
        level,
        decision,
        f"lower end of the held-out accuracy's interval above {CHANCE}",
        SOURCE,
        fixes.get(decision, ""),
        reason,
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
    rises = {name: getattr(policy, name) - getattr(sft, name) for name in ("repetition", "no_eos", "empty")}
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
