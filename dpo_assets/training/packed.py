"""What the packed SFT and DPO trainers share: a batch is one optimizer step, cut into forwards under a token budget.

The step's loss is weighted over the whole batch, not per forward, so the token budget decides memory and nothing else:
the gradient is that of one forward over all pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.recipe import OptimSection
from dpo_assets.training.logprobs import to_device
from dpo_assets.training.packing import Group, PackedBatch, balanced, pack

LOGGED_STEPS = 200  # A run logs every step up to this many steps, and about this many times beyond.


def trainer_arguments(plan: TrainingPlan, section: OptimSection, output_dir: Path, steps: int) -> dict[str, Any]:
    """Arguments of transformers.TrainingArguments, every one that matters set: defaults differ between libraries."""
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": section.batch_size,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": section.epochs,
        "max_steps": steps,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": section.schedule,
        "warmup_steps": math.ceil(section.warmup_ratio * steps),
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "optim": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "seed": section.seed,
        "data_seed": section.seed,
        "bf16": plan.device == "cuda" and plan.precision in ("bf16", "4bit", "8bit") and torch.cuda.is_bf16_supported(),
        "fp16": plan.device == "cuda" and plan.precision == "fp16",
        "use_cpu": plan.device == "cpu",
        "gradient_checkpointing": plan.gradient_checkpointing,
        "logging_steps": max(1, steps // LOGGED_STEPS),
        "logging_first_step": True,  # The first loss must be the first step's, however rarely a run logs.
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": plan.device == "cuda",
        "dataloader_num_workers": 0,
    }


class PackedCollator:
    """Rows of a prepared dataset to one batch: a list of packed forwards with the extra columns of their pairs."""

    def __init__(self, to_group: Callable[[dict[str, Any]], Group], budget: int, extra: tuple[str, ...] = ()) -> None:
        self.to_group, self.budget, self.extra = to_group, budget, extra

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        groups = [self.to_group(row) for row in rows]
        forwards = []
        for run in balanced(list(zip(groups, rows, strict=True)), [g.tokens for g in groups], self.budget):
            batch = pack([group for group, _ in run])
            for name in self.extra:
                batch[name] = torch.tensor([row[name] for _, row in run])
            forwards.append(batch)
        return {"forwards": forwards, "pairs": len(rows), "targets": sum(len(f["target"]) for f in forwards)}


class PackedSteps:
    """Mixin for transformers.Trainer: runs the forwards of a step and adds up their weighted losses."""

    # Provided by transformers.Trainer.
    accelerator: Any
    optimizer: Any
    state: Any

    def forward_loss(self, model: Any, batch: PackedBatch, step: dict[str, Any]) -> Tensor:
        """This forward's share of the step's loss: a sum over its pairs or tokens, divided by the step's total."""
        raise NotImplementedError

    def after_step_loss(self, loss: Tensor) -> None:
        """Hook on the whole step's loss, before the optimizer moves."""

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        model.train()
        total = torch.zeros((), device=self.accelerator.device)
        for batch in inputs["forwards"]:
            loss = self.forward_loss(model, to_device(batch, self.accelerator.device), inputs)
            self.accelerator.backward(loss)
            total += loss.detach()
        self.after_step_loss(total)
        return total

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Transformers counts padded tokens of `input_ids`, which a packed batch does not have."""
        return 0


class RunningMeans:
    """Sums on the device, read once per log: a read per step would wait for the device each time."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """Adds a sum and the number of things it sums over."""
        total = total.detach().double()
        weight = torch.as_tensor(count, dtype=torch.double, device=total.device)
        if name in self._sums:
            before, seen = self._sums[name]
            total, weight = before + total, seen + weight
        self._sums[name] = (total, weight)

    def take(self) -> dict[str, float]:
        """The means since the last call."""
        means = {name: float(total / weight) for name, (total, weight) in self._sums.items()}
        self._sums.clear()
        return means


def end_quietly(trainer: Any, callbacks: list[TrainerCallback]) -> None:
    """Adds callbacks and drops the one that prints every log to standard output."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        trainer.add_callback(callback)
