"""The resolved recipe of one run. It is written before training and says everything that training will do."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from dpo_assets.planning.dataset import DatasetStats
from dpo_assets.planning.decision import decide, what_would_fit
from dpo_assets.planning.offers import BUILT_IN, EngineOffer
from dpo_assets.planning.precision import QUANTISED, Compute, Device, Half, Precision, compute_format
from dpo_assets.planning.refresh import Refresh
from dpo_assets.planning.schedule import warmup_steps
from dpo_assets.planning.scoring import Scoring, choose_scoring
from dpo_assets.planning.shape import Kernels, ModelShape, Part
from dpo_assets.planning.targets import LoraCoverage, planned_coverage, resolve_targets
from dpo_assets.recipe import DpoSection, LoraSection, Recipe, SftSection, Speedup

__all__ = ["DatasetStats", "Kernels", "ModelShape", "TrainingPlan", "make_plan", "settings_digest", "steps_of"]


class TrainingPlan(BaseModel):
    """Everything a training stage does, resolved. Nothing in it is a library's default."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    device: Literal["cpu", "cuda"]
    device_name: str
    device_index: int = Field(default=0, description="The one GPU that the worker may see, as NVML counts them.")
    device_uuid: str = Field(default="", description="The same by its UUID, which no order of devices changes.")
    precision: Precision = Field(description="What the base's linear weights are kept in while it trains.")
    precision_reason: str
    half: Half = Field(default="bf16", description="The 16-bit format of the device, for what is quantised.")
    scoring: Scoring = Field(default=Scoring(), description="Which weights are scored as the release.")
    kernels: Kernels
    engines: tuple[EngineOffer, ...] = Field(
        default=(), description="What every engine was predicted to make of the run, the one that is taken first."
    )
    speedups: tuple[Speedup, ...] = Field(default=(), description="What makes Transformers' layers faster.")
    gradient_checkpointing: bool
    recomputed_layers: int = Field(
        default=0, description="The lowest layers, whose activations are computed again in the backward pass."
    )
    token_budget: int = Field(description="Most tokens of one forward; a step takes as many forwards as it needs.")
    reference_budget: int = Field(
        default=0, description="Most tokens of one forward of the reference pass; 0: as many as in training."
    )
    longest_pair: int = Field(default=0, description="Tokens of the longest pair: no forward can be smaller.")
    memory_gib: float = Field(description="Estimated peak.")
    memory_available_gib: float
    memory_parts: dict[str, float] = Field(default={}, description="GiB of each part at the estimated peak.")
    fits: bool = Field(default=True, description="Whether the estimated peak fits, with room for fragments.")
    would_fit: list[str] = Field(default=[], description="Where it does not fit: single changes that would.")
    parameters: int
    max_length: int
    train_pairs: int = Field(description="Pairs that DPO trains on.")
    eval_pairs: int
    sft_steps: int
    dpo_steps: int
    lora: LoraSection
    coverage: LoraCoverage = Field(default=LoraCoverage(), description="What of the layers the adapter will change.")
    sft: SftSection
    dpo: DpoSection
    refresh: Refresh = Field(default=Refresh(), description="What DPO starts from, and which pairs are trained on.")

    @property
    def compute(self) -> Compute:
        """What layers compute in. The worker, the checks and the identity of what is trained read it here."""
        return compute_format(self.precision, self.half)

    @property
    def scored(self) -> str:
        """What is scored as the release, in words."""
        if self.scoring.subject == "merged":
            compute, stored = self.at_release().compute, self.scoring.stored
            return f"merged model in {compute}" + (f", stored in {stored}" if stored not in ("", compute) else "")
        return f"adapter on the {self.precision.replace('bit', '-bit')} base"

    @property
    def dpo_warmup_steps(self) -> int:
        """DPO steps whose learning rate still rises."""
        return warmup_steps(self.dpo.warmup_ratio, self.dpo_steps)

    def sft_part(self) -> dict[str, object]:
        """What the SFT checkpoint depends on.

        Both stages run on one engine at one precision. So of the DPO settings those that change either change this too:
        `trainer`, `router_balance` and `reference_strategy`, and by the memory of a forward `micro_batch_size` and
        `batch_size`. No other does, which is why a new rate, beta or loss keeps the SFT checkpoint.
        """
        return self.sft_part_on(self.refresh.sft.dataset)

    def sft_part_on(self, dataset: str) -> dict[str, object]:
        """The same for a checkpoint that is trained on the dataset of this digest."""
        return {**self._identity("sft"), "dataset": dataset}

    def dpo_part(self) -> dict[str, object]:
        """What the DPO adapter depends on, beside its inputs."""
        return {**self._identity("dpo"), "refresh": self.refresh.settings()}

    def _identity(self, section: Literal["sft", "dpo"]) -> dict[str, object]:
        """What any training depends on, and the section of the stage. `half` counts where layers compute in it."""
        keys = {"device", "precision", "kernels", "speedups", "max_length", "lora", section}
        return self.model_dump(include=keys) | {"compute": self.compute}

    def refreshed(self, refresh: Refresh) -> TrainingPlan:
        """The same plan from another start, with the steps that its pairs make."""
        sft, dpo = refresh.sft, self.train_pairs if refresh.whole else refresh.new + refresh.sampled
        adopted = self.sft.strategy == "adopt"
        return self.model_copy(
            update={
                "refresh": refresh,
                "train_pairs": dpo,
                "sft_steps": 0 if adopted else steps_of(sft.pairs, self.sft.batch_size, self.sft.epochs),
                "dpo_steps": steps_of(dpo, self.dpo.batch_size, self.dpo.epochs),
            }
        )

    def at_release(self) -> TrainingPlan:
        """The plan by which the release is scored: merged weights in what their layers compute in, never quantised.

        The release is stored in the base's own format, whatever it is scored in (bf16 weights on a card without it).
        """
        if self.scoring.subject == "adapter":
            return self
        budget = min(self.token_budget, self.scoring.token_budget or self.token_budget)
        precision = self.half if self.precision in QUANTISED else self.precision
        return self.model_copy(update={"precision": precision, "token_budget": budget})

    def at_proof(self) -> TrainingPlan:
        """The plan by which a merge is proven: never on a quantised base, so on the CPU where 16 bit do not fit.

        What makes layers faster on a GPU has no part in it there.
        """
        if self.scoring.subject == "merged":
            return self.at_release()
        on_cpu = {"device": "cpu", "precision": "bf16", "kernels": "transformers", "speedups": ()}
        return self.model_copy(update=on_cpu)

    def with_half_budget(self) -> TrainingPlan | None:
        """The same plan in forwards of half the size, those of the reference pass too. None where no forward holds more
        than the longest pair.

        Pairs per optimizer step do not change: a step takes more forwards.
        """
        smaller = max(self.token_budget // 2, self.longest_pair, 1)
        if smaller >= max(self.token_budget, self.reference_budget):
            return None
        scored = self.scoring.token_budget and max(self.scoring.token_budget // 2, self.longest_pair, 1)
        scoring = self.scoring.model_copy(update={"token_budget": scored})
        # Another engine may have taken over, in forwards of its own size.
        engines = tuple(
            offer
            if offer.token_budget is None
            else offer.model_copy(update={"token_budget": max(offer.token_budget // 2, self.longest_pair, 1)})
            for offer in self.engines
        )
        changed = {"token_budget": smaller, "reference_budget": smaller, "scoring": scoring, "engines": engines}
        return self.model_copy(update=changed)

    def fitted_to(self, engine: str) -> TrainingPlan:
        """The same plan in forwards that were fitted to the memory that another engine needs.

        Args:
            engine: what computes in the place of `kernels`. Of `rows` with the model's own head nothing is estimated;
                it has the forwards of `rows`. A budget that was halved since is not raised again.
        """
        offer = next((offer for offer in self.engines if offer.name == engine.partition(",")[0]), None)
        if engine == self.kernels:
            return self
        if offer is None or offer.token_budget is None:
            return self.model_copy(update={"reference_budget": self.token_budget})
        budget = min(self.token_budget, offer.token_budget)
        changed = {"recomputed_layers": offer.recomputed_layers or 0, "reference_budget": budget}
        return self.model_copy(update=changed | {"token_budget": budget})


def settings_digest(settings: Mapping[str, object]) -> str:
    """sha256 of a part of a plan, which an artefact keeps of the plan that it was made by."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def steps_of(pairs: int, batch: int, epochs: float) -> int:
    """Optimizer steps: the last, smaller batch of an epoch is a step too."""
    return max(1, math.ceil(math.ceil(pairs / batch) * epochs))


def make_plan(
    recipe: Recipe,
    shape: ModelShape,
    data: DatasetStats,
    device: Device,
    installed: frozenset[Part] = BUILT_IN,
) -> TrainingPlan:
    """Resolves a recipe for a model, a dataset and a device. A plan that does not fit says so, and what would.

    Args:
        installed: engines that `auto` may take, and whether fla-core computes delta nets (`offers.installed_here`); the
            planner looks at no environment itself.

    Raises:
        ConfigError: when an explicit choice cannot work on the device.
    """
    whole = device.memory_gib
    available = min(whole, recipe.hardware.memory_gib or whole)
    device = replace(device, memory_gib=available)
    lora = resolve_targets(recipe.lora, shape)
    recipe = recipe.model_copy(update={"lora": lora})
    decision = decide(recipe, shape, data, device, installed)
    memory = decision.memory
    return TrainingPlan(
        device=device.kind,
        device_name=device.name,
        device_index=device.index,
        device_uuid=device.uuid,
        precision=decision.precision,
        precision_reason=decision.reason,
        half=device.half,
        scoring=choose_scoring(decision.precision, memory.token_budget, shape, data, device),
        kernels=decision.kernels,
        engines=decision.engines,
        speedups=tuple(sorted(set(recipe.hardware.speedups))),
        gradient_checkpointing=memory.gradient_checkpointing,
        recomputed_layers=memory.recomputed_layers,
        token_budget=memory.token_budget,
        reference_budget=memory.reference_budget,
        longest_pair=data.longest_pair,
        memory_gib=memory.peak_gib,
        memory_available_gib=available,
        memory_parts=memory.parts,
        fits=memory.fits,
        would_fit=[] if memory.fits else what_would_fit(recipe, shape, data, device, installed, whole),
        parameters=shape.parameters,
        max_length=data.max_length,
        train_pairs=data.train_pairs,
        eval_pairs=data.eval_pairs,
        sft_steps=0
        if recipe.sft.strategy == "adopt"
        else steps_of(data.train_pairs, recipe.sft.batch_size, recipe.sft.epochs),
        dpo_steps=steps_of(data.train_pairs, recipe.dpo.batch_size, recipe.dpo.epochs),
        lora=lora,
        coverage=planned_coverage(lora, shape),
        sft=recipe.sft,
        dpo=recipe.dpo,
    )
