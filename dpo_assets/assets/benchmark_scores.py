"""`benchmark_scores`: RewardBench's files, scored by the policy's implicit reward against SFT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import dagster as dg

from dpo_assets.artifact import Artifact
from dpo_assets.assets.base_model import read_facts
from dpo_assets.assets.compared_release import compared, release_spec
from dpo_assets.assets.dpo_plan import read_plan
from dpo_assets.assets.kept_models import trained_record
from dpo_assets.assets.lineage import Inputs
from dpo_assets.assets.node import Node
from dpo_assets.assets.step import Events, Step
from dpo_assets.checks.benchmarks import benchmark_verdicts
from dpo_assets.checks.reports import BenchmarkScore, BenchmarkScores
from dpo_assets.checks.statistics import percent
from dpo_assets.contract import ANSWERED, LEFT_OUT, BenchmarkFile, BenchmarkSpec
from dpo_assets.feedback.trained import trained_groups
from dpo_assets.hashing import file_sha256
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.report.tables import table

SHOWN = 20


def materialise(step: Step) -> Events:
    """Scores every benchmark of the recipe in the worker."""
    evaluation, inputs = step.recipe.evaluation, step.inputs()
    plan = read_plan(inputs["dpo_plan"])

    def make(folder: Path, print_: str) -> None:
        step.launch(
            "benchmark",
            BenchmarkSpec(
                kind="benchmark_scores",
                **release_spec(step, inputs, plan, folder, print_),
                benchmarks=tuple(
                    BenchmarkFile.model_validate(one.model_dump(exclude={"guards"})) for one in evaluation.benchmarks
                ),
                confidence=evaluation.confidence,
                vocabulary=read_facts(inputs["base_model"]).vocabulary,
            ),
        )

    artifact, reused = step.build("benchmark_scores", {} if step.only_checks else _identity(step), inputs, make)
    report = BenchmarkScores.of(artifact)
    left_out = artifact.json(LEFT_OUT)[:SHOWN]
    yield from step.result(
        "benchmark_scores",
        artifact,
        reused,
        benchmark_verdicts(report, _seen(step, inputs, artifact)),
        {
            "scored": report.scored,
            "kernels": report.kernels,
            "kernels_note": report.kernels_note,
            **{f"{one.name} overall": one.overall.value for one in report.benchmarks},
            "scores": dg.MetadataValue.md(scores_table(report)),
            "left_out": dg.MetadataValue.md(
                table(
                    ["benchmark", "row", "reason", ""],
                    [[row["benchmark"], row["number"], row["reason"], row["said"]] for row in left_out],
                )
            ),
        },
    )


def scores_table(report: BenchmarkScores) -> str:
    """Every benchmark with its sections and subsets."""
    rows = []
    for one in report.benchmarks:
        named = [("overall", one.overall), *one.sections.items(), *((part.name, part.score) for part in one.subsets)]
        rows += [[one.name, name, str(found), _told(one) if name == "overall" else ""] for name, found in named]
    return table(["benchmark", "part", f"score, {percent(report.confidence)} interval", ""], rows)


def _told(one: BenchmarkScore) -> str:
    left_out = sum(one.left_out.values())
    return "; ".join(
        [
            f"{one.format}, {one.rows} rows",
            *([f"{left_out} left out"] if left_out else []),
            *([f"{one.undecided} undecided"] if one.undecided else []),
        ]
    )


def _identity(step: Step) -> Mapping[str, object]:
    """Files count by what they hold, wherever they lie."""
    evaluation = step.recipe.evaluation
    files = [[one.name, one.format, file_sha256(Path(one.path))] for one in evaluation.benchmarks]
    return {"benchmarks": files, "confidence": evaluation.confidence}


def _seen(step: Step, inputs: Inputs, artifact: Artifact) -> dict[str, int]:
    """By benchmark, the scored rows whose opening message the model was trained on."""
    import polars as pl

    models = (inputs["dpo_adapter"], inputs["sft_checkpoint"])
    sets = dict(found for model in models if (found := trained_record(step.tree, model)))
    trained = {group for path in sets.values() for group in trained_groups(path)}
    rows = pl.read_parquet(artifact.path / ANSWERED, columns=["benchmark", "row", "group_id"]).unique()
    seen = rows.filter(pl.col("group_id").is_in(list(trained)))["benchmark"].to_list()
    return {name: seen.count(name) for name in rows["benchmark"].unique(maintain_order=True).to_list()}


def benchmark_settings(plan: TrainingPlan) -> dict[str, object]:
    """What scores depend on, beside the models: which of them is scored, in which numbers, and what fits."""
    release = plan.at_release()
    return {
        "device": plan.device,
        "precision": release.precision,
        "compute": release.compute,
        "scored": plan.scoring.subject,
        "max_length": plan.max_length,
    }


NODE = Node(
    name="benchmark_scores",
    description="RewardBench's files, scored by the policy's implicit reward against SFT, with intervals over prompts.",
    phase="release",
    kinds=frozenset({"pytorch"}),
    body=materialise,
    reads=compared(benchmark_settings),
    recipe=("evaluation",),
    trains=True,
    wanted=lambda recipe: bool(recipe.evaluation.benchmarks),
)
