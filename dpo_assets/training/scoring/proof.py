"""Which engine computes a model: the planned one where it is proven exact, or the next one that is.

Engines are tried from the fastest to the one that serves every causal model. Each is held against the model's own
forward, row by row with eager attention, on the longest row that the run will see: a window of attention shows only on
rows that are longer than it. A short row stands behind it: what one row leaves to the next (the state of a recurrent
layer, attention across rows) shows only where there is another. A new adapter does nothing yet, so its factors get
noise for the while; and what will be trained is trained once on the short rows, because a forward with a gradient takes
other ways, and a backward pass may fail where a forward does not. So another attention, head or multiplier than an
engine knows costs time and no exactness.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dpo_assets.contract import memory_failure
from dpo_assets.errors import ConfigError
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.batches.packing import Group, pack
from dpo_assets.training.engines.attention import plain_attention
from dpo_assets.training.engines.base import attached_engine
from dpo_assets.training.engines.ladder import below, choose_kernels
from dpo_assets.training.engines.rotary import fresh_tables
from dpo_assets.training.engines.transformers import engine_of
from dpo_assets.training.models.loading import autocast_of
from dpo_assets.training.models.structure import causal_lm, decoder_layers
from dpo_assets.training.scoring.logprobs import evaluating, score_tokens

LONGEST_EAGER = 4096  # Eager attention keeps all scores of a row, heads x length squared.
SHORT = 16  # Most answer tokens of the row behind the longest.
# Mean absolute difference of a token's log-probability from that by plain scoring, in nats. A sum over tokens would
# not do: differences have both signs. Measured on tiny models of ten architectures: in fp32 below 1e-5; in bf16 0.0015
# to 0.0102 where an engine is exact, 0.03 to 0.45 where it leaves out a window, a soft cap or sinks.
PROBE_TOLERANCE = 1e-3
HALF_TOLERANCE = 0.015
# Deep models round more. In 16 bit an engine may also differ by this many times what a model's own scores differ by
# when each layer's output is rounded otherwise, up to a limit.
ROUNDINGS, LARGEST_TOLERANCE = 3.0, 0.3
ADAPTER_OUTPUTS = ("lora_B", "lora_embedding_B")  # PEFT's factors that a new adapter has at zero.
NOISE = 0.1  # What the probe's adapter adds to the output of a layer, about, for inputs of size 1.


class NotExactError(ConfigError):
    """An engine gives a model other scores than its own forward does."""


class NotCausalError(ConfigError):
    """What follows a token changes the model's score of it."""


class NoisyError(ConfigError):
    """Two scores of one pair differ while a model trains."""


@dataclass(frozen=True)
class Settled:
    """What computes a model from now on, and why that is not what the plan said (empty when it is)."""

    kernels: str
    note: str = ""


def settle_engine(
    model: Any, plan: TrainingPlan, longest: Group, first: str | None = None, *, trains: bool = False
) -> Settled:
    """Attaches the first engine that is proven exact on `longest`, the group with the run's longest row.

    The adapter and its gradients are afterwards what they were before, bit for bit.

    Args:
        first: the engine to begin with; None: the attached one, or else the plan's.
        trains: whether the engine will train the model's adapter, and not only score.

    Raises:
        ConfigError: when not even the model's own forward gives the same scores on padded rows, or it is not causal, or
            is random while it trains.
    """
    with stirred_adapter(model):
        return _settle(model, plan, longest, first, trains)


def _settle(model: Any, plan: TrainingPlan, longest: Group, first: str | None, trains: bool) -> Settled:
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
                if trains:
                    assert_trains(model, longest)
                if engine_of(model).padded:  # Packed attention is causal itself, so what equals it is.
                    assert_causal(model, longest)
            return Settled(kernels, "; ".join(reasons))
        except (NotCausalError, NoisyError):
            raise  # Says nothing about the engine.
        except Exception as error:
            if memory_failure(error) is not None:
                raise  # Neither does this; the stage is run again in smaller forwards.
            # Whatever keeps a layer of an unknown architecture from computing a packed batch, the next engine may not
            # mind.
            reasons.append(str(error) if isinstance(error, NotExactError) else f"`{kernels}` fails: {_named(error)}")
            slower = below(kernels)
            if not slower:
                raise ConfigError(
                    f"{type(causal_lm(model)).__name__} is computed by nothing here as by its own forward, so no score "
                    f"of it would be right: {'; '.join(reasons)}. Use a base of another architecture."
                ) from error
            kernels, note = choose_kernels(model, plan, slower[0])
            reasons += [note] if note else []


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


@contextmanager
def stirred_adapter(model: Any) -> Iterator[None]:
    """The adapter with noise on its outputs for a while: a new one's are zero, so whoever leaves it out is exact."""
    outputs = [
        (name, p) for name, p in model.named_parameters() if p.requires_grad and any(b in name for b in ADAPTER_OUTPUTS)
    ]
    before = [p.detach().clone() for _, p in outputs]
    draws = torch.Generator().manual_seed(0)  # Its own: what is drawn later must be what it was.
    try:
        with torch.no_grad():
            for name, p in outputs:
                noise = torch.randn(p.shape, generator=draws).to(p)
                # Factors A are drawn so that A x has a variance of x^2 / 3 (PEFT, kaiming_uniform with a = sqrt 5).
                rank = p.shape[0] if "embedding" in name else p.shape[-1]
                p.add_(noise, alpha=NOISE * math.sqrt(3 / max(1, rank)))
        _renew(model)
        yield
    finally:
        with torch.no_grad():
            for (_, p), own in zip(outputs, before, strict=True):
                p.copy_(own)
        _renew(model)


def _renew(model: Any) -> None:
    engine = attached_engine(model)
    if engine is not None:
        engine.renew()


@torch.no_grad()
def assert_exact(model: Any, group: Group, autocast: AbstractContextManager[Any] | None = None) -> None:
    """Scores a group, and a short one behind it, by the model's engine in one forward, and row by row through the
    model's own forward with eager attention.

    Scores that are not finite pass, because they say nothing about the engine; the guards of training name them.

    Raises:
        NotExactError: when they differ.
    """
    if not engine_of(model).has_eager:
        return  # It has no eager attention to compare with; its own table of shared prefixes was checked at loading.
    groups = [group, _beginning(group)]
    with evaluating(model):
        _compare(model, groups, _engine_logps(model, groups, autocast), autocast)


def assert_trains(model: Any, group: Group) -> None:
    """One forward with a gradient and its backward pass in training mode, on short rows.

    Raises:
        NoisyError: when two forwards differ that have no dropout of an adapter in them.
        NotExactError: when they differ from the model's own forward; when no parameter gets a gradient.
    """
    lm, engine = causal_lm(model), engine_of(model)
    if not engine.has_eager:
        return
    short, trained = [_beginning(group)], [p for p in model.parameters() if p.requires_grad]
    before, was_training = [p.grad for p in trained], model.training
    for p in trained:
        p.grad = None
    cards = [lm.device] if lm.device.type == "cuda" else []
    model.train()
    try:
        with torch.random.fork_rng(devices=cards), torch.enable_grad():
            with torch.no_grad():
                first = _engine_logps(model, short, None)
            second = _engine_logps(model, short, None)
            torch.cat(second).sum().backward()
            if trained and all(p.grad is None for p in trained):
                raise NotExactError(f"no parameter of {type(lm).__name__} gets a gradient by `{engine.name}`")
    finally:
        model.train(was_training)
        for p, grad in zip(trained, before, strict=True):
            p.grad = grad
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return
    apart = _apart(torch.cat(first), torch.cat(second).detach())
    if apart > (PROBE_TOLERANCE if lm.dtype == torch.float32 else HALF_TOLERANCE):
        raise NoisyError(
            f"{type(lm).__name__} gives two scores of one pair that differ by {apart:.4f} nats a token while it "
            "trains, without dropout in its adapter: a rate in its config.json (dropout, jitter, layerdrop) is not "
            "switched off. Set it to 0 there."
        )
    with evaluating(model), torch.no_grad():
        _compare(model, short, [logps.detach() for logps in second], None)


@torch.no_grad()
def assert_routers_heard(model: Any, group: Group) -> None:
    """Asks the routers for their balance on short rows, where a run will train on it.

    Raises:
        ConfigError: when the engine or the model does not tell what they say.
    """
    with engine_of(model).watching_routers() as routers:
        _engine_logps(model, [_beginning(group)], None)
    routers.loss()


def _engine_logps(model: Any, groups: Sequence[Group], autocast: AbstractContextManager[Any] | None) -> list[Tensor]:
    """Log-probabilities [tokens] of every completion, from one forward of the model's engine."""
    engine = engine_of(model)
    engine.renew()
    batch = pack(groups).to(causal_lm(model).device)
    with engine.as_the_policy():
        logps = score_tokens(model, batch, autocast).logps
    return list(logps.float().split(batch.scored.lengths.tolist()))


def _compare(
    model: Any, groups: Sequence[Group], scored: Sequence[Tensor], autocast: AbstractContextManager[Any] | None
) -> None:
    """Raises NotExactError where an engine's scores are not those of the model's own forward, row by row."""
    lm, rows = causal_lm(model), [(group.prompt, answer) for group in groups for answer in group.completions]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    with plain_attention(model, "eager" if longest <= LONGEST_EAGER else None):
        for ours, (prompt, answer) in zip(scored, rows, strict=True):
            theirs = _row_logps(lm, prompt, answer, autocast)
            apart = _apart(ours.detach(), theirs)

            def rounding(
                prompt: Sequence[int] = prompt, answer: Sequence[int] = answer, theirs: Tensor = theirs
            ) -> float:
                with _rounded_otherwise(lm):
                    return _apart(_row_logps(lm, prompt, answer, autocast), theirs)

            if _too_far(lm, apart, rounding):
                raise NotExactError(
                    f"{type(lm).__name__} scores {float(theirs.sum()):.4f} nats row by row and "
                    f"{float(ours.sum()):.4f} by `{engine_of(model).name}`, {apart:.4f} apart a token"
                )


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """Mean absolute difference of log-probabilities [tokens], in nats; 0 where theirs are not finite."""
    if not bool(torch.isfinite(theirs).all()):
        return 0.0
    apart = float((ours - theirs).abs().mean()) if len(theirs) else 0.0
    return apart if math.isfinite(apart) else math.inf


def _too_far(lm: Any, apart: float, rounding: Callable[[], float]) -> bool:
    """Whether scores differ by more nats a token than exact ones do; `rounding` is asked only where it decides."""
    if lm.dtype == torch.float32:
        return apart > PROBE_TOLERANCE
    return apart > HALF_TOLERANCE and apart > min(LARGEST_TOLERANCE, ROUNDINGS * rounding())


@contextmanager
def _rounded_otherwise(lm: Any) -> Iterator[None]:
    """The output of every layer off by up to half the last place that its numbers have."""

    def off(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        step = torch.finfo(hidden.dtype).eps / 2
        draws = torch.Generator(hidden.device).manual_seed(0)
        factor = 1 + step * (2 * torch.rand(hidden.shape, generator=draws, device=hidden.device) - 1)
        moved = (hidden * factor).to(hidden.dtype)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    hooks = [layer.register_forward_hook(off) for layer in decoder_layers(lm)[1]]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _beginning(group: Group) -> Group:
    """The first token of its prompt and the first few of its completions, where what another row left weighs most."""
    return Group(group.prompt[:1], tuple(completion[:SHORT] for completion in group.completions))


@torch.no_grad()
def assert_causal(model: Any, group: Group) -> None:
    """An encoder that is read as a causal model sees the tokens that it should predict, and agrees with itself on rows.

    Rows of one length are compared: of another, some models rotate by other tables (`engines.rotary`).

    Raises:
        NotCausalError: when the first half of an answer has another score before another second half.
    """
    lm, answer = causal_lm(model), max(map(list, group.completions), key=len)
    half = (len(answer) + 1) // 2
    changed = answer[:half] + [token + 1 if token == 0 else token - 1 for token in answer[half:]]
    with evaluating(model):
        one, other = (_row_logps(lm, group.prompt, tokens, None)[:half] for tokens in (answer, changed))
    apart = _apart(other, one)
    if apart > (PROBE_TOLERANCE if lm.dtype == torch.float32 else LARGEST_TOLERANCE):
        raise NotCausalError(
            f"{type(lm).__name__} scores an answer's first {half} tokens {apart:.4f} nats a token apart when other "
            "tokens follow: it is no causal language model, or not configured as one (`is_decoder`). Use another base."
        )


def _row_logps(
    lm: Any, prompt: Sequence[int], completion: Sequence[int], autocast: AbstractContextManager[Any] | None
) -> Tensor:
    row = torch.tensor([[*prompt, *completion]], device=lm.device)
    kept = len(completion) + 1
    # Logits of the prompt would only cost memory; the few models that do not know the argument compute them.
    few = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(lm.forward).parameters else {}
    fresh_tables(lm)
    with autocast or nullcontext():
        logits = lm(input_ids=row, use_cache=False, **few).logits[0, -kept:-1].float()
    wanted = row[0, len(prompt) :]
    return logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0]


T = TypeVar("T")


def alike(scorings: Sequence[Callable[[str | None], tuple[Settled, T]]]) -> list[tuple[Settled, T]]:
    """The results of scorings that will be compared, all by one engine.

    Each is told the engine to begin with and says which it took. Where a later one cannot take that of those before
    (an adapter that fused layers do not compute), they are done again by its own. Every result says why.
    """
    first: str | None = None
    notes: dict[str, None] = {}
    while True:
        results: list[tuple[Settled, T]] = []
        for scoring in scorings:
            results.append(scoring(first))
            first = results[-1][0].kernels
            notes |= {note: None for note in [results[-1][0].note] if note}
        if all(settled.kernels == first for settled, _ in results):
            return [(replace(settled, note="; ".join(notes)), result) for settled, result in results]
