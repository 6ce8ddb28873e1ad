"""What the packed SFT and DPO trainers share: a batch is one optimizer step, cut into forwards under a token budget.

The step's loss is weighted over the whole batch, not per forward, so the token budget decides memory and nothing else:
the gradient is that of one forward over all pairs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.planning.schedule import warmup_steps
from dpo_assets.recipe import OptimSection
from dpo_assets.training.engines.head import TokenScores
from dpo_assets.training.engines.transformers import engine_of
from dpo_assets.training.scoring.logprobs import score_tokens
from dpo_assets.training.snapshot import Snapshot
from dpo_assets.training.trainers.schedule import SCHEDULER_TYPES, MovingSchedule
from dpo_assets.training.trainers.step import STEP, Forward, Step

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
        "lr_scheduler_type": SCHEDULER_TYPES[section.schedule],
        "warmup_steps": warmup_steps(section.warmup_ratio, steps),
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "optim": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "seed": section.seed,
        "data_seed": section.seed,
        "bf16": plan.device == "cuda" and plan.compute == "bf16",
        "fp16": plan.device == "cuda" and plan.compute == "fp16",
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


def packed_arguments(plan: TrainingPlan) -> dict[str, Any]:
    """What differs for packed batches from TRL's own trainer: every engine recomputes layers by itself."""
    return {
        "gradient_checkpointing": False,
        "optim": "adamw_torch_fused" if plan.device == "cuda" else "adamw_torch",
    }


class PackedSteps(MovingSchedule):
    """Mixin for transformers.Trainer: runs the forwards of a step and adds up their weighted losses."""

    router_balance = 0.0  # What the routers' balancing loss is multiplied by, where it is added.

    # Provided by transformers.Trainer.
    accelerator: Any
    state: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._means = RunningMeans()

    def snapshot(self) -> Snapshot:
        """What was counted since the last log."""
        return self._means.snapshot()

    def take_up(self, snapshot: Snapshot) -> None:
        self._means.take_up(snapshot, self.accelerator.device)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: `resuming.Checkpoints` puts back all of a run when the training begins, its model too."""

    def begin_step(self, model: Any, step: Step) -> Step:
        """Hook before the first forward of a step that is on the device: the step with what its forwards need."""
        return step

    def forward_loss(self, model: Any, forward: Forward, step: Step) -> tuple[Tensor, Tensor]:
        """(what to differentiate, this forward's share of the step's loss). Both add up over the step's forwards."""
        raise NotImplementedError

    def scored(self, model: Any, forward: Forward, step: Step) -> tuple[TokenScores, Tensor | float]:
        """A forward's scores, and what the balance of its routers adds to what is differentiated.

        A forward counts by its tokens, a shared prompt's once. Each is balanced for itself, as the micro-batches of TRL
        are: how often an expert was chosen has no gradient that could be added up over forwards.
        """
        lm, autocast = self.accelerator.unwrap_model(model), self.accelerator.autocast()
        if not self.router_balance:
            return score_tokens(lm, forward.batch, autocast), 0.0
        with engine_of(lm).watching_routers() as routers:
            scores = score_tokens(lm, forward.batch, autocast)
        balance, tokens = routers.loss(), len(forward.batch.ids)
        self._means.add("aux_loss", balance * tokens, tokens)
        return scores, self.router_balance * balance * tokens / step.tokens

    def after_step_loss(self, loss: Tensor) -> None:
        """Hook on the whole step's loss, before the optimizer moves."""

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        model.train()
        device = self.accelerator.device
        moved: Step = inputs[STEP].to(device, non_blocking=True)
        engine_of(self.accelerator.unwrap_model(model)).renew()
        step = self.begin_step(model, moved)
        total = torch.zeros((), device=device)
        for forward in step.forwards:
            loss, share = self.forward_loss(model, forward, step)
            self.accelerator.backward(loss)
            total += share.detach()
        self.after_step_loss(total)
        return total

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Transformers counts padded tokens of `input_ids`, which a packed batch does not have."""
        return 0


class RunningMeans:
    """Sums on the device, read once per log: a read per step would wait for the device each time."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor | float] = {}

    def add(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """Adds a sum and the number of things it sums over. A count that is a plain number stays off the device."""
        total = total.detach().double()
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0.0) + count

    def snapshot(self) -> Snapshot:
        """The sums and counts as they are."""
        counts = {name: count for name, count in self._counts.items() if isinstance(count, Tensor)}
        tensors = {f"sum/{name}": total for name, total in self._sums.items()}
        tensors |= {f"count/{name}": count for name, count in counts.items()}
        return Snapshot(tensors, {"counts": {n: c for n, c in self._counts.items() if n not in counts}})

    def take_up(self, snapshot: Snapshot, device: torch.device) -> None:
        """Puts back what `snapshot` gave."""
        named = {name: tensor.to(device) for name, tensor in snapshot.tensors.items()}
        self._sums = {n.removeprefix("sum/"): t for n, t in named.items() if n.startswith("sum/")}
        self._counts = {n.removeprefix("count/"): t for n, t in named.items() if n.startswith("count/")}
        self._counts |= snapshot.values["counts"]

    def take(self) -> dict[str, float]:
        """The means since the last call."""
        names = list(self._sums)
        if not names:
            return {}
        device = self._sums[names[0]].device
        counts = [torch.as_tensor(self._counts[n], dtype=torch.double, device=device) for n in names]
        means = torch.stack([self._sums[n] for n in names]) / torch.stack(counts)
        self._sums.clear()
        self._counts.clear()
        return dict(zip(names, means.tolist(), strict=True))


def end_quietly(trainer: Any, callbacks: list[TrainerCallback]) -> None:
    """Adds callbacks and drops the one that prints every log to standard output."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        trainer.add_callback(callback)
