"""The packed trainer against TRL's own DPOTrainer: same pairs, same start, same order, so the same run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset

from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.data import dpo_group, load_split
from dpo_assets.training.dpo import REFERENCE_COLUMNS, PackedDPOTrainer, dpo_arguments, score_reference
from dpo_assets.training.loading import attach_adapter, load_base
from dpo_assets.training.packed import PackedCollator, end_quietly
from dpo_assets.training.packing import Group, under_budget
from dpo_assets_tests.training.conftest import Log, PlanMaker, SpecMaker
from dpo_assets_tests.training.trl_dense_scoring import dense_scoring

LOSS_TOLERANCE, METRIC_TOLERANCE = 1e-5, 1e-4
FP32_ROUNDING = 1e-6  # Relative: a sum of log-probabilities is some hundreds of nats.
STEPS = 10
COMPARED = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
    "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm", "learning_rate",
)  # fmt: skip
History = list[dict[str, float]]
Runner = Callable[..., History]


@pytest.fixture(scope="module")
def plan(plan_for: PlanMaker) -> TrainingPlan:
    """Two epochs of five steps, the last of each smaller, at a learning rate that moves the loss."""
    plan = plan_for(dpo={"learning_rate": 1e-3, "batch_size": 5, "epochs": 2.0})
    assert plan.dpo_steps == STEPS
    return plan


@pytest.fixture(scope="module")
def messages(dataset: Path) -> Dataset:
    """The pairs as TRL takes them: messages, nothing tokenized."""
    return load_split(dataset, "train", ["prompt", "chosen", "rejected"])


@pytest.fixture(scope="module", params=["fresh adapter", "sft adapter"])
def start(request: pytest.FixtureRequest, sft_adapter: Path) -> Path | None:
    return sft_adapter if request.param == "sft adapter" else None


def train(trainer: trl.DPOTrainer) -> History:
    end_quietly(trainer, [])
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def policy(model_folder: Path, plan: TrainingPlan, start: Path | None, *, packed: bool) -> Any:
    return attach_adapter(load_base(model_folder, plan, packed=packed), plan, start, seed=plan.dpo.seed, dropout=0.0)


@pytest.fixture(scope="module")
def by_trl(
    plan: TrainingPlan, start: Path | None, model_folder: Path, messages: Dataset, tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[trl.DPOTrainer, History]:  # fmt: skip
    """TRL's own run, on rows that it tokenizes itself."""
    with dense_scoring():
        trainer = trl.DPOTrainer(
            model=policy(model_folder, plan, start, packed=False),
            args=dpo_arguments(plan, tmp_path_factory.mktemp("trl")),
            train_dataset=messages,
            processing_class=tokenizer,
        )
        return trainer, train(trainer)


@pytest.fixture
def run_packed(
    start: Path | None, model_folder: Path, dataset: Path, train_spec: SpecMaker, tokenizer: Any, tmp_path: Path
) -> Runner:  # fmt: skip
    """The packed run, put together as stage `dpo` does."""

    def run(plan: TrainingPlan) -> History:
        model = policy(model_folder, plan, start, packed=True)
        trl.trainer.dpo_trainer.disable_dropout_in_model(model)
        rows = load_split(dataset, "train")
        to_group = partial(dpo_group, max_length=plan.max_length)
        scores, _ = score_reference(model, [to_group(row) for row in rows], train_spec(plan, tmp_path), Log())
        for n, name in enumerate(REFERENCE_COLUMNS):
            rows = rows.add_column(name, [pair[n] for pair in scores])
        trainer = PackedDPOTrainer(
            model=model,
            args=dpo_arguments(plan, tmp_path / "trainer"),
            train_dataset=rows,
            processing_class=tokenizer,
            data_collator=PackedCollator(to_group, plan.token_budget, REFERENCE_COLUMNS),
        )
        return train(trainer)

    return run


def largest_difference(ours: History, theirs: History, name: str) -> float:
    assert len(ours) == len(theirs) == STEPS
    return max(abs(a[name] - b[name]) for a, b in zip(ours, theirs, strict=True))


def assert_same_metrics(ours: History, theirs: History) -> None:
    for name in COMPARED:
        largest = max(abs(row[name]) for row in theirs)
        assert largest_difference(ours, theirs, name) <= METRIC_TOLERANCE + FP32_ROUNDING * largest, name


def test_trl_tokenizes_the_same_messages_to_the_same_ids(by_trl: tuple[trl.DPOTrainer, History], dataset: Path) -> None:
    theirs, ours = by_trl[0].train_dataset, load_split(dataset, "train")
    assert len(theirs) == len(ours)
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert list(theirs[name]) == list(ours[name])


def test_losses_equal_those_of_trl_at_every_step(
    plan: TrainingPlan, by_trl: tuple[trl.DPOTrainer, History], run_packed: Runner, record_property: Callable[..., None]
) -> None:  # fmt: skip
    ours, theirs = run_packed(plan), by_trl[1]
    losses = [row["loss"] for row in theirs]
    assert max(losses) - min(losses) > 0.05, "a loss that stands still would prove nothing"
    off = largest_difference(ours, theirs, "loss")
    record_property("largest_loss_difference", off)
    assert off <= LOSS_TOLERANCE

    assert {name for row in theirs for name in row} <= {name for row in ours for name in row}
    assert_same_metrics(ours, theirs)


def test_losses_equal_those_of_trl_when_every_step_takes_several_forwards(
    plan: TrainingPlan, by_trl: tuple[trl.DPOTrainer, History], run_packed: Runner, groups: list[Group]
) -> None:  # fmt: skip
    sizes = sorted(group.tokens for group in groups)
    small = plan.model_copy(update={"token_budget": sizes[0] + sizes[1]})
    # Even the five smallest pairs do not fit into two forwards.
    assert len(list(under_budget(sizes[:5], sizes[:5], small.token_budget))) > 2
    ours, theirs = run_packed(small), by_trl[1]
    assert largest_difference(ours, theirs, "loss") <= LOSS_TOLERANCE
    assert_same_metrics(ours, theirs)


@pytest.mark.parametrize("start", ["fresh adapter"], indirect=True)
def test_gradient_checkpointing_changes_no_loss(
    plan: TrainingPlan, by_trl: tuple[trl.DPOTrainer, History], run_packed: Runner
) -> None:  # fmt: skip
    ours = run_packed(plan.model_copy(update={"gradient_checkpointing": True}))
    assert largest_difference(ours, by_trl[1], "loss") <= LOSS_TOLERANCE


@pytest.mark.parametrize("start", ["fresh adapter"], indirect=True)
def test_another_order_of_the_pairs_gives_other_losses(
    plan: TrainingPlan, by_trl: tuple[trl.DPOTrainer, History], run_packed: Runner
) -> None:  # fmt: skip
    """The comparisons above rest on equal data order; this shows that they would notice another one."""
    section = plan.dpo.model_copy(update={"seed": plan.dpo.seed + 1})
    ours = run_packed(plan.model_copy(update={"dpo": section}))
    assert largest_difference(ours, by_trl[1], "logps/chosen") > 1.0


@pytest.mark.parametrize("start", ["sft adapter"], indirect=True)
def test_the_packed_trainer_keeps_no_second_adapter(
    model_folder: Path, plan: TrainingPlan, start: Path | None, dataset: Path, tokenizer: Any, tmp_path: Path
) -> None:  # fmt: skip
    model = policy(model_folder, plan, start, packed=True)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    trainer = PackedDPOTrainer(
        model=model,
        args=dpo_arguments(plan, tmp_path),
        train_dataset=load_split(dataset, "train"),
        processing_class=tokenizer,
        data_collator=PackedCollator(partial(dpo_group, max_length=plan.max_length), plan.token_budget),
    )
    assert list(trainer.model.peft_config) == ["default"]
    assert trainer.model.active_adapters == ["default"]
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == trainable
    assert not [name for name, _ in trainer.model.named_parameters() if ".ref." in name]
    assert torch.is_grad_enabled()
