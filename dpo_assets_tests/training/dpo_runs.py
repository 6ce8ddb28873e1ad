"""Short runs of stage `dpo` on a handful of real pairs, and what came out of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors.torch import load_file
from torch import Tensor

from dpo_assets.contract import TrainSpec
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.batches.batch import PackedBatch
from dpo_assets.training.batches.data import dpo_group, load_split
from dpo_assets.training.stages import dpo
from dpo_assets.training.trainers.step import PackedCollator
from dpo_assets_tests.training.conftest import Log, PlanMaker, small_part

ROW = 96  # Tokens of a row: long enough for answers of several lengths, short enough for many runs.
PAIRS, LR = 6, 1e-3
FORWARD = 260  # Tokens: it takes two pairs or one, so that the forwards of a step are of different weight.


@dataclass(frozen=True)
class Run:
    """What one run of the stage left."""

    folder: Path
    rows: list[dict[str, float]]  # One per step.
    report: dict[str, Any]
    adapter: dict[str, Tensor]
    messages: list[str]

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows]

    @property
    def notes(self) -> list[str]:
        """Why other kernels than the plan's computed the run."""
        return [message for message in self.messages if "computed by" in message]


def run_dpo(spec: TrainSpec) -> Run:
    log, out = Log(), spec.output_dir
    dpo.run(spec, log)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    return Run(out, [json.loads(line) for line in lines], report, adapter, log.messages)


def write_pairs(prepared: pl.DataFrame, folder: Path, count: int = PAIRS) -> Path:
    """A dataset of `count` pairs with short prompts."""
    short = prepared.filter(pl.col("prompt_ids").list.len() <= ROW - 32)
    small_part(short, count).write_parquet(folder / "train.parquet")
    return folder


def without_dropout(adapter: Path, folder: Path) -> Path:
    """The adapter as if it had been trained without dropout, in a new `folder`."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_dropout": 0.0}), encoding="utf-8")
    return folder


def short_plan(plan_for: PlanMaker, dpo: dict[str, Any], *, steps: int, **resolved: Any) -> TrainingPlan:
    """A plan of `steps` steps that all learn: at the peak rate from the first on."""
    section = {"learning_rate": LR, "batch_size": PAIRS, "warmup_ratio": 0.0, **dpo}
    more = {"max_length": ROW, "train_pairs": PAIRS, "dpo_steps": steps, "token_budget": FORWARD, **resolved}
    return plan_for(dpo=section, **more)


def forwards_of(folder: Path, plan: TrainingPlan) -> list[PackedBatch]:
    """The forwards of a step over the whole dataset."""
    collator = PackedCollator(lambda row: dpo_group(row, plan.max_length), plan.token_budget)
    return [forward.batch for forward in collator.step(list(load_split(folder, "train"))).forwards]


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Between the factors of two adapters."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def root_mean_square(adapter: dict[str, Tensor]) -> float:
    """Of all factors together."""
    return float(torch.cat([values.flatten() for values in adapter.values()]).pow(2).mean().sqrt())
