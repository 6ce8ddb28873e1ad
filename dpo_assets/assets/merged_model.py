"""`merged_model`: base + adapter as one safetensors model."""

from __future__ import annotations

from pathlib import Path

from dpo_assets.assets.base_model import in_worker
from dpo_assets.assets.dpo_plan import followed, read_plan
from dpo_assets.assets.lineage import Read
from dpo_assets.assets.node import Node
from dpo_assets.assets.step import Events, Step
from dpo_assets.checks.reports import MergeReport
from dpo_assets.checks.training import merge_verdicts
from dpo_assets.contract import MergeSpec
from dpo_assets.planning.plan import TrainingPlan


def materialise(step: Step) -> Events:
    """Merges, and scores held-out pairs before and after."""
    inputs = step.inputs()
    plan = read_plan(inputs["dpo_plan"])

    def make(folder: Path, print_: str) -> None:
        step.launch(
            "merge",
            MergeSpec(
                kind="merged_model",
                output_dir=folder,
                fingerprint=print_,
                inputs=inputs.digests,
                **in_worker(inputs["base_model"]),
                threads=step.recipe.hardware.threads,
                adapter=inputs["dpo_adapter"].path / "adapter",
                dataset=inputs["dpo_dataset"].path,
                plan=plan,
                parts=step.tree.checkpoints("merged_model", print_),
            ),
        )

    artifact, reused = step.build("merged_model", {}, inputs, make)
    report = MergeReport.of(artifact)
    yield from step.result(
        "merged_model", artifact, reused, merge_verdicts(report, step.bands), report.model_dump(mode="json")
    )


def merge_settings(plan: TrainingPlan) -> dict[str, object]:
    """What a merged model depends on, beside base and adapter: where and how it is proven to be the same policy."""
    proof = plan.at_proof()
    return {"device": proof.device, "precision": proof.precision}


NODE = Node(
    name="merged_model",
    description="Base + adapter as one safetensors model, proven to score pairs as the adapter did.",
    phase="training",
    kinds=frozenset({"pytorch", "huggingface"}),
    body=materialise,
    reads=(followed(merge_settings), Read("dpo_adapter"), Read("dpo_dataset"), Read("base_model")),
    trains=True,
)
