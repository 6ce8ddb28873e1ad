"""How a stage speaks to whoever runs it: lines of text and progress. The Pipes edge is in `__main__`."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpo_assets.artifact import without_nan
from dpo_assets.contract import Progress

PROGRESS_EVERY_SECONDS = 1.0


class Reporter(Protocol):
    """Where messages go: a Dagster run's log, or a terminal."""

    def log(self, message: str) -> None: ...


class ProgressLines(TrainerCallback):
    """A progress line about once a second, and always at the end."""

    def __init__(self, reporter: Reporter, stage: str, keys: dict[str, str]) -> None:
        self.reporter, self.stage, self.keys = reporter, stage, keys
        self._last = 0.0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        now = time.monotonic()
        too_soon = now - self._last < PROGRESS_EVERY_SECONDS and state.global_step < state.max_steps
        if logs is None or "loss" not in logs or too_soon:
            return
        self._last = now
        note = " ".join(f"{short} {logs[key]:.4g}" for key, short in self.keys.items() if key in logs)
        self.reporter.log(Progress(stage=self.stage, done=state.global_step, total=state.max_steps, note=note).line())


def write_metrics(history: list[dict[str, Any]], path: Path) -> list[dict[str, float]]:
    """The training log as JSON lines, one a logged step. Wall-clock values stay out: equal runs give equal files."""
    rows = [
        {k: v for k, v in row.items() if isinstance(v, int | float) and not k.endswith(("_runtime", "_per_second"))}
        for row in history
        if "loss" in row
    ]
    lines = [json.dumps(without_nan(row), sort_keys=True, allow_nan=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return rows


def all_finite(rows: list[dict[str, float]]) -> bool:
    """Whether every logged value is a finite number."""
    return all(math.isfinite(value) for row in rows for value in row.values())
