"""The resolved recipe of one run. It is written before training and says everything that training will do."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from dpo_assets.planning.dataset import DatasetStats
from dpo_assets.planning.decision import decide, what_would_fit
from dpo_assets.planning.precision import Device, Precision
from dpo_assets.planning.shape import Kernels, ModelShape
from dpo_assets.recipe import DpoSection, LoraSection, Recipe, SftSection, Speedup

__all__ = ["DatasetStats", "Kernels", "ModelShape", "TrainingPlan", "make_plan", "steps_of"]


class TrainingPlan(BaseModel):
    """Everything a training stage does, resolved. Nothing in it is a library's default."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    device: Literal["cpu", "cuda"]
    device_name: str
    device_index: int = Field(default=0, description="The one GPU that the worker may see, as NVML counts them.")
    device_uuid: str = Field(default="", description="The same by its UUID, which no order of devices changes.")
    precision: Precision
    precision_reason: str
    kernels: Kernels
    speedups: tuple[Speedup, ...] = Field(default=(), description="What makes Transformers' layers faster.")
    gradient_checkpointing: bool
    recomputed_layers: int = Field(
        default=0, description="With fused kernels: layers whose activations are computed again in the backward pass."
    )
    token_budget: int = Field(description="Most tokens of one forward; a step takes as many forwards as it needs.")
    longest_pair: int = Field(default=0, description="Tokens of the longest pair: no forward can be smaller.")
    memory_gib: float = Field(description="Estimated peak.")
    memory_available_gib: float
    memory_parts: dict[str, float] = Field(default={}, description="GiB of each part at the estimated peak.")
    fits: bool = Field(default=True, description="Whether the estimated peak fits, with room for fragments.")
    would_fit: list[str] = Field(default=[], description="Where it does not fit: single changes that would.")
    parameters: int
    max_length: int
    train_pairs: int
    eval_pairs: int
    sft_steps: int
    dpo_steps: int
    lora: LoraSection
    sft: SftSection
    dpo: DpoSection

    def sft_part(self) -> dict[str, object]:
        """What the SFT checkpoint depends on: a change of DPO settings must not retrain it."""
        keys = {"device", "precision", "kernels", "speedups", "max_length", "lora", "sft"}
        return self.model_dump(include=keys)

    def dpo_part(self) -> dict[str, object]:
        """What the DPO adapter depends on, beside its inputs."""
        keys = {"device", "precision", "kernels", "speedups", "max_length", "lora", "dpo"}
        return self.model_dump(include=keys)

    def with_half_budget(self) -> TrainingPlan | None:
        """The same plan in forwards of half the size, or None where a forward holds no more than the longest pair.

        Pairs per optimizer step do not change: a step takes more forwards.
        """
        smaller = max(self.token_budget // 2, self.longest_pair, 1)
        return self.model_copy(update={"token_budget": smaller}) if smaller < self.token_budget else None


def steps_of(pairs: int, batch: int, epochs: float) -> int:
    """Optimizer steps: the last, smaller batch of an epoch is a step too."""
    return max(1, math.ceil(math.ceil(pairs / batch) * epochs))


def make_plan(recipe: Recipe, shape: ModelShape, data: DatasetStats, device: Device) -> TrainingPlan:
    """Resolves a recipe for a model, a dataset and a device. A plan that does not fit says so, and what would.

    Raises:
        ConfigError: when an explicit choice cannot work on the device.
    """
    available = min(device.memory_gib, recipe.hardware.memory_gib or device.memory_gib)
    device = replace(device, memory_gib=available)
    decision = decide(recipe, shape, data, device)
    memory = decision.memory
    return TrainingPlan(
        device=device.kind,
        device_name=device.name,
        device_index=device.index,
        device_uuid=device.uuid,
        precision=decision.precision,
        precision_reason=decision.reason,
        kernels=decision.kernels,
        speedups=tuple(sorted(set(recipe.hardware.speedups))),
        gradient_checkpointing=memory.gradient_checkpointing,
        recomputed_layers=memory.recomputed_layers,
        token_budget=memory.token_budget,
        longest_pair=data.longest_pair,
        memory_gib=memory.peak_gib,
        memory_available_gib=available,
        memory_parts=memory.parts,
        fits=memory.fits,
        would_fit=[] if memory.fits else what_would_fit(recipe, shape, data, device),
        parameters=shape.parameters,
        max_length=data.max_length,
        train_pairs=data.train_pairs,
        eval_pairs=data.eval_pairs,
        sft_steps=0
        if recipe.sft.strategy == "adopt"
        else steps_of(data.train_pairs, recipe.sft.batch_size, recipe.sft.epochs),
        dpo_steps=steps_of(data.train_pairs, recipe.dpo.batch_size, recipe.dpo.epochs),
        lora=recipe.lora,
        sft=recipe.sft,
        dpo=recipe.dpo,
    )
