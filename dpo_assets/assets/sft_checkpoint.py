"""`sft_checkpoint`: the policy that DPO starts from, and its reference."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from dpo_assets.artifact import Artifact, write_json
from dpo_assets.assets.dpo_plan import read_plan
from dpo_assets.assets.node import Node
from dpo_assets.assets.step import Events, Step, memory_record
from dpo_assets.checks.training import sft_verdicts
from dpo_assets.contract import TrainSpec
from dpo_assets.report.plots import line_plot


def materialise(step: Step) -> Events:
    """Trains the SFT adapter, or adopts the base as it is."""
    plan_artifact, dataset, base = step.upstream("dpo_plan"), step.upstream("dpo_dataset"), step.upstream("base_model")
    plan = read_plan(plan_artifact)
    inputs = {"dpo_dataset": dataset, "base_model": base}

    def make(folder: Path, print_: str) -> None:
        if plan.sft.strategy == "adopt":
            write_json(folder / "report.json", {"adopted": True})
            return
        step.launch(
            "sft",
            TrainSpec(
                kind="sft_checkpoint",
                output_dir=folder,
                fingerprint=print_,
                inputs={name: artifact.digest for name, artifact in inputs.items()},
                base_model=base.path / "model",
                threads=step.recipe.hardware.threads,
                dataset=dataset.path,
                plan=plan,
            ),
        )

    # An adopted base depends on nothing that was trained, so a new dataset must not make it new.
    adopted = plan.sft.strategy == "adopt"
    config = {"strategy": "adopt"} if adopted else plan.sft_part()
    artifact, reused = step.build("sft_checkpoint", config, {"base_model": base} if adopted else inputs, make)
    report = artifact.json("report.json")
    metadata = {
        "strategy": plan.sft.strategy,
        **{k: v for k, v in report.items() if k != "adopted" and not isinstance(v, dict)},
    }
    metadata |= memory_record(artifact)
    if not adopted:
        metadata["loss"] = dg.MetadataValue.md(line_plot(artifact.path / "metrics.jsonl", {"loss": "loss"}, "SFT loss"))
    yield from step.result("sft_checkpoint", artifact, reused, sft_verdicts(report, step.bands), metadata)


def start_adapter(checkpoint: Artifact) -> Path | None:
    """The SFT adapter, or None when the base was adopted."""
    folder = checkpoint.path / "adapter"
    return folder if folder.is_dir() else None


NODE = Node(
    name="sft_checkpoint",
    description="Where DPO starts and what it is measured against: LoRA SFT on chosen answers, or the base as it is.",
    phase="training",
    kinds=frozenset({"pytorch", "huggingface"}),
    body=materialise,
    deps=("dpo_plan", "base_model"),
    trains=True,
)
