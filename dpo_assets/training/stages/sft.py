"""Stage `sft`: LoRA supervised fine-tuning on the chosen answers: where DPO starts, and its reference."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainingArguments

from dpo_assets.artifact import VOLATILE, write_json
from dpo_assets.checks.reports import SftReport
from dpo_assets.contract import TrainSpec
from dpo_assets.training.batches.data import load_split, longest_group, sft_group
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.guard.finite import StopOnNonFinite, check_trained
from dpo_assets.training.models.chat_format import load_chat_format
from dpo_assets.training.models.loading import ADAPTER_NAME, autocast_of, save_adapter
from dpo_assets.training.models.targets import coverage
from dpo_assets.training.policy import load_policy
from dpo_assets.training.reporting import ProgressLines, Reporter, all_finite, write_metrics
from dpo_assets.training.resuming.callback import checkpoints_of, train_to_end
from dpo_assets.training.scoring.logprobs import evaluating, score_groups
from dpo_assets.training.scoring.proof import assert_routers_heard
from dpo_assets.training.trainers.packed import (
    PackedSteps,
    end_quietly,
    packed_arguments,
    trainer_arguments,
)
from dpo_assets.training.trainers.step import Forward, PackedCollator, Step

PROBE_PAIRS = 64  # Held-out answers whose loss is measured before and after.


class PackedSFTTrainer(PackedSteps, Trainer):
    """transformers.Trainer with the mean negative log-likelihood per completion token of the step.

    Args:
        router_balance: what the routers' balancing loss is multiplied by.
    """

    def __init__(self, *args: Any, router_balance: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.router_balance = router_balance

    def forward_loss(self, model: Any, forward: Forward, step: Step) -> tuple[Tensor, Tensor]:
        scores, balance = self.scored(model, forward, step)
        count = len(scores.logps)
        self._means.add("mean_token_accuracy", scores.top1.sum(), count)
        self._means.add("entropy", scores.entropy.sum(), count)
        loss = -scores.logps.sum() / step.targets
        return loss + balance, loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs | self._means.take(), start_time)


def run(spec: TrainSpec, reporter: Reporter) -> None:
    """Writes `adapter/`, `metrics.jsonl` and `report.json`."""
    plan, out = spec.plan, spec.output_dir
    started = time.perf_counter()
    chat = load_chat_format(spec.base_model, spec.template)
    train, held_out = (
        load_split(spec.dataset, "train", scratch=spec.scratch),
        load_split(spec.dataset, "eval", scratch=spec.scratch),
    )
    to_group = partial(sft_group, max_length=plan.max_length)
    longest = longest_group(spec.dataset, to_group, spec.scratch)
    policy = load_policy(spec.base_model, plan, spec.start_adapter, seed=plan.sft.seed, dropout=plan.lora.dropout)
    policy = policy.proven(plan, longest)
    model = policy.model
    if plan.sft.router_balance:
        with autocast_of(plan):
            assert_routers_heard(model, longest)
    if policy.note:
        reporter.log(policy.told("sft", plan))
    plan = plan.fitted_to(policy.kernels)
    spec = spec.model_copy(update={"plan": plan})
    probe = [to_group(row) for row in held_out.select(range(min(PROBE_PAIRS, len(held_out))))]
    with autocast_of(plan):
        before = held_out_nll(model, probe, plan.token_budget)
    covered = coverage(model, ADAPTER_NAME)
    reporter.log(f"sft: adapters on {100 * covered.share:.3g}% of the layers' weights")
    if covered.frozen:
        reporter.log(f"sft: frozen layers: {', '.join(covered.frozen)}")
    reporter.log(f"sft: {len(train)} chosen answers, {plan.sft_steps} steps; held-out loss before: {before:.4f}")

    trainer = PackedSFTTrainer(
        model=model,
        args=TrainingArguments(
            **trainer_arguments(plan, plan.sft, spec.scratch, plan.sft_steps) | packed_arguments(plan)
        ),
        train_dataset=train,
        data_collator=PackedCollator.of(model, to_group, plan.token_budget),
        router_balance=plan.sft.router_balance,
    )
    keys = {"loss": "loss", "mean_token_accuracy": "token accuracy"}
    end_quietly(trainer, [StopOnNonFinite("sft_finite"), ProgressLines(reporter, "sft", keys)])
    checkpoints = checkpoints_of("sft", spec, policy.kernels, trainer, {"trainer": trainer}, reporter, started)
    with policy.computing(plan):
        tries = train_to_end(trainer, checkpoints)
    check_trained("sft_finite", model)

    with autocast_of(plan):
        after = held_out_nll(model, probe, plan.token_budget)
    reporter.log(f"sft: held-out loss after: {after:.4f}")
    save_adapter(model, out / "adapter")
    rows = write_metrics(trainer.state.log_history, out / "metrics.jsonl")
    SftReport(
        steps=trainer.state.global_step,
        held_out_nll_before=before,
        held_out_nll_after=after,
        finite=all_finite(rows) and math.isfinite(after),
        kernels=policy.kernels,
        kernels_note=policy.note,
        adapted_share=covered.share,
        lora_coverage=covered,
        ends_with_eos=share_ending_with(train["chosen_ids"], chat.ends),
    ).write(out)
    write_json(out / VOLATILE, {"seconds": time.perf_counter() - started, **tries, **spec.memory_record()})


def held_out_nll(model: Any, groups: Sequence[Group], budget: int) -> float:
    """Mean negative log-likelihood per completion token, in nats."""
    with evaluating(model):
        logps, lengths = score_groups(model, groups, budget)
    total: float = sum(logps)
    tokens: int = sum(lengths)
    return -total / max(1, tokens)


def share_ending_with(completions: Sequence[Sequence[int]], ends: Collection[int]) -> float:
    """Share of untruncated answers with a token that ends a turn among their last two (templates may add a line end
    after it)."""
    ended = sum(any(token in ends for token in list(ids)[-2:]) for ids in completions)
    return ended / max(1, len(completions))
