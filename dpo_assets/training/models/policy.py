"""The policy: a base model with the adapter that is trained, on the kernels that the plan names."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.helpers import disable_input_dtype_casting

from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.engines.base import attach_engine, causal_lm
from dpo_assets.training.engines.speedups import speed_up
from dpo_assets.training.engines.unsloth.engine import UnslothEngine, check_shared_prefix
from dpo_assets.training.engines.unsloth.loading import load_unsloth
from dpo_assets.training.models.loading import attach_adapter, choose_kernels, load_base


@dataclass(frozen=True)
class Policy:
    """A loaded policy, what computes it, and why that is not what the plan said (empty when it is)."""

    model: PeftModel
    kernels: str
    note: str = ""

    def computing(self, plan: TrainingPlan) -> AbstractContextManager[Any]:
        """Around training and scoring: PEFT casts the inputs of an fp32 adapter to fp32, and autocast casts them back.

        Under autocast the first cast only costs memory and time.
        """
        if self.kernels == "transformers" and plan.compute != "fp32":
            context: AbstractContextManager[Any] = disable_input_dtype_casting(self.model)
            return context
        return nullcontext()


def load_policy(
    folder: Path, plan: TrainingPlan, start: Path | None, *, seed: int, dropout: float, packed: bool = True
) -> Policy:
    """Loads the base and attaches the adapter `start`, or a new one.

    Args:
        packed: whether packed batches will be scored; TRL's own trainer wants the model as its library made it.

    Raises:
        ConfigError: when the architecture cannot be packed, or the adapter was not attached as one.
    """
    if plan.kernels == "unsloth":
        model = load_unsloth(folder, plan, start, seed, dropout=dropout)
        if packed:
            lm = causal_lm(model)
            check_shared_prefix(lm, plan.max_length)
            attach_engine(lm, UnslothEngine(lm))
        return Policy(model, "unsloth")
    model = attach_adapter(load_base(folder, plan, packed=packed), plan, start, seed=seed, dropout=dropout)
    if not packed:
        speed_up(model, plan)
        return Policy(model, "transformers")
    kernels, note = choose_kernels(model, plan)
    return Policy(model, kernels, note)
