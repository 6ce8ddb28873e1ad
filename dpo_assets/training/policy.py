"""The policy: a base model with the adapter that is trained, on the kernels that the plan names."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.helpers import disable_input_dtype_casting

from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.engines import unsloth
from dpo_assets.training.engines.base import attach_engine
from dpo_assets.training.engines.fused.decoder import FusedDecoder
from dpo_assets.training.engines.ladder import choose_kernels
from dpo_assets.training.engines.speedups import speed_up
from dpo_assets.training.engines.transformers import TransformersEngine
from dpo_assets.training.engines.unsloth.engine import UnslothEngine, check_shared_prefix
from dpo_assets.training.engines.unsloth.loading import load_unsloth
from dpo_assets.training.models.loading import attach_adapter, load_base
from dpo_assets.training.models.structure import causal_lm
from dpo_assets.training.scoring.proof import settle_engine

# Other engines run the model's layers and PEFT's.
OWN_LAYERS = frozenset({FusedDecoder.name, unsloth.NAME})


@dataclass(frozen=True)
class Policy:
    """A loaded policy, what computes it, and why that is not what the plan said (empty when it is)."""

    model: PeftModel
    kernels: str
    note: str = ""

    def proven(self, plan: TrainingPlan, longest: Group) -> Policy:
        """The same, on an engine that is proven exact on the group with the run's longest row.

        Raises:
            ConfigError: when there is none.
        """
        settled = settle_engine(self.model, plan, longest, trains=True)
        notes = [note for note in (self.note, settled.note) if note]
        return replace(self, kernels=settled.kernels, note="; ".join(notes))

    def told(self, stage: str, plan: TrainingPlan) -> str:
        """A line for the log of a stage."""
        return f"{stage}: computed by {self.kernels}, not by {plan.kernels} kernels: {self.note}"

    def computing(self, plan: TrainingPlan) -> AbstractContextManager[Any]:
        """Around training and scoring: PEFT casts the inputs of an fp32 adapter to fp32, and autocast casts them back.

        Under autocast the first cast only costs memory and time.
        """
        if self.kernels not in OWN_LAYERS and plan.compute != "fp32":
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
        ConfigError: when the adapter was not attached as one.
    """
    if unsloth.computes(plan.kernels):
        model = load_unsloth(folder, plan, start, seed, dropout=dropout)
        if packed:
            lm = causal_lm(model)
            check_shared_prefix(lm, plan.max_length)
            attach_engine(lm, UnslothEngine(lm))
        return Policy(model, unsloth.NAME)
    model = load_adapted(folder, plan, start, seed=seed, dropout=dropout)
    if not packed:
        return Policy(model, TransformersEngine.name)
    kernels, note = choose_kernels(model, plan)
    return Policy(model, kernels, note)


def load_adapted(folder: Path, plan: TrainingPlan, start: Path | None, *, seed: int, dropout: float) -> PeftModel:
    """A base with the adapter `start`, or a new one, and the plan's speedups; no engine is chosen yet."""
    model = attach_adapter(load_base(folder, plan), plan, start, seed=seed, dropout=dropout)
    speed_up(model, plan)
    return model


def load_scored(folder: Path, plan: TrainingPlan, adapter: Path | None) -> Any:
    """A model to be scored, with its adapter if it has one, in evaluation mode."""
    if adapter is not None:
        return load_adapted(folder, plan, adapter, seed=0, dropout=0.0).eval()
    model = load_base(folder, plan).eval()
    speed_up(model, plan)
    return model
