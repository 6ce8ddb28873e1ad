"""`harness_scores`: tasks of lm-evaluation-harness, answered by SFT and policy and compared document by document."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from dpo_assets.assets.compared_release import compared, release_spec
from dpo_assets.assets.dpo_plan import read_plan
from dpo_assets.assets.harness_tasks import harness_identity
from dpo_assets.assets.node import Node
from dpo_assets.assets.scorers_ahead import refuse_harness
from dpo_assets.assets.step import Events, Step
from dpo_assets.checks.harness import harness_verdicts
from dpo_assets.checks.reports import HarnessScores
from dpo_assets.checks.statistics import percent
from dpo_assets.contract import HarnessSpec
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.report.tables import table

REUSED_WHILE = (
    "models, settings, the files of evaluation.harness.include_path and the version of lm-eval are the same. Datasets "
    "outside of that folder are not looked at: `documents_asked` is the SHA-256 of the documents, prompts and targets "
    "that were asked. Where such a dataset changed, change a file of the folder too."
)


def materialise(step: Step) -> Events:
    """Runs the tasks of the recipe in the worker, on both models."""
    evaluation, inputs = step.recipe.evaluation, step.inputs()
    settings = evaluation.harness
    assert settings is not None, "the node is wanted where a harness is declared"
    plan = read_plan(inputs["dpo_plan"])
    if not step.only_checks:
        refuse_harness(settings)

    def make(folder: Path, print_: str) -> None:
        step.launch(
            "harness",
            HarnessSpec(
                kind="harness_scores",
                **release_spec(step, inputs, plan, folder, print_),
                confidence=evaluation.confidence,
                **settings.model_dump(exclude={"guards"}),
            ),
        )

    config = {} if step.only_checks else {**harness_identity(settings), "confidence": evaluation.confidence}
    artifact, reused = step.build("harness_scores", config, inputs, make)
    report = HarnessScores.of(artifact)
    yield from step.result(
        "harness_scores",
        artifact,
        reused,
        harness_verdicts(report),
        {
            "lm_eval": report.version,
            "scored": report.scored,
            **{one.name: one.policy for one in report.tasks},
            "scores": dg.MetadataValue.md(scores_table(report)),
            "documents_asked": dg.MetadataValue.json({one.name: one.asked for one in report.tasks if one.asked}),
            "reused_while": REUSED_WHILE,
        },
    )


def scores_table(report: HarnessScores) -> str:
    """Every metric of every task, for both models, with the paired difference."""
    rows = [
        [one.task, one.metric, one.filter, one.documents, f"{one.sft:.4f}", f"{one.policy:.4f}", one.shown]
        for one in report.tasks
    ]
    interval = f"policy less SFT, paired, {percent(report.confidence)} interval"
    return table(["task", "metric", "filter", "documents", "SFT", "policy", interval], rows)


def harness_settings(plan: TrainingPlan) -> dict[str, object]:
    """What scores depend on, beside the models: which of them is scored, and in which numbers."""
    release = plan.at_release()
    return {
        "device": plan.device,
        "precision": release.precision,
        "compute": release.compute,
        "scored": plan.scoring.subject,
    }


NODE = Node(
    name="harness_scores",
    description="Tasks of lm-evaluation-harness, answered by SFT and policy, with paired differences over documents.",
    phase="release",
    kinds=frozenset({"pytorch"}),
    body=materialise,
    reads=compared(harness_settings),
    recipe=("evaluation",),
    trains=True,
    wanted=lambda recipe: recipe.evaluation.harness is not None,
)
