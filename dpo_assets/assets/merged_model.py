"""`merged_model`: base + adapter as one safetensors model."""

from __future__ import annotations

from pathlib import Path

from dpo_assets.assets.dpo_plan import read_plan
from dpo_assets.assets.node import Node
from dpo_assets.assets.step import Events, Step
from dpo_assets.checks.training import merge_verdicts
from dpo_assets.contract import MergeSpec


def materialise(step: Step) -> Events:
    """Merges, and scores held-out pairs before and after."""
    plan = read_plan(step.upstream("dpo_plan"))
    inputs = {name: step.upstream(name) for name in ("dpo_adapter", "dpo_dataset", "base_model")}

    def make(folder: Path, print_: str) -> None:
        step.launch(
            "merge",
            MergeSpec(
                kind="merged_model",
                output_dir=folder,
                fingerprint=print_,
                inputs={name: artifact.digest for name, artifact in inputs.items()},
                base_model=inputs["base_model"].path / "model",
                threads=step.recipe.hardware.threads,
                adapter=inputs["dpo_adapter"].path / "adapter",
                dataset=inputs["dpo_dataset"].path,
                plan=plan,
            ),
        )

    config = plan.at_proof().model_dump(include={"precision", "device"})
    artifact, reused = step.build("merged_model", config, inputs, make)
    report = artifact.json("report.json")
    yield from step.result("merged_model", artifact, reused, merge_verdicts(report, step.bands), report)


NODE = Node(
    name="merged_model",
    description="Base + adapter as one safetensors model, proven to score pairs as the adapter did.",
    phase="training",
    kinds=frozenset({"pytorch", "huggingface"}),
    body=materialise,
    deps=("dpo_adapter",),
    trains=True,
)
