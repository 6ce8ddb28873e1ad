"""Which weights are scored as the release, and at which precision.

A release holds the base's 16-bit weights with the adapter merged in. Scored in the 4 bit of its training it would be
another model: rounding moves it further than the adapter did.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from dpo_assets.planning.dataset import DatasetStats
from dpo_assets.planning.memory import FRAMEWORK_GIB, GIB, USABLE, cache_bytes, forward_peak
from dpo_assets.planning.precision import QUANTISED, Device, Precision, compute_format
from dpo_assets.planning.shape import ModelShape

GENERATION_BATCH = 8  # Prompts that are answered in one batch.


class Scoring(BaseModel):
    """What stage `evaluate` scores: the merged model as released, or the adapter on the base it was trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    subject: Literal["merged", "adapter"] = "merged"
    stored: str = Field(default="", description="The format of the released weights, where it is known.")
    token_budget: int = Field(default=0, description="Most tokens of one forward; 0: as many as in training.")
    reason: str = ""


def choose_scoring(
    precision: Precision, token_budget: int, shape: ModelShape, data: DatasetStats, device: Device
) -> Scoring:
    """The merged model at its own precision where that fits the device, else the adapter on the quantised base.

    Args:
        precision: what the base is trained in.
        token_budget: of training; scoring takes no larger forwards, and smaller ones where 16-bit weights leave less.
    """
    if precision not in QUANTISED:
        computed = compute_format(precision, device.half)
        return Scoring(
            stored=shape.stored, token_budget=token_budget, reason=f"it was trained on the base in {computed}"
        )
    half = device.half
    usable = USABLE[device.kind] * device.memory_gib - FRAMEWORK_GIB[device.kind]
    prompts = GENERATION_BATCH * data.max_length
    answers = cache_bytes(shape, prompts) / GIB

    def needed(budget: int) -> float:
        return forward_peak(shape, half, budget, device.kind, prompts) + answers

    budget, longest = token_budget, max(1, data.longest_pair)
    while budget > longest and needed(budget) > usable:
        budget = max(longest, budget // 2)
    peak = needed(budget)
    need = f"{peak:.1f} of {device.memory_gib:.1f} GiB at the peak"
    if peak <= usable:
        return Scoring(stored=shape.stored, token_budget=budget, reason=f"it fits in {half} ({need})")
    why = f"the merged model does not fit in {half} ({need})"
    return Scoring(subject="adapter", token_budget=token_budget, reason=why)
