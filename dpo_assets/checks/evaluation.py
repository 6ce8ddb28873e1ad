"""Verdicts on how a policy was evaluated, beside those that decide a release."""

from __future__ import annotations

from dpo_assets.checks.reports import EvaluationReport
from dpo_assets.checks.verdict import Verdict


def champion_scored(report: EvaluationReport) -> Verdict:
    """Whether the champion was asked every held-out pair.

    A champion of another base has a template and tokens of its own. On a pair that it cannot be asked neither side is
    scored: the comparison stays paired, and is about fewer pairs.
    """
    name, band, source = "champion_scored", "every held-out pair", "paired differences: arXiv 2411.00640, section 4"
    if report.champion is None:
        return Verdict(name, "pass", "no champion yet", band, source, note="it is held against its own start")
    left_out = report.champion_scores.left_out if report.champion_scores is not None else {}
    if not left_out:
        return Verdict(name, "pass", f"{report.pairs} of {report.pairs} pairs", band, source)
    return Verdict(
        name,
        "warn",
        f"{report.pairs} of {report.pairs + sum(left_out.values())} pairs",
        band,
        source,
        "raise feedback.max_length where answers are cut; a template that refuses conversations is the base's own, and "
        "the champions of this base are asked them",
        ", ".join(f"{count} {reason}" for reason, count in left_out.items()),
    )
