"""Where reference log-probabilities come from: the cache, a frozen adapter, a merged base, or a second model.

All four measure the policy against the policy at its start, so the first loss is the same. With `merged` that start is
folded into the base, rounded to the base's dtype (exact in fp32), and a new adapter is trained on it: the same first
step's loss, another parametrisation, so another path after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo_assets.artifact import read_object, rewrite_json
from dpo_assets.contract import Progress, TrainSpec
from dpo_assets.errors import ConfigError
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.planning.precision import QUANTISED
from dpo_assets.training.batches import data
from dpo_assets.training.batches.batch import PackedBatch
from dpo_assets.training.batches.data import dpo_group
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.engines import unsloth
from dpo_assets.training.engines.ladder import LADDER, choose_kernels
from dpo_assets.training.engines.speedups import speed_up
from dpo_assets.training.engines.transformers import engine_of
from dpo_assets.training.engines.unsloth.engine import reference_mode
from dpo_assets.training.models.loading import attach_adapter, autocast_of, load_base, switch_off_dropout
from dpo_assets.training.policy import Policy, load_policy
from dpo_assets.training.private.trl import REFERENCE_ADAPTER, using_adapter
from dpo_assets.training.reporting import Reporter
from dpo_assets.training.scoring.cache import ScoreCache, Scores, computed_by, score_key
from dpo_assets.training.scoring.logprobs import score_groups, score_tokens, sequence_logps
from dpo_assets.training.trainers.dpo import StepReference
from dpo_assets.training.trainers.reference import reference_scores

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
A, B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Start:
    """A policy at the start of DPO, and the adapter that was folded into its base, if any."""

    policy: Policy
    folded: Path | None = None


def load_start(spec: TrainSpec, *, packed: bool) -> Start:
    """The policy that DPO trains, by the plan's reference strategy.

    Args:
        packed: whether packed batches will be scored, by an engine that is proven on the longest row of the training
            split; TRL's own trainer wants the model as its library made it.

    Raises:
        ConfigError: for `merged` with a quantised base or Unsloth's kernels; when no engine is exact.
    """
    plan = spec.plan
    folds = plan.dpo.reference_strategy == "merged" and plan.dpo.reference == "sft"
    if packed and folds and spec.start_adapter is not None:
        start = _folded_start(spec.base_model, plan, spec.start_adapter)
        return replace(start, policy=start.policy.proven(plan, longest_group(spec)))
    policy = load_policy(spec.base_model, plan, spec.start_adapter, seed=plan.dpo.seed, dropout=0.0, packed=packed)
    # Before the reference is scored: an SFT adapter may bring its own dropout, and DPO trains without.
    switch_off_dropout(policy.model)
    return Start(policy.proven(plan, longest_group(spec)) if packed else policy)


def longest_group(spec: TrainSpec) -> Group:
    """The pair with the longest row that the run will see."""
    return data.longest_group(spec.dataset, partial(dpo_group, max_length=spec.plan.max_length), spec.scratch)


def _folded_start(folder: Path, plan: TrainingPlan, start: Path) -> Start:
    if plan.precision in QUANTISED or unsloth.computes(plan.kernels):
        what = f"a {plan.precision} base" if plan.precision in QUANTISED else "Unsloth's kernels"
        raise ConfigError(
            f"dpo.reference_strategy `merged` cannot fold an adapter into {what} without rounding it; "
            "use `cached`, which measures against the same reference."
        )
    sft = attach_adapter(load_base(folder, plan), plan, start, seed=plan.dpo.seed, dropout=0.0)
    merged = sft.merge_and_unload(safe_merge=True)
    model = attach_adapter(merged, plan, None, seed=plan.dpo.seed, dropout=0.0)
    speed_up(model, plan)
    kernels, note = choose_kernels(model, plan)
    return Start(Policy(model, kernels, note), folded=start)


def step_reference(start: Start, spec: TrainSpec) -> StepReference | None:
    """What scores a batch by the reference at every step; None for cached scores."""
    plan, model = spec.plan, start.policy.model
    strategy = plan.dpo.reference_strategy
    if strategy == "cached":
        return None
    if strategy == "model":
        with_adapter = None if plan.dpo.reference == "base" else spec.start_adapter
        other = load_policy(spec.base_model, plan, with_adapter, seed=plan.dpo.seed, dropout=0.0).model
        if start.policy.kernels in LADDER:  # The proof may have moved the policy from the plan's engine to another.
            taken, why = choose_kernels(other, plan, start.policy.kernels)
            assert taken == start.policy.kernels, why
        switch_off_dropout(other)
        other.requires_grad_(False).train()
        return lambda batch: _pair_logps(other, batch, plan)
    bare = strategy == "merged" or plan.dpo.reference == "base"

    def score(batch: PackedBatch) -> Tensor:
        with using_adapter(model, None if bare else REFERENCE_ADAPTER):
            return _pair_logps(model, batch, plan)

    return score


def _pair_logps(model: PeftModel, batch: PackedBatch, plan: TrainingPlan) -> Tensor:
    with engine_of(model).as_the_policy():
        return sequence_logps(score_tokens(model, batch, autocast_of(plan)), batch).view(-1, 2).detach()


def join_adapters(trained: Path, folded: Path) -> None:
    """Makes the adapter in `trained`, which lies on the base with `folded` merged in, one on the base alone.

    W + s1 B1 A1 + s2 B2 A2 = W + [s1 B1, s2 B2] [A1; A2]: the ranks add up. A layer that only one of them adapts is
    filled with zeros.
    """
    parts = [(load_file(folder / WEIGHTS), read_object(folder / CONFIG)) for folder in (folded, trained)]
    ranks = [config["r"] for _, config in parts]
    scales = [c["lora_alpha"] / (math.sqrt(c["r"]) if c.get("use_rslora") else c["r"]) for _, c in parts]
    names = sorted({name.removesuffix(A) for tensors, _ in parts for name in tensors if name.endswith(A)})
    joined: dict[str, Tensor] = {}
    for name in names:
        a, b = next((t[name + A], t[name + B]) for t, _ in parts if name + A in t)
        zero_a, zero_b = a.new_zeros(1, a.shape[1]), b.new_zeros(b.shape[0], 1)
        joined[name + A] = torch.cat(
            [t.get(name + A, zero_a.expand(r, -1)) for (t, _), r in zip(parts, ranks, strict=True)]
        )
        joined[name + B] = torch.cat(
            [s * t.get(name + B, zero_b.expand(-1, r)) for (t, _), r, s in zip(parts, ranks, scales, strict=True)],
            dim=1,
        )
    targets = sorted({target for _, config in parts for target in config["target_modules"]})
    config = parts[1][1] | {"r": sum(ranks), "lora_alpha": sum(ranks), "use_rslora": False, "target_modules": targets}
    save_file(joined, trained / WEIGHTS, metadata={"format": "pt"})
    rewrite_json(trained / CONFIG, config)


def score_reference(policy: Policy, groups: Sequence[Group], spec: TrainSpec, reporter: Reporter) -> tuple[Scores, int]:
    """Reference scores by the same kernels, dtype and packing as the policy, from the cache where known."""
    plan, model = spec.plan, policy.model
    with reference_mode(model, policy.kernels) as path:
        key = score_key(
            base=spec.base_digest,
            start=spec.inputs.get("sft_checkpoint", "") if spec.start_adapter else "",
            reference=plan.dpo.reference,
            tokenizer=spec.tokenizer_digest,
            **computed_by(plan, policy.kernels, path),
        )
        cache = ScoreCache(spec.reference_cache, key) if spec.reference_cache else None

        # On padded rows attention holds more than the plan counts, the more the larger a forward.
        widened = plan.reference_budget and not engine_of(model).pads_attention
        budget = plan.reference_budget if widened else plan.token_budget
        done = 0

        def score(part: Sequence[Group]) -> Scores:
            nonlocal done
            with autocast_of(plan), policy.computing(plan):
                logps, _ = score_groups(model, part, budget)
            done += len(part)
            reporter.log(Progress(stage="reference", done=done, total=len(groups)).line())
            return list(zip(logps[::2], logps[1::2], strict=True))

        if plan.dpo.reference == "base":
            with model.disable_adapter():
                scores, reused = reference_scores(groups, cache, score)
        else:
            scores, reused = reference_scores(groups, cache, score)
    if cache and cache.damage:
        reporter.log(f"dpo: {cache.damage}; they were scored again")
    reporter.log(f"dpo: reference log-probabilities of {len(groups)} pairs, {reused} from the cache")
    return scores, reused
