"""Learning rates that move from the first step on.

With w steps of warm-up, step k (from 0) has the share (k + 1) / (w + 1) of the peak rate while k < w, and the peak at
k = w. Transformers' own warm-up is k / w: its first step has rate zero and trains nothing on the pairs it takes, which
is half of a run of two steps.
"""

from __future__ import annotations

from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    SchedulerType,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from dpo_assets.training.private.transformers import mark_schedule_made

# Transformers' names. Its `constant` takes no notice of warm-up steps.
SCHEDULER_TYPES: dict[Literal["linear", "cosine", "constant"], str] = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
}


def make_schedule(kind: str, optimizer: Optimizer, warmup: int, steps: int) -> LRScheduler:
    """The schedule of a run of `steps` with `warmup` steps below the peak; `kind` is one of Transformers' names.

    Transformers' schedule with one more step of warm-up, entered at its second step: the warm-up becomes the rates
    above, and what follows it stays as it is.

    Raises:
        ValueError: for a kind that is none of SCHEDULER_TYPES.
    """
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    entered: dict[str, Any] = {"num_warmup_steps": warmup + 1, "last_epoch": 0}
    match SchedulerType(kind):
        case SchedulerType.LINEAR:
            made: LRScheduler = get_linear_schedule_with_warmup(optimizer, num_training_steps=steps + 1, **entered)
        case SchedulerType.COSINE:
            made = get_cosine_schedule_with_warmup(optimizer, num_training_steps=steps + 1, **entered)
        case SchedulerType.CONSTANT_WITH_WARMUP:
            made = get_constant_schedule_with_warmup(optimizer, **entered)
        case other:
            raise ValueError(f"there is no schedule `{other.value}` here; there are {', '.join(SCHEDULER_TYPES)}")
    return made


class MovingSchedule:
    """Mixin for transformers.Trainer: its schedule is the one of `make_schedule`."""

    # Provided by transformers.Trainer.
    args: Any
    optimizer: Any
    lr_scheduler: Any

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            moved = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = make_schedule(self.args.lr_scheduler_type, moved, warmup, num_training_steps)
            mark_schedule_made(self)
        made: LRScheduler = self.lr_scheduler
        return made
