"""The packed trainer with every loss of the family; its metrics, its forwards, and the first steps it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from dpo_assets.checks.losses import LOSSES
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.recipe import DpoSection
from dpo_assets.training.batches.batch import PackedBatch
from dpo_assets.training.batches.data import dpo_group, load_split
from dpo_assets.training.batches.packing import balanced
from dpo_assets.training.engines.base import attach_engine
from dpo_assets.training.engines.head import TokenScores
from dpo_assets.training.engines.transformers import TransformersEngine
from dpo_assets.training.models.loading import attach_adapter, load_base
from dpo_assets.training.models.structure import causal_lm
from dpo_assets.training.private.trl import REFERENCE_ADAPTER
from dpo_assets.training.stages.dpo import dpo_arguments, packed_trainer
from dpo_assets.training.trainers.losses import DpoLoss
from dpo_assets.training.trainers.packed import RunningMeans, end_quietly
from dpo_assets.training.trainers.strategies import load_start
from dpo_assets_tests.training.conftest import Log, PlanMaker, SpecMaker
from dpo_assets_tests.training.dpo_runs import (
    LR,
    PAIRS,
    Run,
    forwards_of,
    largest_difference,
    root_mean_square,
    run_dpo,
    short_plan,
    write_pairs,
)
from dpo_assets_tests.training.trl_dense_scoring import dense_scoring

STEPS = 3
ONE_FORWARD = 100_000  # Tokens: no step is that large.
TOLERANCE = 1e-5  # Of losses, relative above 1: sums in another order, in fp32.


@pytest.fixture(scope="module")
def pairs(prepared: tuple[pl.DataFrame, pl.DataFrame], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(prepared[0], tmp_path_factory.mktemp("pairs"))


# --- every loss ---------------------------------------------------------------------------------------------------

SINGLE: dict[str, dict[str, Any]] = {
    name: {"loss": name, "label_smoothing": 0.0 if facts.smoothing == "ignored" else 0.1}
    for name, facts in LOSSES.items()
    if name != "sft"
}
MIXED: dict[str, dict[str, Any]] = {
    "sigmoid+sft": {"loss": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "sigmoid+bco_pair+sft": {"loss": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "aot+sft": {"loss": ["aot", "sft"], "loss_weights": [1.0, 0.5]},
    "sigmoid, forward KL": {"loss": "sigmoid", "f_divergence": "forward_kl"},
}
FAMILY = SINGLE | MIXED
# At its usual temperature the slope of discopop at zero margin is positive, with a minimum just below: small steps.
SINGLE["discopop"]["learning_rate"] = LR / 10
COUPLED = [name for name in FAMILY if name.startswith("aot")]


@dataclass(frozen=True)
class Twice:
    """One loss, trained with a step in one forward and with a step in several."""

    name: str
    plan: TrainingPlan
    one: Run
    several: Run


@pytest.fixture(scope="module", params=list(FAMILY))
def twice(
    request: pytest.FixtureRequest,
    plan_for: PlanMaker,
    train_spec: SpecMaker,
    pairs: Path,
    sft_adapter: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Twice:
    """Every step is over all pairs, so that losses of one run can be compared with each other."""
    plan = short_plan(plan_for, FAMILY[request.param], steps=STEPS)
    runs = [
        run_dpo(train_spec(p, tmp_path_factory.mktemp("run"), dataset=pairs, start_adapter=sft_adapter))
        for p in (plan.model_copy(update={"token_budget": ONE_FORWARD}), plan)
    ]
    return Twice(request.param, plan, *runs)


def test_the_small_budget_cuts_a_step_into_several_forwards_of_different_weight(
    plan_for: PlanMaker, pairs: Path
) -> None:
    """The tests below rest on it."""
    plan = short_plan(plan_for, {}, steps=STEPS)
    sizes = [len(batch.scored.lengths) // 2 for batch in forwards_of(pairs, plan)]
    assert len(sizes) >= 3
    assert len(set(sizes)) > 1
    assert sum(sizes) == PAIRS
    assert len(forwards_of(pairs, plan.model_copy(update={"token_budget": ONE_FORWARD}))) == 1


def test_the_first_loss_is_the_loss_at_zero_margin(twice: Twice, pairs: Path) -> None:
    loss = DpoLoss.of(twice.plan.dpo)
    expected = loss.at_zero_margin()
    if expected is None:
        groups = [dpo_group(row, twice.plan.max_length) for row in load_split(pairs, "train")]
        tokens = sum(len(group.completions[0]) for group in groups)
        weights = dict(zip(loss.names, loss.weights, strict=True))
        nll = -twice.several.rows[0]["logps/chosen"] * len(groups) / tokens
        others = DpoLoss(tuple(weights)[:-1], loss.weights[:-1], beta=loss.beta).at_zero_margin()
        assert others is not None
        expected = others + weights["sft"] * nll
    for run in (twice.one, twice.several):
        assert run.losses[0] == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
        assert run.report["expected_first_loss"] == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


def test_the_loss_falls(twice: Twice) -> None:
    assert len(twice.several.losses) == STEPS
    assert twice.several.losses[-1] < twice.several.losses[0] - 1e-3


def test_a_step_in_several_forwards_is_the_step_in_one(twice: Twice, sft_adapter: Path) -> None:
    """For the coupled losses too, which sort over all pairs of the step."""
    # Steps amplify: `sppo_hard` falls from 50 to 4 in three of them, and was 1.5e-5 apart there.
    assert twice.several.losses == pytest.approx(twice.one.losses, rel=3 * TOLERANCE, abs=TOLERANCE)
    start = load_file(sft_adapter / "adapter_model.safetensors")
    rate = twice.plan.dpo.learning_rate
    assert largest_difference(twice.one.adapter, start) > rate, "an adapter that stands still would prove nothing"
    difference = {name: twice.one.adapter[name] - twice.several.adapter[name] for name in start}
    # Adam moves every weight by about its rate however small the gradient, so a few follow the last digits of theirs.
    assert root_mean_square(difference) < 3e-3 * rate
    for metric in ("grad_norm", "rewards/margins", "logps/chosen", "logps/rejected"):
        ours, theirs = ([row[metric] for row in run.rows] for run in (twice.several, twice.one))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4), metric


def test_every_loss_of_the_family_is_trained_here() -> None:
    assert {name for values in FAMILY.values() for name in DpoLoss.of(DpoSection.model_validate(values)).names} == set(
        LOSSES
    )


@pytest.mark.parametrize("name", [*COUPLED, "sigmoid+bco_pair+sft"])
def test_losses_and_adapter_equal_those_of_trl(
    name: str,
    plan_for: PlanMaker,
    train_spec: SpecMaker,
    pairs: Path,
    model_folder: Path,
    tokenizer: Any,
    sft_adapter: Path,
    tmp_path: Path,
) -> None:
    """TRL's own trainer on whole batches, against steps cut into forwards."""
    plan = short_plan(plan_for, FAMILY[name], steps=STEPS)
    loss = DpoLoss.of(plan.dpo)
    args = dpo_arguments(plan, tmp_path / "trl")
    args.loss_type, args.loss_weights = list(loss.names), list(loss.weights) or None
    args.label_smoothing = loss.label_smoothing
    policy = attach_adapter(load_base(model_folder, plan), plan, sft_adapter, seed=plan.dpo.seed, dropout=0.0)
    with dense_scoring():
        trainer = trl.DPOTrainer(
            model=policy,
            args=args,
            train_dataset=load_split(pairs, "train", ["prompt", "chosen", "rejected"]),
            processing_class=tokenizer,
        )
        end_quietly(trainer, [])
        trainer.train()
    theirs = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    ours = run_dpo(train_spec(plan, tmp_path / "ours", dataset=pairs, start_adapter=sft_adapter))
    assert max(theirs) - min(theirs) > 0.01
    assert ours.losses == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE)
    adapter = get_peft_model_state_dict(trainer.model, adapter_name="default")
    difference = {name: adapter[name].detach() - ours.adapter[name] for name in ours.adapter}
    assert root_mean_square(difference) < 1e-2 * LR


# --- steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["sft adapter", "fresh adapter"])
def test_a_run_of_one_step_moves_the_adapter(
    start: str, plan_for: PlanMaker, train_spec: SpecMaker, pairs: Path, sft_adapter: Path, tmp_path: Path
) -> None:
    """And at the peak rate: a run of one step has no warm-up."""
    plan = short_plan(plan_for, {"warmup_ratio": 0.1}, steps=1)
    begin = sft_adapter if start == "sft adapter" else None
    run = run_dpo(train_spec(plan, tmp_path, dataset=pairs, start_adapter=begin))
    assert run.rows[0]["learning_rate"] == pytest.approx(LR)
    if begin is None:
        moved = {name: values for name, values in run.adapter.items() if "lora_B" in name}
    else:
        before = load_file(begin / "adapter_model.safetensors")
        moved = {name: values - before[name] for name, values in run.adapter.items()}
    assert all(values.abs().max() == pytest.approx(LR, rel=0.01) for values in moved.values())


def flagged_start(train_spec: SpecMaker, plan: TrainingPlan, folder: Path, pairs: Path, start: Path) -> tuple[Any, Any]:
    """(spec, start of training) of a model that says it is loaded in 4 bit.

    bitsandbytes has no 4-bit layers on a CPU that these tests could rely on. TRL decides by this attribute alone
    whether it turns the trained factors into bf16, so a plain model that carries it takes the same path.
    """
    spec = train_spec(plan, folder, dataset=pairs, start_adapter=start)
    begin = load_start(spec, packed=True)
    begin.policy.model.get_base_model().is_loaded_in_4bit = True
    return spec, begin


def trained_factors(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("strategy", ["cached", "adapter"])
def test_the_adapter_of_a_quantised_base_stays_fp32_and_small_steps_move_it(
    strategy: str,
    plan_for: PlanMaker,
    train_spec: SpecMaker,
    pairs: Path,
    tokenizer: Any,
    sft_adapter: Path,
    tmp_path: Path,
) -> None:
    small = 5e-6
    plan = short_plan(plan_for, {"learning_rate": small, "reference_strategy": strategy}, steps=1)
    spec, start = flagged_start(train_spec, plan, tmp_path, pairs, sft_adapter)
    before = {name: p.detach().clone() for name, p in trained_factors(start.policy.model).items()}
    trainer, _ = packed_trainer(start, tokenizer, spec, Log())
    factors = trained_factors(trainer.model)
    assert factors.keys() == before.keys()
    assert all(p.dtype == torch.float32 for p in factors.values())
    assert all(torch.equal(p, before[name]) for name, p in factors.items())
    end_quietly(trainer, [])
    trainer.train()
    for name, p in trained_factors(trainer.model).items():
        assert p.dtype == torch.float32
        moved = (p.detach() - before[name]).abs()
        assert moved.max() == pytest.approx(small, rel=0.05), name
        assert (moved > 0).float().mean() > 0.9, name
    reference = {name: p for name, p in trainer.model.named_parameters() if f".{REFERENCE_ADAPTER}." in name}
    assert bool(reference) == (strategy == "adapter")
    for name, p in reference.items():
        assert torch.equal(p, before[name.replace(f".{REFERENCE_ADAPTER}.", ".default.")])


def test_trl_alone_turns_the_adapter_of_a_quantised_base_into_bf16(
    plan_for: PlanMaker, train_spec: SpecMaker, pairs: Path, tokenizer: Any, sft_adapter: Path, tmp_path: Path
) -> None:
    """What the test above guards against. When this one fails, TRL has changed and the guard may go."""
    plan = short_plan(plan_for, {}, steps=1)
    _, start = flagged_start(train_spec, plan, tmp_path, pairs, sft_adapter)
    trainer = trl.DPOTrainer(
        model=start.policy.model,
        args=dpo_arguments(plan, tmp_path),
        train_dataset=load_split(pairs, "train", ["prompt", "chosen", "rejected"]),
        processing_class=tokenizer,
    )
    assert {p.dtype for p in trained_factors(trainer.model).values()} == {torch.bfloat16}


def test_metrics_are_means_over_the_pairs_of_a_step_however_it_is_cut(
    plan_for: PlanMaker, train_spec: SpecMaker, pairs: Path, tokenizer: Any, sft_adapter: Path, tmp_path: Path
) -> None:
    """Forwards hold different numbers of pairs, so a mean of forward means would be another number."""
    plan = short_plan(plan_for, {}, steps=2)
    runs = [
        run_dpo(
            train_spec(
                plan.model_copy(update={"token_budget": budget}),
                tmp_path / str(budget),
                dataset=pairs,
                start_adapter=sft_adapter,
            )
        )
        for budget in (plan.token_budget, ONE_FORWARD)
    ]
    for cut, whole in zip(runs[0].rows, runs[1].rows, strict=True):
        assert cut.keys() == whole.keys()
        for name, value in whole.items():
            if name != "rewards/accuracies":  # A tie is decided by the last digits.
                assert cut[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


# --- parts --------------------------------------------------------------------------------------------------------

sums = st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(1, 1000)), min_size=1, max_size=8)


@given(sums, sums, st.booleans())
def test_running_means_weigh_by_count_and_start_anew_after_each_reading(
    first: list[tuple[float, int]], second: list[tuple[float, int]], count_on_device: bool
) -> None:
    means = RunningMeans()
    for batch in (first, second):
        for total, count in batch:
            means.add("x", torch.tensor(total), torch.tensor(count) if count_on_device else count)
        totals = [float(torch.tensor(total)) for total, _ in batch]
        expected = math.fsum(totals) / sum(count for _, count in batch)
        assert means.take()["x"] == pytest.approx(expected, rel=1e-9, abs=1e-6)
        assert means.take() == {}


def test_running_means_keep_no_graph_and_each_name_its_own_count() -> None:
    means = RunningMeans()
    weight = torch.ones(1, requires_grad=True)
    means.add("a", (weight * 6).sum(), 2)
    means.add("b", torch.tensor(5), 1)
    means.add("b", torch.tensor(7), torch.tensor(3))
    assert not any(total.requires_grad for total in means._sums.values())
    assert means.take() == {"a": 3.0, "b": 3.0}


def test_running_means_of_many_small_numbers_lose_no_digits() -> None:
    """In fp32 the last of them would no longer count."""
    means = RunningMeans()
    means.add("x", torch.tensor(2.0**25), 1)
    for _ in range(100):
        means.add("x", torch.tensor(1.0), 0)
    assert means.take()["x"] == 2.0**25 + 100


@settings(max_examples=200)
@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 400))
def test_balanced_runs_hold_every_item_once_in_order_and_keep_the_budget(sizes: list[int], budget: int) -> None:
    runs = balanced(list(range(len(sizes))), sizes, budget)
    assert sorted(n for run in runs for n in run) == list(range(len(sizes)))
    for run in runs:
        assert run == sorted(run)
        assert len(run) == 1 or sum(sizes[n] for n in run) <= budget


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(200, 400))
def test_balanced_runs_are_few_and_about_equally_large(sizes: list[int], budget: int) -> None:
    loads = sorted(sum(run) for run in balanced(sizes, sizes, budget))
    # The run that gets an item is the lightest, so no run exceeds the mean by more than one item (Graham 1969). With
    # items of at most half a budget, twice as many runs as the sum asks for are therefore always enough.
    assert math.ceil(sum(sizes) / budget) <= len(loads) <= math.ceil(2 * sum(sizes) / budget)
    assert loads[-1] - loads[0] <= max(sizes)


def test_an_item_over_the_budget_leaves_the_others_together() -> None:
    assert sorted(map(sorted, balanced("abcdef", [100, 1, 1, 1, 1, 1], 50))) == [["a"], ["b", "c", "d", "e", "f"]]


# --- graphs -------------------------------------------------------------------------------------------------------


class TwoGraphs(TransformersEngine):
    """An engine with one graph for gradients and another without. Of compiled layers they differ by rounding."""

    def scores(self, lm: Any, batch: PackedBatch, autocast: Any) -> TokenScores:
        scores = super().scores(lm, batch, autocast)
        if torch.is_grad_enabled():
            return scores
        away = torch.linspace(0, 9, len(scores.logps))
        return TokenScores(scores.logps - away, scores.entropy, scores.mean_logits, scores.top1)


def test_a_coupled_loss_scores_beforehand_by_the_graph_that_is_trained(
    plan_for: PlanMaker, train_spec: SpecMaker, pairs: Path, tokenizer: Any, sft_adapter: Path, tmp_path: Path
) -> None:
    """Else its slopes are those of other scores; where the first step's loss is off by it, the stage stops there."""
    plan = short_plan(plan_for, FAMILY[COUPLED[0]], steps=1)
    spec = train_spec(plan, tmp_path, dataset=pairs, start_adapter=sft_adapter)
    start = load_start(spec, packed=True)
    attach_engine(start.policy.model, TwoGraphs(causal_lm(start.policy.model), compiled=True))
    trainer, _ = packed_trainer(start, tokenizer, spec, Log())
    end_quietly(trainer, [])
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(trainer.expected_first_loss, abs=TOLERANCE)
