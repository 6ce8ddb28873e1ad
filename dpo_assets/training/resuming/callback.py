"""The callback that writes a run's checkpoints, and takes the newest one up when the run begins."""

from __future__ import annotations

import copy
import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpo_assets.contract import CheckpointSpec, TrainSpec
from dpo_assets.errors import ConfigError, Preempted
from dpo_assets.feedback.dataset import split_digest
from dpo_assets.hashing import file_sha256
from dpo_assets.training.guard.finite import check_trained
from dpo_assets.training.packages import versions
from dpo_assets.training.private.transformers import check_running_loss
from dpo_assets.training.reporting import Reporter
from dpo_assets.training.resuming.folder import Checkpoint, CheckpointFolder, Reached, Tries
from dpo_assets.training.resuming.pace import Pace, most_again
from dpo_assets.training.resuming.preemption import Preemption
from dpo_assets.training.resuming.state import restore, restore_random, state_of
from dpo_assets.training.snapshot import Resumable, Snapshot

TRAINER_STATE = "trainer_state.json"  # Transformers' name; its loop reads the steps that were done from there.
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def identity_of(stage: Literal["sft", "dpo"], spec: TrainSpec, kernels: str) -> dict[str, str]:
    """What a stage must have in common with a checkpoint to go on from it.

    The token budget is no part: the pairs of a step are the same in smaller forwards.

    Args:
        kernels: the engine that computes the policy.
    """
    plan = spec.plan
    settings: Any = plan.sft_part() if stage == "sft" else plan.dpo_part()
    start = spec.start_adapter / ADAPTER_WEIGHTS if spec.start_adapter else None
    named = {
        "stage": stage,
        "fingerprint": spec.fingerprint,
        "inputs": _digest(spec.inputs),
        "data": spec.inputs.get("dpo_dataset") or split_digest(spec.dataset, "train"),
        "training settings": _digest(settings),
        "steps": str(plan.sft_steps if stage == "sft" else plan.dpo_steps),
        "start adapter": file_sha256(start) if start and start.is_file() else "none",
        "kernels": kernels,
        "device": plan.device_name,
        "packages": _digest(versions()),
    }
    if stage == "dpo":
        named["reference"] = f"{plan.dpo.reference}, {plan.dpo.reference_strategy}"
        # Limits are no part of an adapter's identity, but what was seen under them is in the guard's state.
        guard = spec.guard
        named["guard"] = _digest(guard and {**guard.identity(), **guard.limits.model_dump(), "stops": guard.stops})
    return named


def checkpoints_of(
    stage: Literal["sft", "dpo"], spec: TrainSpec, kernels: str, trainer: Any, parts: Mapping[str, Resumable],
    reporter: Reporter, began: float,
) -> Checkpoints | None:  # fmt: skip
    """The callback of a packed run; None where the spec asks for no checkpoints, or they cannot be written here.

    Args:
        kernels: the engine that computes the policy.
        parts: what has a state beside model and optimizer.
        began: when the stage did, on `time.perf_counter`.
    """
    if spec.checkpoints is None or not spec.checkpoints.share:
        return None
    try:
        check_running_loss()
    except ConfigError as why:
        reporter.log(f"{stage}: no checkpoints are written, so a try that is ended is lost: {why}")
        return None
    return Checkpoints(stage, spec.checkpoints, identity_of(stage, spec, kernels), trainer, parts, reporter, began)


def train_to_end(trainer: Any, checkpoints: Checkpoints | None) -> dict[str, int | float]:
    """Trains to the end, from the newest checkpoint where there is one.

    Returns:
        what the artefact keeps of its tries; empty without checkpoints.

    Raises:
        Preempted: when the process was told to end, after it wrote a checkpoint.
    """
    if checkpoints is None:
        trainer.train()
        return {}
    trainer.add_callback(checkpoints)
    with checkpoints.preemption.noticed():
        trainer.train(resume_from_checkpoint=checkpoints.resume_from)
    return checkpoints.record()


@dataclass(frozen=True)
class Writing:
    """A checkpoint on its way to the disk. `usable` is set when another process could go on from it, or never can."""

    step: int
    usable: threading.Event
    done: Future[None]


class Checkpoints(TrainerCallback):
    """Writes checkpoints at a pace that their cost decides, and one more when the process is told to end.

    It is added last: a checkpoint is written after a step was logged and judged by the others.

    Args:
        stage: what log lines begin with.
        identity: what a checkpoint must be of to be gone on from.
        parts: what else has a state, by name.
        began: when the stage did, on `time.perf_counter`.
    """

    def __init__(
        self,
        stage: str,
        spec: CheckpointSpec,
        identity: Mapping[str, str],
        trainer: Any,
        parts: Mapping[str, Resumable],
        reporter: Reporter,
        began: float,
    ) -> None:
        self.stage, self.trainer, self.parts, self.reporter = stage, trainer, dict(parts), reporter
        self.folder, self.reached = CheckpointFolder(spec.folder, identity, stage), Reached(spec.folder)
        self.pace, self.preemption = Pace(spec.share, spec.least_seconds, began), Preemption()
        self.found: Checkpoint | None = self.folder.newest(reporter)
        self._kept = Snapshot.read(self.found.path) if self.found else None
        self._awaits_log = False
        self.failed = 0  # Checkpoints that could not be written.
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Writing | None = None
        self._kept_step = self.found.step if self.found else 0  # What another process would go on after.
        self.tries: Tries = self.reached.begin(self.found.step if self.found else 0)

    @property
    def resume_from(self) -> str | None:
        """What `Trainer.train` is told to go on from."""
        return str(self.found.path) if self.found else None

    def record(self) -> dict[str, int | float]:
        """What the artefact keeps of its tries, outside its digest."""
        return {
            "times_resumed": self.tries.resumed,
            "steps_done_twice": self.tries.steps_again,
            "checkpoints": self.pace.written - self.failed,
            "checkpoints_failed": self.failed,
            "seconds_held_up_by_checkpoints": self.pace.spent,
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._kept is not None:
            restore(self.trainer, self._kept, self.parts)
            self.reporter.log(
                f"{self.stage}: goes on after step {state.global_step} of {state.max_steps} (times "
                f"resumed: {self.tries.resumed}, steps done twice: {self.tries.steps_again})"
            )
        self.pace.start(time.perf_counter(), state.global_step)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Between two epochs the generators go back before the next one's order is drawn."""
        if self._kept is not None:
            restore_random(self._kept)
            if float(state.epoch or 0.0).is_integer():
                self._kept = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Within an epoch they go back when the rest of its order is there."""
        if self._kept is not None:
            restore_random(self._kept)
            self._kept = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.reached.at(state.global_step)
        self._awaits_log = control.should_log
        if not control.should_log:
            self._between_steps(state, control)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._awaits_log:  # It is not what Transformers logs of the whole run at its end.
            self._awaits_log = False
            self._between_steps(state, control)

    def _between_steps(self, state: TrainerState, control: TrainerControl) -> None:
        """Raises:
        Preempted: when the process was told to end.
        """
        # After the last step, and after a guard's stop, training does not go on.
        over = state.global_step >= state.max_steps or control.should_training_stop
        asked = self.preemption.asked
        if asked and not over:
            self._write(state, last=True)
        elif not over:
            self._keep_up(state)
        if asked:
            self.settle()
            raise Preempted(
                f"stage `{self.stage}` was told to end (SIGTERM) and did so after step {state.global_step} of "
                f"{state.max_steps}; the next try goes on from its newest checkpoint."
            )

    def _keep_up(self, state: TrainerState) -> None:
        """Writes one where it is due, and waits where a kill would cost too many steps, as long as the pace allows."""
        step, steps = state.global_step, state.max_steps
        self._wait(step, steps, lambda writing, seconds: wait_for([writing.done], seconds))
        busy = self._writing is not None and not self._writing.done.done()
        if not busy and self.pace.due(time.perf_counter(), step, steps):
            self._write(state)
            self._wait(step, steps, lambda writing, seconds: writing.usable.wait(seconds))

    def _wait(self, step: int, steps: int, until: Callable[[Writing, float], object]) -> None:
        if self._writing is None or step + 1 - self._kept_step <= most_again(steps):
            return
        before = time.perf_counter()
        until(self._writing, self.pace.left(before))
        self.pace.waited(time.perf_counter() - before)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.settle()
        self._writer.shutdown()

    def settle(self) -> None:
        """Waits for the checkpoint that is being written, if any, and says so where it could not be."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        try:
            writing.done.result()
        except OSError as error:  # A full disk, above all. What was trained is still here.
            self.failed += 1
            self.reporter.log(
                f"{self.stage}: no checkpoint of step {writing.step} could be written to {self.folder.folder}: "
                f"{error}. Training goes on; a try that is ended now begins at the last one that was written"
            )

    def _write(self, state: TrainerState, last: bool = False) -> None:
        """Copies the state, and has it written while the training goes on: the copy is what a checkpoint costs it.

        Args:
            last: whether the process ends after it.

        Raises:
            GateError: when what is trained is not finite.
        """
        self.settle()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # Else the step at hand would count as the checkpoint's cost.
        before = time.perf_counter()
        # A log tells of a loss that is NaN, but a run does not log every step.
        check_trained("sft_finite" if self.stage == "sft" else "finite", self.trainer.model)
        whole, told = state_of(self.trainer, self.parts).copied(), copy.copy(state)
        told.log_history = [dict(row) for row in state.log_history]

        def fill(folder: Path) -> None:
            whole.write(folder)
            told.save_to_json(str(folder / TRAINER_STATE))

        usable = threading.Event()

        def write() -> None:
            before = self._kept_step
            try:
                made = self.folder.write(told.global_step, fill)
                self._kept_step = made.step
            finally:
                usable.set()
            try:
                self.folder.flush(made, at_once=last)
            except OSError:
                self._kept_step = before
                raise

        self._writing = Writing(told.global_step, usable, self._writer.submit(write))
        self.pace.wrote(before, time.perf_counter(), told.global_step)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
