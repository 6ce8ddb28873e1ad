"""The packed trainer against TRL's own DPOTrainer: same pairs, same start, same order, so the same run."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import trl
import trl.trainer.utils as trl_utils
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR

from dpo_assets.planning.plan import TrainingPlan, steps_of
from dpo_assets.training.batches.data import dpo_group, load_split
from dpo_assets.training.batches.packing import under_budget
from dpo_assets.training.models.loading import attach_adapter, load_base
from dpo_assets.training.stages import dpo
from dpo_assets.training.stages.dpo import dpo_arguments
from dpo_assets.training.trainers.dpo import PackedDPOTrainer
from dpo_assets.training.trainers.packed import end_quietly
from dpo_assets.training.trainers.step import PackedCollator
from dpo_assets_tests.training.conftest import Log, PlanMaker, SpecMaker, small_part
from dpo_assets_tests.training.trl_dense_scoring import DenseLogProbs, dense_scoring

LOSS_TOLERANCE, METRIC_TOLERANCE = 1e-5, 1e-4
UNMOVED_STEPS = 1  # Steps before the first update.
FP32_ROUNDING = 1e-6  # Relative: a sum of log-probabilities is some hundreds of nats.
STEPS, PAIRS, SHORTER = 10, 18, 128
COMPARED = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
    "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm", "learning_rate",
)  # fmt: skip
History = list[dict[str, float]]
Runner = Callable[..., History]


@pytest.fixture(scope="module")
def plan(plan_for: PlanMaker) -> TrainingPlan:
    """Two epochs of five steps, the last of each smaller, at a learning rate that moves the loss."""
    plan = plan_for(dpo={"learning_rate": 1e-3, "batch_size": 4, "epochs": 2.0})
    steps = steps_of(PAIRS, plan.dpo.batch_size, plan.dpo.epochs)
    return plan.model_copy(update={"max_length": SHORTER, "dpo_steps": steps, "train_pairs": PAIRS})


@pytest.fixture(scope="module")
def pairs(prepared: tuple[pl.DataFrame, pl.DataFrame], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of shorter rows than elsewhere: this is the longest comparison of all."""
    folder = tmp_path_factory.mktemp("pairs")
    short = prepared[0].filter(pl.col("prompt_ids").list.len() <= SHORTER - 32)
    small_part(short, PAIRS).write_parquet(folder / "train.parquet")
    return folder


@pytest.fixture(scope="module")
def messages(pairs: Path) -> Dataset:
    """The pairs as TRL takes them: messages, nothing tokenized."""
    return load_split(pairs, "train", ["prompt", "chosen", "rejected"])


@pytest.fixture(scope="module", params=["fresh adapter", "sft adapter"])
def start(request: pytest.FixtureRequest, sft_adapter: Path) -> Path | None:
    return sft_adapter if request.param == "sft adapter" else None


class TrlAtTheSameRates(trl.DPOTrainer):
    """TRL's trainer, untouched but for its rates: a linear schedule whose first step moves (`training.schedule`)."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        warmup, steps = self.args.warmup_steps, num_training_steps

        def share(step: int) -> float:
            return (step + 1) / (warmup + 1) if step < warmup else (steps - step) / (steps - warmup)

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, share)
        return self.lr_scheduler


def policy(model_folder: Path, plan: TrainingPlan, start: Path | None, *, packed: bool) -> Any:
    return attach_adapter(load_base(model_folder, plan), plan, start, seed=plan.dpo.seed, dropout=0.0)


@pytest.fixture(scope="module")
def by_trl(
    plan: TrainingPlan,
    start: Path | None,
    model_folder: Path,
    messages: Dataset,
    tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[trl.DPOTrainer, History]:
    """TRL's own run, on rows that it tokenizes itself."""
    assert plan.dpo_warmup_steps > 0
    with dense_scoring():
        trainer = TrlAtTheSameRates(
            model=policy(model_folder, plan, start, packed=False),
            args=dpo_arguments(plan, tmp_path_factory.mktemp("trl")),
            train_dataset=messages,
            processing_class=tokenizer,
        )
        end_quietly(trainer, [])
        trainer.train()
    return trainer, [row for row in trainer.state.log_history if "loss" in row]


@pytest.fixture
def run_packed(start: Path | None, pairs: Path, train_spec: SpecMaker, tmp_path: Path) -> Runner:
    """Stage `dpo` with the packed trainer, and what it logged."""

    def run(plan: TrainingPlan) -> History:
        dpo.run(train_spec(plan, tmp_path, dataset=pairs, start_adapter=start), Log())
        return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    return run


def largest_difference(ours: History, theirs: History, name: str, after: int = 0) -> float:
    """Over the steps later than `after`."""
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, STEPS + 1))
    return max(abs(a[name] - b[name]) for a, b in zip(ours[after:], theirs[after:], strict=True))


def assert_same_metrics(ours: History, theirs: History) -> None:
    for name in COMPARED:
        largest = max(abs(row[name]) for row in theirs)
        # As long as policy and reference are equal every pair is a tie, which the last digits of its scores decide.
        after = UNMOVED_STEPS if name == "rewards/accuracies" else 0
        assert largest_difference(ours, theirs, name, after) <= METRIC_TOLERANCE + FP32_ROUNDING * largest, name


def test_trl_tokenizes_the_same_messages_to_the_same_ids(by_trl: tuple[trl.DPOTrainer, History], pairs: Path) -> None:
    theirs, ours = by_trl[0].train_dataset, load_split(pairs, "train")
    assert len(theirs) == len(ours)
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert list(theirs[name]) == list(ours[name])


def test_trl_has_its_own_kernel_back(by_trl: tuple[trl.DPOTrainer, History]) -> None:
    assert by_trl[1]
    assert trl_utils._ChunkedLogProbFunction is not DenseLogProbs


def test_losses_equal_those_of_trl_at_every_step(
    plan: TrainingPlan, by_trl: tuple[trl.DPOTrainer, History], run_packed: Runner
) -> None:
    ours, theirs = run_packed(plan), by_trl[1]
    losses = [row["loss"] for row in theirs]
    assert max(losses) - min(losses) > 0.05, "a loss that stands still would prove nothing"
    assert largest_difference(ours, theirs, "loss") <= LOSS_TOLERANCE

    assert {name for row in theirs for name in row} <= {name for row in ours for name in row}
    assert_same_metrics(ours, theirs)


def test_losses_equal_those_of_trl_when_every_step_takes_several_forwards(
    plan: TrainingPlan, by_trl: tuple[trl.DPOTrainer, History], run_packed: Runner, pairs: Path
) -> None:
    sizes = sorted(dpo_group(row, plan.max_length).tokens for row in load_split(pairs, "train"))
    small = plan.model_copy(update={"token_budget": sizes[0] + sizes[1]})
    # Even the four smallest pairs do not fit into one forward, and many pairs take one alone.
    assert len(list(under_budget(sizes[:4], sizes[:4], small.token_budget))) > 1
    assert small.token_budget < 2 * sizes[PAIRS // 2]
    ours, theirs = run_packed(small), by_trl[1]
    assert largest_difference(ours, theirs, "loss") <= LOSS_TOLERANCE
    assert_same_metrics(ours, theirs)


@pytest.mark.parametrize("start", ["fresh adapter"], indirect=True)
def test_gradient_checkpointing_changes_no_loss(
    plan: TrainingPlan, by_trl: tuple[trl.DPOTrainer, History], run_packed: Runner
) -> None:
    ours = run_packed(plan.model_copy(update={"gradient_checkpointing": True, "recomputed_layers": 3}))
    assert largest_difference(ours, by_trl[1], "loss") <= LOSS_TOLERANCE


@pytest.mark.parametrize("start", ["fresh adapter"], indirect=True)
def test_another_order_of_the_pairs_gives_other_losses(
    plan: TrainingPlan, by_trl: tuple[trl.DPOTrainer, History], run_packed: Runner
) -> None:
    """The comparisons above rest on equal data order; this shows that they would notice another one."""
    section = plan.dpo.model_copy(update={"seed": plan.dpo.seed + 1})
    ours = run_packed(plan.model_copy(update={"dpo": section}))
    assert largest_difference(ours, by_trl[1], "logps/chosen") > 1.0


@pytest.mark.parametrize("start", ["sft adapter"], indirect=True)
def test_the_packed_trainer_keeps_no_second_adapter(
    model_folder: Path, plan: TrainingPlan, start: Path | None, pairs: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = policy(model_folder, plan, start, packed=True)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    trainer = PackedDPOTrainer(
        model=model,
        args=dpo_arguments(plan, tmp_path),
        train_dataset=load_split(pairs, "train"),
        processing_class=tokenizer,
        data_collator=PackedCollator(partial(dpo_group, max_length=plan.max_length), plan.token_budget),
    )
    assert list(trainer.model.peft_config) == ["default"]
    assert trainer.model.active_adapters == ["default"]
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == trainable
    assert not [name for name, _ in trainer.model.named_parameters() if ".ref." in name]
