"""A plan for a card in plain words, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpo_assets.planning.dataset import DatasetStats
from dpo_assets.planning.offers import EngineOffer
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.planning.precision import Device
from dpo_assets.planning.sizes import Size
from dpo_assets.planning.work import Work

KERNELS = {
    "fused": "fused: this project's own layers, with LoRA, attention and head computed together",
    "transformers": "transformers: PEFT on the layers of Transformers",
    "unsloth": "unsloth: FastLanguageModel",
    "rows": "rows: the model's own forward on padded rows, with PEFT",
}
SUPPOSED_PAIRS = 1_000  # Steps are not part of the answer, so any number does.


def supposed_pairs(max_length: int) -> DatasetStats:
    """Lengths to plan with where there is no dataset: the worst pair that `max_length` lets through.

    A pair is a prompt with two answers, so two rows that share their start. The mean of real preferences cut to the
    same length is a little below `max_length` (UltraFeedback at 1,024: 910 tokens).
    """
    return DatasetStats(
        train_pairs=SUPPOSED_PAIRS, eval_pairs=0, max_length=max_length, longest_pair=2 * max_length,
        mean_pair=float(max_length),
    )  # fmt: skip


def plan_rows(plan: TrainingPlan, size: Size, device: Device) -> Iterator[tuple[str, str]]:
    """(label, sentence) pairs that say what a run would do and what it was planned for."""
    shape, batch = size.shape, plan.dpo.batch_size
    like = "" if size.like == size.key else f" (shape of {size.like})"
    yield "model", f"{size.key}{like}: {shape.parameters / 1e9:.2f} billion parameters, {shape.layers} layers"
    capability = "" if device.capability is None else f", compute capability {'.'.join(map(str, device.capability))}"
    yield "device", f"{device.name}: {plan.memory_available_gib:.1f} GiB{capability}"
    yield "precision", plan.precision_reason
    yield "kernels", KERNELS[plan.kernels]
    for number, offer in enumerate(plan.engines):
        yield "" if number else "predicted", offer_sentence(offer)
    yield "memory", f"{plan.memory_gib:.1f} of {plan.memory_available_gib:.1f} GiB at the peak, by estimate"
    for name, gib in sorted(plan.memory_parts.items(), key=lambda part: -part[1]):
        if gib:
            yield "", f"{gib:7.2f}  {name}"
    work = Work.of(supposed_pairs(plan.max_length), plan.dpo)
    forwards = work.forwards(plan.kernels, plan.token_budget)
    often = "one forward" if forwards == 1 else f"about {forwards} forwards"
    most = f"up to {plan.token_budget:,} tokens"
    yield "forward", f"{most}; a step of {batch} pairs of {plan.max_length:,} takes {often}"
    if plan.recomputed_layers:
        twice = f"{plan.recomputed_layers} of {shape.layers} layers are computed again in the backward pass"
        yield "checkpointing", f"{twice}, to save memory"
    else:
        yield "checkpointing", "none: no layer is computed twice"
    tight = not plan.fits and plan.memory_gib <= plan.memory_available_gib
    yield "scored", f"{plan.scored}: {plan.scoring.reason}"
    yield "fits", "yes" if plan.fits else "no: nothing is left for fragments" if tight else "no"
    for change in plan.would_fit:
        yield "would fit", change
    if not plan.fits and not plan.would_fit:
        yield "would fit", "nothing in the catalogue; take a smaller model"
    yield (
        "planned for",
        f"pairs of at most {plan.longest_pair:,} tokens, {plan.max_length:,} on average (supposed from "
        f"max_length; a run takes those of its pairs); LoRA rank {plan.lora.rank} on "
        f"{_targets(plan)}",
    )


def offer_sentence(offer: EngineOffer) -> str:
    """One engine's prediction, and why it was not taken."""
    speed = "" if offer.pairs_per_s is None else f"{offer.pairs_per_s:.3g} pairs/s, "
    peak = "" if offer.peak_gib is None else f"{offer.peak_gib:.1f} GiB"
    numbers = f"{speed}{peak}"
    said = "; ".join(filter(None, (numbers, offer.note, offer.why_not)))
    return f"{offer.name:<12}  {said}"


def _targets(plan: TrainingPlan) -> str:
    modules, experts = plan.lora.target_modules, plan.lora.target_parameters
    linear = modules if isinstance(modules, str) else f"{len(modules)} linear layers a block"
    return f"{linear} and {', '.join(experts)}" if experts else linear


def plan_json(plan: TrainingPlan, size: Size, gpu: str) -> dict[str, Any]:
    """The plan as one flat object. Memory in GiB."""
    return {
        "gpu": gpu,
        "device_name": plan.device_name,
        "model": size.key,
        "model_like": size.like,
        "parameters": plan.parameters,
        "layers": size.shape.layers,
        "precision": plan.precision,
        "reason": plan.precision_reason,
        "computed_in": plan.compute,
        "kernels": plan.kernels,
        "engines": [offer.model_dump(mode="json") for offer in plan.engines],
        "token_budget": plan.token_budget,
        "recomputed_layers": plan.recomputed_layers,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "memory_gib": round(plan.memory_gib, 2),
        "memory_available_gib": plan.memory_available_gib,
        "memory_parts": {name: round(gib, 3) for name, gib in plan.memory_parts.items()},
        "fits": plan.fits,
        "would_fit": plan.would_fit,
        "scored": plan.scored,
        "target_modules": plan.lora.target_modules,
        "target_parameters": plan.lora.target_parameters,
        "adapted_share": round(plan.coverage.share, 4),
        "max_length": plan.max_length,
        "longest_pair": plan.longest_pair,
        "batch_size": plan.dpo.batch_size,
        "rank": plan.lora.rank,
    }
