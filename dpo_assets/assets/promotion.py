"""`promotion`: what the held-out scores decide, written into the pipeline's ledger once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from dpo_assets.artifact import Artifact, ArtifactTree, write_json
from dpo_assets.assets.eval_scores import SCORES as SCORES_FILE
from dpo_assets.assets.lineage import Inputs, Read
from dpo_assets.assets.node import Node
from dpo_assets.assets.step import Events, Step
from dpo_assets.checks.evidence.candidate import Candidate, ScoredPairs
from dpo_assets.checks.evidence.ledger import FIRST, SCORES, Decided, Ledger
from dpo_assets.checks.evidence.ledger_file import LedgerFile
from dpo_assets.checks.evidence.outlook import Outlook
from dpo_assets.checks.evidence.previews import Previews, PreviewsFile
from dpo_assets.checks.evidence.task_guards import TaskGuard
from dpo_assets.checks.promotion import OUTCOME, PromotionOutcome, override_of, promotion_verdict
from dpo_assets.checks.reports import EvaluationReport
from dpo_assets.judging.guards import benchmark_guards, harness_guards
from dpo_assets.publishing.secrets import scrub
from dpo_assets.recipe import Recipe
from dpo_assets.report.history import HISTORY, history_rows
from dpo_assets.report.tables import table

NAME = "promotion"
SNAPSHOT = "ledger.jsonl"


class PromotionConfig(dg.Config):
    """What a person may decide for one run."""

    override: str = Field(default="", description="`promote` or `hold`; empty: the rules decide.")
    reason: str = Field(default="", description="Why, in at least 10 characters. The ledger and the card show it.")


def materialise(step: Step) -> Events:
    """Decides on the challenger, and appends the decision to the ledger. A dry run decides as a preview and appends
    nothing; that it looked is kept (`previews`)."""
    inputs, dry_run = step.inputs(), step.recipe.publishing.dry_run
    if step.only_checks:
        artifact, reused = step.build(NAME, {}, inputs, lambda folder, print_: None)
        ledger = read_ledger(step.tree)
    else:
        override = override_of(str(step.config.get("override", "")), scrub(str(step.config.get("reason", ""))))
        previews = PreviewsFile.of(step.tree.root)
        candidate = candidate_of(step, inputs, previews.read())
        decided: list[Decided] = []
        heads = kept_heads(step.tree)  # Before the ledger: a line that is written in between is not lost.

        def decide(ledger: Ledger) -> Ledger:
            ledger.refuse_lost(heads)
            after, line = candidate.decide(ledger, override, datetime.now(UTC).isoformat(timespec="seconds"))
            decided.append(line)
            return after

        file = LedgerFile.of(step.tree.root)
        ledger = file.read() if dry_run else file.extend(decide)
        if dry_run:
            decide(ledger)
            if decided[-1].level is not None and decided[-1] not in ledger.lines:
                # It was looked at, and so tested: what it has of the level is known only now.
                candidate = replace(candidate, previews=previews.add(candidate.name, decided[-1].saw))
                decide(ledger)
        line = decided[-1]
        preview = line not in ledger.lines
        before = Ledger(lines=ledger.lines[: line.number - 1])

        def make(folder: Path, _: str) -> None:
            outcome = PromotionOutcome(
                decided=line,
                preview=preview,
                held_out=tuple(sorted(candidate.held_out)),
                fresh_prompts=len(before.fresh(candidate.held_out)),
                outlook=tuple(outlook_of(candidate, before).rows()),
            )
            write_json(folder / OUTCOME, outcome.model_dump(mode="json"))
            (folder / SNAPSHOT).write_text(before.text if preview else before.append(line).text, encoding="utf-8")

        # A preview would have another time with each run, and is the same decision.
        identity = line.model_dump(mode="json", exclude={"at"}) if preview else {"decision": line.digest}
        artifact, reused = step.build(NAME, {"preview": preview, **identity}, inputs, make)
    outcome = PromotionOutcome.of(artifact)
    yield from step.result(
        NAME, artifact, reused, [promotion_verdict(outcome, dry_run=dry_run)], _shown(outcome, ledger)
    )


def candidate_of(step: Step, inputs: Inputs, previews: Previews) -> Candidate:
    """The challenger that an evaluation scored.

    Raises:
        ConfigError: the scores are of an earlier version.
    """
    scores = inputs["eval_scores"]
    recorded, opponent = scores.manifest.inputs, EvaluationReport.of(scores).champion
    guarding = {read.node: inputs[read.node].digest for read in guarding_reads(step.recipe)}
    tasks, theirs = _task_guards(step, inputs, opponent)
    return Candidate(
        name=recorded["merged_model"],
        opponent=opponent,
        inputs={**recorded, **guarding, **theirs, SCORES: scores.digest},
        pairs=ScoredPairs.read(scores.path / SCORES_FILE),
        fewest=step.recipe.evaluation.min_pairs,
        failures=withdrawn_start(step.tree, LedgerFile.of(step.tree.root).read(), recorded.get("dpo_adapter")),
        tasks=tasks,
        previews=previews,
    )


def withdrawn_start(tree: ArtifactTree, ledger: Ledger, adapter: str | None) -> dict[str, str]:
    """The hard guard that fails where a challenger's adapter went on from a release that was taken back since.

    What it was taken back for may be in the challenger too. By manifests alone: of an adapter behind it that is gone
    from the store the digest is still known.
    """
    made = {told.digest: told.manifest.inputs.get("dpo_adapter") for told in tree.listed("dpo_adapter")}
    models = [(told.manifest.inputs.get("dpo_adapter"), told.digest) for told in tree.listed("merged_model")]
    models += [(one.inputs.get("dpo_adapter"), one.challenger) for one in ledger.decisions]
    while adapter is not None and (adapter := made.get(adapter)) is not None:
        for name in (model for of, model in models if of == adapter):
            if (line := ledger.taken_back(name)) is not None:
                return {
                    "start": f"it went on from the release {name[:12]}, which line {line.number} took back "
                    f"({line.reason}); materialise `dpo_plan` and what follows again, which starts from what is live"
                }
    return {}


def guarding_reads(recipe: Recipe) -> tuple[Read, ...]:
    """The scores of tasks and benchmarks that the recipe makes guards."""
    evaluation = recipe.evaluation
    asked = {
        "harness_scores": evaluation.harness is not None and evaluation.harness.guards,
        "benchmark_scores": any(one.guards for one in evaluation.benchmarks),
    }
    return tuple(Read(node) for node, wanted in asked.items() if wanted)


def _task_guards(step: Step, inputs: Inputs, opponent: str | None) -> tuple[dict[str, TaskGuard], dict[str, str]]:
    """Those scores against the opponent's own, item by item; and the digests of these, as `champion_<node>`."""
    evaluation, guards, against = step.recipe.evaluation, dict[str, TaskGuard](), dict[str, str]()

    def compare(own: Artifact, theirs: Artifact | None) -> dict[str, TaskGuard]:
        if own.manifest.kind == "harness_scores":
            return harness_guards(own, theirs, first=opponent is None)
        if opponent is None:  # A benchmark has no score of a start: rewards are against it.
            return {}
        names = [one.name for one in evaluation.benchmarks if one.guards]
        return benchmark_guards(own, theirs, names, evaluation.confidence)

    for read in guarding_reads(step.recipe):
        found, theirs = fitting(_scores_of(step.tree, read.node, opponent), partial(compare, inputs[read.node]))
        guards |= found
        if theirs is not None:
            against[f"champion_{read.node}"] = theirs.digest
    return guards, against


def fitting(
    scores: Iterable[Artifact], compare: Callable[[Artifact | None], dict[str, TaskGuard]]
) -> tuple[dict[str, TaskGuard], Artifact | None]:
    """The first of the champion's scores by which every guard can be tested, or else the most; and those guards.

    A model may have several: of other tasks, or of other items of the same ones. The newest need not be those that the
    challenger was asked too.
    """
    best: tuple[int, dict[str, TaskGuard], Artifact] | None = None
    for theirs in scores:
        found = compare(theirs)
        tested = sum(one.tested for one in found.values())
        if best is None or tested > best[0]:
            best = tested, found, theirs
        if tested == len(found):
            break
    return (compare(None), None) if best is None else best[1:]


def _scores_of(tree: ArtifactTree, node: str, model: str | None) -> Iterator[Artifact]:
    """The scores of a merged model, whole, newest first."""
    for told in tree.listed(node) if model is not None else ():
        if told.manifest.inputs.get("merged_model") == model and (found := tree.find(node, told.path.name)) is not None:
            yield found


def read_ledger(tree: ArtifactTree) -> Ledger:
    """The ledger of a pipeline, held against the heads that were kept of it.

    Raises:
        ConfigError: it was changed, or lines of it are lost.
    """
    heads = kept_heads(tree)  # First: a line that somebody writes in between is not lost.
    ledger = LedgerFile.of(tree.root).read()
    ledger.refuse_lost(heads)
    return ledger


def kept_heads(tree: ArtifactTree) -> dict[str, str]:
    """The heads that decisions kept in their artefacts: digest of the last line, and where it stands."""
    heads = {}
    for told in tree.listed(NAME):
        with suppress(OSError):  # Damaged: it is no witness.
            last = (told.path / SNAPSHOT).read_bytes().rstrip(b"\n").rpartition(b"\n")[2]
            heads[hashlib.sha256(last).hexdigest() if last else FIRST] = str(told.path)
    return heads


def outlook_of(candidate: Candidate, ledger: Ledger) -> Outlook:
    """How the pipeline stands before a decision on this challenger, with the widest of each kind of comparison."""
    evidence = candidate.evidence(ledger)
    primary, guard = (
        max(of.values(), key=lambda one: one.error if one.error == one.error else -1.0, default=None)
        for of in (evidence.primaries, evidence.guards)
    )
    fresh = len(ledger.fresh(candidate.held_out))
    return Outlook.of(ledger, fresh, primary, candidate.fewest, guard=guard, look=evidence.look)


def _shown(outcome: PromotionOutcome, ledger: Ledger) -> dict[str, Any]:
    """Numbers that Dagster plots from run to run, and tables."""
    decided, budget = outcome.decided, ledger.budget()
    rows = [[what, how] for what, how in outcome.outlook]
    waiting = [one for one in ledger.waiting if one.challenger != decided.challenger]
    return {
        "verdict": decided.decision,
        "verdict_reason": decided.reason,
        "preview": outcome.preview,
        "champion": decided.champion or "none yet",
        "challenger": decided.challenger,
        "error_spent": budget.spent,
        "level": budget.level if decided.level is None else decided.level,
        "fresh_prompts": outcome.fresh_prompts,
        **({"never_released": dg.MetadataValue.md(waiting_table(waiting))} if waiting else {}),
        "outlook": dg.MetadataValue.md(table(["before this decision", "how it stands"], rows)),
        "history": dg.MetadataValue.md(history_table(ledger)),
    }


def waiting_table(waiting: Sequence[Decided]) -> str:
    """Challengers that were promoted, and whose release never came to its end, before another was made."""
    rows = [[str(one.number), one.at, one.decision, one.challenger[:12], one.reason] for one in waiting]
    return table(["line", "at", "decision", "challenger, never released", "why"], rows)


def history_table(ledger: Ledger) -> str:
    """Every line of a ledger, newest first."""
    rows = [list(row) for row in history_rows(ledger)]
    return table(list(HISTORY), rows) if rows else "nothing was decided yet"


def _config(_: Recipe) -> type[dg.Config]:
    return PromotionConfig


NODE = Node(
    name=NAME,
    description="Promote, hold or reject, by what no decision saw before; the ledger remembers what it cost.",
    phase="release",
    kinds=frozenset({"json"}),
    body=materialise,
    reads=(Read("eval_scores"),),
    also=guarding_reads,
    recipe=("evaluation", "publishing"),
    config=_config,
)
