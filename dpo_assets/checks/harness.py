"""Whether the policy still does what SFT did on the tasks of lm-evaluation-harness."""

from __future__ import annotations

from dpo_assets.checks.evidence.power import one_sided
from dpo_assets.checks.reports import HarnessScores, TaskScore
from dpo_assets.checks.statistics import holm
from dpo_assets.checks.verdict import Verdict


def harness_verdicts(report: HarnessScores) -> list[Verdict]:
    """All checks of `harness_scores`."""
    return [harness_retained(report)]


def harness_retained(report: HarnessScores) -> Verdict:
    """Metrics that fell beyond chance, over documents; several metrics are several chances (Holm 1979)."""
    level = one_sided(report.confidence)
    exact = {
        one.name: one.comparison.p_better if one.higher_is_better is False else one.comparison.p_worse
        for one in report.tasks
        if one.comparison is not None
    }
    fallen = [name for name, p in holm(exact).items() if p <= level]
    fallen += [one.name for one in report.tasks if one.comparison is None and _fell(one)]
    told = {one.name: one for one in report.tasks}
    open_ = [one.name for one in report.tasks if one.difference is None]
    return Verdict(
        "harness_retained",
        "warn" if fallen or not report.tasks else "pass",
        "; ".join(f"{name} {told[name].shown}" for name in fallen) or f"none of {len(report.tasks)} metrics fell",
        f"no metric worse than SFT's beyond chance ({level:.3g} over all, one-sided)",
        "paired over documents (arXiv 2411.00640, section 4); Holm 1979",
        "lower dpo.learning_rate or raise dpo.beta; read samples.json of the artefact"
        if fallen or not report.tasks
        else "",
        f"compared as a whole only, without an interval: {', '.join(open_)}" if open_ else "",
    )


def _fell(one: TaskScore) -> bool:
    """Whether the interval of a mean difference lies on the worse side; where none is known, nothing is worse."""
    if one.difference is None or one.higher_is_better is None:
        return False
    low, high = one.difference.low, one.difference.high
    return (high is not None and high < 0) if one.higher_is_better else (low is not None and low > 0)
