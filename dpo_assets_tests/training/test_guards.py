"""What stops a run, and how soon."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig

from dpo_assets.checks.bands import first_loss_tolerance
from dpo_assets.errors import GateError
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.batches.data import dpo_group, load_split, sft_group
from dpo_assets.training.guard.finite import StopOnNonFinite, check_first_loss, first_non_finite
from dpo_assets.training.models.chat_format import load_tokenizer
from dpo_assets.training.models.loading import attach_adapter, load_base
from dpo_assets.training.policy import Policy
from dpo_assets.training.stages import dpo, sft
from dpo_assets.training.stages.dpo import dpo_arguments
from dpo_assets.training.stages.sft import PackedSFTTrainer
from dpo_assets.training.trainers import packed
from dpo_assets.training.trainers.dpo import PackedDPOTrainer
from dpo_assets.training.trainers.losses import DpoLoss, PairScores
from dpo_assets.training.trainers.packed import end_quietly, trainer_arguments
from dpo_assets.training.trainers.step import REFERENCE_COLUMNS, PackedCollator
from dpo_assets.training.trainers.strategies import score_reference
from dpo_assets_tests.training.conftest import Log, PlanMaker, SpecMaker

LN2 = math.log(2)
POISONED_AFTER = 2


class Poison(TrainerCallback):
    """Puts one NaN into a trained weight after a step, as a diverging update does."""

    def __init__(self, after: int = POISONED_AFTER) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.after:
            weight = next(p for n, p in model.named_parameters() if p.requires_grad and "lora_B" in n)
            with torch.no_grad():
                weight[0, 0] = torch.nan


def dpo_trainer(plan: TrainingPlan, model_folder: Path, dataset: Path, spec: Any, folder: Path) -> Trainer:
    model = attach_adapter(load_base(model_folder, plan), plan, None, seed=1, dropout=0.0)
    rows, to_group = load_split(dataset, "train"), partial(dpo_group, max_length=plan.max_length)
    scores, _ = score_reference(Policy(model, "transformers"), [to_group(row) for row in rows], spec, Log())
    for n, name in enumerate(REFERENCE_COLUMNS):
        rows = rows.add_column(name, [pair[n] for pair in scores])
    return PackedDPOTrainer(
        model=model,
        args=dpo_arguments(plan, folder),
        train_dataset=rows,
        data_collator=PackedCollator(to_group, plan.token_budget, referenced=True),
        processing_class=load_tokenizer(model_folder),
    )


def sft_trainer(plan: TrainingPlan, model_folder: Path, dataset: Path, spec: Any, folder: Path) -> Trainer:
    return PackedSFTTrainer(
        model=attach_adapter(load_base(model_folder, plan), plan, None, seed=1, dropout=0.0),
        args=TrainingArguments(**trainer_arguments(plan, plan.sft, folder, plan.sft_steps)),
        train_dataset=load_split(dataset, "train"),
        data_collator=PackedCollator(partial(sft_group, max_length=plan.max_length), plan.token_budget),
    )


@pytest.mark.parametrize("make", [dpo_trainer, sft_trainer])
def test_nan_in_the_weights_stops_a_run_at_the_next_logged_step(
    make: Callable[..., Trainer],
    plan_for: PlanMaker,
    train_spec: SpecMaker,
    model_folder: Path,
    dataset: Path,
    tmp_path: Path,
) -> None:
    plan = plan_for(dpo={"epochs": 2.0}, sft={"epochs": 2.0})
    trainer = make(plan, model_folder, dataset, train_spec(plan, tmp_path), tmp_path / "trainer")
    end_quietly(trainer, [StopOnNonFinite("finite"), Poison()])
    with pytest.raises(GateError) as stopped:
        trainer.train()
    assert trainer.state.global_step == POISONED_AFTER + 1 < trainer.state.max_steps
    assert stopped.value.check == "finite"
    assert stopped.value.value == "nan"
    assert f"step {POISONED_AFTER + 1}" in str(stopped.value)
    assert "learning rate" in stopped.value.fix


@pytest.mark.parametrize("stage", [dpo, sft])
def test_a_run_that_diverges_ends_in_the_finite_gate(
    stage: Any, plan_for: PlanMaker, train_spec: SpecMaker, tmp_path: Path
) -> None:
    section = {"learning_rate": 1e20, "warmup_ratio": 0.0, "epochs": 1.0}
    plan = plan_for(dpo=section, sft=section)
    with pytest.raises(GateError) as stopped:
        stage.run(train_spec(plan, tmp_path / "out"), Log())
    assert stopped.value.check in ("finite", "sft_finite")
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize(("stage", "check"), [(dpo, "finite"), (sft, "sft_finite")])
def test_an_update_after_the_last_loss_does_not_go_unseen(
    stage: Any,
    check: str,
    plan_for: PlanMaker,
    train_spec: SpecMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One step: every loss that is logged is that of the start."""
    section = {"batch_size": 24, "epochs": 1.0}
    plan = plan_for(dpo=section, sft=section)
    assert plan.dpo_steps == plan.sft_steps == 1

    def with_poison(trainer: Any, callbacks: list[TrainerCallback]) -> None:
        end_quietly(trainer, [*callbacks, Poison(after=1)])

    monkeypatch.setattr(stage, "end_quietly", with_poison)
    with pytest.raises(GateError, match="at the end of training") as stopped:
        stage.run(train_spec(plan, tmp_path / "out"), Log())
    assert stopped.value.check == check
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize("stage", [dpo, sft])
def test_nan_in_the_adapter_that_a_run_starts_from_is_called_by_its_name(
    stage: Any, plan_for: PlanMaker, train_spec: SpecMaker, sft_adapter: Path, tmp_path: Path
) -> None:
    """Not an unsupported architecture, and not a wrong reference: the way out of each is another one."""
    damaged = tmp_path / "adapter"
    shutil.copytree(sft_adapter, damaged)
    weights = load_file(damaged / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, damaged / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GateError) as stopped:
        stage.run(train_spec(plan_for(), tmp_path / "out", start_adapter=damaged), Log())
    assert stopped.value.check in ("finite", "sft_finite")


def test_transformers_may_not_hide_a_nan_loss(plan_for: PlanMaker, tmp_path: Path) -> None:
    plan = plan_for()
    for section, steps in ((plan.sft, plan.sft_steps), (plan.dpo, plan.dpo_steps)):
        assert trainer_arguments(plan, section, tmp_path, steps)["logging_nan_inf_filter"] is False
    assert (
        TrainingArguments(**trainer_arguments(plan, plan.sft, tmp_path, plan.sft_steps)).logging_nan_inf_filter is False
    )
    arguments = dpo_arguments(plan, tmp_path)
    assert isinstance(arguments, DPOConfig)
    assert arguments.logging_nan_inf_filter is False


def test_no_value_that_decides_the_result_is_left_to_a_library(plan_for: PlanMaker, tmp_path: Path) -> None:
    section = {
        "learning_rate": 3e-4, "epochs": 2.0, "batch_size": 6, "warmup_ratio": 0.25, "schedule": "cosine",
        "weight_decay": 0.02, "max_grad_norm": 0.7, "seed": 11,
    }  # fmt: skip
    plan = plan_for(dpo=section | {"beta": 0.35})
    arguments = dpo_arguments(plan, tmp_path)
    assert arguments.learning_rate == 3e-4
    assert arguments.max_steps == plan.dpo_steps == 8
    assert arguments.per_device_train_batch_size == 6
    assert arguments.gradient_accumulation_steps == 1
    assert arguments.warmup_steps == 2
    assert arguments.lr_scheduler_type == "cosine"
    assert arguments.weight_decay == 0.02
    assert arguments.max_grad_norm == 0.7
    assert (arguments.seed, arguments.data_seed) == (11, 11)
    assert arguments.beta == 0.35
    assert arguments.loss_type == ["sigmoid"]
    assert (arguments.max_length, arguments.truncation_mode) == (plan.max_length, "keep_start")
    assert arguments.disable_dropout
    assert not arguments.bf16
    assert not arguments.fp16
    assert arguments.report_to == []


def test_a_long_run_is_logged_about_as_often_as_a_short_one(plan_for: PlanMaker, tmp_path: Path) -> None:
    plan = plan_for()
    every = [trainer_arguments(plan, plan.dpo, tmp_path, steps)["logging_steps"] for steps in (1, 200, 2000)]
    assert every == [1, 1, 10]


def test_the_first_loss_of_a_report_is_that_of_the_first_step_however_rarely_a_run_logs(
    plan_for: PlanMaker, train_spec: SpecMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of 400 steps or more logs means over several steps, and after the first of them the policy has moved.

    The `reference_is_start` check is asked again with this number: a mean would block a good run, or pass a bad one.
    """
    monkeypatch.setattr(packed, "LOGGED_STEPS", 2)
    plan = plan_for(dpo={"epochs": 2.0, "warmup_ratio": 0.0})
    dpo.run(train_spec(plan, tmp_path / "out"), Log())
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["steps"] == 6
    assert abs(report["first_loss"] - LN2) <= first_loss_tolerance(math.log(2))


@pytest.mark.parametrize("off", [0.0, 4.9e-4, -4.9e-4])
def test_a_first_loss_inside_the_band_passes(off: float) -> None:
    check_first_loss(LN2 + off, LN2, "sft")


@pytest.mark.parametrize("loss", [LN2 + 5.1e-4, LN2 - 5.1e-4, 0.0])
@pytest.mark.parametrize("reference", ["sft", "base"])
def test_a_first_loss_outside_the_band_stops_with_a_way_out(loss: float, reference: str) -> None:
    with pytest.raises(GateError) as stopped:
        check_first_loss(loss, LN2, reference)
    assert stopped.value.check == "reference_is_start"
    assert ("dpo.reference" in stopped.value.fix) == (reference == "base")


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_first_loss_that_is_not_finite_is_a_divergence_and_not_a_wrong_reference(loss: float) -> None:
    """Deleting a cache of good scores does not help; `isfinite` comes first."""
    with pytest.raises(GateError) as stopped:
        check_first_loss(loss, LN2, "sft")
    assert stopped.value.check == "finite"


def test_only_numbers_can_be_not_finite() -> None:
    assert first_non_finite({"loss": 1.0, "step": 3, "note": "nan"}) is None
    assert first_non_finite({"loss": 1.0, "grad_norm": math.inf}) == ("grad_norm", math.inf)
    name, value = first_non_finite({"loss": math.nan, "grad_norm": math.inf}) or ("", 0.0)
    assert name == "loss"
    assert math.isnan(value)


def test_long_answers_in_16_bit_may_round_further_off_and_in_fp32_may_not() -> None:
    off = 1.2e-3  # Measured on an H100 with 6,300 tokens of answers a pair.
    check_first_loss(LN2 + off, LN2, "sft", rounded_tokens=6_300)
    for tokens in (0.0, 670.0):
        with pytest.raises(GateError, match="the reference is not the start of training"):
            check_first_loss(LN2 + off, LN2, "sft", rounded_tokens=tokens)


@pytest.mark.parametrize(("sixteen_bit", "expected"), [(True, 35.0), (False, 0.0)])
def test_a_trainer_counts_the_answers_of_its_first_step_in_16_bit_only(sixteen_bit: bool, expected: float) -> None:
    zeros = torch.zeros(2)
    first = PairScores(zeros, zeros, zeros, zeros, torch.tensor([10.0, 20.0]), torch.tensor([15.0, 25.0]))
    trainer = SimpleNamespace(
        args=SimpleNamespace(bf16=sixteen_bit, fp16=False), first_loss_tokens=0.0, _loss=DpoLoss(beta=0.1),
        _reference="sft", expected_first_loss=0.0,
    )  # fmt: skip
    PackedDPOTrainer._check_first(trainer, LN2, first)
    assert trainer.first_loss_tokens == expected
    assert trainer.expected_first_loss == pytest.approx(LN2)
