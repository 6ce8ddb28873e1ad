"""Learning rates: every schedule is warmed up, and every step moves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.optim import SGD

from dpo_assets.checks.bands import default_bands
from dpo_assets.checks.config import schedule_and_precision
from dpo_assets.checks.configuration import Configuration
from dpo_assets.contract import GuardSpec
from dpo_assets.planning.schedule import warmup_steps
from dpo_assets.recipe import ChecksSection
from dpo_assets.training.stages import sft
from dpo_assets.training.stages.sft import PackedSFTTrainer
from dpo_assets.training.trainers.classic import ClassicDPOTrainer
from dpo_assets.training.trainers.dpo import PackedDPOTrainer
from dpo_assets.training.trainers.packed import trainer_arguments
from dpo_assets.training.trainers.schedule import SCHEDULER_TYPES, MovingSchedule, make_schedule
from dpo_assets_tests.training.conftest import Log, PlanMaker, SpecMaker
from dpo_assets_tests.training.dpo_runs import LR, run_dpo, short_plan, write_pairs

PEAK = 0.5


def rates(schedule: Any, warmup: int, steps: int) -> list[float]:
    """The rate of every step of a run, as an optimizer meets them."""
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    made = make_schedule(SCHEDULER_TYPES[schedule], optimizer, warmup, steps)
    met = []
    for _ in range(steps):
        met.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        made.step()
    return met


def share(schedule: str, step: int, warmup: int, steps: int) -> float:
    """The rate of step `step`, from 0, over the peak: what the recipe's documentation promises."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / (steps - warmup)
    return {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[schedule]


@given(
    schedule=st.sampled_from(sorted(SCHEDULER_TYPES)), ratio=st.floats(0.0, 0.99), steps=st.integers(1, 60)
)  # fmt: skip
def test_every_step_of_every_schedule_moves_and_the_peak_is_reached(schedule: str, ratio: float, steps: int) -> None:
    warmup = warmup_steps(ratio, steps)
    met = rates(schedule, warmup, steps)
    assert met == pytest.approx([PEAK * share(schedule, k, warmup, steps) for k in range(steps)])
    assert min(met) > 0
    assert max(met) == met[warmup] == PEAK
    assert met[: warmup + 1] == sorted(met[: warmup + 1])


def test_a_schedule_that_is_none_of_the_recipes_is_refused() -> None:
    """Transformers' own `constant` would take no notice of the warm-up."""
    for kind in ("constant", "polynomial"):
        with pytest.raises(ValueError, match=f"no schedule `{kind}`"):
            make_schedule(kind, SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), 1, 2)


@pytest.mark.parametrize("trainer", [PackedSFTTrainer, PackedDPOTrainer, ClassicDPOTrainer])
def test_every_trainer_takes_these_rates(trainer: type, plan_for: PlanMaker, tmp_path: Path) -> None:
    """Before any library's: the method that makes a trainer's schedule is this project's."""
    assert trainer.create_scheduler is MovingSchedule.create_scheduler  # type: ignore[attr-defined]
    plan = plan_for(dpo={"schedule": "constant"}, sft={"schedule": "cosine"})
    for section, kind in ((plan.dpo, "constant_with_warmup"), (plan.sft, "cosine")):
        assert trainer_arguments(plan, section, tmp_path, 4)["lr_scheduler_type"] == kind


@pytest.mark.parametrize("schedule", sorted(SCHEDULER_TYPES))
def test_a_dpo_run_is_warmed_up_by_every_schedule(
    schedule: str, plan_for: PlanMaker, train_spec: SpecMaker, prepared: Any, tmp_path: Path
) -> None:
    """Half of four steps; their rates stand in the metric log, and the first of them changes the policy already."""
    section = {"warmup_ratio": 0.5, "schedule": schedule, "batch_size": 2, "epochs": 1.0}
    plan = short_plan(plan_for, section, steps=4)
    run = run_dpo(train_spec(plan, tmp_path / "out", dataset=write_pairs(prepared[0], tmp_path, count=8)))
    assert [row["learning_rate"] for row in run.rows] == pytest.approx(
        [LR * share(schedule, k, 2, 4) for k in range(4)]
    )
    # The second step is scored by what the first one left.
    assert run.rows[0]["rewards/chosen"] == pytest.approx(0.0, abs=1e-6)
    assert abs(run.rows[1]["rewards/chosen"]) > 1e-6


def test_both_steps_of_a_run_of_two_train(plan_for: PlanMaker, train_spec: SpecMaker, tmp_path: Path) -> None:
    """The first had rate zero: half of the pairs taught nothing."""
    plan = plan_for(sft={"batch_size": 12, "epochs": 1.0, "warmup_ratio": 0.1})
    assert plan.sft_steps == 2
    sft.run(train_spec(plan, tmp_path), Log())
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    peak = plan.sft.learning_rate
    assert [row["learning_rate"] for row in log] == pytest.approx([peak / 2, peak])
    # AdamW moves a factor by about the rate at each step, and B starts at zero.
    moved = {n: v for n, v in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items() if "lora_B" in n}
    assert max(float(v.abs().max()) for v in moved.values()) > 1.2 * peak


def test_guard_trainer_and_check_mean_the_same_warm_up(plan_for: PlanMaker, tmp_path: Path) -> None:
    plan = plan_for(dpo={"warmup_ratio": 0.1, "schedule": "constant", "batch_size": 12})
    assert plan.dpo_steps == 2
    asked = trainer_arguments(plan, plan.dpo, tmp_path, plan.dpo_steps)
    guard = GuardSpec.of(plan, default_bands(), ChecksSection())
    assert asked["warmup_steps"] == guard.limits.warmup_steps == plan.dpo_warmup_steps == 1
    assert "warm-up 10% (1 of 2 steps)" in str(
        schedule_and_precision(Configuration.of_plan(plan), default_bands()).value
    )
