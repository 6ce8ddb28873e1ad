"""TRL's own trainer by the classic recipe: what is asked of it, what it must refuse, and that it learns the same."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
import yaml
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model_state_dict
from trl import DPOConfig

from dpo_assets.errors import ConfigError, GateError
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.recipe import parse_recipe
from dpo_assets.training.batches.data import load_split
from dpo_assets.training.models.loading import attach_adapter, load_base, save_adapter
from dpo_assets.training.trainers import classic
from dpo_assets.training.trainers.classic import (
    ClassicDPOTrainer,
    accumulation,
    check_arguments,
    classic_arguments,
    classic_trainer,
    loss_arguments,
    optimizer_of,
    refuse_without_gpu,
)
from dpo_assets.training.trainers.packed import end_quietly
from dpo_assets_tests.training.conftest import TRAIN_PAIRS, PlanMaker
from dpo_assets_tests.training.trl_dense_scoring import dense_scoring

EXAMPLE = Path(__file__).parents[2] / "examples" / "classic_unsloth.yaml"
LN2 = math.log(2)
LOSS_TOLERANCE = 1e-5
Run = Callable[..., ClassicDPOTrainer]


@pytest.fixture(autouse=True)
def _dense_scoring() -> Iterator[None]:
    with dense_scoring():
        yield


@pytest.fixture(scope="module")
def plan(plan_for: PlanMaker) -> TrainingPlan:
    """Three steps of eight pairs."""
    return plan_for(dpo={"trainer": "trl", "learning_rate": 1e-3, "warmup_ratio": 0.0})


@pytest.fixture(scope="module")
def rows(dataset: Path) -> Dataset:
    """The pairs as TRL takes them: messages, nothing tokenized."""
    return load_split(dataset, "train", ["prompt", "chosen", "rejected"])


@pytest.fixture
def make(model_folder: Path, rows: Dataset, tokenizer: Any, tmp_path: Path) -> Run:
    """A trainer of a plan: `make(plan, start=adapter)`."""

    def build(plan: TrainingPlan, start: Path | None = None) -> ClassicDPOTrainer:
        base = load_base(model_folder, plan)
        model = attach_adapter(base, plan, start, seed=plan.dpo.seed, dropout=0.0)
        trainer = classic_trainer(model, tokenizer, rows, plan, tmp_path / "trainer")
        end_quietly(trainer, [])
        return trainer

    return build


def losses(trainer: trl.DPOTrainer) -> list[float]:
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


# ------------------------------------------------------------------------------------------------- micro-batches


def batched(batch: int, micro: int | None = None, budget: int = 100_000) -> Any:
    dpo_section = SimpleNamespace(batch_size=batch, micro_batch_size=micro)
    return SimpleNamespace(dpo=dpo_section, token_budget=budget, max_length=1024)


def test_sixteen_pairs_are_eight_forwards_of_two() -> None:
    assert accumulation(batched(16)) == (2, 8)


@given(st.integers(1, 300), st.integers(1, 10_000))
def test_forwards_add_up_to_the_effective_batch(batch: int, budget: int) -> None:
    micro, forwards = accumulation(batched(batch, budget=budget))
    assert micro * forwards == batch
    assert micro == (2 if batch % 2 == 0 and budget >= 4 * 1024 else 1)


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_micro_batch_that_was_asked_for_is_kept_or_refused(batch: int, micro: int) -> None:
    if batch % micro == 0:
        assert accumulation(batched(batch, micro)) == (micro, batch // micro)
    else:
        with pytest.raises(ConfigError, match=f"{micro} does not divide dpo.batch_size {batch}; use 1"):
            accumulation(batched(batch, micro))


# ------------------------------------------------------------------------------------------------- arguments


def test_losses_reach_trl_in_its_own_words(plan_for: PlanMaker) -> None:
    section = plan_for(
        dpo={
            "loss": ["robust", "sft"],
            "loss_weights": [1.0, 0.5],
            "label_smoothing": 0.1,
            "f_divergence": "alpha_divergence",
            "alpha": 0.3,
        }
    ).dpo
    config = DPOConfig(output_dir="unused", use_cpu=True, bf16=False, **loss_arguments(section))
    assert (config.loss_type, config.loss_weights) == (["robust", "sft"], [1.0, 0.5])
    assert (config.label_smoothing, config.f_divergence_type, config.f_alpha_divergence_coef) == (
        0.1,
        "alpha_divergence",
        0.3,
    )


def test_a_loss_that_trl_lacks_is_refused_before_any_step(plan_for: PlanMaker, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no loss `cdpo`.*`packed`"):
        classic_arguments(plan_for(dpo={"loss": "cdpo", "label_smoothing": 0.1}), tmp_path)


def test_every_argument_is_read_back(plan: TrainingPlan, make: Run) -> None:
    trainer = make(plan)
    asked = classic_arguments(plan, Path(trainer.args.output_dir))
    check_arguments(asked, trainer.args)
    assert {"learning_rate", "weight_decay", "warmup_steps", "optim", "seed", "beta", "loss_type"} < asked.keys()


@pytest.mark.parametrize(
    ("name", "value"), [("learning_rate", 5e-5), ("optim", "adamw_8bit"), ("max_length", 7), ("loss_type", ["ipo"])]
)
def test_an_argument_that_a_library_changed_is_named(name: str, value: Any, plan: TrainingPlan, make: Run) -> None:
    trainer = make(plan)
    asked = classic_arguments(plan, Path(trainer.args.output_dir))
    setattr(trainer.args, name, value)
    with pytest.raises(ConfigError, match=f"did not keep these arguments: {name}: asked"):
        check_arguments(asked, trainer.args)


@pytest.mark.parametrize(
    ("kernels", "device", "found", "optimizer"),
    [
        ("unsloth", "cuda", True, "adamw_8bit"),
        ("unsloth", "cuda", False, "adamw_torch"),
        ("transformers", "cuda", True, "adamw_torch"),
        ("unsloth", "cpu", True, "adamw_torch"),
    ],
)
def test_the_8_bit_optimizer_is_used_only_where_it_can_run(
    kernels: str, device: str, found: bool, optimizer: str, plan_for: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classic.importlib.util, "find_spec", lambda name: object() if found else None)
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    assert optimizer_of(plan_for(kernels=kernels, device=device)) == optimizer


# ------------------------------------------------------------------------------------------------- refused


def test_a_cpu_is_refused_but_for_unsloths_scorer(plan: TrainingPlan) -> None:
    with pytest.raises(ConfigError, match=r"`trl` needs a GPU.*`packed`"):
        refuse_without_gpu(plan)
    refuse_without_gpu(plan.model_copy(update={"kernels": "unsloth"}))
    refuse_without_gpu(plan.model_copy(update={"device": "cuda"}))


def test_a_model_without_an_adapter_is_refused(
    plan: TrainingPlan, model_folder: Path, rows: Dataset, tokenizer: Any, tmp_path: Path
) -> None:
    """With a `peft_config` beside it, Unsloth's trainer would train every weight."""
    with pytest.raises(ConfigError, match=r"has no adapter.*`peft_config`"):
        classic_trainer(load_base(model_folder, plan), tokenizer, rows, plan, tmp_path)


def test_a_model_whose_base_would_be_trained_is_refused(
    plan: TrainingPlan, model_folder: Path, rows: Dataset, tokenizer: Any, tmp_path: Path
) -> None:
    model = attach_adapter(load_base(model_folder, plan), plan, None, seed=1, dropout=0.0)
    model.requires_grad_(True)
    with pytest.raises(ConfigError, match="parameters would be trained"):
        classic_trainer(model, tokenizer, rows, plan, tmp_path)


def test_rows_that_trl_would_drop_are_refused(
    plan: TrainingPlan, model_folder: Path, rows: Dataset, tokenizer: Any, tmp_path: Path
) -> None:
    """TRL drops a pair whose prompt fills max_length, and says nothing."""
    short = plan.model_copy(update={"max_length": 40})
    model = attach_adapter(load_base(model_folder, plan), plan, None, seed=1, dropout=0.0)
    with pytest.raises(ConfigError, match=rf"TRL dropped \d+ of {TRAIN_PAIRS} rows"):
        classic_trainer(model, tokenizer, rows, short, tmp_path)


def test_rows_without_a_column_are_refused(
    plan: TrainingPlan, model_folder: Path, rows: Dataset, tokenizer: Any, tmp_path: Path
) -> None:
    model = attach_adapter(load_base(model_folder, plan), plan, None, seed=1, dropout=0.0)
    for faulty in (rows.remove_columns("rejected"), rows.select([])):
        with pytest.raises(ConfigError, match="TRL needs rows with prompt, chosen, rejected"):
            classic_trainer(model, tokenizer, faulty, plan, tmp_path)


# ------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def in_one_forward(
    plan: TrainingPlan, model_folder: Path, rows: Dataset, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """The same run by TRL's bare trainer, each step in one forward."""
    out = tmp_path_factory.mktemp("bare")
    whole = {"per_device_train_batch_size": plan.dpo.batch_size, "gradient_accumulation_steps": 1}
    trainer = trl.DPOTrainer(
        model=attach_adapter(load_base(model_folder, plan), plan, None, seed=plan.dpo.seed, dropout=0.0),
        args=DPOConfig(**(classic_arguments(plan, out) | whole)),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    end_quietly(trainer, [])
    with dense_scoring():
        return losses(trainer)


@pytest.mark.parametrize("same_forward", [False, True])
def test_accumulated_micro_batches_learn_what_whole_batches_learn(
    same_forward: bool, plan: TrainingPlan, make: Run, in_one_forward: list[float]
) -> None:
    """However the reference is scored: by TRL, or by the policy's own forward with gradients recorded."""
    trainer = make(plan.model_copy(update={"kernels": "unsloth"}) if same_forward else plan)
    assert trainer.precompute_ref_logps == same_forward
    assert (trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps) == (2, 4)
    ours = losses(trainer)
    assert ours[0] == pytest.approx(LN2, abs=1e-6)
    assert max(ours) - min(ours) > 0.05, "a loss that stands still would prove nothing"
    assert ours == pytest.approx(in_one_forward, abs=LOSS_TOLERANCE)


def test_a_recorded_reference_leaves_no_gradient_in_the_reference(plan: TrainingPlan, make: Run) -> None:
    trainer = make(plan.model_copy(update={"kernels": "unsloth"}))
    reference = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".ref." in n}
    assert reference
    losses(trainer)
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[n], p) and after[n].grad is None for n, p in reference.items())
    assert {n for n, p in after.items() if p.requires_grad} == {n for n in after if "lora_" in n and ".default." in n}


def test_gradient_checkpointing_changes_no_loss(plan: TrainingPlan, make: Run, in_one_forward: list[float]) -> None:
    trainer = make(plan.model_copy(update={"gradient_checkpointing": True}))
    assert losses(trainer) == pytest.approx(in_one_forward, abs=LOSS_TOLERANCE)


def test_the_reference_is_the_sft_policy(plan: TrainingPlan, make: Run, sft_adapter: Path) -> None:
    assert losses(make(plan, start=sft_adapter))[0] == pytest.approx(LN2, abs=1e-6)


def test_a_fresh_adapter_starts_at_the_base_too(plan_for: PlanMaker, make: Run) -> None:
    plan = plan_for(dpo={"trainer": "trl", "reference": "base"}, dpo_steps=1)
    assert losses(make(plan))[0] == pytest.approx(LN2, abs=1e-6)


def test_a_wrong_reference_stops_the_run_before_the_first_update(
    plan: TrainingPlan, make: Run, sft_adapter: Path
) -> None:
    base = plan.dpo.model_copy(update={"reference": "base"})
    trainer = make(plan.model_copy(update={"dpo": base}), start=sft_adapter)
    before = {n: p.clone() for n, p in get_peft_model_state_dict(trainer.model).items()}
    with pytest.raises(GateError, match=r"the first loss is .*, not 0.693147") as caught:
        trainer.train()
    assert caught.value.check == "reference_is_start"
    assert abs(float(caught.value.value) - LN2) > 5e-4
    after = get_peft_model_state_dict(trainer.model)
    assert all(torch.equal(after[n], p) for n, p in before.items())


def test_the_reference_adapter_is_never_saved(plan: TrainingPlan, make: Run, tmp_path: Path) -> None:
    trainer = make(plan.model_copy(update={"dpo_steps": 1}))
    trainer.train()
    assert list(trainer.model.peft_config) == ["default", "ref"]
    save_adapter(trainer.accelerator.unwrap_model(trainer.model), tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").rglob("*")} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_the_example_is_the_classic_recipe() -> None:
    attributes = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))["attributes"]
    recipe = parse_recipe({name: value for name, value in attributes.items() if name != "name"})
    assert (recipe.dpo.trainer, recipe.hardware.kernels, recipe.hardware.precision) == ("trl", "unsloth", "4bit")
    assert accumulation(batched(recipe.dpo.batch_size)) == (2, 8)
