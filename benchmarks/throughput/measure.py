"""What all arms share: the block that is timed, the clock, the adapter's start, the gradient of the first step."""

from __future__ import annotations

import gc
import math
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.throughput.data import Row

CUDA = torch.cuda.is_available()
GIB = 2**30


@dataclass(frozen=True)
class Block:
    """One training run: `warmup` steps that are not timed, then `steps` that are."""

    warmup: int
    steps: int
    max_length: int
    micro_batch: int | None = None  # Peers only; ours cuts a step by its token budget.
    cap_gib: float | None = None
    max_grad_norm: float = 1.0
    gradient: Path | None = None  # Where the gradient of the first step goes.
    overrides: dict[str, Any] = field(default_factory=dict)  # Ours only: fields of the plan.


@dataclass
class Measured:
    """What a block gave. Times are seconds; memory is GiB of PyTorch's allocator over the whole block."""

    seconds: float
    step_seconds: list[float]
    losses: list[float]
    first_loss_minus_ln2: float
    peak_allocated_gib: float | None = None
    peak_reserved_gib: float | None = None
    setup_seconds: float = 0.0
    more: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        more: dict[str, Any] = values.pop("more")
        return values | more


class Arm(Protocol):
    """One way to train, with its model loaded once and trained many times from the same start."""

    def load(self) -> None: ...

    def run(self, rows: list[Row], block: Block) -> Measured: ...


@torch.no_grad()
def seed_adapter(model: Any) -> None:
    """The same adapter in every arm: A uniform from a generator keyed by the matrix's name, B zero.

    In place and past `.data`, so that whoever keeps a copy of the factors sees their version change.
    """
    seeded: set[str] = set()
    for name, parameter in model.named_parameters():
        if ".ref." in name:
            continue
        if "lora_A" in name:
            if _key(name) in seeded:
                raise RuntimeError(f"two LoRA matrices are called {_key(name)}: they would start alike")
            seeded.add(_key(name))
            generator = torch.Generator().manual_seed(zlib.crc32(_key(name).encode()))
            bound = 1 / math.sqrt(parameter.shape[1])
            value = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound
            parameter.copy_(value)
        elif "lora_B" in name:
            parameter.zero_()
    if not seeded:
        raise RuntimeError("no LoRA matrix found: the arms would not start alike")


def _key(name: str) -> str:
    """The name of a LoRA matrix without what its wrappers add: `layers.0.mlp.up_proj.lora_A.weight`."""
    at = name.find("layers.")
    if at < 0:
        raise RuntimeError(f"{name} is outside the decoder layers: no arm of this benchmark adapts that")
    return name[at:].replace(".default", "")


class Clock(TrainerCallback):
    """Times the steps after the warm-up. The device is waited for only at the two ends."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.started = self.ended = 0.0
        self._marks: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.warmup == 0:
            self._start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.warmup:
            self._start()
        elif state.global_step > self.warmup:
            self._mark()
            if state.global_step == state.max_steps:
                _synchronise()
                self.ended = time.perf_counter()

    def _start(self) -> None:
        _synchronise()
        self.started = time.perf_counter()
        self._mark()

    def _mark(self) -> None:
        if CUDA:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def step_seconds(self) -> list[float]:
        pairs = zip(self._marks[:-1], self._marks[1:], strict=True)
        return [a.elapsed_time(b) / 1e3 if CUDA else b - a for a, b in pairs]


class KeepGradient(TrainerCallback):
    """Writes the adapter's gradient of the first step, in fp32 under wrapper-free names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            named = kwargs["model"].named_parameters()
            found = {_key(name): p.grad.float().cpu() for name, p in named if "lora_" in name and p.grad is not None}
            save_file(found, self.path)


def train(trainer: Any, block: Block) -> tuple[float, list[float]]:
    """Seconds of the timed steps, and of each."""
    clock = Clock(block.warmup)
    trainer.add_callback(clock)
    if block.gradient is not None:
        trainer.add_callback(KeepGradient(block.gradient))
    trainer.train()
    return clock.ended - clock.started, clock.step_seconds()


@contextmanager
def memory_cap(cap_gib: float | None) -> Iterator[dict[str, float]]:
    """Bounds the allocator for a while; the yielded dict gets the peaks at the end."""
    peaks: dict[str, float] = {}
    free_memory()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        if cap_gib is not None:
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * GIB / device_bytes()))
    try:
        yield peaks
    finally:
        if CUDA:
            peaks["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
            peaks["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
            torch.cuda.set_per_process_memory_fraction(1.0)


def device_bytes() -> int:
    return int(torch.cuda.get_device_properties(0).total_memory)


def free_bytes() -> int:
    """What other processes leave of the device, this one's own share included."""
    free, _ = torch.cuda.mem_get_info()
    return int(free + torch.cuda.memory_reserved())


def free_memory() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def unwrap(trainer: Any) -> Any:
    """The trainer's model without the autocast that accelerate put around its forward, for the next trainer."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def _synchronise() -> None:
    if CUDA:
        torch.cuda.synchronize()
