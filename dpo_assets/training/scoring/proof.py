"""Which engine computes a model: the planned one where it is proven exact, or the next one that is.

Engines are tried from the fastest to the one that serves every causal model. Each is held against the model's own
forward, row by row with eager attention, on the longest row that the run will see: a window of attention shows only on
rows that are longer than it. A short row stands behind it: what one row leaves to the next (the state of a recurrent
layer, attention across rows) shows only where there is another. So another attention, head or multiplier than an engine
knows costs time and no exactness.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from dpo_assets.errors import ConfigError
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.engines.base import attached_engine, causal_lm
from dpo_assets.training.engines.transformers import engine_of
from dpo_assets.training.models.loading import CHAIN, autocast_of, choose_kernels, plain_attention
from dpo_assets.training.scoring.logprobs import evaluating, score_groups

LONGEST_EAGER = 4096  # Eager attention keeps all scores of a row, heads x length squared.
SHORT = 16  # Most answer tokens of the row behind the longest.
PROBE_TOLERANCE = 1e-3  # Nats per token from plain scoring in fp32; measured differences are below 1e-5.


class NotExactError(ConfigError):
    """An engine gives a model other scores than its own forward does."""


class NotCausalError(ConfigError):
    """What follows a token changes the model's score of it."""


@dataclass(frozen=True)
class Settled:
    """What computes a model from now on, and why that is not what the plan said (empty when it is)."""

    kernels: str
    note: str = ""


def settle_engine(model: Any, plan: TrainingPlan, longest: Group, first: str | None = None) -> Settled:
    """Attaches the first engine that is proven exact on `longest`, the group with the run's longest row.

    Args:
        first: the engine to begin with; None: the attached one, or else the plan's.

    Raises:
        ConfigError: when not even the model's own forward gives the same scores on padded rows, or it is not causal.
    """
    attached = attached_engine(model)
    if first is None and attached is not None:
        kernels, note = attached.name, ""
    else:
        kernels, note = choose_kernels(model, plan, first)
    reasons = [note] if note else []
    while True:
        try:
            with autocast_of(plan):
                assert_exact(model, longest)
                if engine_of(model).padded:  # Packed attention is causal itself, so what equals it is.
                    assert_causal(model, longest)
            return Settled(kernels, "; ".join(reasons))
        except (torch.OutOfMemoryError, MemoryError, NotCausalError):
            raise  # Says nothing about the engine.
        except Exception as error:
            # Whatever keeps a layer of an unknown architecture from computing a packed batch, the next engine may not
            # mind.
            reasons.append(str(error) if isinstance(error, NotExactError) else f"`{kernels}` fails: {_named(error)}")
            slower = CHAIN[CHAIN.index(kernels) + 1 :] if kernels in CHAIN else ()
            if not slower:
                raise ConfigError(
                    f"{type(causal_lm(model)).__name__} is computed by nothing here as by its own forward, so no score "
                    f"of it would be right: {'; '.join(reasons)}. Use a base of another architecture."
                ) from error
            kernels, note = choose_kernels(model, plan, slower[0])
            reasons += [note] if note else []


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


@torch.no_grad()
def assert_exact(model: Any, group: Group, autocast: AbstractContextManager[Any] | None = None) -> None:
    """Scores a group, and a short one behind it, by the model's engine in one forward, and row by row through the
    model's own forward with eager attention.

    Scores that are not finite pass, because they say nothing about the engine; the guards of training name them.

    Raises:
        NotExactError: when they differ.
    """
    lm, engine = causal_lm(model), engine_of(model)
    if not engine.has_eager:
        return  # It has no eager attention to compare with; its own table of shared prefixes was checked at loading.
    groups = [group, _beginning(group)]
    with evaluating(model):
        scored, lengths = score_groups(model, groups, budget=sum(g.tokens for g in groups), autocast=autocast)
        with plain_attention(model, "eager" if group.longest_row <= LONGEST_EAGER else None):
            own = [_row_logp(lm, g.prompt, completion, autocast) for g in groups for completion in g.completions]
    tolerance = _tolerance(lm)
    for ours, theirs, length in zip(scored, own, lengths, strict=True):
        if math.isfinite(theirs) and not abs(ours - theirs) <= tolerance * length:
            raise NotExactError(
                f"{type(lm).__name__} scores {theirs:.4f} nats row by row and {ours:.4f} by `{engine.name}`"
            )


def _beginning(group: Group) -> Group:
    """The first token of its prompt and the first few of its completions, where what another row left weighs most."""
    return Group(group.prompt[:1], tuple(completion[:SHORT] for completion in group.completions))


@torch.no_grad()
def assert_causal(model: Any, group: Group) -> None:
    """An encoder that is read as a causal model sees the tokens that it should predict, and agrees with itself on rows.

    Raises:
        NotCausalError: when the first half of an answer has another score where the second half follows.
    """
    lm, answer = causal_lm(model), max(group.completions, key=len)
    half = answer[: (len(answer) + 1) // 2]
    with evaluating(model):
        whole, alone = (_row_logps(lm, group.prompt, tokens, None)[: len(half)] for tokens in (answer, half))
    off = float((whole - alone).abs().sum())
    if math.isfinite(off) and off > _tolerance(lm) * len(half):
        raise NotCausalError(
            f"{type(lm).__name__} scores an answer's first {len(half)} tokens {off:.4f} nats apart with and without "
            "what follows: it is no causal language model, or not configured as one (`is_decoder`). Use another base."
        )


def _tolerance(lm: Any) -> float:
    """Nats per token that two exact scores may differ by."""
    return PROBE_TOLERANCE if lm.dtype == torch.float32 else 0.1


def _row_logp(
    lm: Any, prompt: Sequence[int], completion: Sequence[int], autocast: AbstractContextManager[Any] | None
) -> float:
    return float(_row_logps(lm, prompt, completion, autocast).sum())


def _row_logps(
    lm: Any, prompt: Sequence[int], completion: Sequence[int], autocast: AbstractContextManager[Any] | None
) -> torch.Tensor:
    row = torch.tensor([[*prompt, *completion]], device=lm.device)
    kept = len(completion) + 1
    # Logits of the prompt would only cost memory; the few models that do not know the argument compute them.
    few = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(lm.forward).parameters else {}
    with autocast or nullcontext():
        logits = lm(input_ids=row, use_cache=False, **few).logits[0, -kept:-1].float()
    wanted = row[0, len(prompt) :]
    return logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0]


T = TypeVar("T")


def alike(scorings: Sequence[Callable[[str | None], tuple[Settled, T]]]) -> list[tuple[Settled, T]]:
    """The results of scorings that will be compared, all by one engine.

    Each is told the engine to begin with and says which it took. Where a later one cannot take that of those before
    (an adapter that fused layers do not compute), they are done again by its own.
    """
    first: str | None = None
    while True:
        results: list[tuple[Settled, T]] = []
        for scoring in scorings:
            results.append(scoring(first))
            first = results[-1][0].kernels
        if all(settled.kernels == first for settled, _ in results):
            return results
