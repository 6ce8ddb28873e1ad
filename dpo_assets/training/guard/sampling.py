"""What the policy says by itself, beside what the reference says: sampled answers, and how far apart the two are.

The reference is the start that DPO is measured from, also where the policy goes on from a release. Its adapter, put
back for a moment, is the reference for every reference strategy, and no second model is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.batches.data import first_asked
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.engines import unsloth
from dpo_assets.training.engines.attention import plain_attention
from dpo_assets.training.engines.base import attached_engine
from dpo_assets.training.engines.transformers import engine_of
from dpo_assets.training.engines.unsloth.engine import reference_mode
from dpo_assets.training.models.chat_format import ChatFormat
from dpo_assets.training.models.loading import ADAPTER_NAME, autocast_of
from dpo_assets.training.scoring.divergence import LogRatios, log_ratios, own_answers
from dpo_assets.training.scoring.generation import generate
from dpo_assets.training.scoring.logprobs import evaluating, score_hits
from dpo_assets.training.scoring.proof import Settled, settle_engine

Answer = dict[str, Any]


class AdapterState:
    """The trained adapter's factors at one moment, copied to the CPU."""

    def __init__(self, model: Any) -> None:
        self.factors: dict[str, Tensor] = {
            name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if _is_trained(name, p)
        }

    @classmethod
    def of(cls, factors: dict[str, Tensor]) -> AdapterState:
        """Those of another process."""
        made = cls.__new__(cls)
        made.factors = factors
        return made

    @torch.no_grad()
    def put_into(self, model: Any) -> None:
        """Overwrites the factors in place, so that an optimizer keeps hold of them."""
        for name, parameter in model.named_parameters():
            if name in self.factors:
                parameter.copy_(self.factors[name])

    @contextmanager
    def in_place(self, model: Any) -> Iterator[None]:
        """The model with these factors for a while."""
        now = AdapterState(model)
        self.put_into(model)
        try:
            yield
        finally:
            now.put_into(model)


def _is_trained(name: str, parameter: torch.nn.Parameter) -> bool:
    """Not TRL's frozen copy of the start, which it makes beside the adapter that is trained."""
    return parameter.requires_grad and (".lora_" not in name or f".{ADAPTER_NAME}." in name)


def attach_scorer(model: Any, plan: TrainingPlan, longest: Group) -> Settled:
    """Lets a model that TRL trains be scored here as well, its layers left as TRL's trainer found them.

    Returns:
        the engine that scores it, and why that is not the plan's.

    Raises:
        ConfigError: when no engine is exact (`scoring.proof`).
    """
    with plain_attention(model):
        return settle_engine(model, plan, longest)


@dataclass(frozen=True)
class Watched:
    """A policy in training with its start, and how it is scored."""

    model: Any
    start: AdapterState
    chat: ChatFormat
    plan: TrainingPlan
    kernels: str

    @property
    def why_no_scores(self) -> str:
        """Why pairs cannot be scored here; empty when they can."""
        engine = attached_engine(self.model)
        if engine is None or unsloth.computes(engine.name) != unsloth.computes(self.kernels):
            return "TRL's own trainer on Unsloth's kernels has no packed scorer"
        return ""

    @property
    def why_no_answers(self) -> str:
        """Why no answers can be sampled here; empty when they can."""
        if unsloth.computes(self.kernels):
            return "Unsloth's kernels have a generation mode of their own, and switching to it changes what is trained"
        return ""

    def answers(self, prompts: list[list[int]], tokens: int, seed: int | None) -> list[Answer]:
        """Answers of at most `tokens` tokens, as `generation.generate` makes them; greedy without a seed."""
        with evaluating(self.model), autocast_of(self.plan):
            said: list[Answer] = generate(self.model, prompts, self.chat, tokens, seed=seed)
            return said

    def scores(self, groups: Sequence[Group]) -> tuple[list[float], list[int]]:
        """(summed log-probability, greedy matches) of every completion, by the forward of training."""
        with ExitStack() as stack:
            if unsloth.computes(self.kernels):
                stack.enter_context(reference_mode(self.model, self.kernels))
            else:
                stack.enter_context(evaluating(self.model))
                # TRL trains a model with the attention that Transformers chose.
                stack.enter_context(plain_attention(self.model, engine_of(self.model).attention))
            stack.enter_context(autocast_of(self.plan))
            scores: tuple[list[float], list[int]] = score_hits(self.model, groups, self.plan.token_budget)
            return scores

    def reference_scores(self, groups: Sequence[Group]) -> tuple[list[float], list[int]]:
        """The same by the reference."""
        with self.start.in_place(self.model):
            return self.scores(groups)

    def reference_answers(self, prompts: list[list[int]], tokens: int, seed: int | None) -> list[Answer]:
        """The same prompts and seed, answered by the reference."""
        with self.start.in_place(self.model):
            return self.answers(prompts, tokens, seed)

    def divergence(self, prompts: list[list[int]], answers: Sequence[Answer]) -> LogRatios:
        """(log pi - log pi_ref, tokens) of each of the policy's own answers with the token that ended it.

        Their sum over their tokens estimates KL(policy || reference) per token: the expectation is over the policy.
        """
        groups = own_answers(prompts, answers)
        (policy, _), (reference, _) = self.scores(groups), self.reference_scores(groups)
        return log_ratios(groups, policy, reference)


def first_prompts(rows: Any, chat: ChatFormat, count: int, longest: int) -> list[list[int]]:
    """Token ids of the first `count` different prompts of at most `longest` tokens, for a model to answer."""
    return [ids for _, ids in first_asked(rows, chat, count, longest)]
