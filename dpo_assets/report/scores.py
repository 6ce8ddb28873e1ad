"""The page of `eval_scores`: every score with its interval and its reach, and what the pairs look like one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_assets.checks.evidence.measured import Comparison
from dpo_assets.checks.evidence.power import EFFECT, POWER, Reach, one_sided, reach_of_comparison, reach_of_score
from dpo_assets.checks.reports import EvaluationReport, Perplexity
from dpo_assets.checks.statistics import Proportion, percent
from dpo_assets.report.tables import table

SIDES = {"sft": "SFT", "policy": "policy", "champion": "champion"}


def scores_table(report: EvaluationReport) -> str:
    """Every score with its interval over prompts, the least difference that so many pairs would find, and both p of a
    paired difference."""
    level = one_sided(report.confidence)
    rows = [
        [
            label,
            f"{one.value:.3f}",
            f"[{one.low:.3f}, {one.high:.3f}]",
            one.counted,
            *_found(reach_of_score(one, level)),
            "-",
        ]
        for label, one in _shares(report)
    ]
    rows += [
        [
            f"{label}, paired",
            f"{one.difference:+.3f}",
            f"[{one.low:+.3f}, {one.high:+.3f}]",
            f"{one.n} in {one.clusters} prompts",
            *_found(reach_of_comparison(one, level)),
            _tested(one, level),
        ]
        for label, one in _comparisons(report)
        if one is not None
    ]
    interval, least = f"{percent(report.confidence)} interval", f"found: {POWER:.0%} of the time"
    found = f"{100 * EFFECT:.0f} points found"
    tested = "p for better (by pairs, McNemar)"
    return table(["held-out accuracy", "value", interval, "pairs", least, found, tested], rows)


def _tested(one: Comparison, level: float) -> str:
    """p over prompts, and beside it p over pairs, which is too small where pairs of a prompt agree."""
    apart = (one.p_better <= level) != (one.p_pairs <= level)
    return f"{one.p_better:.2g} ({one.p_pairs:.2g}{'; they disagree: prompts are what counts' if apart else ''})"


def _found(reach: Reach) -> tuple[str, str]:
    return f"{reach.detectable:.3f}", f"{reach.power:.0%}"


def _shares(report: EvaluationReport) -> Iterator[tuple[str, Proportion]]:
    yield from report.shares
    if (champion := report.champion_scores) is not None:
        yield "champion, implicit reward against its own start", champion.implicit_reward_accuracy
        yield "champion, log-probability per token", champion.logp_accuracy


def _comparisons(report: EvaluationReport) -> Iterator[tuple[str, Comparison | None]]:
    yield "policy less SFT, log-probability per token", report.logp_against_sft
    if (champion := report.champion_scores) is not None:
        yield "policy less champion, implicit reward", champion.reward_against
        yield "policy less champion, log-probability per token", champion.logp_against


def perplexity_table(report: EvaluationReport) -> str:
    """Perplexity per token before and after training, of neutral text and of chosen answers."""
    champion = report.champion_scores.neutral_ratio if report.champion_scores is not None else None
    parts = {"neutral texts": (report.neutral, champion), "chosen answers": (report.chosen, None)}
    rows = [
        [
            label,
            f"{part.texts} of {part.tokens} tokens",
            f"{part.sft:.4g}",
            f"{part.policy:.4g}",
            f"{part.ratio:.3f}",
            "-" if part.low is None or part.high is None else f"[{part.low:.3f}, {part.high:.3f}]",
            "-" if of_champion is None else f"{of_champion:.3f}",
        ]
        for label, (part, of_champion) in parts.items()
        if isinstance(part, Perplexity)
    ]
    interval = f"{percent(report.confidence)} interval"
    header = ["perplexity per token", "texts", "SFT", "policy", "policy over SFT", interval, "champion over its start"]
    return table(header, rows) if rows else "not measured"


def parts_table(report: EvaluationReport) -> str:
    """The policy by source and by quartile of the feedback's margin."""
    rows = [
        [
            f"{one.by}: {one.name}",
            one.reward.counted,
            f"{one.reward.value:.3f} [{one.reward.low:.3f}, {one.reward.high:.3f}]",
            f"{one.against_sft.difference:+.3f} [{one.against_sft.low:+.3f}, {one.against_sft.high:+.3f}]",
        ]
        for one in report.slices
    ]
    header = ["part", "pairs", "implicit reward", "log-probability per token, policy less SFT"]
    return table(header, rows) if rows else "one source, and one margin or none"


def answers_table(answers: Sequence[Mapping[str, Any]]) -> str:
    """Greedy answers of the models to the same prompts, side by side."""
    sides = {side: label for side, label in SIDES.items() if all(side in row for row in answers)}
    rows = [[row["prompt"][-1]["content"], *(row[side] for side in sides)] for row in answers]
    return table(["prompt (last message)", *sides.values()], rows)
