"""`sft_checkpoint`: the policy that DPO starts from, and its reference."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from dpo_assets.artifact import Artifact
from dpo_assets.assets.base_model import in_worker
from dpo_assets.assets.dpo_plan import followed, read_plan
from dpo_assets.assets.lineage import Read
from dpo_assets.assets.node import Node
from dpo_assets.assets.out_of_memory import memory_record
from dpo_assets.assets.refreshing import kept
from dpo_assets.assets.resuming import resume_record
from dpo_assets.assets.step import Events, Step
from dpo_assets.checks.reports import AdoptedBase, read_sft
from dpo_assets.checks.training import sft_verdicts
from dpo_assets.contract import TrainSpec
from dpo_assets.errors import ConfigError
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.planning.refresh import SftData
from dpo_assets.report.plots import line_plot


def materialise(step: Step) -> Events:
    """Trains the SFT adapter, or adopts the base as it is."""
    inputs = step.inputs()
    plan = read_plan(inputs["dpo_plan"])
    adopted, now = plan.sft.strategy == "adopt", inputs["dpo_dataset"]
    if adopted:  # It depends on nothing that was trained, so a new dataset must not make it new.
        inputs = inputs.only("dpo_plan", "base_model")
    else:
        inputs = inputs.using("dpo_dataset", _trained_on(step, plan.refresh.sft, now))

    def make(folder: Path, print_: str) -> None:
        if adopted:
            AdoptedBase(adopted=True).write(folder)
            return
        step.launch(
            "sft",
            TrainSpec(
                kind="sft_checkpoint",
                output_dir=folder,
                fingerprint=print_,
                inputs=inputs.digests,
                **in_worker(inputs["base_model"]),
                threads=step.recipe.hardware.threads,
                dataset=inputs["dpo_dataset"].path,
                plan=plan,
                checkpoints=step.checkpoints("sft_checkpoint", print_),
            ),
        )

    artifact, reused = step.build("sft_checkpoint", {}, inputs, make)
    report = read_sft(artifact)
    metadata = {
        "strategy": plan.sft.strategy,
        **{
            name: "not known" if value in (None, "") and name != "kernels_note" else value
            for name, value in report.model_dump(mode="json", exclude={"adopted", "lora_coverage"}).items()
        },
    }
    metadata |= memory_record(artifact) | resume_record(artifact)
    if not adopted:
        metadata |= _data(plan.refresh.sft, now, step.recipe.refresh.renew_sft_after)
        metadata["loss"] = dg.MetadataValue.md(line_plot(artifact.path / "metrics.jsonl", {"loss": "loss"}, "SFT loss"))
    yield from step.result("sft_checkpoint", artifact, reused, sft_verdicts(report, step.bands), metadata)


def _data(data: SftData, now: Artifact, limit: float) -> dict[str, str | int]:
    """What SFT was trained on, and how far the data moved since."""
    said = "all training pairs of now"
    if data.dataset not in ("", now.digest):
        said = (
            f"the dataset {data.dataset[:12]}, an earlier one: SFT is taken up until more than {limit:.0%} of the "
            "training pairs are newer than it, or one of its own is gone"
        )
    return {"trained_on": said, "trained_on_pairs": data.pairs, "pairs_newer_than_it": data.newer}


def _trained_on(step: Step, data: SftData, now: Artifact) -> Artifact:
    """The dataset that the plan chose: that of now, or an earlier one.

    Raises:
        ConfigError: it is not in the store any more.
    """
    if step.only_checks or data.dataset in ("", now.digest):
        return now
    found = kept(step.tree, "dpo_dataset", data.dataset)
    if found is None:
        raise ConfigError(
            f"the `dpo_dataset` ({data.dataset[:12]}) that SFT was trained on is gone from {step.tree.root} since the "
            "plan was made; materialise `dpo_plan` again, and SFT is trained on the pairs of now."
        )
    return found


def sft_settings(plan: TrainingPlan) -> dict[str, object]:
    """What an SFT checkpoint depends on. An adopted base is the same under any numbers."""
    return {"strategy": "adopt"} if plan.sft.strategy == "adopt" else plan.sft_part()


NODE = Node(
    name="sft_checkpoint",
    description="Where DPO starts and what it is measured against: LoRA SFT on chosen answers, or the base as it is.",
    phase="training",
    kinds=frozenset({"pytorch", "huggingface"}),
    body=materialise,
    reads=(followed(sft_settings), Read("dpo_dataset", chosen_by="dpo_plan"), Read("base_model")),
    recipe=("lora", "sft"),
    trains=True,
)
