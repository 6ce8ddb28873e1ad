"""How long a run had a GPU to itself, as tags of the run: what a budget of GPU hours is counted from.

A worker's time counts from the moment at which it has its GPU, so waiting for it costs nothing, until the worker has
ended, however it ended. A run that was killed cannot tell its end: what it had open is counted until the run ended.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import dagster as dg

_OF = "dpo_assets/gpu_of."  # Tag, with the name of a pipeline behind it: that it used a GPU in this run.
_STEP = "dpo_assets/gpu_seconds."  # Tag, with the name of the step behind it.
_WRITTEN = re.compile(r"(\d+(?:\.\d+)?)(?: and since (\d+(?:\.\d+)?))?")


@dataclass(frozen=True)
class StepTime:
    """Seconds that one step had a GPU, and since when it has one now (seconds since the epoch)."""

    seconds: float = 0.0
    since: float | None = None

    @classmethod
    def of(cls, text: str | None) -> Self:
        """As it was written; none of what is no such text, as of a tag that somebody set by hand."""
        match = _WRITTEN.fullmatch(text or "")
        return cls(float(match[1]), float(match[2]) if match[2] else None) if match else cls()

    def __str__(self) -> str:
        return f"{self.seconds:.1f}" + (f" and since {self.since:.1f}" if self.since is not None else "")

    def until(self, end: float) -> float:
        """Seconds in all by `end`."""
        return self.seconds + (max(0.0, end - self.since) if self.since is not None else 0.0)


def gpu_runs(pipeline: str) -> Mapping[str, str]:
    """The tags by which runs are found in which the pipeline used a GPU; there can be other pipelines in them."""
    return {f"{_OF}{pipeline}": "yes"}


def gpu_seconds(tags: Mapping[str, str], pipeline: str, end: float) -> float:
    """Seconds that the pipeline had GPUs in a run with these tags by `end`, the run's own or now.

    Of several GPUs at a time each counts, and of several pipelines in one run each for itself.
    """
    steps = f"{_STEP}{pipeline}__"  # No name of a step has two underscores in it, but that of a pipeline may.
    texts = (text for name, text in tags.items() if name.startswith(steps) and "__" not in name[len(steps) :])
    return sum(StepTime.of(text).until(end) for text in texts)


@contextmanager
def gpu_timed(context: dg.AssetExecutionContext, gpu: str, now: Callable[[], float] = time.time) -> Iterator[None]:
    """Counts the time inside as GPU time of the step's run; without a GPU there is nothing to count."""
    if not gpu:
        yield
        return
    instance, run_id, step = context.instance, context.run_id, context.op_execution_context.op.name
    tag, run = f"{_STEP}{step}", instance.get_run_by_id(run_id)
    began = now()
    # What is open belongs to a try of this step whose process was killed.
    before = StepTime.of(run.tags.get(tag) if run is not None else None).until(began)
    instance.add_run_tags(run_id, {**gpu_runs(step.rpartition("__")[0]), tag: str(StepTime(before, began))})
    try:
        yield
    finally:
        instance.add_run_tags(run_id, {tag: str(StepTime(before + max(0.0, now() - began)))})
