"""What a run is judged by before it starts: a plan of this pipeline, or a configuration that someone published."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dpo_assets.checks.bands import Bands, LearningRateBand, Method
from dpo_assets.planning.plan import TrainingPlan

# Losses with a likelihood term of their own: ORPO (arXiv 2403.07691) and CPO (arXiv 2401.08417).
_LIKELIHOOD_INSIDE = frozenset({"orpo", "cpo"})
# Beta scales the log-ratio of a whole answer in these, so a small one is a weak pull. In IPO it sets the gap aimed at.
_UNIT_OF_SIGMOID = frozenset({"sigmoid", "cdpo", "robust", "hinge", "kto"})


@dataclass(frozen=True)
class Configuration:
    """The numbers of one DPO run. None: not known, and not judged.

    `billions`: parameters in 1e9. `learning_rate`: peak, of AdamW. `batch`: pairs per optimizer step. `warmup`: share
    of the steps. `sft_weight`: weight of the likelihood term beside the preference losses, 0 where there is none.
    `sft_learning_rate`: of the SFT run that trained the same adapter before, None where there was none.
    """

    method: Method
    billions: float
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
    ok_high: float
    error_above: float
    moved: tuple[str, ...]


def rate_ceilings(configuration: Configuration, bands: Bands) -> RateCeilings:
    """The ceilings for a configuration's method, size, beta and losses.

    A beta below `low_beta` lowers the ok ceiling alone: weak restraint is no cause by itself. A likelihood term raises
    both.
    """
    band = bands.learning_rate(configuration.method, configuration.billions)
    low, term = bands.limit("low_beta"), bands.limit("sft_term")
    ok_high, error_above, moved = band.ok_high, band.error_above, []
    if weakly_restrained(configuration, bands):
        ok_high *= low["factor"]
        moved.append(f"beta is below {low['below']:g}: the ok ceiling is {low['factor']:g} times as high")
    if configuration.sft_weight >= term["weight"] or _LIKELIHOOD_INSIDE & set(configuration.losses):
        ok_high, error_above = ok_high * term["factor"], error_above * term["factor"]
        moved.append(f"a likelihood term holds the chosen answers: both ceilings are {term['factor']:g} times as high")
    return RateCeilings(band, significant(ok_high), significant(error_above), tuple(moved))


def weakly_restrained(configuration: Configuration, bands: Bands) -> bool:
    """Whether beta is so low, for a loss in sigmoid's unit, that the pull towards the reference is weak."""
    beta, below = configuration.beta, bands.limit("low_beta")["below"]
    return beta is not None and beta < below and bool(_UNIT_OF_SIGMOID & set(configuration.losses))


def significant(value: float, digits: int = 6) -> float:
    """A product of decimals as the decimal it stands for: 1e-6 x 20 is 2e-05, and not a hair below it."""
    return float(f"{value:.{digits}g}")
