"""Stage `dpo`: the packed trainer on TRL's DPOTrainer, or TRL's own."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import TrainerCallback
from trl import DPOConfig

from dpo_assets.artifact import VOLATILE, write_json
from dpo_assets.checks.evidence.clusters import COUNTED_BY
from dpo_assets.checks.reports import Aftermath, DpoReport, Stop
from dpo_assets.checks.tasks import read_tasks
from dpo_assets.contract import GuardSpec, TrainSpec
from dpo_assets.errors import ConfigError
from dpo_assets.feedback.dataset import has_split
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.batches.data import dpo_group, load_asked, load_conversations, load_split
from dpo_assets.training.engines import unsloth
from dpo_assets.training.engines.base import attached_engine
from dpo_assets.training.guard.aftermath import measure
from dpo_assets.training.guard.collapse import CollapseGuard
from dpo_assets.training.guard.finite import StopOnNonFinite, check_trained
from dpo_assets.training.guard.sampling import AdapterState, Watched, attach_scorer, first_prompts
from dpo_assets.training.models.chat_format import RENDERING_ERRORS, load_chat_format
from dpo_assets.training.models.loading import ADAPTER_NAME, autocast_of, load_factors, save_adapter
from dpo_assets.training.models.targets import coverage
from dpo_assets.training.policy import Policy
from dpo_assets.training.reporting import ProgressLines, Reporter, all_finite, write_metrics
from dpo_assets.training.resuming.callback import checkpoints_of, train_to_end
from dpo_assets.training.scoring.proof import assert_routers_heard
from dpo_assets.training.snapshot import Resumable
from dpo_assets.training.trainers.classic import ClassicDPOTrainer, classic_trainer, refuse_without_gpu
from dpo_assets.training.trainers.dpo import PackedDPOTrainer
from dpo_assets.training.trainers.losses import DpoLoss
from dpo_assets.training.trainers.packed import end_quietly, packed_arguments, trainer_arguments
from dpo_assets.training.trainers.step import REFERENCE_COLUMNS, PackedCollator
from dpo_assets.training.trainers.strategies import (
    Start,
    join_adapters,
    load_start,
    longest_group,
    score_reference,
    step_reference,
)

CLOSING = ("loss", "logps/chosen", "rewards/chosen", "rewards/margins", "rewards/accuracies")
LAST_LOGS = 5  # Closing values are means over this many logs: one batch of a small run is noise.


def dpo_arguments(plan: TrainingPlan, output_dir: Path) -> DPOConfig:
    """TRL's configuration with every value that decides the result set."""
    return DPOConfig(
        **trainer_arguments(plan, plan.dpo, output_dir, plan.dpo_steps) | packed_arguments(plan),
        beta=plan.dpo.beta,
        loss_type=["sigmoid"],  # The packed trainer's losses are its own; TRL's has no say.
        max_length=plan.max_length,
        truncation_mode="keep_start",
        disable_dropout=True,
        precompute_ref_log_probs=False,
    )


def run(spec: TrainSpec, reporter: Reporter) -> None:
    """Writes `adapter/`, `metrics.jsonl` and `report.json`."""
    plan, out = spec.plan, spec.output_dir
    started = time.perf_counter()
    packed = plan.dpo.trainer == "packed"
    if not packed:
        refuse_without_gpu(plan)
    chat = load_chat_format(spec.base_model, spec.template)
    start = load_start(spec, packed=packed)
    policy = start.policy
    if policy.note:
        reporter.log(policy.told("dpo", plan))
    plan = plan.fitted_to(policy.kernels) if packed else plan
    spec = spec.model_copy(update={"plan": plan})
    trainer: PackedDPOTrainer | ClassicDPOTrainer
    reused = 0
    if packed:
        trainer, reused = packed_trainer(start, chat.tokenizer, spec, reporter)
    else:
        rows = load_conversations(spec.train_folder, spec.scratch)
        trainer = classic_trainer(policy.model, chat.rendering_tokenizer(), rows, plan, spec.scratch)
    guard, watched = None, None
    if spec.guard is not None:
        if attached_engine(policy.model) is None and not unsloth.computes(policy.kernels):
            scorer = attach_scorer(policy.model, plan, longest_group(spec))
            if scorer.note:
                reporter.log(f"dpo: pairs are scored by {scorer.kernels} beside TRL's trainer: {scorer.note}")
        watched = Watched(policy.model, AdapterState(policy.model), chat, plan, policy.kernels)
    if spec.goes_on_from is not None:
        go_on(trainer, policy, spec.goes_on_from)
        reporter.log(f"dpo: the policy goes on from an earlier release, generation {plan.refresh.generation}")
    if watched is not None and spec.guard is not None:
        guard = collapse_guard(watched, spec.guard, spec, reporter)
    reporter.log(
        f"dpo: {plan.train_pairs} pairs, {plan.dpo_steps} steps, lr {plan.dpo.learning_rate:g}, "
        f"beta {plan.dpo.beta:g}, {plan.dpo.trainer} trainer on {policy.kernels} kernels"
    )
    keys = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
    watchers: list[TrainerCallback] = [] if guard is None else [guard]
    end_quietly(trainer, [StopOnNonFinite("finite"), *watchers, ProgressLines(reporter, "dpo", keys)])
    checkpoints = None
    if isinstance(trainer, PackedDPOTrainer):
        parts: dict[str, Resumable] = {"trainer": trainer}
        if guard is not None:
            parts["guard"] = guard
        checkpoints = checkpoints_of("dpo", spec, policy.kernels, trainer, parts, reporter, started)
    elif spec.checkpoints is not None:
        reporter.log("dpo: TRL's own trainer writes no checkpoints here, so a try that is ended is lost")
    measured = Aftermath()
    with policy.computing(plan):
        tries = train_to_end(trainer, checkpoints)
        trained = time.perf_counter()
        check_trained("finite", policy.model)
        if guard is not None and watched is not None and spec.guard is not None:
            reporter.log("dpo: measuring the adapter against its start")
            measured = measure(watched, spec.guard, held_out_rows(spec), guard.tasks)

    save_adapter(trainer.accelerator.unwrap_model(trainer.model), out / "adapter")
    if start.folded is not None:
        join_adapters(out / "adapter", start.folded)
    record = guard.record(load_split(spec.train_folder, "train", scratch=spec.scratch)) if guard is not None else None
    stopped = guard is not None and guard.stopped
    write_report(trainer, spec, policy, measured, stopped=record if stopped else None, trigger=record)
    timings = {
        "seconds": time.perf_counter() - started,
        "reference_pairs_from_cache": reused,
        "seconds_measuring": time.perf_counter() - trained,
        "seconds_probing": guard.seconds if guard is not None else 0.0,
    }
    write_json(out / VOLATILE, timings | tries | spec.memory_record())


def packed_trainer(start: Start, tokenizer: Any, spec: TrainSpec, reporter: Reporter) -> tuple[PackedDPOTrainer, int]:
    """The packed trainer with its reference, and how many reference scores came from the cache."""
    plan, policy = spec.plan, start.policy
    loss = DpoLoss.of(plan.dpo)
    train = load_split(spec.train_folder, "train", scratch=spec.scratch)
    to_group = partial(dpo_group, max_length=plan.max_length)
    groups = [to_group(row) for row in train]
    if plan.dpo.router_balance:
        with autocast_of(plan):
            assert_routers_heard(policy.model, groups[0])
    reference = step_reference(start, spec)
    reused = 0
    if reference is None:
        scores, reused = score_reference(policy, groups, spec, reporter)
        for n, name in enumerate(REFERENCE_COLUMNS):
            train = train.add_column(name, [pair[n] for pair in scores])
    trainer = PackedDPOTrainer(
        model=policy.model,
        args=dpo_arguments(plan, spec.scratch),
        train_dataset=train,
        processing_class=tokenizer,
        data_collator=PackedCollator.of(policy.model, to_group, plan.token_budget, referenced=reference is None),
        loss=loss,
        reference=plan.dpo.reference,
        step_reference=reference,
        router_balance=plan.dpo.router_balance,
        keep_reference_adapter=plan.dpo.reference_strategy == "adapter" and plan.dpo.reference == "sft",
    )
    return trainer, reused


def go_on(trainer: PackedDPOTrainer | ClassicDPOTrainer, policy: Policy, release: Path) -> None:
    """Puts the adapter of a release on the policy. What was made of the start by now stays its reference.

    Raises:
        ConfigError: that adapter is of another shape; TRL's own trainer is asked for.
    """
    if not isinstance(trainer, PackedDPOTrainer):
        raise ConfigError("refresh.policy: only `dpo.trainer: packed` goes on from a release")
    trainer.go_on_from_elsewhere(AdapterState(policy.model))
    load_factors(policy.model, release)


def held_out_rows(spec: TrainSpec) -> Any:
    """The held-out split with its token ids, prompts, and ids of both, or None where the dataset has none."""
    if not has_split(spec.dataset, "eval"):
        return None
    return load_asked(spec.dataset, "eval", spec.scratch, [COUNTED_BY])


def collapse_guard(watched: Watched, guard: GuardSpec, spec: TrainSpec, reporter: Reporter) -> CollapseGuard:
    """The guard of this run. Half of its prompts are of training pairs and half are held out, where there are any."""
    plan = watched.plan
    room, train = plan.max_length - guard.probe_tokens, load_asked(spec.train_folder, "train", spec.scratch)
    prompts: list[list[int]] = []
    if guard.probe_prompts and watched.why_no_answers:
        reporter.log(f"dpo: no answers are sampled while it trains: {watched.why_no_answers}")
    elif guard.probe_prompts:
        held_out = held_out_rows(spec)
        theirs = [] if held_out is None else first_prompts(held_out, watched.chat, guard.probe_prompts // 2, room)
        prompts = [*first_prompts(train, watched.chat, guard.probe_prompts - len(theirs), room), *theirs]
        if not prompts:
            reporter.log(
                f"dpo: no answers are sampled while it trains: no prompt leaves room for {guard.probe_tokens} tokens "
                f"in {plan.max_length}"
            )
    tasks = []
    if guard.tasks is not None:
        for task in read_tasks(guard.tasks):
            try:
                ids = watched.chat.prompt_ids(task.messages)
            except RENDERING_ERRORS as error:
                raise ConfigError(f"checks.capability_probe: the chat template refuses a prompt: {error}") from None
            if len(ids) > room:
                raise ConfigError(
                    f"checks.capability_probe: a prompt of {len(ids)} tokens leaves no room for an answer"
                )
            tasks.append((task, ids))
    lengths = [[len(ids) for ids in train[name]] for name in ("chosen_ids", "rejected_ids")]
    chosen, rejected = (fmean(max(1, n) for n in column) for column in lengths)
    return CollapseGuard(watched, guard, reporter, prompts, tasks, (chosen, rejected))


def write_report(
    trainer: PackedDPOTrainer | ClassicDPOTrainer,
    spec: TrainSpec,
    policy: Policy,
    measured: Aftermath,
    *,
    stopped: Stop | None,
    trigger: Stop | None,
) -> None:
    """`metrics.jsonl`, and what the checks judge the run by."""
    plan = spec.plan
    model = trainer.accelerator.unwrap_model(trainer.model)
    rows = write_metrics(trainer.state.log_history, spec.output_dir / "metrics.jsonl")
    last = {key: fmean(row[key] for row in rows[-LAST_LOGS:]) for key in CLOSING}
    reference_logp = last["logps/chosen"] - last["rewards/chosen"] / plan.dpo.beta if plan.dpo.beta else float("nan")
    # With an `sft` term it depends on the data, and TRL's trainer does not tell its parts.
    expected = getattr(trainer, "expected_first_loss", None)
    if expected is None:
        expected = DpoLoss.of(plan.dpo).at_zero_margin()
    # TRL's own loss has the routers' balance in it.
    balance = plan.dpo.router_balance * rows[0].get("aux_loss", 0.0) if plan.dpo.trainer == "trl" else 0.0
    at_reference = getattr(trainer, "loss_at_reference", None)
    DpoReport(
        steps=trainer.state.global_step,
        first_loss=rows[0]["loss"] - balance if at_reference is None else at_reference,
        expected_first_loss=expected,
        first_loss_tokens=trainer.first_loss_tokens,
        last_loss=last["loss"],
        last_margin=last["rewards/margins"],
        last_accuracy=last["rewards/accuracies"],
        nll_ratio=last["logps/chosen"] / reference_logp,
        finite=all_finite(rows),
        lora_coverage=coverage(model, ADAPTER_NAME),
        lora_planned=plan.coverage,
        trainer=plan.dpo.trainer,
        kernels=policy.kernels,
        kernels_note=policy.note,
        stopped=stopped,
        trigger=trigger,
        held_out=measured.held_out,
        answers=measured.answers,
        capability=measured.capability,
        adapter_norm=measured.adapter_norm,
    ).write(spec.output_dir)
