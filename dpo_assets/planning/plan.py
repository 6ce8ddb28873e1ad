"""The resolved recipe of one run. It is written before training and says everything that training will do."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from dpo_assets.errors import ConfigError
from dpo_assets.planning.precision import Device, Precision, choose_precision, weights_gib
from dpo_assets.planning.shape import Kernels, ModelShape
from dpo_assets.recipe import DpoSection, LoraSection, Recipe, SftSection

# Bytes of activations per computed token, layer and hidden unit in 16 bit: fitted to 2.05 MiB (1B) and 7.4 MiB (8B)
# measured per token on an H200 without checkpointing, and 0.6 MiB (8B) with it.
ACTIVATION_BYTES, CHECKPOINTED_BYTES = 62.0, 5.0
LARGEST_BUDGET = {"cuda": 16_384, "cpu": 4_096}
FRAMEWORK_GIB = {"cuda": 1.5, "cpu": 1.0}


class DatasetStats(BaseModel):
    """What planning needs to know of a dataset. Lengths are tokens after truncation."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    train_pairs: int
    eval_pairs: int
    max_length: int
    longest_pair: int = Field(description="Tokens of the longest pair with its prompt shared.")
    mean_pair: float = Field(description="Mean tokens of a pair with its prompt shared.")


class TrainingPlan(BaseModel):
    """Everything a training stage does, resolved. Nothing in it is a library's default."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    device: Literal["cpu", "cuda"]
    device_name: str
    precision: Precision
    precision_reason: str
    kernels: Kernels
    gradient_checkpointing: bool
    recomputed_layers: int = Field(
        default=0, description="With fused kernels: layers whose activations are computed again in the backward pass."
    )
    token_budget: int = Field(description="Most tokens of one forward; a step takes as many forwards as it needs.")
    memory_gib: float
    memory_available_gib: float
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
        keys = {"device", "precision", "kernels", "max_length", "lora", "sft"}
        return self.model_dump(include=keys)

    def dpo_part(self) -> dict[str, object]:
        """What the DPO adapter depends on, beside its inputs."""
        keys = {"device", "precision", "kernels", "max_length", "lora", "dpo"}
        return self.model_dump(include=keys)


def steps_of(pairs: int, batch: int, epochs: float) -> int:
    """Optimizer steps: the last, smaller batch of an epoch is a step too."""
    return max(1, math.ceil(math.ceil(pairs / batch) * epochs))


def activation_gib_per_token(shape: ModelShape, precision: Precision, checkpointing: bool) -> float:
    """Estimate of what one more token in a forward costs."""
    per_unit = CHECKPOINTED_BYTES if checkpointing else ACTIVATION_BYTES
    width = 2 if precision == "fp32" else 1
    return per_unit * width * shape.layers * shape.hidden / 2**30


def adapter_gib(shape: ModelShape, lora: LoraSection) -> float:
    """LoRA weights, gradients and both Adam moments in fp32."""
    per_layer = 0
    for target in lora.target_modules:
        wide = target in ("gate_proj", "up_proj", "down_proj")
        per_layer += lora.rank * (shape.hidden + (shape.intermediate if wide else shape.hidden))
    return 16 * per_layer * shape.layers / 2**30


def make_plan(recipe: Recipe, shape: ModelShape, data: DatasetStats, device: Device) -> TrainingPlan:
    """Resolves a recipe for a model, a dataset and a device.

    Gradient checkpointing is used only when without it the longest pair, or two thousand tokens, would not fit.

    Raises:
        ConfigError: when an explicit choice cannot work on the device.
    """
    available = min(device.memory_gib, recipe.hardware.memory_gib or device.memory_gib)
    device = replace(device, memory_gib=available)
    choice = choose_precision(device, shape.parameters, recipe.hardware.precision)
    if choice.precision == "fp8":
        raise ConfigError(
            "hardware.precision `fp8` has no loader in this version; use `bf16`, or `4bit` to save memory."
        )
    fixed = (
        weights_gib(shape.parameters, choice.precision) + adapter_gib(shape, recipe.lora) + FRAMEWORK_GIB[device.kind]
    )
    room = max(0.9 * available - fixed, 0.0)
    wanted = max(data.longest_pair, 2_048)
    checkpointing = activation_gib_per_token(shape, choice.precision, False) * wanted > room
    per_token = activation_gib_per_token(shape, choice.precision, checkpointing)
    budget = int(min(LARGEST_BUDGET[device.kind], room / per_token))
    budget = max(budget, data.longest_pair)
    return TrainingPlan(
        device=device.kind,
        device_name=device.name,
        precision=choice.precision,
        precision_reason=choice.reason,
        kernels="transformers",
        gradient_checkpointing=checkpointing,
        token_budget=budget,
        memory_gib=fixed + per_token * min(budget, data.mean_pair * recipe.dpo.batch_size + data.longest_pair),
        memory_available_gib=available,
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
