"""Whether a judge or a reward model can be believed, and what it says of the policy's answers."""

from __future__ import annotations

import math

from dpo_assets.checks.evidence.power import FEWEST_PROMPTS
from dpo_assets.checks.reports import JudgedAnswers, RewardModelScores
from dpo_assets.checks.statistics import Proportion
from dpo_assets.checks.verdict import Verdict

HEALTH = {"judged_better": "judge_health", "rewarded_better": "reward_model_health"}
# A judge's own order decides 10 to 20 % of its verdicts as a rule (Zheng et al., arXiv 2306.05685).
MOST_NULLS, MOST_FLIPPED, CHANCE = 0.05, 0.30, 0.5
_TOO_FEW = "it was held against {} conversations of people's pairs with a verdict: raise human_pairs, or collect more"


def judge_verdicts(report: JudgedAnswers) -> list[Verdict]:
    """All checks of `judged_answers`."""
    return [judge_health(report), judged_better(report)]


def judge_health(report: JudgedAnswers) -> Verdict:
    """Replies without a verdict, verdicts that went with the order, and agreement with people."""
    asked = max(1, report.asked)
    nulls, flipped = (report.nulls + report.human_nulls) / asked, report.flipped / asked
    faults = []
    if not report.asked:
        faults.append("nothing was compared: set evaluation.generations above 0")
    if nulls > MOST_NULLS:
        faults.append(f"{nulls:.1%} of its replies hold no verdict: take a stronger model, or raise max_tokens")
    if flipped > MOST_FLIPPED:
        faults.append(f"{flipped:.1%} of its verdicts go with the order of the answers: take a stronger model")
    if _known_by(report.agreement) < FEWEST_PROMPTS:
        faults.append(_TOO_FEW.format(_known_by(report.agreement)))
    elif report.agreement.low <= CHANCE:
        faults.append(f"it agrees with people on {report.agreement}, which may be chance: take a stronger model")
    return Verdict(
        "judge_health",
        "warn" if faults else "pass",
        f"no verdict {nulls:.1%}, by order {flipped:.1%}, agrees with people on {report.agreement}",
        f"at most {MOST_NULLS:.0%} and {MOST_FLIPPED:.0%}; agreement beyond chance on {FEWEST_PROMPTS} conversations",
        "both orders, ties where they disagree: arXiv 2306.05685, section 4",
        "; ".join(faults),
        report.judge,
    )


def judged_better(report: JudgedAnswers) -> Verdict:
    """The share of the policy's answers that people would have preferred to those of SFT, by this judge."""
    return _better("judged_better", report, "as judged")


def reward_model_verdicts(report: RewardModelScores) -> list[Verdict]:
    """All checks of `reward_model_scores`."""
    return [reward_model_health(report), rewarded_better(report)]


def reward_model_health(report: RewardModelScores) -> Verdict:
    """Answers without a reward, and agreement with people."""
    left_out = sum(report.left_out.values()) + sum(report.human_left_out.values())
    asked = report.wins + report.ties + report.losses + sum(report.left_out.values()) + report.human_pairs
    share = left_out / max(1, asked)
    reasons = sorted({*report.left_out, *report.human_left_out})
    faults = []
    if not asked:
        faults.append("nothing was scored: set evaluation.generations above 0")
    if share > MOST_NULLS:
        faults.append(
            f"{share:.1%} of the pairs have no reward ({', '.join(reasons)}): raise max_length of "
            "evaluation.reward_model, or take a model whose chat template renders such conversations"
        )
    if _known_by(report.agreement) < FEWEST_PROMPTS:
        faults.append(_TOO_FEW.format(_known_by(report.agreement)))
    elif report.agreement.low <= CHANCE:
        faults.append(f"it agrees with people on {report.agreement}, which may be chance: take another reward model")
    return Verdict(
        "reward_model_health",
        "warn" if faults else "pass",
        f"no reward {share:.1%}, agrees with people on {report.agreement}",
        f"at most {MOST_NULLS:.0%}; agreement beyond chance on {FEWEST_PROMPTS} conversations",
        "a reward model measures what it was trained to: held against held-out pairs of these people",
        "; ".join(faults),
        report.model,
    )


def rewarded_better(report: RewardModelScores) -> Verdict:
    """The share of the policy's answers that people would have preferred to those of SFT, by this reward model."""
    return _better("rewarded_better", report, "as scored")


def _known_by(agreement: Proportion) -> int:
    """Conversations in which it was held against people. One of an earlier version knows its pairs alone."""
    return agreement.n if agreement.clusters is None else agreement.clusters


def _beyond(report: JudgedAnswers | RewardModelScores) -> str:
    """Which way the share that was seen is one that its agreement, as measured, cannot see of any; empty: it can."""
    most, seen = report.agreement.value, report.share.value
    return "larger" if seen > most + 1e-9 else "smaller" if seen < 1 - most - 1e-9 else ""


def _better(check: str, report: JudgedAnswers | RewardModelScores, raw: str) -> Verdict:
    """Of the corrected share alone: what a coin prefers is no evidence, and neither is what nobody was held against."""
    share, nothing = report.corrected, math.isnan(report.corrected.value)
    worse = share.high < CHANCE
    beyond, believed = _beyond(report), _known_by(report.agreement) >= FEWEST_PROMPTS and report.agreement.low > CHANCE
    shown = f"{share}, corrected by its agreement with people"
    shown += f" and cut off: it sees a {beyond} share than that allows, {report.share.value:.3f}" if beyond else ""
    fix = "read the answers beside this check; lower dpo.learning_rate, or collect feedback on such prompts" * worse
    if nothing:
        shown = f"no evidence: its agreement with people is {report.agreement}"
        fix = f"what may be a coin, or was held against too few pairs of people, shows nothing: see {HEALTH[check]}"
        if believed and beyond and report.share.effective != 0:
            shown += f", and it sees a {beyond} share than that allows, {report.share}"
            fix = "it judges these answers otherwise than it judges people's pairs: read some of both, or take another"
    alike = report.interval_at_equal_length
    ends = f" [{alike[0]:.3f}, {alike[1]:.3f}]" if alike else ""
    told = f"{report.wins} better, {report.ties} alike, {report.losses} worse"
    return Verdict(
        check,
        "warn" if worse or nothing else "pass",
        shown,
        f"the interval of the policy's share reaches {CHANCE:g}",
        "Rogan & Gladen 1978; intervals: benchmarks/RESULTS.md; at equal length: arXiv 2404.04475",
        fix,
        f"{told}: {report.share}, {raw}; at equal length {report.share_at_equal_length:.3f}{ends}",
    )
