"""This project's packed trainer, driven as its DPO stage drives it: plan, base, adapter, reference pass, training."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl.trainer.utils import disable_dropout_in_model

from benchmarks.throughput.data import PAIRS_PER_STEP, Row
from benchmarks.throughput.measure import (
    CUDA,
    GIB,
    Block,
    Measured,
    free_bytes,
    free_memory,
    memory_cap,
    seed_adapter,
    train,
    unwrap,
)
from benchmarks.throughput.shapes import LORA_RANK
from dpo_assets.planning.model_folder import inspect_model
from dpo_assets.planning.plan import DatasetStats, TrainingPlan, make_plan
from dpo_assets.planning.precision import Device
from dpo_assets.recipe import parse_recipe
from dpo_assets.training.batches.data import dpo_group
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.engines.unsloth.engine import reference_mode
from dpo_assets.training.models.chat_format import load_tokenizer
from dpo_assets.training.models.loading import autocast_of
from dpo_assets.training.policy import Policy, load_policy
from dpo_assets.training.scoring.logprobs import score_groups
from dpo_assets.training.stages.dpo import dpo_arguments
from dpo_assets.training.trainers.dpo import PackedDPOTrainer
from dpo_assets.training.trainers.losses import DpoLoss
from dpo_assets.training.trainers.packed import end_quietly
from dpo_assets.training.trainers.step import REFERENCE_COLUMNS, PackedCollator

SEED = 42
CPU_GIB = 4.0
Scores = list[tuple[float, float]]


def plan_of(
    folder: Path, precision: str, targets: Sequence[str], kernels: str, rows: list[Row], block: Block
) -> TrainingPlan:
    """The planner's own answer for these rows on this device; `block.overrides` replaces fields of it."""
    overrides = dict(block.overrides)
    kernels = overrides.pop("kernels", kernels)
    groups = [dpo_group(row, block.max_length) for row in rows]
    recipe = parse_recipe(
        {
            "base_model": {"source": str(folder.absolute())},
            "feedback": {
                "sources": [{"path": "builtin:oasst", "format": "oasst_tree"}],
                "max_length": block.max_length,
            },
            "lora": {"rank": LORA_RANK, "alpha": LORA_RANK, "target_modules": list(targets)},
            "sft": {"strategy": "adopt"},
            "dpo": {
                "learning_rate": 2e-4,
                "beta": 0.1,
                "batch_size": PAIRS_PER_STEP,
                "epochs": 1.0,
                "warmup_ratio": 0.0,
                "schedule": "constant",
                "max_grad_norm": block.max_grad_norm,
                "seed": SEED,
            },
            "hardware": {"precision": precision, "kernels": kernels},
        }
    )
    stats = DatasetStats(
        train_pairs=len(rows),
        eval_pairs=0,
        max_length=block.max_length,
        longest_pair=max(group.tokens for group in groups),
        mean_pair=sum(group.tokens for group in groups) / len(groups),
    )
    plan = make_plan(recipe, inspect_model(folder).shape, stats, _device(block.cap_gib))
    return plan.model_copy(update=overrides)


def _device(cap_gib: float | None) -> Device:
    if not CUDA:
        return Device("cpu", "CPU", CPU_GIB)
    properties = torch.cuda.get_device_properties(0)
    memory = free_bytes() / GIB if cap_gib is None else cap_gib
    return Device("cuda", properties.name, memory, (properties.major, properties.minor))


class OursArm:
    """The packed trainer with a cached reference."""

    def __init__(self, folder: Path, precision: str, targets: Sequence[str], kernels: str) -> None:
        self.folder, self.precision, self.targets, self.kernels = folder, precision, targets, kernels
        self.policy: Policy | None = None
        self._loaded: tuple[Any, ...] = ()

    def load(self) -> None:
        self.tokenizer = load_tokenizer(self.folder)

    def _policy(self, plan: TrainingPlan) -> Policy:
        """The policy of a plan, loaded again only where the plan loads it in another way."""
        wanted = (plan.precision, plan.kernels, plan.gradient_checkpointing, plan.recomputed_layers)
        if self.policy is None or self._loaded != wanted:
            self.policy = None
            free_memory()
            self.policy = load_policy(self.folder, plan, None, seed=SEED, dropout=0.0)
            disable_dropout_in_model(self.policy.model)
            self._loaded = wanted
        seed_adapter(self.policy.model)
        return self.policy

    def run(self, rows: list[Row], block: Block) -> Measured:
        plan = plan_of(self.folder, self.precision, self.targets, self.kernels, rows, block)
        begun = time.perf_counter()
        # A policy that a failed block left behind is not used again.
        policy, self.policy = self._policy(plan), None
        loading = time.perf_counter() - begun
        with memory_cap(block.cap_gib) as peaks:
            scores, reference = self._reference(policy, rows, plan)
            columns = [dict(zip(REFERENCE_COLUMNS, pair, strict=True)) for pair in scores]
            arguments = dpo_arguments(plan, Path(tempfile.mkdtemp(prefix="dpo-throughput-")))
            # The arms must see the same pairs at the same step; nothing else of the arguments is touched.
            arguments.train_sampling_strategy = "sequential"
            trainer = PackedDPOTrainer(
                model=policy.model,
                args=arguments,
                train_dataset=Dataset.from_list([row | more for row, more in zip(rows, columns, strict=True)]),
                processing_class=self.tokenizer,
                data_collator=PackedCollator.of(
                    policy.model, partial(dpo_group, max_length=plan.max_length), plan.token_budget, referenced=True
                ),
                loss=DpoLoss.of(plan.dpo),
                reference=plan.dpo.reference,
            )
            end_quietly(trainer, [])
            with policy.computing(plan):
                seconds, steps = train(trainer, block)
            unwrap(trainer)
            self.policy = policy
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return Measured(
            seconds=seconds,
            step_seconds=steps,
            losses=losses,
            first_loss_minus_ln2=losses[0] - math.log(2),
            peak_allocated_gib=peaks.get("peak_allocated_gib"),
            peak_reserved_gib=peaks.get("peak_reserved_gib"),
            setup_seconds=loading,
            more={"plan": _shown(plan), "kernels": policy.kernels, "kernels_note": policy.note, **reference},
        )

    def _reference(self, policy: Policy, rows: list[Row], plan: TrainingPlan) -> tuple[Scores, dict[str, Any]]:
        """Reference scores of all rows, and how fast the different pairs among them were scored after a warm-up."""
        unique: dict[int, Group] = {}
        for row in rows:
            unique.setdefault(id(row), dpo_group(row, plan.max_length))
        groups = list(unique.values())
        with reference_mode(policy.model, plan.kernels), autocast_of(plan):
            score_groups(policy.model, groups[:PAIRS_PER_STEP], plan.reference_budget)
            if CUDA:
                torch.cuda.synchronize()
            begun = time.perf_counter()
            logps, _ = score_groups(policy.model, groups, plan.reference_budget)
            seconds = time.perf_counter() - begun
        pairs = dict(zip(unique, zip(logps[::2], logps[1::2], strict=True), strict=True))
        facts = {"reference_pairs_per_s": len(groups) / seconds, "reference_seconds": seconds}
        return [pairs[id(row)] for row in rows], facts


def _shown(plan: TrainingPlan) -> dict[str, Any]:
    """The decisions of a plan, for the record."""
    names = {"precision", "precision_reason", "kernels", "gradient_checkpointing", "recomputed_layers", "token_budget"}
    names |= {"reference_budget", "memory_gib", "memory_available_gib", "max_length"}
    return plan.model_dump(include=names)
