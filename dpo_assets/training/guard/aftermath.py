"""What DPO did to the policy, measured in the process that trained it: policy against reference, on held-out data.

Every part is either numbers or `{"not_measured": why}`; the checks turn the latter into a warning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from dpo_assets.checks.evidence.clusters import COUNTED_BY, tie_aware_accuracy
from dpo_assets.checks.reports import (
    AdapterNorm,
    Aftermath,
    AnswerHealth,
    Capability,
    Divergence,
    HeldOutPairs,
    NotMeasured,
    SampledAnswers,
)
from dpo_assets.checks.tasks import Task, compared
from dpo_assets.contract import GuardSpec
from dpo_assets.training.batches.data import dpo_group
from dpo_assets.training.guard.sampling import AdapterState, Answer, Watched, first_prompts
from dpo_assets.training.models.fp8 import Fp8Linear
from dpo_assets.training.models.loading import ADAPTER_NAME
from dpo_assets.training.private.peft import dequantised, experts_of, parameter_of, stacked_weight
from dpo_assets.training.scoring.divergence import per_token
from dpo_assets.training.scoring.generation import generation_health

EXAMPLES, EXAMPLE_LENGTH = 3, 300  # Answers that the report quotes, and characters of each.


def measure(watched: Watched, guard: GuardSpec, held_out: Any, tasks: Sequence[tuple[Task, list[int]]]) -> Aftermath:
    """What an adapter did, for the report of stage `dpo`.

    Args:
        held_out: rows of the held-out split with their token ids, prompts, `COUNTED_BY` and `pair_id`, or None where
            there is none.
        tasks: the user's capability probe with the token ids of its prompts; without one token accuracy is compared.
    """
    plan = watched.plan
    pairs: HeldOutPairs | NotMeasured = NotMeasured(not_measured="checks.held_out_pairs is 0")
    matches: list[tuple[float, float]] | None = None
    if held_out is None or not len(held_out):
        pairs = NotMeasured(not_measured="the dataset has no held-out pairs")
    elif watched.why_no_scores:
        pairs = NotMeasured(not_measured=watched.why_no_scores)
    elif guard.held_out_pairs:
        few = held_out.select(range(min(guard.held_out_pairs, len(held_out))))
        groups = [dpo_group(row, plan.max_length) for row in few]
        pairs, matches = _pairs(watched, groups, few[COUNTED_BY], few["pair_id"])
    return Aftermath(
        held_out=pairs,
        answers=_answers(watched, guard, held_out),
        capability=_capability(watched, guard, tasks, pairs, matches),
        adapter_norm=adapter_norm(watched.model, watched.start),
    )


def _pairs(
    watched: Watched, groups: list[Any], conversations: Sequence[str], ids: Sequence[str]
) -> tuple[HeldOutPairs, list[tuple[float, float]]]:
    """Numbers of held-out pairs, and the token accuracy of each chosen answer by (reference, policy).

    `conversations` names that of each pair, and `ids` the pair.
    """
    lengths = [len(c) for g in groups for c in g.completions]
    policy, hits = watched.scores(groups)
    reference, reference_hits = watched.reference_scores(groups)
    shifts = [p - r for p, r in zip(policy, reference, strict=True)]
    margins = [c - r for c, r in zip(shifts[::2], shifts[1::2], strict=True)]
    part = HeldOutPairs(
        pairs=len(groups),
        accuracy=tie_aware_accuracy(margins, conversations),
        margin_nats=fmean(margins),
        margins=dict(zip(ids, margins, strict=True)),
        nll_ratio=sum(policy[::2]) / sum(reference[::2]),
        chosen_nats_per_token=sum(shifts[::2]) / sum(lengths[::2]),
        rejected_nats_per_token=sum(shifts[1::2]) / sum(lengths[1::2]),
    )
    shares = zip(reference_hits[::2], hits[::2], lengths[::2], strict=True)
    return part, [(before / n, after / n) for before, after, n in shares]


def _answers(watched: Watched, guard: GuardSpec, held_out: Any) -> SampledAnswers | NotMeasured:
    """Health of both sides' sampled answers to the same prompts with the same seed, and the policy's divergence."""
    plan, tokens = watched.plan, guard.probe_tokens
    if watched.why_no_answers:
        return NotMeasured(not_measured=watched.why_no_answers)
    if not guard.sampled_answers:
        return NotMeasured(not_measured="checks.sampled_answers is 0")
    room = plan.max_length - tokens
    prompts = first_prompts(held_out, watched.chat, guard.sampled_answers, room) if held_out is not None else []
    if not prompts:
        return NotMeasured(not_measured=f"no held-out prompt leaves room for {tokens} tokens in {plan.max_length}")
    decode = watched.chat.tokenizer.decode
    policy = watched.answers(prompts, tokens, plan.dpo.seed)
    reference = watched.reference_answers(prompts, tokens, plan.dpo.seed)
    sides = list(zip(reference, policy, strict=True))
    return SampledAnswers(
        prompts=len(prompts),
        most_tokens=tokens,
        reference=AnswerHealth.model_validate(generation_health(reference)),
        policy=AnswerHealth.model_validate(generation_health(policy)),
        longer=sum(len(b["ids"]) > len(a["ids"]) for a, b in sides),
        shorter=sum(len(b["ids"]) < len(a["ids"]) for a, b in sides),
        kl=_divergence(watched, prompts, policy),
        examples=tuple(
            (decode(prompt)[-EXAMPLE_LENGTH:], a["text"][:EXAMPLE_LENGTH], b["text"][:EXAMPLE_LENGTH])
            for prompt, (a, b) in list(zip(prompts, sides, strict=True))[:EXAMPLES]
        ),
    )


def _divergence(watched: Watched, prompts: list[list[int]], answers: Sequence[Answer]) -> Divergence | NotMeasured:
    if watched.why_no_scores:
        return NotMeasured(not_measured=watched.why_no_scores)
    return per_token(watched.divergence(prompts, answers))


def _capability(
    watched: Watched,
    guard: GuardSpec,
    tasks: Sequence[tuple[Task, list[int]]],
    pairs: HeldOutPairs | NotMeasured,
    matches: list[tuple[float, float]] | None,
) -> Capability | NotMeasured:
    """The user's tasks answered greedily by both sides; without tasks, next tokens of held-out chosen answers."""
    if tasks:
        if watched.why_no_answers:
            return NotMeasured(not_measured=watched.why_no_answers)
        prompts = [ids for _, ids in tasks]
        after = watched.answers(prompts, guard.probe_tokens, None)
        before = watched.reference_answers(prompts, guard.probe_tokens, None)
        texts = [[answer["text"] for answer in answers] for answers in (before, after)]
        return Capability(kind="tasks", **compared([task for task, _ in tasks], *texts))
    if matches is None:
        assert isinstance(pairs, NotMeasured)
        return pairs
    return Capability(
        kind="token_accuracy",
        tasks=len(matches),
        reference=fmean(before for before, _ in matches),
        policy=fmean(after for _, after in matches),
        lost=sum(after < before for before, after in matches),
        gained=sum(after > before for before, after in matches),
    )


@torch.no_grad()
def adapter_norm(model: Any, start: AdapterState) -> AdapterNorm | NotMeasured:
    """Largest ||s (B A - B0 A0)|| / ||W|| over adapted layers and experts (Frobenius norms), and where it stands.

    The change is one product of stacked factors, [s B, -s B0] [A; A0], and ||B A||^2 = trace((A A^T) (B^T B)) needs no
    matrix larger than twice the rank. In fp64: the start cancels where an adapter hardly moved.
    """
    largest, where, layers = 0.0, "", 0
    for name, layer in model.named_modules():
        if ADAPTER_NAME not in getattr(layer, "lora_A", {}) or not hasattr(layer, "get_base_layer"):
            continue
        weights = _weights(layer)
        if weights is None:
            return NotMeasured(not_measured=f"the weight of {name} is kept in a form that has no plain norm")
        scale = float(layer.scaling[ADAPTER_NAME])
        a, b = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
        key = next((n for n in start.factors if n.endswith(f"{name}.lora_A.{ADAPTER_NAME}.weight")), None)
        if key is None:
            return NotMeasured(not_measured=f"{name} has no adapter at the start to compare with")
        a0, b0 = start.factors[key], start.factors[key.replace(".lora_A.", ".lora_B.")]
        layers += 1
        factors = zip(weights, _factors(layer, b, a), _factors(layer, b0, a0), strict=True)
        share = max_or_nan(_change(weight, scale, now, before) for weight, now, before in factors)
        if not share <= largest:  # NaN too must show.
            largest, where = share, name
            if share != share:
                break
    if not layers:
        return NotMeasured(not_measured="the model has no LoRA layers of the usual kind")
    return AdapterNorm(largest=largest, layer=where.removeprefix("base_model.model."), layers=layers)


def product_norm(b: Tensor, a: Tensor) -> float:
    """Frobenius norm of B A for B [out, r] and A [r, in], without the product: its square is trace(A A^T B^T B)."""
    square = ((a @ a.T) * (b.T @ b).T).sum()
    return float(square.clamp(min=0.0).sqrt()) if bool(torch.isfinite(square)) else float("nan")


def max_or_nan(values: Iterable[float]) -> float:
    """The largest, or NaN where one is: `max` would lose it, depending on where it stands."""
    return float(torch.tensor(list(values), dtype=torch.double).max())


Factors = tuple[Tensor, Tensor]  # B [out, r] and A [r, in].


def _change(weight: Tensor, scale: float, now: Factors, before: Factors) -> float:
    """||s (B A - B0 A0)|| / ||W||."""
    (b, a), (b0, a0) = now, before
    norm = float(weight.float().norm())
    return product_norm(torch.cat([b, -b0], dim=1) * scale, torch.cat([a, a0])) / norm if norm else math.nan


def _factors(layer: Any, b: Tensor, a: Tensor) -> list[Factors]:
    """The factors in fp64 of a layer, or of each of its experts, whose factors PEFT keeps in one matrix."""
    b, a = b.detach().double().cpu(), a.detach().double().cpu()
    experts = experts_of(layer)
    return list(zip(b.reshape(len(b), -1, experts).unbind(2), a.reshape(experts, -1, a.shape[1]), strict=True))


def _weights(layer: Any) -> Sequence[Tensor] | None:
    """The weight [out, in] of an adapted layer, or that of each of its experts; None where nothing here knows how."""
    if parameter_of(layer) is not None:
        stacked = stacked_weight(layer)
        return list(stacked) if stacked.is_floating_point() and stacked.dim() == 3 else None
    weight = _weight(layer.get_base_layer())
    return None if weight is None else [weight]


def _weight(base: Any) -> Tensor | None:
    """The weight of a base layer [out, in], dequantised; None where nothing here knows how."""
    if isinstance(base, Fp8Linear):
        return base.codes.float() * base.weight_scale[:, None]
    try:
        weight = dequantised(base)
    except (TypeError, ValueError, ImportError, AttributeError):
        return None
    return weight if weight.is_floating_point() and weight.dim() == 2 else None
