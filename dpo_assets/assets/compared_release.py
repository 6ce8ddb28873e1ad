"""What every stage that compares the release with its SFT start is told, and reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_assets.assets.base_model import in_worker
from dpo_assets.assets.dpo_plan import followed
from dpo_assets.assets.lineage import Inputs, Read
from dpo_assets.assets.refreshing import start_adapter
from dpo_assets.assets.step import Step
from dpo_assets.planning.plan import TrainingPlan


def release_spec(step: Step, inputs: Inputs, plan: TrainingPlan, folder: Path, fingerprint: str) -> dict[str, Any]:
    """The fields of a `ReleaseSpec` that the run's artefacts fill."""
    return {
        "output_dir": folder,
        "fingerprint": fingerprint,
        "inputs": inputs.digests,
        **in_worker(inputs["base_model"]),
        "threads": step.recipe.hardware.threads,
        "plan": plan,
        "sft_adapter": start_adapter(inputs["sft_checkpoint"]),
        "adapter": inputs["dpo_adapter"].path / "adapter",
        "policy": inputs["merged_model"].path / "model",
    }


def compared(settings: Callable[[TrainingPlan], dict[str, object]]) -> tuple[Read, ...]:
    """What such a stage reads: the plan for some of its settings, and the models."""
    return (
        followed(settings),
        *(Read(name) for name in ("merged_model", "dpo_adapter", "sft_checkpoint", "base_model")),
    )
