"""What each engine would make of a run: whether it can, what it takes, and how fast it would be."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from dpo_assets.errors import ConfigError
from dpo_assets.planning.cards import Rates
from dpo_assets.planning.dataset import DatasetStats
from dpo_assets.planning.delta_nets import BY_PYTORCH, HOPPER, has_delta_nets, has_fla, why_wrong_gradient
from dpo_assets.planning.engines import KERNELS, beyond_unsloth, why_not
from dpo_assets.planning.memory import FRAMEWORK_GIB, MemoryFit, Training, fit
from dpo_assets.planning.precision import Device, Precision
from dpo_assets.planning.shape import Kernels, ModelShape, Part
from dpo_assets.planning.speed import predicted_by
from dpo_assets.planning.work import Work
from dpo_assets.recipe import Recipe

BUILT_IN: frozenset[Kernels] = frozenset({"fused", "transformers", "rows"})
UNSLOTH_FP8 = (9, 0)  # Unsloth 2026.10.9 refuses fp8 below this capability.


class EngineOffer(BaseModel):
    """What one engine would make of the run, beside the others."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Kernels
    pairs_per_s: float | None = Field(
        default=None, description="Predicted pairs a second of training; None on a CPU, and where it cannot compute."
    )
    peak_gib: float | None = Field(default=None, description="Estimated peak of its own best forward size.")
    why_not: str = Field(default="", description="Why another was taken; empty for the one that was.")
    note: str = Field(default="", description="What the prediction rests on, where that is not this card and engine.")


def installed_here() -> frozenset[Part]:
    """What this environment has the packages of. The worker runs in it too. Nothing is imported."""
    found: set[Part] = set(BUILT_IN)
    if all(importlib.util.find_spec(package) for package in ("unsloth", "unsloth_zoo")):
        found.add("unsloth")
    if has_fla():
        found.add("delta-net")
        if not why_wrong_gradient((HOPPER, 0)):
            found.add("delta-net on Hopper")
    return frozenset(found)


def balances_routers(recipe: Recipe) -> bool:
    """Whether a stage that trains adds the routers' balancing loss."""
    return recipe.dpo.router_balance > 0 or (recipe.sft.router_balance > 0 and recipe.sft.strategy == "train")


@dataclass(frozen=True, eq=False)
class Offers:
    """The engines' offers for a recipe, with its adapter's targets resolved."""

    recipe: Recipe
    shape: ModelShape
    data: DatasetStats
    device: Device
    installed: frozenset[Part]

    @property
    def asked(self) -> Kernels | None:
        """The engine that the recipe names; speedups are for Transformers' layers. None: `auto`."""
        if self.recipe.hardware.speedups:
            return "transformers"
        return None if self.recipe.hardware.kernels == "auto" else self.recipe.hardware.kernels

    @cached_property
    def work(self) -> Work:
        return Work.of(self.data, self.recipe.dpo)

    @cached_property
    def _rates(self) -> Rates:
        return predicted_by(self.device)

    @property
    def _fla(self) -> bool:
        """Whether gated delta nets are computed by flash-linear-attention: on a GPU that has a right gradient of it."""
        hopper = (self.device.capability or (0, 0))[0] == HOPPER
        return self.device.kind == "cuda" and ("delta-net on Hopper" if hopper else "delta-net") in self.installed

    @cached_property
    def _fitted(self) -> Any:
        return cache(self._fit)

    def fitted(self, kernels: Kernels, precision: Precision) -> MemoryFit:
        """The engine's best forward size at a precision."""
        found: MemoryFit = self._fitted(kernels, precision)
        return found

    def _fit(self, kernels: Kernels, precision: Precision) -> MemoryFit:
        return fit(self._training(kernels, precision), self.work, self.device.memory_gib, self._rates.card)

    def _training(self, kernels: Kernels, precision: Precision) -> Training:
        bases = 2 if self.recipe.dpo.reference_strategy == "model" else 1
        return Training(
            self.shape,
            precision,
            kernels,
            self.recipe.lora,
            self.device.kind,
            bases,
            self.recipe.dpo.trainer,
            self._fla,
        )

    def cannot(self, kernels: Kernels, precision: Precision | None = None) -> str:
        """Why an engine cannot compute this run; empty where it can.

        Args:
            precision: None: at any.
        """
        recipe = self.recipe
        if kernels == "unsloth" and self.shape.more_than_text:
            return f"it loads {self.shape.architecture} whole, and names its layers otherwise than a release does"
        if kernels != "transformers" and balances_routers(recipe):
            return "it does not tell what routers say, which router_balance needs"
        if recipe.dpo.trainer == "trl":
            if kernels in ("fused", "rows"):
                return "dpo.trainer `trl` calls the model in its own way"
            if kernels == "unsloth" and (other := beyond_unsloth(recipe.lora)):
                return f"it cannot adapt {', '.join(other)}"
        elif reason := why_not(kernels, self.shape.decoder, self.data.max_length, recipe.lora, precision):
            return reason
        if kernels == "fused" and recipe.lora.dropout > 0 and recipe.sft.strategy == "train":
            return f"it computes no dropout, and SFT would train with lora.dropout {recipe.lora.dropout:g}"
        if kernels == "unsloth":
            if recipe.dpo.reference_strategy == "merged":
                return "dpo.reference_strategy `merged` would round the adapter that is folded into its base"
            if precision == "fp8" and (self.device.capability or (0, 0)) < UNSLOTH_FP8:
                return f"it has fp8 from capability 9.0 on, and {self.device.name} is older"
        return ""

    def unwanted(self, kernels: Kernels) -> str:
        """Why `auto` leaves out an engine that can compute the run; empty where it does not."""
        if self.device.kind == "cpu" and kernels in ("fused", "unsloth"):
            return "on a CPU the model's own layers are taken"
        if kernels not in self.installed:
            return f"not installed: pip install 'dpo-assets[{kernels}]'"
        return ""

    def possible(self, precision: Precision | None = None) -> list[Kernels]:
        """The engines that `auto` may take.

        Raises:
            ConfigError: there is none, with each engine's reason and the way out.
        """
        why = {k: self.cannot(k, precision) or self.unwanted(k) for k in KERNELS}
        if found := [kernels for kernels, reason in why.items() if not reason]:
            return found
        reasons = "; ".join(f"`{kernels}`: {reason}" for kernels, reason in why.items())
        out = (
            "set sft.router_balance and dpo.router_balance to 0"
            if balances_routers(self.recipe)
            else "change what the reasons name, or take another base model"
        )
        raise ConfigError(
            f"no engine can train {self.shape.architecture or 'this model'} with this recipe ({reasons}); {out}."
        )

    def best(self, precision: Precision) -> Kernels:
        """The engine to take at a precision: the one that is asked for, else the fastest of those that fit.

        Where none fits it is the one that needs least. On a CPU nothing is predicted: the first that can is taken.

        Raises:
            ConfigError: as `possible`.
        """
        if self.asked is not None:
            return self.asked
        possible = self.possible(precision)
        if self.device.kind == "cpu":
            return possible[0]

        def order(kernels: Kernels) -> tuple[bool, float]:
            found = self.fitted(kernels, precision)
            return not found.fits, found.step_seconds if found.fits else found.peak_gib

        return min(possible, key=order)

    def table(self, precision: Precision, taken: Kernels) -> tuple[EngineOffer, ...]:
        """All engines at one precision, the taken one first, the others from the fastest to those that cannot."""
        offers = [self._offer(kernels, precision, taken) for kernels in KERNELS]
        return tuple(sorted(offers, key=lambda offer: (offer.name != taken, -(offer.pairs_per_s or 0.0))))

    def _offer(self, kernels: Kernels, precision: Precision, taken: Kernels) -> EngineOffer:
        if kernels != taken and (reason := self.cannot(kernels, precision)):
            return EngineOffer(name=kernels, why_not=reason)
        found = self.fitted(kernels, precision)
        speed = None if self.device.kind == "cpu" else self.work.pairs / found.step_seconds
        return EngineOffer(
            name=kernels,
            pairs_per_s=speed,
            peak_gib=found.peak_gib,
            why_not="" if kernels == taken else self._passed_over(kernels, precision, found),
            note=self._note(kernels),
        )

    def _note(self, kernels: Kernels) -> str:
        """What a prediction rests on, where that is not this card and the fastest form of the model's layers."""
        notes = [self._rates.note]
        if kernels != "unsloth" and has_delta_nets(self.shape.described()) and not self._fla:
            notes.append(f"{BY_PYTORCH}{self._way_to_fla()}")
        return "; ".join(filter(None, notes))

    def _way_to_fla(self) -> str:
        if self.device.kind == "cpu":
            return ""
        if "delta-net" not in self.installed:
            return ": pip install 'dpo-assets[delta-net]'"
        return ", for this Triton compiles the gradient wrong on Hopper GPUs: pip install 'triton>=3.7.1', or tilelang"

    def _passed_over(self, kernels: Kernels, precision: Precision, found: MemoryFit) -> str:
        if reason := self.unwanted(kernels):
            return reason
        if self.recipe.hardware.speedups:
            return "hardware.speedups are for Transformers' layers"
        if self.asked is not None:
            return f"hardware.kernels asks for `{self.asked}`"
        if not found.fits:
            needed = found.peak_gib + FRAMEWORK_GIB[self.device.kind]
            usable = self._training(kernels, precision).usable(self.device.memory_gib)
            return f"it does not fit: {needed:.1f} GiB in all, and a run can plan with {usable:.1f}"
        return "not faster, by this prediction" if self.device.kind == "cuda" else "nothing is predicted on a CPU"
