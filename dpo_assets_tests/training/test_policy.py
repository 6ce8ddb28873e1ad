"""The policy on the kernels of its plan: fused layers through whole stages, and when Transformers' take their place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from dpo_assets.errors import ConfigError
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training import attention, sft
from dpo_assets.training.data import dpo_group, load_split
from dpo_assets.training.fused.decoder import attach_fused, fused_decoder
from dpo_assets.training.loading import attach_adapter, choose_kernels, load_base
from dpo_assets.training.logprobs import assert_packing_is_exact, causal_lm, score_groups, score_tokens, sequence_logps
from dpo_assets.training.packing import Group, pack
from dpo_assets.training.policy import Policy, load_policy
from dpo_assets_tests.training.conftest import Log, PlanMaker, SpecMaker
from dpo_assets_tests.training.dense import summed_logps
from dpo_assets_tests.training.dpo_runs import LR, ROW, Run, root_mean_square, run_dpo, short_plan, write_pairs

LAYERS, STEPS = 5, 3
LOSS_TOLERANCE = 1e-5
SCORE_TOLERANCE = 1e-3  # Nats of a whole answer: products are summed in another order.
Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def pairs(prepared: tuple[pl.DataFrame, pl.DataFrame], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(prepared[0], tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def few(pairs: Path) -> list[Group]:
    return [dpo_group(row, ROW) for row in load_split(pairs, "train")]


@pytest.fixture(scope="module")
def plain_adapter(sft_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SFT adapter as if it had been trained without dropout."""
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    shutil.copytree(sft_adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_dropout": 0.0}), encoding="utf-8")
    return folder


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


def test_recomputing_transformers_layers_changes_no_loss(trained: Callable[..., Run], by_transformers: Run) -> None:
    run = trained(kernels="transformers", gradient_checkpointing=True, recomputed_layers=LAYERS)
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
    assert fused_decoder(causal_lm(policy.model)) is not None


def test_trls_own_trainer_gets_the_model_as_its_library_made_it(model_folder: Path, fused_plan: TrainingPlan) -> None:
    policy = load_policy(model_folder, fused_plan, None, seed=0, dropout=0.0, packed=False)
    assert (policy.kernels, policy.note) == ("transformers", "")
    lm = causal_lm(policy.model)
    assert fused_decoder(lm) is None
    assert lm.config._attn_implementation != attention.NAME


def test_training_with_dropout_falls_back_and_says_so(
    model_folder: Path, plan_for: PlanMaker, train_spec: SpecMaker, tmp_path: Path
) -> None:
    plan = plan_for(kernels="fused", lora={"dropout": 0.1}, sft_steps=1)
    policy = load_policy(model_folder, plan, None, seed=0, dropout=0.1)
    assert policy.kernels == "transformers"
    assert "an adapter with dropout" in policy.note
    assert fused_decoder(causal_lm(policy.model)) is None
    log = Log()
    sft.run(train_spec(plan, tmp_path), log)
    [note] = [message for message in log.messages if "computed by transformers" in message]
    assert "not by fused kernels" in note
    assert policy.note in note
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["kernels"] == "transformers"


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="load_policy chooses the kernels before the stage takes the dropout out, so DPO falls back needlessly",
)
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
    assert choose_kernels(model, fused_plan) == ("transformers", f"down_proj has {reason}")


def test_a_window_falls_back_only_where_a_row_can_feel_it(fused_plan: TrainingPlan) -> None:
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=ROW,
    )  # fmt: skip
    lm = MistralForCausalLM(config)
    assert choose_kernels(lm, fused_plan) == ("fused", "")
    longer = fused_plan.model_copy(update={"max_length": ROW + 1})
    assert choose_kernels(lm, longer) == ("transformers", f"its attention sees {ROW} tokens back")


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


# --- adapters on fused layers -------------------------------------------------------------------------------------


def with_random_adapter(model_folder: Path, plan: TrainingPlan, seed: int = 1) -> PeftModel:
    """A policy whose adapter shows in every score."""
    model = attach_adapter(load_base(model_folder, plan), plan, None, seed=0, dropout=0.0)
    randomise(model, "default", seed)
    return model


def randomise(model: PeftModel, adapter: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if f".{adapter}." in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)


@pytest.fixture
def two(model_folder: Path, fused_plan: TrainingPlan) -> tuple[PeftModel, PeftModel]:
    """The same policy on fused layers and on Transformers'."""
    fused, plain = (with_random_adapter(model_folder, fused_plan) for _ in range(2))
    assert choose_kernels(fused, fused_plan) == ("fused", "")
    return fused, plain


def scores(model: PeftModel, groups: Sequence[Group]) -> list[float]:
    return score_groups(model, groups, 10_000)[0]


def assert_same_scores(models: tuple[PeftModel, PeftModel], groups: Sequence[Group]) -> list[float]:
    ours, theirs = (scores(model, groups) for model in models)
    assert ours == pytest.approx(theirs, abs=SCORE_TOLERANCE)
    return theirs


def test_a_switched_off_adapter_leaves_the_base(two: tuple[PeftModel, PeftModel], few: list[Group]) -> None:
    on = assert_same_scores(two, few)
    with two[0].disable_adapter(), two[1].disable_adapter():
        off = assert_same_scores(two, few)
        with torch.no_grad():
            assert off == pytest.approx(summed_logps(two[1], few), abs=SCORE_TOLERANCE)
    assert off != pytest.approx(on, abs=1.0)
    assert assert_same_scores(two, few) == on


def test_the_active_adapter_computes_after_every_switch(
    two: tuple[PeftModel, PeftModel], few: list[Group], fused_plan: TrainingPlan
) -> None:
    for model in two:
        model.add_adapter("ref", model.peft_config["default"])
        randomise(model, "ref", 2)
    first = assert_same_scores(two, few)
    for model in two:
        model.set_adapter("ref")
    second = assert_same_scores(two, few)
    for model in two:
        model.set_adapter("default")
    assert assert_same_scores(two, few) == first
    assert second != pytest.approx(first, abs=1.0)


@pytest.mark.parametrize("change", ["an optimizer", "PEFT"])
def test_new_weights_are_seen(change: str, two: tuple[PeftModel, PeftModel], few: list[Group]) -> None:
    before = assert_same_scores(two, few)
    for model in two:
        if change == "PEFT":
            state = {name: values * 1.5 for name, values in get_peft_model_state_dict(model).items()}
            set_peft_model_state_dict(model, state)
            continue
        trained = [p for p in model.parameters() if p.requires_grad]
        for n, p in enumerate(trained):
            p.grad = torch.full_like(p, (-1.0) ** n)
        torch.optim.AdamW(trained, lr=0.05).step()
    assert assert_same_scores(two, few) != pytest.approx(before, abs=0.1)


def test_packing_is_checked_on_fused_layers(two: tuple[PeftModel, PeftModel], few: list[Group]) -> None:
    """The probe compares with the model's own forward, whose weights are views of the fused matrices by then."""
    assert_packing_is_exact(two[0], few[0])
    decoder = fused_decoder(causal_lm(two[0]))
    assert decoder is not None
    decoder.layers[0].norm1 = decoder.layers[0].norm1 * 1.5
    with pytest.raises(ConfigError, match="cannot be scored"):
        assert_packing_is_exact(two[0], few[0])


# --- gradients ----------------------------------------------------------------------------------------------------


def backward(model: PeftModel, *forwards: Sequence[Group]) -> None:
    """Adds up the gradients of a pair loss over forwards."""
    for groups in forwards:
        batch = pack(groups)
        logps = sequence_logps(score_tokens(model, batch), batch).view(-1, 2)
        (-torch.nn.functional.logsigmoid(0.1 * (logps[:, 0] - logps[:, 1]))).sum().backward()


def gradients(model: PeftModel) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: Gradients, theirs: Gradients) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            ours[name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("recomputed", [0, 3])
def test_gradients_add_up_over_the_forwards_of_a_step(
    recomputed: int, two: tuple[PeftModel, PeftModel], few: list[Group]
) -> None:
    fused, plain = two
    attach_fused(fused, torch.float32, recomputed)
    backward(plain, few)
    backward(fused, few[:1], few[1:4], few[4:])
    assert_same_gradients(gradients(fused), gradients(plain))
    assert all(name.split(".")[-3] in ("lora_A", "lora_B") for name in gradients(fused))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_new_step_starts_from_no_gradient(
    set_to_none: bool, two: tuple[PeftModel, PeftModel], few: list[Group]
) -> None:
    fused, plain = two
    backward(fused, few[:2], few[2:4])
    fused.zero_grad(set_to_none=set_to_none)
    backward(fused, few[4:5], few[5:])
    backward(plain, few[4:])
    assert_same_gradients(gradients(fused), gradients(plain))


def test_clipped_gradients_are_what_later_forwards_add_to(two: tuple[PeftModel, PeftModel], few: list[Group]) -> None:
    """The factors' gradients share memory; clipping and scaling in place must reach it."""
    for model in two:
        backward(model, few[:3])
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.01)
        backward(model, few[3:])
    assert_same_gradients(gradients(two[0]), gradients(two[1]))


def test_scoring_without_gradients_between_two_forwards_leaves_them_alone(
    two: tuple[PeftModel, PeftModel], few: list[Group]
) -> None:
    """A frozen adapter that scores the reference, and a switched-off one, come between the forwards of a step."""
    fused, plain = two
    fused.add_adapter("ref", fused.peft_config["default"])
    randomise(fused, "ref", 2)
    backward(fused, few[:3])
    fused.set_adapter("ref")
    scores(fused, few)
    fused.set_adapter("default")
    with fused.disable_adapter():
        scores(fused, few)
    backward(fused, few[3:])
    backward(plain, few)
    assert_same_gradients(gradients(fused), gradients(plain))


def test_a_frozen_policy_on_fused_layers_has_no_graph(two: tuple[PeftModel, PeftModel], few: list[Group]) -> None:
    two[0].requires_grad_(False)
    assert not score_tokens(two[0], pack(few)).logps.requires_grad


# --- what no stage does, and would go wrong silently --------------------------------------------------------------


@pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="columns of the first adapter's rank stay in the fused matrices"
)
def test_an_adapter_of_another_rank_is_computed_right_or_refused(
    two: tuple[PeftModel, PeftModel], few: list[Group]
) -> None:
    """TRL's frozen copy has the rank of the policy, so no strategy needs it."""
    assert_same_scores(two, few)
    for model in two:
        config = model.peft_config["default"]
        model.add_adapter("thin", LoraConfig(r=2, target_modules=config.target_modules, task_type="CAUSAL_LM"))
        randomise(model, "thin", 3)
        model.set_adapter("thin")
    try:
        assert_same_scores(two, few)
    except ConfigError:
        return


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="gradients are added to the buffer of the first forward, wherever .grad is",
)
def test_gradients_that_were_replaced_between_forwards_are_added_to(
    two: tuple[PeftModel, PeftModel], few: list[Group]
) -> None:
    for model in two:
        for groups in (few[:3], few[3:]):
            backward(model, groups)
            for p in model.parameters():
                p.grad = None if p.grad is None else p.grad.clone()
    assert_same_gradients(gradients(two[0]), gradients(two[1]))
