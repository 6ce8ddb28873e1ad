"""Runs one stage: `python -m dpo_assets.training <stage> --spec spec.json`.

The only place where the worker meets Dagster, through dagster_pipes, and only when a Dagster run started it.
"""

from __future__ import annotations

import os

# Before anything that reads them: no network once the base model is local, no telemetry, no fork warnings.
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")  # No token of the user's home either.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Forwards of different sizes would leave holes that no later one fits; must be set before CUDA starts.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import argparse
import faulthandler
import gc
import importlib
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, get_args

from dpo_assets.artifact import seal
from dpo_assets.contract import (
    DISK_FULL_EXIT,
    END_NOW,
    EXPLAINED_EXIT,
    FAILURE_FILE,
    HEARTBEAT,
    PREEMPTED_EXIT,
    BenchmarkSpec,
    EvaluateSpec,
    Failure,
    GgufSpec,
    HarnessSpec,
    MergeSpec,
    PlannedSpec,
    RewardSpec,
    Spec,
    Stage,
    TasksSpec,
    TokenizeSpec,
    TrainSpec,
    VerifySpec,
    memory_failure,
)
from dpo_assets.disk import is_full
from dpo_assets.errors import ConfigError, GateError, Preempted
from dpo_assets.feedback.trained import write_trained_groups
from dpo_assets.training import alive
from dpo_assets.training.engines import unsloth
from dpo_assets.training.packages import versions

SPECS: dict[Stage, type[Spec]] = {
    "verify": VerifySpec,
    "tokenize": TokenizeSpec,
    "sft": TrainSpec,
    "dpo": TrainSpec,
    "merge": MergeSpec,
    "evaluate": EvaluateSpec,
    "gguf": GgufSpec,
    "reward": RewardSpec,
    "benchmark": BenchmarkSpec,
    "harness": HarnessSpec,
    "tasks": TasksSpec,
}


class Terminal:
    """Messages to standard output, for a stage run by hand."""

    def log(self, message: str) -> None:
        print(message, flush=True)


class DagsterRun:
    """Messages to the log of the Dagster run that started this worker."""

    def __init__(self, pipes: Any) -> None:
        self._pipes = pipes

    def log(self, message: str) -> None:
        self._pipes.log.info(message)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, EXPLAINED_EXIT with a failure file beside the spec, DISK_FULL_EXIT, PREEMPTED_EXIT after a
    checkpoint that SIGTERM asked for, or whatever killed the process."""
    try:
        return _main(argv)
    except Exception as error:
        if not is_full(error):
            raise
        traceback.print_exc()
        return DISK_FULL_EXIT


def _main(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dpo_assets.training", description=__doc__)
    parser.add_argument("stage", choices=get_args(Stage))
    parser.add_argument("--spec", type=Path, required=True, help="JSON file with the stage's spec")
    parser.add_argument("--follow-parent", action="store_true", help="end when standard input closes")
    args = parser.parse_args(argv)
    if args.follow_parent:
        _end_with_parent()
        # A process inherits what its parent ignores, and a worker ends when it is told to. Who ends a stage that takes
        # too long finds in its log what it was doing.
        for sign in (signal.SIGTERM, END_NOW):
            signal.signal(sign, signal.SIG_DFL)
            faulthandler.register(sign, chain=True)
        alive.show(args.spec.parent / HEARTBEAT)
    spec = SPECS[args.stage].model_validate_json(args.spec.read_bytes())
    with ExitStack() as stack:
        if "DAGSTER_PIPES_CONTEXT" in os.environ:
            from dagster_pipes import open_dagster_pipes

            reporter: Any = DagsterRun(stack.enter_context(open_dagster_pipes()))
        else:
            reporter = Terminal()
        try:
            _run(args.stage, spec, reporter)
        except Preempted as error:
            print(error, file=sys.stderr)
            return PREEMPTED_EXIT
        except GateError as error:
            failure = Failure(
                kind="gate",
                message=str(error),
                check=error.check,
                value=error.value,
                band=error.band,
                source=error.source,
                fix=error.fix,
            )
        except ConfigError as error:
            failure = Failure(kind="config", message=str(error))
        except (MemoryError, RuntimeError, OSError) as error:
            found = memory_failure(error)
            if found is None:
                raise
            failure = found
        else:
            return 0
    (args.spec.parent / FAILURE_FILE).write_text(failure.model_dump_json(), encoding="utf-8")
    print(failure.message, file=sys.stderr)
    return EXPLAINED_EXIT


def _run(stage: Stage, spec: Spec, reporter: Any) -> None:
    if any(spec.output_dir.iterdir()):
        raise ConfigError(f"output_dir {spec.output_dir} is not empty; a stage writes into a folder of its own.")
    if isinstance(spec, PlannedSpec) and unsloth.computes(spec.plan.kernels) and stage in ("sft", "dpo"):
        from dpo_assets.training.engines.unsloth.loading import prepare_unsloth

        # It patches what is imported after it. The compile cache outlives the run beside the reference cache, if any.
        cache = getattr(spec, "reference_cache", None)
        prepare_unsloth(cache.parent if cache else spec.scratch)
    with _no_collection():
        if stage != "tokenize":
            import torch
            import transformers

            from dpo_assets.training.models.devices import refuse_other_devices

            torch.set_num_threads(spec.threads)
            if isinstance(spec, PlannedSpec):
                refuse_other_devices(spec.plan, torch.cuda.device_count())
            transformers.logging.set_verbosity_error()
        stage_module = importlib.import_module(f"dpo_assets.training.stages.{stage}")
    stage_module.run(spec, reporter)
    if isinstance(spec, TrainSpec):
        write_trained_groups(spec.dataset, spec.output_dir)
    shutil.rmtree(spec.scratch, ignore_errors=True)
    seal(
        spec.output_dir, kind=spec.kind or stage, fingerprint=spec.fingerprint, inputs=spec.inputs, versions=versions()
    )


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection for a while.

    Importing torch, Transformers and TRL makes hundreds of thousands of objects that stay, and looking for garbage
    among them is a sixth of a worker's start.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _end_with_parent() -> None:
    """Ends this process group when standard input closes, which happens however the parent dies, SIGKILL included."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True, name="follow-parent").start()


if __name__ == "__main__":
    sys.exit(main())
