"""Whether the policy still does what SFT did on the tasks of lm-evaluation-harness."""

from __future__ import annotations

from dpo_assets.checks.evidence.power import one_sided
from dpo_assets.checks.reports import HarnessScores
from dpo_assets.checks.statistics import holm
from dpo_assets.checks.verdict import Verdict


def harness_verdicts(report: HarnessScores) -> list[Verdict]:
    """All checks of `harness_scores`."""
    return [harness_retained(report)]


def harness_retained(report: HarnessScores) -> Verdict:
    """Metrics that fell beyond chance, over documents, and those that are no number.

    Several metrics are several chances, whatever they are made of: all are tested at one level (Holm 1979).
    """
    level = one_sided(report.confidence)
    told = {one.name: one for one in report.tasks}
    nothing = [name for name, one in told.items() if not one.is_number]
    worse = {name: one.p_worse for name, one in told.items() if name not in nothing}
    fallen = [name for name, p in holm({n: p for n, p in worse.items() if p is not None}).items() if p <= level]
    open_ = [name for name, p in worse.items() if p is None]
    said = [f"{name} {told[name].shown}" for name in fallen]
    said += [f"{name} is no number: SFT {told[name].sft:.4g}, policy {told[name].policy:.4g}" for name in nothing]
    faulty = bool(said) or not report.tasks
    return Verdict(
        "harness_retained",
        "warn" if faulty else "pass",
        "; ".join(said) or f"none of {len(report.tasks)} metrics fell",
        f"no metric worse than SFT's beyond chance ({level:.3g} over all, one-sided), every metric a number",
        "paired over documents (arXiv 2411.00640, section 4); Holm 1979",
        "lower dpo.learning_rate or raise dpo.beta; read samples.json of the artefact" if faulty else "",
        f"shown and not tested, for documents or task do not tell what is worse: {', '.join(open_)}" if open_ else "",
    )
