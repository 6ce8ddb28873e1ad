"""The policy on the kernels of its plan: fused layers through whole stages, and when Transformers' take their place."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from peft import LoraConfig, PeftModel
from transformers import MistralConfig, MistralForCausalLM

from dpo_assets.artifact import VOLATILE
from dpo_assets.errors import ConfigError
from dpo_assets.planning.offers import EngineOffer
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.engines import attention, ladder
from dpo_assets.training.engines.base import attached_engine
from dpo_assets.training.engines.ladder import choose_kernels
from dpo_assets.training.engines.transformers import engine_of
from dpo_assets.training.models.loading import load_base
from dpo_assets.training.models.structure import causal_lm
from dpo_assets.training.policy import Policy, load_policy
from dpo_assets.training.stages import sft
from dpo_assets_tests.training.conftest import Log, PlanMaker, SpecMaker
from dpo_assets_tests.training.dpo_runs import (
    LR,
    ROW,
    Run,
    root_mean_square,
    run_dpo,
    short_plan,
    without_dropout,
    write_pairs,
)

LAYERS, STEPS = 5, 3
LOSS_TOLERANCE = 5e-5  # AdamW divides by the size of a gradient, and so enlarges the rounding of small ones.


@pytest.fixture(scope="module")
def pairs(prepared: tuple[pl.DataFrame, pl.DataFrame], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(prepared[0], tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def plain_adapter(sft_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without_dropout(sft_adapter, tmp_path_factory.mktemp("plain") / "adapter")


# --- the whole stage ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sft adapter", "fresh adapter"])
def start(request: pytest.FixtureRequest, plain_adapter: Path) -> Path | None:
    return plain_adapter if request.param == "sft adapter" else None


@pytest.fixture(scope="module")
def trained(
    start: Path | None,
    plan_for: PlanMaker,
    train_spec: SpecMaker,
    pairs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Run]:
    """Stage `dpo` on kernels, every step in several forwards."""

    def run(**resolved: Any) -> Run:
        section = resolved.pop("dpo", {})
        plan = short_plan(plan_for, {"batch_size": 3, "epochs": 2.0, **section}, steps=STEPS, **resolved)
        return run_dpo(train_spec(plan, tmp_path_factory.mktemp("run"), dataset=pairs, start_adapter=start))

    return run


@pytest.fixture(scope="module")
def by_transformers(trained: Callable[..., Run]) -> Run:
    return trained(kernels="transformers")


@pytest.mark.parametrize("recomputed", [0, 2, LAYERS])
def test_fused_layers_train_as_transformers_do(
    recomputed: int, trained: Callable[..., Run], by_transformers: Run
) -> None:
    run = trained(kernels="fused", recomputed_layers=recomputed, gradient_checkpointing=recomputed > 0)
    assert (run.report["kernels"], by_transformers.report["kernels"]) == ("fused", "transformers")
    assert run.notes == []
    assert max(by_transformers.losses) - min(by_transformers.losses) > 0.02, "a still loss would prove nothing"
    assert run.losses == pytest.approx(by_transformers.losses, abs=LOSS_TOLERANCE)
    for metric in ("grad_norm", "logps/chosen", "logps/rejected", "entropy", "logits/chosen"):
        ours, theirs = ([row[metric] for row in r.rows] for r in (run, by_transformers))
        assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-4), metric
    difference = {name: run.adapter[name] - by_transformers.adapter[name] for name in by_transformers.adapter}
    # Adam moves every weight by about its rate however small the gradient, so a few follow the last digits.
    assert root_mean_square(difference) < 2e-2 * LR


@pytest.mark.parametrize("recomputed", [2, LAYERS])
def test_recomputing_transformers_layers_changes_no_loss(
    recomputed: int, trained: Callable[..., Run], by_transformers: Run
) -> None:
    run = trained(kernels="transformers", gradient_checkpointing=True, recomputed_layers=recomputed)
    assert run.losses == pytest.approx(by_transformers.losses, abs=LOSS_TOLERANCE)


@pytest.mark.parametrize("start", ["fresh adapter"], indirect=True)
def test_the_base_as_reference_on_fused_layers_is_the_untrained_start(
    trained: Callable[..., Run], by_transformers: Run
) -> None:
    """Its scores come from the same layers with the adapter switched off."""
    run = trained(kernels="fused", dpo={"reference": "base"})
    assert run.report["kernels"] == "fused"
    assert run.losses == pytest.approx(by_transformers.losses, abs=LOSS_TOLERANCE)


def test_sft_on_fused_layers_is_sft_on_transformers(
    plan_for: PlanMaker, train_spec: SpecMaker, dataset: Path, tmp_path: Path
) -> None:
    reports = {}
    for kernels in ("fused", "transformers"):
        plan = plan_for(kernels=kernels, sft_steps=3, token_budget=600, recomputed_layers=1)
        sft.run(train_spec(plan, tmp_path / kernels), Log())
        reports[kernels] = json.loads((tmp_path / kernels / "report.json").read_text(encoding="utf-8"))
    fused, plain = reports["fused"], reports["transformers"]
    assert (fused["kernels"], plain["kernels"]) == ("fused", "transformers")
    for name in ("held_out_nll_before", "held_out_nll_after"):
        assert fused[name] == pytest.approx(plain[name], abs=1e-4)
    assert plain["held_out_nll_after"] < plain["held_out_nll_before"] - 0.05


# --- who computes -------------------------------------------------------------------------------------------------


@pytest.fixture
def fused_plan(plan_for: PlanMaker) -> TrainingPlan:
    return plan_for(kernels="fused", max_length=ROW)


def test_the_built_in_model_is_computed_by_fused_layers(model_folder: Path, fused_plan: TrainingPlan) -> None:
    policy = load_policy(model_folder, fused_plan, None, seed=0, dropout=0.0)
    assert (policy.kernels, policy.note) == ("fused", "")
    assert engine_of(policy.model).name == "fused"


def test_trls_own_trainer_gets_the_model_as_its_library_made_it(model_folder: Path, fused_plan: TrainingPlan) -> None:
    policy = load_policy(model_folder, fused_plan, None, seed=0, dropout=0.0, packed=False)
    assert (policy.kernels, policy.note) == ("transformers", "")
    lm = causal_lm(policy.model)
    assert attached_engine(lm) is None
    assert lm.config._attn_implementation != attention.NAME


def test_an_engine_that_takes_over_has_forwards_fitted_to_it(
    plan_for: PlanMaker, train_spec: SpecMaker, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the plan were fitted to what its engine keeps of a token, and another keeps more."""
    offers = (
        EngineOffer(name="fused", token_budget=900, recomputed_layers=0),
        EngineOffer(name="transformers", token_budget=600, recomputed_layers=2, why_not="slower"),
    )
    plan = plan_for(kernels="fused", engines=offers, token_budget=900, sft_steps=1, lora={"dropout": 0.1})
    recomputed: list[int] = []
    monkeypatch.setattr(ladder, "recompute_lowest", lambda model, layers: recomputed.append(layers))
    sft.run(train_spec(plan, tmp_path), Log())
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["kernels"] == "transformers"
    assert json.loads((tmp_path / VOLATILE).read_text(encoding="utf-8"))["token_budget_used"] == 600
    assert recomputed == [2]


def test_training_with_dropout_falls_back_and_says_so(
    model_folder: Path, plan_for: PlanMaker, train_spec: SpecMaker, tmp_path: Path
) -> None:
    plan = plan_for(kernels="fused", lora={"dropout": 0.1}, sft_steps=1)
    policy = load_policy(model_folder, plan, None, seed=0, dropout=0.1)
    assert policy.kernels == "transformers"
    assert "an adapter with dropout" in policy.note
    assert engine_of(policy.model).name != "fused"
    log = Log()
    sft.run(train_spec(plan, tmp_path), log)
    [note] = [message for message in log.messages if "computed by transformers" in message]
    assert "not by fused kernels" in note
    assert policy.note in note
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["kernels"] == "transformers"


def test_dpo_from_an_sft_adapter_with_dropout_is_computed_by_fused_layers(
    plan_for: PlanMaker, train_spec: SpecMaker, pairs: Path, sft_adapter: Path, tmp_path: Path
) -> None:
    """DPO trains without dropout whatever SFT did, and its memory was planned for fused layers."""
    plan = short_plan(plan_for, {}, steps=1, kernels="fused")
    run = run_dpo(train_spec(plan, tmp_path, dataset=pairs, start_adapter=sft_adapter))
    assert run.report["kernels"] == "fused"


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"use_dora": True}, "a DoRA adapter"),
        ({"lora_bias": True}, "an adapter with a bias"),
        ({"lora_dropout": 0.2}, "an adapter with dropout"),
    ],
)
def test_another_kind_of_adapter_falls_back(
    lora: dict[str, Any], reason: str, model_folder: Path, fused_plan: TrainingPlan
) -> None:
    config = LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM", **lora)
    model = PeftModel(load_base(model_folder, fused_plan), config)
    assert choose_kernels(model, fused_plan) == ("transformers", f"mlp.down_proj has {reason}")


def test_a_window_is_no_reason_to_fall_back(fused_plan: TrainingPlan) -> None:
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=ROW,
    )  # fmt: skip
    lm = MistralForCausalLM(config)
    assert choose_kernels(lm, fused_plan) == ("fused", "")
    longer = fused_plan.model_copy(update={"max_length": ROW + 1})
    assert choose_kernels(lm, longer) == ("fused", "")


def test_casts_are_left_to_autocast_where_there_is_one(model_folder: Path, fused_plan: TrainingPlan) -> None:
    model = load_policy(model_folder, fused_plan, None, seed=0, dropout=0.0).model
    half = fused_plan.model_copy(update={"precision": "bf16"})

    def casts() -> set[bool]:
        return {module.cast_input_dtype_enabled for module in model.modules() if hasattr(module, "lora_A")}

    assert isinstance(Policy(model, "fused").computing(half), nullcontext)
    assert isinstance(Policy(model, "transformers").computing(fused_plan), nullcontext)
    with Policy(model, "transformers").computing(half):
        assert casts() == {False}
    assert casts() == {True}


def test_a_plan_that_would_train_nearly_everything_is_refused_on_fused_layers_too(
    model_folder: Path, plan_for: PlanMaker
) -> None:
    plan = plan_for(kernels="fused", lora={"rank": 512})
    with pytest.raises(ConfigError, match="parameters would be trained"):
        load_policy(model_folder, plan, None, seed=0, dropout=0.0)
