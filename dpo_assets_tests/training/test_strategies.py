"""The four sources of reference scores: one reference, so one run; `merged` leaves an adapter of the base."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from dpo_assets.errors import ConfigError, GateError
from dpo_assets.training.batches.data import dpo_group, load_split
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.models.loading import load_base, save_adapter
from dpo_assets.training.private.trl import REFERENCE_ADAPTER
from dpo_assets.training.stages import dpo
from dpo_assets.training.stages.dpo import packed_trainer
from dpo_assets.training.trainers import strategies
from dpo_assets.training.trainers.packed import end_quietly
from dpo_assets.training.trainers.strategies import join_adapters, load_start, step_reference
from dpo_assets_tests.training.conftest import Log, PlanMaker, SpecMaker
from dpo_assets_tests.training.dense import summed_logps
from dpo_assets_tests.training.dpo_runs import (
    LR,
    ROW,
    Run,
    forwards_of,
    largest_difference,
    root_mean_square,
    run_dpo,
    short_plan,
    without_dropout,
    write_pairs,
)

STRATEGIES = ("cached", "adapter", "merged", "model")
LN2, STEPS, BATCH = math.log(2), 4, 3
SCORE_TOLERANCE = 1e-3  # Nats of a whole answer: products of factors are summed in another order.


@pytest.fixture(scope="module")
def pairs(prepared: tuple[pl.DataFrame, pl.DataFrame], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(prepared[0], tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def few(pairs: Path) -> list[Group]:
    return [dpo_group(row, ROW) for row in load_split(pairs, "train")]


@pytest.fixture(scope="module")
def plain_adapter(sft_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without_dropout(sft_adapter, tmp_path_factory.mktemp("plain") / "adapter")


# --- whole runs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Four:
    """One run by each strategy, of the same plan from the same start."""

    start: Path | None
    kernels: str
    runs: Mapping[str, Run]


@pytest.fixture(
    scope="module",
    params=[("sft", "transformers"), ("none", "transformers"), ("plain", "fused"), ("none", "fused")],
    ids=lambda case: f"{case[0]}, {case[1]}",
)
def four(
    request: pytest.FixtureRequest,
    plan_for: PlanMaker,
    train_spec: SpecMaker,
    pairs: Path,
    sft_adapter: Path,
    plain_adapter: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Four:
    start = {"sft": sft_adapter, "plain": plain_adapter, "none": None}[request.param[0]]
    runs = {}
    for strategy in STRATEGIES:
        section = {"reference_strategy": strategy, "batch_size": BATCH, "epochs": 2.0}
        plan = short_plan(plan_for, section, steps=STEPS, kernels=request.param[1])
        spec = train_spec(plan, tmp_path_factory.mktemp(strategy), dataset=pairs, start_adapter=start)
        runs[strategy] = run_dpo(spec)
    return Four(start, request.param[1], runs)


def test_a_step_takes_several_forwards(plan_for: PlanMaker, pairs: Path) -> None:
    """The tests below rest on it."""
    assert len(forwards_of(pairs, short_plan(plan_for, {}, steps=1))) >= 3


def test_cached_adapter_and_model_give_equal_losses_at_every_step(four: Four) -> None:
    losses = {name: four.runs[name].losses for name in ("cached", "adapter", "model")}
    assert len(losses["cached"]) == STEPS
    assert max(losses["cached"]) - min(losses["cached"]) > 0.02, "a loss that stands still would prove nothing"
    for name in ("adapter", "model"):
        assert losses[name] == pytest.approx(losses["cached"], abs=1e-5), name
        rewards = [[row["rewards/rejected"] for row in four.runs[n].rows] for n in (name, "cached")]
        assert rewards[0] == pytest.approx(rewards[1], abs=1e-4), name


def test_cached_adapter_and_model_train_the_same_adapter(four: Four) -> None:
    cached = four.runs["cached"].adapter
    for name in ("adapter", "model"):
        other = four.runs[name].adapter
        difference = {key: cached[key] - other[key] for key in cached}
        # Adam moves every weight by about its rate however small the gradient, so a few follow the last digits.
        assert root_mean_square(difference) < 1e-2 * LR, name


def test_merged_starts_at_the_same_loss_and_learns(four: Four) -> None:
    merged, cached = four.runs["merged"], four.runs["cached"]
    assert merged.losses[0] == pytest.approx(cached.losses[0], abs=1e-6)
    assert merged.losses[0] == pytest.approx(LN2, abs=1e-6)
    assert merged.rows[0]["logps/chosen"] == pytest.approx(cached.rows[0]["logps/chosen"], abs=SCORE_TOLERANCE)
    assert min(merged.losses) < LN2 - 0.02
    if four.start is None:  # Nothing to fold: the same run.
        assert merged.losses == pytest.approx(cached.losses, abs=1e-5)


def test_every_strategy_runs_on_the_kernels_of_the_plan(four: Four) -> None:
    for name, run in four.runs.items():
        assert run.report["kernels"] == four.kernels, name
        assert run.notes == [], name


def test_no_second_adapter_is_saved(four: Four, model_folder: Path, plan_for: PlanMaker) -> None:
    for name, run in four.runs.items():
        folder = run.folder / "adapter"
        assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}, name
        assert not [key for key in run.adapter if REFERENCE_ADAPTER in key.split(".")], name
        model = PeftModel.from_pretrained(load_base(model_folder, plan_for()), folder)
        assert list(model.peft_config) == ["default"]


def test_the_merged_run_leaves_the_ranks_of_both_adapters(four: Four, plan_for: PlanMaker) -> None:
    rank = plan_for().lora.rank
    config = json.loads((four.runs["merged"].folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == (rank if four.start is None else 2 * rank)
    for key, values in four.runs["merged"].adapter.items():
        assert values.shape[0 if "lora_A" in key else 1] == config["r"]


def test_the_adapter_of_a_merged_run_on_the_bare_base_scores_as_the_two_adapters_do(
    plan_for: PlanMaker,
    train_spec: SpecMaker,
    pairs: Path,
    few: list[Group],
    sft_adapter: Path,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SFT on every projection with rank 4; DPO on two of them with rank 2 and another scale."""
    trained = tmp_path / "trained"

    def keep_and_join(folder: Path, folded: Path) -> None:
        shutil.copytree(folder, trained)
        join_adapters(folder, folded)

    monkeypatch.setattr(dpo, "join_adapters", keep_and_join)
    lora = {"rank": 2, "alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    plan = short_plan(plan_for, {"reference_strategy": "merged", "learning_rate": 1e-2}, steps=3, lora=lora)
    run = run_dpo(train_spec(plan, tmp_path / "out", dataset=pairs, start_adapter=sft_adapter))

    def scores(*adapters: Path) -> list[float]:
        model: Any = load_base(model_folder, plan)
        for folder in adapters:
            model = PeftModel.from_pretrained(model, folder).merge_and_unload()
        return summed_logps(model.eval(), few)

    both, sft = scores(sft_adapter, trained), scores(sft_adapter)
    assert max(abs(a - b) for a, b in zip(both, sft, strict=True)) > 1, "the trained part must show"
    assert scores(run.folder / "adapter") == pytest.approx(both, abs=SCORE_TOLERANCE)
    policy = PeftModel.from_pretrained(load_base(model_folder, plan), run.folder / "adapter")
    assert summed_logps(policy.eval(), few) == pytest.approx(both, abs=SCORE_TOLERANCE)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resolved", "named"),
    [
        ({"precision": "4bit"}, "a 4bit base"),
        ({"precision": "8bit"}, "a 8bit base"),
        ({"precision": "fp8"}, "a fp8 base"),
        ({"kernels": "unsloth"}, "Unsloth's kernels"),
    ],
)
def test_merged_on_what_would_round_the_merge_is_refused_with_the_way_out(
    resolved: dict[str, str],
    named: str,
    plan_for: PlanMaker,
    train_spec: SpecMaker,
    pairs: Path,
    sft_adapter: Path,
    tmp_path: Path,
) -> None:
    plan = short_plan(plan_for, {"reference_strategy": "merged"}, steps=1, **resolved)
    with pytest.raises(ConfigError) as refused:
        dpo.run(train_spec(plan, tmp_path / "out", dataset=pairs, start_adapter=sft_adapter), Log())
    assert "dpo.reference_strategy `merged`" in str(refused.value)
    assert named in str(refused.value)
    assert "use `cached`" in str(refused.value)
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize("strategy", ["adapter", "model"])
def test_with_reference_base_a_trained_start_stops_at_the_first_step(
    strategy: str, plan_for: PlanMaker, train_spec: SpecMaker, pairs: Path, sft_adapter: Path, tmp_path: Path
) -> None:
    plan = short_plan(plan_for, {"reference": "base", "reference_strategy": strategy}, steps=1)
    with pytest.raises(GateError) as stopped:
        dpo.run(train_spec(plan, tmp_path, dataset=pairs, start_adapter=sft_adapter), Log())
    assert stopped.value.check == "reference_is_start"
    assert "set dpo.reference to `sft`" in stopped.value.fix


def test_merged_with_reference_base_and_a_trained_start_does_not_train_against_sft(
    plan_for: PlanMaker, train_spec: SpecMaker, pairs: Path, sft_adapter: Path, tmp_path: Path
) -> None:
    plan = short_plan(plan_for, {"reference": "base", "reference_strategy": "merged"}, steps=1)
    with pytest.raises((ConfigError, GateError)):
        dpo.run(train_spec(plan, tmp_path, dataset=pairs, start_adapter=sft_adapter), Log())


# --- parts --------------------------------------------------------------------------------------------------------


def test_the_frozen_adapter_stays_at_the_start_while_the_policy_moves(
    plan_for: PlanMaker, train_spec: SpecMaker, pairs: Path, tokenizer: Any, sft_adapter: Path, tmp_path: Path
) -> None:
    plan = short_plan(plan_for, {"reference_strategy": "adapter"}, steps=2)
    spec = train_spec(plan, tmp_path, dataset=pairs, start_adapter=sft_adapter)
    trainer, reused = packed_trainer(load_start(spec, packed=True), tokenizer, spec, Log())
    end_quietly(trainer, [])
    trainer.train()
    assert reused == 0
    model = trainer.model
    assert model.active_adapters == ["default"]
    before = load_file(sft_adapter / "adapter_model.safetensors")
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if f".{REFERENCE_ADAPTER}." in name:
            assert torch.equal(p, before[name.replace(f".{REFERENCE_ADAPTER}.", ".")]), name
            assert id(p) not in optimised
            assert not p.requires_grad
        elif ".default." in name:
            assert not torch.equal(p, before[name.replace(".default.", ".")]), name
            assert p.requires_grad


@pytest.mark.parametrize("strategy", ["adapter", "merged", "model"])
def test_reference_scores_at_a_step_are_those_of_the_start_and_carry_no_gradient(
    strategy: str,
    plan_for: PlanMaker,
    train_spec: SpecMaker,
    pairs: Path,
    few: list[Group],
    sft_adapter: Path,
    model_folder: Path,
    tmp_path: Path,
) -> None:
    plan = short_plan(plan_for, {"reference_strategy": strategy}, steps=1)
    spec = train_spec(plan, tmp_path, dataset=pairs, start_adapter=sft_adapter)
    start = load_start(spec, packed=True)
    if strategy == "adapter":
        start.policy.model.load_adapter(sft_adapter, REFERENCE_ADAPTER)
    score = step_reference(start, spec)
    assert score is not None
    for name, p in start.policy.model.named_parameters():
        if ".default." in name:
            p.data = p.data + 0.05  # The policy has moved on.
    forwards = forwards_of(pairs, plan)
    with torch.no_grad():
        scored = sorted(torch.cat([score(forward) for forward in forwards]).flatten().tolist())
    sft = PeftModel.from_pretrained(load_base(model_folder, plan), sft_adapter).eval()
    assert scored == pytest.approx(sorted(summed_logps(sft, few)), abs=SCORE_TOLERANCE)
    if strategy == "model":
        assert not score(forwards[0]).requires_grad


def test_cached_scores_nothing_at_a_step(
    plan_for: PlanMaker, train_spec: SpecMaker, pairs: Path, tmp_path: Path
) -> None:
    spec = train_spec(short_plan(plan_for, {}, steps=1), tmp_path, dataset=pairs)
    assert step_reference(load_start(spec, packed=True), spec) is None


def test_merged_without_a_start_folds_nothing_also_on_a_quantised_base(
    plan_for: PlanMaker, train_spec: SpecMaker, pairs: Path, tmp_path: Path
) -> None:
    plan = short_plan(plan_for, {"reference_strategy": "merged"}, steps=1, precision="fp8", kernels="fused")
    assert load_start(train_spec(plan, tmp_path, dataset=pairs), packed=True).folded is None


def random_adapter(model_folder: Path, plan_for: PlanMaker, folder: Path, seed: int, **lora: Any) -> Path:
    """An adapter with weights that show in every score."""
    model = get_peft_model(load_base(model_folder, plan_for()), LoraConfig(task_type="CAUSAL_LM", **lora))
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    save_adapter(model, folder)
    return folder


@pytest.mark.parametrize(
    ("folded", "trained"),
    [
        pytest.param(
            {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
            {"r": 3, "lora_alpha": 1, "target_modules": ["q_proj", "v_proj"]},
            id="ranks and scales",
        ),
        pytest.param(
            {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"]},
            {"r": 5, "lora_alpha": 4, "target_modules": ["down_proj", "up_proj"]},
            id="projections",
        ),
        pytest.param(
            {"r": 4, "lora_alpha": 2, "use_rslora": True, "target_modules": ["o_proj"]},
            {"r": 2, "lora_alpha": 2, "use_rslora": True, "target_modules": ["k_proj"]},
            id="rank-stabilised scales, nothing in common",
        ),
    ],
)
def test_joined_adapters_score_as_one_after_the_other(
    folded: dict[str, Any],
    trained: dict[str, Any],
    plan_for: PlanMaker,
    model_folder: Path,
    few: list[Group],
    tmp_path: Path,
) -> None:
    first = random_adapter(model_folder, plan_for, tmp_path / "folded", 1, **folded)
    second = random_adapter(model_folder, plan_for, tmp_path / "trained", 2, **trained)
    model: Any = load_base(model_folder, plan_for())
    for folder in (first, second):
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    expected = summed_logps(model.eval(), few[:3])
    untouched = {name: values.clone() for name, values in load_file(first / strategies.WEIGHTS).items()}
    join_adapters(second, first)
    joined = PeftModel.from_pretrained(load_base(model_folder, plan_for()), second).eval()
    assert summed_logps(joined, few[:3]) == pytest.approx(expected, abs=SCORE_TOLERANCE)
    assert joined.peft_config["default"].r == folded["r"] + trained["r"]
    assert largest_difference(load_file(first / strategies.WEIGHTS), untouched) == 0
