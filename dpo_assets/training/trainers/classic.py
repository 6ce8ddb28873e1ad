"""TRL's own DPOTrainer: the classic recipe, with its traps guarded.

The classic recipe, as users of TRL and Unsloth know it: a small micro-batch accumulated to the effective batch (2 x 8),
`ref_model=None`, the reference scored on the fly from a frozen copy of the starting adapter.

Import this module after `unsloth.loading.prepare_unsloth`: Unsloth replaces `trl.DPOTrainer`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOConfig

from dpo_assets.errors import ConfigError
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.planning.work import CLASSIC_MICRO_BATCH
from dpo_assets.recipe import DpoSection
from dpo_assets.training.engines import unsloth
from dpo_assets.training.engines.unsloth.loading import check_adapter_only
from dpo_assets.training.guard.finite import check_first_loss
from dpo_assets.training.private import trl as private
from dpo_assets.training.trainers.dpo import made_by_trl
from dpo_assets.training.trainers.losses import DpoLoss
from dpo_assets.training.trainers.packed import trainer_arguments
from dpo_assets.training.trainers.schedule import MovingSchedule

COLUMNS = ("prompt", "chosen", "rejected")


class ClassicDPOTrainer(MovingSchedule, trl.DPOTrainer):
    """TRL's DPOTrainer that checks its first loss before the first update.

    Args:
        check_first: called with the loss of the first step, before anything moved, and with the mean tokens of a pair's
            answers where layers compute in 16 bit, else 0.
        same_forward: score the reference by the forward that the policy takes, gradients recorded and thrown away.
            Compiled layers need it (`speedups`), and Unsloth without checkpointing: TRL scores the reference without
            gradients, where Unsloth computes whole compiled blocks that round differently
            (`unsloth.engine.reference_mode`), and evaluation mode is no way out for padded batches. The graph is freed
            before the policy's forward, so the peak stays the same.
    """

    def __init__(
        self, *args: Any, check_first: Callable[[float, float], None], same_forward: bool = False, **kwargs: Any
    ) -> None:
        with made_by_trl(self, kwargs["model"]):
            super().__init__(*args, **kwargs)
        private.check_balance(self)
        self._same_forward = same_forward
        self._first_losses: list[Tensor] = []
        self._first_answers: list[tuple[Tensor, int]] = []  # Of each forward of the first step: tokens, pairs.
        if same_forward:
            private.reference_in_batch(self)
        self.add_callback(_BeforeFirstUpdate(lambda: check_first(self._first_loss(), self.first_loss_tokens)))

    @property
    def first_loss_tokens(self) -> float:
        """Mean tokens of a pair's two answers in the first step, where layers compute in 16 bit; else 0."""
        if not (self.args.bf16 or self.args.fp16) or not self._first_answers:
            return 0.0
        return sum(float(tokens) for tokens, _ in self._first_answers) / sum(pairs for _, pairs in self._first_answers)

    def _first_loss(self) -> float:
        """Mean over the micro-batches of the first step; TRL weights them alike."""
        loss = float(torch.stack(self._first_losses).mean())
        self._first_losses.clear()
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.state.global_step == 0 and self.model.training:
            self._first_losses.append((result[0] if return_outputs else result).detach() - private.last_balance(self))
            mask = inputs["completion_mask"]
            self._first_answers.append((mask.sum(), len(mask) // 2))
        return result

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self._same_forward:
            chosen, rejected = self._reference_logps(model, inputs).chunk(2)
            inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        return super()._compute_loss(model, inputs, return_outputs)

    def _reference_logps(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Summed log-probabilities of the completions [2 * pairs], chosen first, detached."""
        scored = {name: value for name, value in inputs.items() if name not in private.NOT_MODEL_INPUTS}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        policy = self.accelerator.unwrap_model(self.model)
        adapter = private.REFERENCE_ADAPTER if private.REFERENCE_ADAPTER in policy.peft_config else None
        with private.using_adapter(policy, adapter), torch.set_grad_enabled(self.model.training):
            logps = private.token_logps(model, scored, labels)
        summed: Tensor = logps.detach().sum(dim=1)
        return summed


class _BeforeFirstUpdate(TrainerCallback):
    """Calls once, before the optimizer moves for the first time."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self.call()


def refuse_without_gpu(plan: TrainingPlan) -> None:
    """Refuses a plan that TRL's own trainer cannot follow. Unsloth puts a scorer of its own in the place of TRL's.

    Raises:
        ConfigError: on a CPU.
    """
    if plan.device == "cpu" and not unsloth.computes(plan.kernels):
        raise ConfigError("dpo.trainer `trl` needs a GPU: TRL 1.15 scores with a Triton kernel. Use `packed` on a CPU.")


def classic_trainer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, plan: TrainingPlan, output_dir: Path
) -> ClassicDPOTrainer:
    """TRL's trainer on `rows` (prompt, chosen, rejected as messages) with every value of the plan, read back.

    The model must carry its adapter already. Its reference is TRL's frozen copy of that adapter; with
    `dpo.reference: base` it is the bare base, and the first loss then tells whether training starts there.

    Raises:
        ConfigError: for a model without an adapter, rows that TRL would drop, a loss that TRL lacks, and an argument
            that came back changed (Unsloth's DPOConfig has other defaults, and its trainer changes values by itself).
    """
    check_adapter_only(model)
    if not len(rows) or missing_columns(rows):
        raise ConfigError(f"TRL needs rows with {', '.join(COLUMNS)}; here are {len(rows)} with {rows.column_names}")
    asked = classic_arguments(plan, output_dir)
    starts_as_base = _adapter_is_zero(model)
    trainer = ClassicDPOTrainer(
        model=model,
        ref_model=None,
        args=DPOConfig(**asked),
        train_dataset=rows.select_columns(list(COLUMNS)),
        processing_class=tokenizer,
        check_first=first_loss_check(plan.dpo),
        same_forward="compile" in plan.speedups or (unsloth.computes(plan.kernels) and not plan.gradient_checkpointing),
    )
    check_arguments(asked, trainer.args)
    if len(trainer.train_dataset) != len(rows):
        raise ConfigError(
            f"TRL dropped {len(rows) - len(trainer.train_dataset)} of {len(rows)} rows: their prompts leave no room in "
            f"{plan.max_length} tokens. Raise feedback.max_length, or screen them out as the dataset asset does."
        )
    # An adapter at zero is the base; its copy is then the better reference, because it takes the policy's kernels.
    if plan.dpo.reference == "base" and not starts_as_base:
        model.delete_adapter(private.REFERENCE_ADAPTER)
    return trainer


def first_loss_check(section: DpoSection) -> Callable[[float, float], None]:
    """The check of the first loss. With an `sft` term it depends on the data: then it need only be a number."""
    expected = DpoLoss.of(section).at_zero_margin()

    def check(loss: float, rounded_tokens: float) -> None:
        check_first_loss(loss, loss if expected is None else expected, section.reference, rounded_tokens)

    return check


def missing_columns(rows: Dataset) -> list[str]:
    """Columns that TRL needs and the rows lack."""
    return [name for name in COLUMNS if name not in rows.column_names]


def _adapter_is_zero(model: PeftModel) -> bool:
    """Whether every B is zero, so that the adapter adds nothing."""
    return not any(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name)


def classic_arguments(plan: TrainingPlan, output_dir: Path) -> dict[str, Any]:
    """Arguments of trl.DPOConfig: every one that decides the result is set, none is left to a library's default.

    Raises:
        ConfigError: for a micro-batch that does not divide the batch, and a loss that TRL lacks.
    """
    micro_batch, forwards = accumulation(plan)
    arguments = trainer_arguments(plan, plan.dpo, output_dir, plan.dpo_steps) | loss_arguments(plan.dpo)
    arguments |= {
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": forwards,
        "optim": optimizer_of(plan),
        "max_length": plan.max_length,
        "truncation_mode": "keep_start",
        "padding_free": False,
        "pad_to_multiple_of": None,
        "disable_dropout": True,
        "precompute_ref_log_probs": False,
        "sync_ref_model": False,
        "ld_alpha": None,
        "router_aux_loss_coef": plan.dpo.router_balance,  # Left out, TRL would take the base's own.
        "use_weighting": False,
        "activation_offloading": False,
        "use_liger_kernel": False,
        "torch_compile": False,
        "label_smoothing_factor": 0.0,
        "neftune_noise_alpha": None,
        "report_to": [],
        "auto_find_batch_size": False,
        "dataloader_drop_last": False,
        "train_sampling_strategy": "random",
    }
    if plan.gradient_checkpointing and not unsloth.computes(plan.kernels):
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return arguments


def accumulation(plan: TrainingPlan) -> tuple[int, int]:
    """(pairs of one forward, forwards of one optimizer step); their product is `dpo.batch_size`.

    `dpo.micro_batch_size` where it is set; otherwise the classic two pairs, or one where two do not divide the batch or
    do not fit the token budget (TRL pads both answers of each pair, at most to `max_length`).

    Raises:
        ConfigError: when the micro-batch does not divide the batch: the effective batch would be another one.
    """
    batch = plan.dpo.batch_size
    asked = plan.dpo.micro_batch_size
    if asked:
        if batch % asked:
            divisors = ", ".join(str(n) for n in range(1, batch + 1) if batch % n == 0)
            raise ConfigError(f"dpo.micro_batch_size {asked} does not divide dpo.batch_size {batch}; use {divisors}")
        return asked, batch // asked
    fitting = max(1, plan.token_budget // (2 * plan.max_length))
    micro_batch = CLASSIC_MICRO_BATCH if batch % CLASSIC_MICRO_BATCH == 0 and fitting >= CLASSIC_MICRO_BATCH else 1
    return micro_batch, batch // micro_batch


def loss_arguments(section: DpoSection) -> dict[str, Any]:
    """The loss in TRL's words.

    Raises:
        ConfigError: for `cdpo`: TRL 1.15 has none, and ignores label_smoothing for its sigmoid loss.
    """
    if "cdpo" in section.losses:
        raise ConfigError("TRL 1.15 has no loss `cdpo`. Set dpo.trainer to `packed`, or dpo.loss to `robust`.")
    return {
        "beta": section.beta,
        "loss_type": list(section.losses),
        "loss_weights": section.loss_weights or None,
        "label_smoothing": section.label_smoothing,
        "f_divergence_type": section.f_divergence,
        "f_alpha_divergence_coef": section.alpha,
        "discopop_tau": section.discopop_tau,
    }


def optimizer_of(plan: TrainingPlan) -> str:
    """The optimizer: 8-bit AdamW on Unsloth's kernels where bitsandbytes can run it, AdamW in fp32 otherwise.

    8-bit AdamW is what Unsloth's users train with. Unsloth's CPU backend replaces `adamw_torch` by its fused form, so
    that is what is asked of it there.
    """
    if not unsloth.computes(plan.kernels):
        return "adamw_torch"
    if plan.device == "cpu":
        return "adamw_torch_fused" if unsloth.is_imported() else "adamw_torch"
    return "adamw_8bit" if importlib.util.find_spec("bitsandbytes") else "adamw_torch"


def check_arguments(asked: Mapping[str, Any], resolved: Any) -> None:
    """Compares what was asked for with what a trainer will train with.

    Raises:
        ConfigError: with every field that came back changed.
    """
    changed = [
        f"{name}: asked {_plain(value)!r}, got {_plain(getattr(resolved, name, '<gone>'))!r}"
        for name, value in asked.items()
        if _plain(getattr(resolved, name, "<gone>")) != _plain(value)
    ]
    if changed:
        raise ConfigError(
            f"{type(resolved).__name__} did not keep these arguments: {'; '.join(changed)}. Ask for the value it keeps "
            "(bf16 and fp16 follow hardware.precision), or set hardware.kernels to `transformers`."
        )


def _plain(value: Any) -> Any:
    """The value behind an enum member."""
    return getattr(value, "value", value)
