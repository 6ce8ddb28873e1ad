"""`harness_scores`: tasks of lm-evaluation-harness, answered by SFT and policy and compared document by document."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

import dagster as dg

from dpo_assets.assets.base_model import in_worker
from dpo_assets.assets.dpo_plan import followed, read_plan
from dpo_assets.assets.lineage import Read
from dpo_assets.assets.node import Node
from dpo_assets.assets.refreshing import start_adapter
from dpo_assets.assets.scorers_ahead import refuse_harness
from dpo_assets.assets.step import Events, Step
from dpo_assets.checks.harness import harness_verdicts
from dpo_assets.checks.reports import HarnessScores
from dpo_assets.checks.statistics import percent
from dpo_assets.contract import HarnessSpec
from dpo_assets.hashing import file_sha256
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.recipe import HarnessSection
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
                output_dir=folder,
                fingerprint=print_,
                inputs=inputs.digests,
                **in_worker(inputs["base_model"]),
                threads=step.recipe.hardware.threads,
                plan=plan,
                sft_adapter=start_adapter(inputs["sft_checkpoint"]),
                adapter=inputs["dpo_adapter"].path / "adapter",
                policy=inputs["merged_model"].path / "model",
                confidence=evaluation.confidence,
                **settings.model_dump(),
            ),
        )

    config = {} if step.only_checks else {**_identity(settings), "confidence": evaluation.confidence}
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


def _identity(settings: HarnessSection) -> Mapping[str, object]:
    """What decides a reuse: the tasks, by the content of their folder, and the version of lm-eval.

    Not what running them leaves there (`__pycache__`), nor what an editor or Git keeps (names with a dot in front), nor
    data outside of the folder: what was asked of it is told by the documents' hashes.
    """
    folder = Path(settings.include_path) if settings.include_path else None
    files = (
        sorted(path for path in folder.rglob("*") if _counts(path.relative_to(folder)) and path.is_file())
        if folder
        else []
    )
    return {
        **settings.model_dump(include={"tasks", "limit", "num_fewshot", "apply_chat_template"}),
        "files": [[path.relative_to(folder).as_posix(), file_sha256(path)] for path in files if folder],
        "paired": "perplexities too, by content",  # By number alone before.
        "lm_eval": importlib.metadata.version("lm_eval"),
    }


def _counts(path: Path) -> bool:
    return not any(part == "__pycache__" or part.startswith(".") for part in path.parts)


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
    reads=(
        followed(harness_settings),
        Read("merged_model"),
        Read("dpo_adapter"),
        Read("sft_checkpoint"),
        Read("base_model"),
    ),
    recipe=("evaluation",),
    trains=True,
    wanted=lambda recipe: recipe.evaluation.harness is not None,
)
