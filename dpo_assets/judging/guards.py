"""Scores of tasks and benchmarks against a champion's own, item by item, as guards of a promotion."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_assets.artifact import Artifact
from dpo_assets.checks.evidence.clusters import clustered_mean
from dpo_assets.checks.evidence.task_guards import TaskGuard
from dpo_assets.checks.reports import BenchmarkScores, HarnessScores, TaskScore
from dpo_assets.contract import ANSWERED, QUESTION, SAMPLES
from dpo_assets.judging.documents import paired_scores, scored

NOT_COMPARED = "not compared: {}"
NO_SCORES = "the store has no scores of the champion"
OTHER_ITEMS = "the champion was asked others"
OTHERWISE = "the champion was scored otherwise: {}"
EARLIER = "scores of an earlier version do not say which answers they are of"
HASHES = ("doc_hash", "prompt_hash", "target_hash")
Row = Mapping[str, Any]
Item = tuple[object, ...]


def harness_guards(challenger: Artifact, champion: Artifact | None, *, first: bool) -> dict[str, TaskGuard]:
    """Every metric of `harness_scores`, by name.

    Args:
        champion: the `harness_scores` of the champion; None: there are none.
        first: nothing is live, so the opponent is SFT, which was asked beside the policy.
    """
    report = HarnessScores.of(challenger)
    if first:
        return {one.name: _guard(one) for one in report.tasks}
    if champion is None:
        return {one.name: TaskGuard(NOT_COMPARED.format(NO_SCORES), None) for one in report.tasks}
    their_report = HarnessScores.of(champion)
    versions = (f"lm-eval {report.version}", f"lm-eval {their_report.version}")
    if unlike := _unlike((report.scored, their_report.scored), versions):
        return {one.name: TaskGuard(NOT_COMPARED.format(unlike), None) for one in report.tasks}
    before = {one.name: one for one in their_report.tasks}
    ours, theirs = (_by_metric(artifact.json(SAMPLES)) for artifact in (challenger, champion))
    return {one.name: _against(one, before.get(one.name), ours, theirs, report.confidence) for one in report.tasks}


def _unlike(*both: tuple[str, str]) -> str:
    """What of the challenger and the champion differs, by which one of them would only seem worse; empty: nothing."""
    differ = [f"{theirs}, and the challenger {ours}" for ours, theirs in both if ours != theirs]
    return OTHERWISE.format("; ".join(differ)) if differ else ""


def _against(
    now: TaskScore,
    before: TaskScore | None,
    ours: Mapping[Item, Mapping[Item, Row]],
    theirs: Mapping[Item, Mapping[Item, Row]],
    confidence: float,
) -> TaskGuard:
    key = (now.task, now.metric, now.filter)
    own, other = ours.get(key, {}), theirs.get(key, {})
    if before is None or not own or own.keys() != other.keys():
        return TaskGuard(NOT_COMPARED.format(OTHER_ITEMS if own else "it has no value by document"), None)
    found = paired_scores(
        [_scored(other[item]) for item in own],
        [_scored(own[item]) for item in own],
        [item[1] for item in own],
        (before.policy, now.policy),
        confidence,
    )
    changes = {"comparison": found.comparison, "difference": found.difference, "perplexity": found.perplexity}
    return _guard(now.model_copy(update={"sft": before.policy, **changes}))


def _guard(one: TaskScore) -> TaskGuard:
    if not one.is_number:
        return TaskGuard(f"is no number: {one.sft:.4g} before, {one.policy:.4g} now", math.nan)
    return TaskGuard(one.shown if one.p_worse is not None else f"{one.shown}, not tested", one.p_worse)


def _scored(row: Row) -> Any:
    return scored(row["policy"])


def _by_metric(rows: Sequence[Row]) -> dict[Item, dict[Item, Row]]:
    """Rows by task, metric and filter, and then by the number and content of their document."""
    found: dict[Item, dict[Item, Row]] = {}
    for row in rows:
        item = (row["document"], *(row[name] for name in HASHES))
        found.setdefault((row["task"], row["metric"], row["filter"]), {})[item] = row
    return found


def benchmark_guards(
    challenger: Artifact, champion: Artifact | None, names: Collection[str], confidence: float
) -> dict[str, TaskGuard]:
    """The share of right rows of each of these benchmarks, RewardBench 2's Ties left out.

    Both models' rewards are against their own starts. A row of several right answers has no share of its own.

    Args:
        champion: its `benchmark_scores`; None: there are none.
    """
    why = _not_comparable(challenger, champion)
    if why or champion is None:
        return {name: TaskGuard(NOT_COMPARED.format(why), None) for name in sorted(names)}
    guards = {}
    ours, theirs = (dict(_credits(one.path / ANSWERED)) for one in (challenger, champion))
    for name in sorted(names):
        now = {item: right for item, right in ours.items() if item[0] == name}
        then = {item: right for item, right in theirs.items() if item[0] == name}
        if not now or now.keys() != then.keys():
            guards[name] = TaskGuard(NOT_COMPARED.format(OTHER_ITEMS), None)
            continue
        if not all(map(math.isfinite, now.values())):
            guards[name] = TaskGuard("rewards are no numbers", math.nan)
            continue
        found = clustered_mean([now[item] - then[item] for item in now], [item[-1] for item in now], confidence)
        guards[name] = TaskGuard(f"{found}", found.p_below)
    return guards


def _not_comparable(challenger: Artifact, champion: Artifact | None) -> str:
    """Why no benchmark of the two can be compared; empty: each by its rows."""
    import polars as pl

    if champion is None:
        return NO_SCORES
    if any(QUESTION not in pl.read_parquet_schema(one.path / ANSWERED) for one in (challenger, champion)):
        return EARLIER
    ours, theirs = BenchmarkScores.of(challenger), BenchmarkScores.of(champion)
    return _unlike((ours.scored, theirs.scored))


def _credits(table: Path) -> Iterator[tuple[Item, float]]:
    """By benchmark, row, its name, prompt, answers and conversation: 1 where the right answer's reward is the highest,
    1/k of k."""
    import polars as pl

    columns = ["benchmark", "row", "id", "prompt_id", QUESTION, "group_id", "answer", "right", "sft", "policy"]
    rows = pl.read_parquet(table, columns=columns).sort("benchmark", "row", "answer")
    for _, own in rows.group_by("benchmark", "row", maintain_order=True):
        rewards, right = (own["policy"] - own["sft"]).to_list(), own["right"].to_list()
        if sum(right) != 1:
            continue
        yield own.row(0)[:6], _credit(rewards, right.index(True))


def _credit(rewards: Sequence[float], right: int) -> float:
    """As `rewardbench.credit`: of RewardBench's two answers the right one is strictly above."""
    if not all(map(math.isfinite, rewards)):
        return math.nan
    alike = rewards.count(max(rewards))
    if rewards[right] < max(rewards) or (len(rewards) == 2 and alike == 2):
        return 0.0
    return 1 / alike
