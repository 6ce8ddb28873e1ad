"""The page of `eval_scores`: every score with its interval and its reach, and what the pairs look like one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_assets.checks.evidence.measured import Comparison
from dpo_assets.checks.evidence.power import EFFECT, POWER, Reach, one_sided, reach_of_comparison, reach_of_score
from dpo_assets.checks.reports import Divergence, EvaluationReport, InstructionsFollowed, NotMeasured, Perplexity
from dpo_assets.checks.statistics import Proportion, percent
from dpo_assets.report.tables import table

SIDES = {"sft": "SFT", "policy": "policy", "champion": "champion"}


def scores_table(report: EvaluationReport) -> str:
    """Every score with its interval over conversations, the least difference that so many pairs find, and both p of a
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
            f"{one.n} in {one.clusters} conversations",
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
        if champion.reward_accuracy_per_token is not None:
            yield "champion, implicit reward against its own start, per token", champion.reward_accuracy_per_token
        yield "champion, log-probability per token", champion.logp_accuracy


def _comparisons(report: EvaluationReport) -> Iterator[tuple[str, Comparison | None]]:
    yield "policy less SFT, log-probability per token", report.logp_against_sft
    if (champion := report.champion_scores) is not None:
        yield "policy less champion, implicit reward", champion.reward_against
        yield "policy less champion, log-probability per token", champion.logp_against


def perplexity_table(report: EvaluationReport) -> str:
    """Perplexity per token of neutral text and of chosen answers: of the policy and of the champion, each beside where
    it started."""
    champion, rows = report.champion_scores, []
    for label, policy, live in (
        ("neutral texts", report.neutral, champion and champion.neutral),
        ("chosen answers", report.chosen, champion and champion.chosen),
    ):
        for who, part in (("policy", policy), ("champion", live)):
            if isinstance(part, Perplexity):
                size = f"{part.texts} of {part.tokens} tokens"
                ends = _ends(part.low, part.high, ".3f")
                rows.append([label, who, size, f"{part.sft:.4g}", f"{part.policy:.4g}", f"{part.ratio:.3f}", ends])
    header = ["perplexity per token", "of", "texts", "its start", "itself", "itself over its start"]
    return table([*header, f"{percent(report.confidence)} interval"], rows) if rows else "not measured"


def distance_table(report: EvaluationReport, policy: Divergence | None, champion: Divergence | None) -> str:
    """How far policy and champion went from their own starts: KL on their own answers, and margins.

    Args:
        policy: its KL as training measured it, where it is not measured again; `champion` is the champion's.
    """
    live = report.champion_scores
    kl = (policy or report.kl, (champion or live.kl) if live else None)
    margin = (report.margin, live.margin if live else None)
    rows = [
        ["KL from its start, nats per token of its own answers", *(_divergence(one) for one in kl)],
        ["mean margin, nats", *("-" if one is None else str(one) for one in margin)],
    ]
    return table(["each from its own start", "policy", "champion"], rows)


def _divergence(one: Divergence | NotMeasured | None) -> str:
    if isinstance(one, Divergence):
        return f"{one.per_token:.4f} {_ends(one.low, one.high, '.4f')}"
    return "-" if one is None else f"not measured: {one.not_measured}"


def _ends(low: float | None, high: float | None, shown: str) -> str:
    return "-" if low is None or high is None else f"[{low:{shown}}, {high:{shown}}]"


def parts_table(report: EvaluationReport) -> str:
    """Policy and champion by source and by quartile of the feedback's margin."""
    rows = [
        [
            f"{one.by}: {one.name}",
            one.reward.counted,
            f"{one.reward.value:.3f} [{one.reward.low:.3f}, {one.reward.high:.3f}]",
            f"{one.against_sft.difference:+.3f} [{one.against_sft.low:+.3f}, {one.against_sft.high:+.3f}]",
            "-"
            if one.champion is None
            else f"{one.champion.value:.3f} {_ends(one.champion.low, one.champion.high, '.3f')}",
            "-"
            if one.against_champion is None
            else f"{one.against_champion.difference:+.3f} "
            f"{_ends(one.against_champion.low, one.against_champion.high, '+.3f')}",
        ]
        for one in report.slices
    ]
    header = ["part", "pairs", "implicit reward", "log-probability per token, policy less SFT"]
    header += ["champion, implicit reward", "implicit reward, policy less champion"]
    return table(header, rows) if rows else "one source, and one margin or none"


def instructions_table(report: EvaluationReport) -> str:
    """Instructions that each model followed, with the least difference that so many find, and each by itself."""
    part, level = report.instructions, one_sided(report.confidence)
    if not isinstance(part, InstructionsFollowed):
        return "not measured" + (f": {part.not_measured}" if part else "")
    scores: list[tuple[str, Proportion | Comparison | None]] = [
        ("SFT", part.sft),
        ("policy", part.policy),
        ("champion", part.champion),
        ("policy less SFT, paired", part.against_sft),
        ("policy less champion, paired", part.against_champion),
    ]
    rows = [
        [
            label,
            f"{one.value:.3f}" if isinstance(one, Proportion) else f"{one.difference:+.3f}",
            _ends(one.low, one.high, ".3f" if isinstance(one, Proportion) else "+.3f"),
            str(one.n),
            *_found(reach_of_score(one, level) if isinstance(one, Proportion) else reach_of_comparison(one, level)),
        ]
        for label, one in scores
        if one is not None
    ]
    interval, least = f"{percent(report.confidence)} interval", f"found: {POWER:.0%} of the time"
    header = ["instructions followed", "share", interval, "n", least, f"{100 * EFFECT:.0f} points found"]
    each = [
        [name, *("-" if met is None else "yes" if met else "no" for met in by)] for name, *by in part.by_instruction
    ]
    return f"{table(header, rows)}\n\n{table(['instruction', *SIDES.values()], each)}"


def answers_table(answers: Sequence[Mapping[str, Any]]) -> str:
    """Greedy answers of the models to the same prompts, side by side."""
    sides = {side: label for side, label in SIDES.items() if all(side in row for row in answers)}
    rows = [[row["prompt"][-1]["content"], *(row[side] for side in sides)] for row in answers]
    return table(["prompt (last message)", *sides.values()], rows)
