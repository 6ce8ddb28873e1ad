"""Whether a judge can be believed, and what it says of the policy's answers."""

from __future__ import annotations

import math

from dpo_assets.checks.reports import JudgedAnswers
from dpo_assets.checks.verdict import Verdict

# A judge's own order decides 10 to 20 % of its verdicts as a rule (Zheng et al., arXiv 2306.05685).
MOST_NULLS, MOST_FLIPPED, CHANCE = 0.05, 0.30, 0.5
FEWEST_HUMAN_PAIRS = 20


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
    if report.human_pairs < FEWEST_HUMAN_PAIRS:
        faults.append(f"it was held against {report.human_pairs} pairs of people: raise human_pairs, or collect more")
    elif report.agreement.low <= CHANCE:
        faults.append(f"it agrees with people on {report.agreement}, which may be chance: take a stronger model")
    return Verdict(
        "judge_health",
        "warn" if faults else "pass",
        f"no verdict {nulls:.1%}, by order {flipped:.1%}, agrees with people on {report.agreement}",
        f"at most {MOST_NULLS:.0%} and {MOST_FLIPPED:.0%}; agreement beyond chance on {FEWEST_HUMAN_PAIRS} pairs",
        "both orders, ties where they disagree: arXiv 2306.05685, section 4",
        "; ".join(faults),
        report.judge,
    )


def judged_better(report: JudgedAnswers) -> Verdict:
    """The share of the policy's answers that people would have preferred to those of SFT, by this judge."""
    share = report.share if math.isnan(report.corrected.value) else report.corrected
    kind = "as judged" if share is report.share else "corrected for the judge's errors"
    worse = share.high < CHANCE or math.isnan(share.value)
    told = f"{report.wins} better, {report.ties} alike, {report.losses} worse"
    way_out = "read the answers beside this check; lower dpo.learning_rate, or collect feedback on such prompts"
    return Verdict(
        "judged_better",
        "warn" if worse else "pass",
        f"{share}, {kind}",
        f"the interval of the policy's share reaches {CHANCE:g}",
        "Rogan & Gladen 1978; at equal length: arXiv 2404.04475",
        way_out if worse else "",
        f"{told}; at equal length {report.share_at_equal_length:.3f}",
    )
