"""Stage `dpo`: the packed trainer on TRL's DPOTrainer, or TRL's own."""

from __future__ import annotations

import time
from functools import partial
from statistics import fmean
from typing import Any

import torch
import trl
from peft import PeftModel
from torch import Tensor
from transformers import Trainer
from trl import DPOConfig
from trl.trainer.utils import disable_dropout_in_model

from dpo_assets.artifact import VOLATILE, write_json
from dpo_assets.checks import bands
from dpo_assets.contract import Progress, TrainSpec
from dpo_assets.errors import ConfigError
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.data import dpo_group, load_split
from dpo_assets.training.guards import StopOnNonFinite, check_first_loss
from dpo_assets.training.loading import attach_adapter, autocast_of, load_base, load_tokenizer, save_adapter
from dpo_assets.training.logprobs import assert_packing_is_exact, score_groups, score_tokens, sequence_logps
from dpo_assets.training.losses import LogRatios, per_pair_loss
from dpo_assets.training.packed import PackedCollator, PackedSteps, RunningMeans, end_quietly, trainer_arguments
from dpo_assets.training.packing import Group, PackedBatch
from dpo_assets.training.reference import ReferenceCache, Scores, reference_key, reference_scores
from dpo_assets.training.reporting import ProgressLines, Reporter, all_finite, write_metrics

LAST_LOGS = 5  # Closing values are means over this many logs: one batch of a small run is noise.
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


class PackedDPOTrainer(PackedSteps, trl.DPOTrainer):
    """TRL's DPOTrainer on packed batches with cached reference log-probabilities.

    Takes a dataset that is tokenized (`prompt_ids`, `chosen_ids`, `rejected_ids`) and carries `ref_chosen_logps` and
    `ref_rejected_logps`. Losses equal TRL's, and so do the names of its metrics.
    """

    def __init__(self, *args: Any, reference: str = "sft", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reference = reference
        self._means = RunningMeans()
        self._tokens = 0
        # TRL clones a PEFT policy as its reference. The scores are cached, so the clone is memory and a wrong file.
        if isinstance(self.model, PeftModel) and "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def forward_loss(self, model: Any, batch: PackedBatch, step: dict[str, Any]) -> Tensor:
        scores = score_tokens(self.accelerator.unwrap_model(model), batch, self.accelerator.autocast())
        logps = sequence_logps(scores, batch).view(-1, 2)
        reference = torch.stack([batch[name] for name in REFERENCE_COLUMNS], dim=1).to(logps)
        ratios = LogRatios(*(logps - reference).unbind(1))
        loss = per_pair_loss(self.loss_types[0], ratios, self.beta)
        self._count(scores, batch, logps.detach(), ratios)
        return loss.sum() / step["pairs"]

    def after_step_loss(self, loss: Tensor) -> None:
        if self.state.global_step == 0:
            check_first_loss(float(loss), self.loss_types[0], self._reference)

    def _count(self, scores: Any, batch: PackedBatch, logps: Tensor, ratios: LogRatios) -> None:
        """TRL's metrics under TRL's names, weighted by pairs and tokens."""
        chosen_token = batch["owner"] % 2 == 0
        chosen_count, count = chosen_token.sum(), len(scores.logps)
        pairs = len(logps)
        rewards_chosen, rewards_rejected = self.beta * ratios.chosen.detach(), self.beta * ratios.rejected.detach()
        add = self._means.add
        add("entropy", scores.entropy.sum(), count)
        add("logits/chosen", scores.mean_logits[chosen_token].sum(), chosen_count)
        add("logits/rejected", scores.mean_logits[~chosen_token].sum(), count - chosen_count)
        add("mean_token_accuracy", (scores.top1 & chosen_token).sum(), chosen_count)
        add("rewards/chosen", rewards_chosen.sum(), pairs)
        add("rewards/rejected", rewards_rejected.sum(), pairs)
        add("rewards/accuracies", (rewards_chosen > rewards_rejected).sum(), pairs)
        add("rewards/margins", (rewards_chosen - rewards_rejected).sum(), pairs)
        add("logps/chosen", logps[:, 0].sum(), pairs)
        add("logps/rejected", logps[:, 1].sum(), pairs)
        self._tokens += batch["logical"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        means = self._means.take()
        if means:
            means["num_tokens"] = float(self._tokens)
        Trainer.log(self, logs | means, start_time)


def dpo_arguments(plan: TrainingPlan, output_dir: Any) -> DPOConfig:
    """TRL's configuration with every value that decides the result set."""
    return DPOConfig(
        **trainer_arguments(plan, plan.dpo, output_dir, plan.dpo_steps),
        beta=plan.dpo.beta,
        loss_type=[plan.dpo.loss],
        label_smoothing=plan.dpo.label_smoothing,
        max_length=plan.max_length,
        truncation_mode="keep_start",
        disable_dropout=True,
        precompute_ref_log_probs=False,
    )


def run(spec: TrainSpec, reporter: Reporter) -> None:
    """Writes `adapter/`, `metrics.jsonl` and `report.json`."""
    plan, out = spec.plan, spec.output_dir
    started = time.perf_counter()
    if plan.dpo.trainer == "trl" and plan.device == "cpu":
        raise ConfigError("dpo.trainer `trl` needs a GPU: TRL 1.15 scores with a Triton kernel. Use `packed` on a CPU.")
    tokenizer = load_tokenizer(spec.base_model)
    train = load_split(spec.dataset, "train")
    to_group = partial(dpo_group, max_length=plan.max_length)
    packed = plan.dpo.trainer == "packed"
    base = load_base(spec.base_model, plan, packed=packed)
    model = attach_adapter(base, plan, spec.start_adapter, seed=plan.dpo.seed, dropout=0.0)
    # Before the reference is scored: an SFT adapter may bring its own dropout, and DPO trains without.
    disable_dropout_in_model(model)
    reused = 0
    if packed:
        groups = [to_group(row) for row in train]
        with autocast_of(plan):
            assert_packing_is_exact(model, max(groups, key=lambda group: group.longest_row))
        scores, reused = score_reference(model, groups, spec, reporter)
        for n, name in enumerate(REFERENCE_COLUMNS):
            train = train.add_column(name, [pair[n] for pair in scores])
        trainer: trl.DPOTrainer = PackedDPOTrainer(
            model=model,
            args=dpo_arguments(plan, out / "trainer"),
            train_dataset=train,
            processing_class=tokenizer,
            data_collator=PackedCollator(to_group, plan.token_budget, REFERENCE_COLUMNS),
            reference=plan.dpo.reference,
        )
    else:
        rows = load_split(spec.dataset, "train", ["prompt", "chosen", "rejected"])
        trainer = trl.DPOTrainer(
            model=model, args=dpo_arguments(plan, out / "trainer"), train_dataset=rows, processing_class=tokenizer
        )
    reporter.log(
        f"dpo: {len(train)} pairs, {plan.dpo_steps} steps, lr {plan.dpo.learning_rate:g}, beta {plan.dpo.beta:g}"
    )
    keys = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
    end_quietly(trainer, [StopOnNonFinite("finite"), ProgressLines(reporter, "dpo", keys)])
    trainer.train()

    save_adapter(trainer.accelerator.unwrap_model(trainer.model), out / "adapter")
    rows_logged = write_metrics(trainer.state.log_history, out / "metrics.jsonl")
    last = {key: fmean(row[key] for row in rows_logged[-LAST_LOGS:]) for key in rows_logged[-1]}
    reference_logp = last["logps/chosen"] - last["rewards/chosen"] / plan.dpo.beta
    report = {
        "steps": trainer.state.global_step,
        "first_loss": rows_logged[0]["loss"],
        "expected_first_loss": bands.FIRST_LOSS[plan.dpo.loss],
        "last_loss": last["loss"],
        "last_margin": last["rewards/margins"],
        "last_accuracy": last["rewards/accuracies"],
        "nll_ratio": last["logps/chosen"] / reference_logp,
        "finite": all_finite(rows_logged),
        "trainer": plan.dpo.trainer,
    }
    write_json(out / "report.json", report)
    write_json(out / VOLATILE, {"seconds": time.perf_counter() - started, "reference_pairs_from_cache": reused})


def score_reference(model: PeftModel, groups: list[Group], spec: TrainSpec, reporter: Reporter) -> tuple[Scores, int]:
    """Reference scores by the same kernels, dtype and packing as the policy, from the cache where known."""
    plan = spec.plan
    key = reference_key(
        base=spec.base_digest,
        start=spec.inputs.get("sft_checkpoint", "") if spec.start_adapter else "",
        reference=plan.dpo.reference,
        tokenizer=spec.tokenizer_digest,
        precision=plan.precision,
        kernels=plan.kernels,
        device=plan.device_name,
        torch=torch.__version__,
        max_length=plan.max_length,
        truncation="keep_start",
    )
    cache = ReferenceCache(spec.reference_cache, key) if spec.reference_cache else None

    def score(missing: Any) -> Scores:
        # Training mode: with dropout off it is the forward the policy will go through.
        model.train()
        chunk = max(1, len(missing) // 10)
        result: Scores = []
        with autocast_of(plan):
            for start in range(0, len(missing), chunk):
                logps, _ = score_groups(model, missing[start : start + chunk], plan.token_budget)
                result += list(zip(logps[::2], logps[1::2], strict=True))
                reporter.log(Progress(stage="reference", done=len(result), total=len(missing)).line())
        return result

    if plan.dpo.reference == "base":
        with model.disable_adapter():
            scores, reused = reference_scores(groups, cache, score)
    else:
        scores, reused = reference_scores(groups, cache, score)
    reporter.log(f"dpo: reference log-probabilities of {len(groups)} pairs, {reused} from the cache")
    return scores, reused
