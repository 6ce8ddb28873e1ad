"""What a run is judged by before it starts: a plan of this pipeline, or a configuration that someone published."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dpo_assets.checks.bands import Bands, LearningRateBand, Method
from dpo_assets.planning.plan import TrainingPlan

# Losses with a likelihood term of their own: ORPO (arXiv 2403.07691) and CPO (arXiv 2401.08417).
_LIKELIHOOD_INSIDE = frozenset({"orpo", "cpo"})


@dataclass(frozen=True)
class Configuration:
    """The numbers of one DPO run. None: not known, and not judged.

    `billions`: parameters in 1e9. `learning_rate`: peak, of AdamW. `batch`: pairs per optimizer step. `warmup`: share
    of the steps. `sft_weight`: weight of the likelihood term beside the preference losses, 0 where there is none.
    `sft_learning_rate`: of the SFT run that trained the same adapter before, None where there was none.
    """

    method: Method
    billions: float | None
    losses: tuple[str, ...]
    learning_rate: float
    beta: float | None
    epochs: float | None = None
    batch: float | None = None
    steps: int | None = None
    warmup: float | None = None
    precision: str | None = None
    max_grad_norm: float | None = None
    sft_weight: float = 0.0
    sft_learning_rate: float | None = None
    rank: int | None = None
    alpha: int | None = None

    @classmethod
    def of_plan(cls, plan: TrainingPlan, *, pairs_known: bool = True) -> Configuration:
        """The configuration of a plan. Without `pairs_known` its steps are supposed, and not judged."""
        dpo = plan.dpo
        weights = dict(zip(dpo.losses, dpo.loss_weights or [1.0] * len(dpo.losses), strict=True))
        others = max((weight for name, weight in weights.items() if name != "sft"), default=1.0)
        return cls(
            method="lora",
            billions=plan.parameters / 1e9,
            losses=dpo.losses,
            learning_rate=dpo.learning_rate,
            beta=dpo.beta,
            epochs=dpo.epochs,
            batch=dpo.batch_size,
            steps=plan.dpo_steps if pairs_known else None,
            warmup=dpo.warmup_ratio,
            precision="fp16" if plan.compute == "fp16" else plan.precision,
            max_grad_norm=dpo.max_grad_norm,
            sft_weight=weights.get("sft", 0.0) / others,
            sft_learning_rate=plan.sft.learning_rate if plan.sft.strategy == "train" else None,
            rank=plan.lora.rank,
            alpha=plan.lora.alpha,
        )

    @property
    def updates_per_pair(self) -> float | None:
        """Optimizer steps for each training pair: epochs / batch."""
        if self.epochs is None or self.batch is None:
            return None
        return self.epochs / self.batch if self.batch > 0 else math.inf


@dataclass(frozen=True)
class RateCeilings:
    """The learning-rate band of one configuration, with what moved it away from the row of its method and size."""

    band: LearningRateBand
    moved: tuple[str, ...] = ()


def rate_ceilings(configuration: Configuration, bands: Bands) -> RateCeilings:
    """The band for a configuration's method, size and losses.

    A likelihood term raises its ceilings: with one, rates are nearer to those of SFT. Beta moves nothing: while margins
    are small it only scales the gradient, and Adam takes that scale away.
    """
    band, times = bands.learning_rate(configuration.method, configuration.billions), bands.limit("sft_term")["factor"]
    if not has_likelihood_term(configuration, bands):
        return RateCeilings(band)
    raised = replace(
        band,
        reference=significant(band.reference * times),
        ok_high=significant(band.ok_high * times),
        error_above=significant(band.error_above * times),
    )
    return RateCeilings(
        raised, (f"a likelihood term holds the chosen answers: the ceilings are {times:g} times as high",)
    )


def has_likelihood_term(configuration: Configuration, bands: Bands) -> bool:
    """Whether something beside the preferences keeps the chosen answers likely."""
    enough = configuration.sft_weight >= bands.limit("sft_term")["weight"]
    return enough or bool(_LIKELIHOOD_INSIDE & set(configuration.losses))


def significant(value: float, digits: int = 6) -> float:
    """A product of decimals as the decimal it stands for: 1e-6 x 20 is 2e-05, and not a hair below it."""
    return float(f"{value:.{digits}g}")
