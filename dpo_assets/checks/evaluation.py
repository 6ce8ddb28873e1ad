"""Verdicts on how a policy was evaluated, beside those that decide a release."""

from __future__ import annotations

from dataclasses import replace

from dpo_assets.checks.aftermath import divergence_verdict, unmeasured
from dpo_assets.checks.bands import Bands
from dpo_assets.checks.reports import Divergence, DpoReport, EvaluationReport, SampledAnswers
from dpo_assets.checks.verdict import Verdict


def divergence_in_training(adapter: DpoReport | None) -> Divergence | None:
    """What training measured of its adapter's KL from its reference, where it did."""
    answers = adapter.answers if adapter is not None else None
    kl = answers.kl if isinstance(answers, SampledAnswers) else None
    return kl if isinstance(kl, Divergence) else None


def released_kl(report: EvaluationReport, in_training: Divergence | None, bands: Bands) -> Verdict:
    """KL(policy || SFT) per token of what is released, on its own answers.

    Where training measured it of the same weights, it is not measured twice: `fidelity` holds the merge to the adapter.
    Training on a quantised base measured another model, and on some kernels it cannot sample at all.
    """
    name = "released_kl"
    if isinstance(report.kl, Divergence):
        return divergence_verdict(name, report.kl, bands, "the release's own answers at temperature 1")
    if in_training is not None:
        return divergence_verdict(name, in_training, bands, "of the adapter, as training measured it")
    why = report.kl.not_measured if report.kl is not None else "these scores are of an earlier version"
    fix = "set evaluation.sampled_answers above 0, and materialise eval_scores again"
    return replace(unmeasured(name, why, bands), source=bands.limit("kl_budget").source, fix=fix)


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
