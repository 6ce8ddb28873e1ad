"""The routers' balancing loss: Transformers' own, on each token of the packed stream once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainingArguments
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from dpo_assets.errors import ConfigError
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.batches.packing import Group, pack
from dpo_assets.training.engines.base import PlainEngine
from dpo_assets.training.engines.routers import balancing_loss
from dpo_assets.training.engines.transformers import engine_of
from dpo_assets.training.models.structure import causal_lm
from dpo_assets.training.scoring.logprobs import score_tokens
from dpo_assets.training.stages.sft import PackedSFTTrainer
from dpo_assets.training.trainers.classic import classic_arguments
from dpo_assets.training.trainers.step import PackedCollator
from dpo_assets_tests.training.conftest import PlanMaker, SpecMaker
from dpo_assets_tests.training.dpo_runs import largest_difference, run_dpo, short_plan, write_pairs
from dpo_assets_tests.training.row_by_row import tiny_policy
from dpo_assets_tests.training.tiny_models import OTHER_PAIR, PAIR, tiny_model

GROUPS = [PAIR, OTHER_PAIR]
FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss", "qwen3_5_moe_text", "qwen3_next"]
TARGETS = ["q_proj", "v_proj"]


def test_it_is_the_balancing_loss_of_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(n, 8, generator=generator).mul(3).requires_grad_() for n in (40, 40, 40)]
    ours, theirs = balancing_loss(layers, 2), load_balancing_loss_func(tuple(layers), 8, 2)
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(torch.autograd.grad(ours, layers), torch.autograd.grad(theirs, layers), strict=True):
        torch.testing.assert_close(one, other)
    alike = [torch.zeros(40, 8)]
    assert float(balancing_loss(alike, 2)) == pytest.approx(2.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_stream_says_what_rows_say_with_a_shared_prompt_counted_once(name: str) -> None:
    policy = tiny_policy(name, targets=TARGETS)
    balance = _packed_balance(policy, GROUPS)
    assert float(balance.detach()) == pytest.approx(float(_by_rows(policy, GROUPS, whole=False)), rel=1e-5)
    # As TRL counts, a prompt for each of its answers.
    assert abs(float(balance.detach()) - float(_by_rows(policy, GROUPS, whole=True))) > 1e-4
    balance.backward()
    gradients = [p.grad for key, p in policy.named_parameters() if p.requires_grad and "layers.0" in key]
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)


def test_answers_without_a_shared_prompt_are_balanced_as_by_transformers() -> None:
    policy = tiny_policy("qwen3_moe", targets=TARGETS)
    alone = [Group(group.prompt, group.completions[:1]) for group in GROUPS]
    whole = _by_rows(policy, alone, whole=True)
    assert float(_packed_balance(policy, alone).detach()) == pytest.approx(float(whole), rel=1e-5)


def _packed_balance(policy: Any, groups: list[Group]) -> Tensor:
    with engine_of(policy).watching_routers() as routers:
        score_tokens(policy, pack(groups))
    loss: Tensor = routers.loss()
    return loss


def _by_rows(policy: Any, groups: list[Group], *, whole: bool) -> Tensor:
    """By Transformers, of the logits of rows; `whole` counts a prompt once for each of its answers."""
    lm = causal_lm(policy)
    lm.set_attn_implementation("eager")
    parts: list[list[Tensor]] = []
    for group in groups:
        for n, answer in enumerate(group.completions):
            with torch.no_grad():
                said = lm(input_ids=torch.tensor([[*group.prompt, *answer]]), output_router_logits=True).router_logits
            start = 0 if whole or n == 0 else len(group.prompt)
            parts.append([layer.view(-1, layer.shape[-1])[start:] for layer in said])
    logits = tuple(torch.cat(layer) for layer in zip(*parts, strict=True))
    return load_balancing_loss_func(logits, logits[0].shape[-1], lm.config.num_experts_per_tok)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_sft_trains_on_the_balance_beside_its_own_loss(checkpointing: bool, tmp_path: Path) -> None:
    coefficient = 0.5
    plain, loss = _sft_gradients(tmp_path, 0.0, checkpointing)
    balanced, same = _sft_gradients(tmp_path, coefficient, checkpointing)
    policy = tiny_policy("qwen3_moe", targets=TARGETS)
    (coefficient * _packed_balance(policy, [Group(g.prompt, g.completions[:1]) for g in GROUPS])).backward()
    assert loss == same, "the loss that is told is without it"
    for key, parameter in policy.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            torch.testing.assert_close(balanced[key] - plain[key], parameter.grad, rtol=1e-3, atol=1e-5)


def _sft_gradients(folder: Path, coefficient: float, checkpointing: bool) -> tuple[dict[str, Tensor], float]:
    policy = tiny_policy("qwen3_moe", targets=TARGETS)
    if checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy.enable_input_require_grads()
    rows = Dataset.from_list([{"n": n} for n in range(len(GROUPS))])
    collator = PackedCollator(lambda row: Group(GROUPS[row["n"]].prompt, GROUPS[row["n"]].completions[:1]), 10_000)
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", remove_unused_columns=False,
        gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    trainer = PackedSFTTrainer(
        model=policy, args=arguments, train_dataset=rows, data_collator=collator, router_balance=coefficient
    )
    loss = trainer.training_step(policy, collator(list(rows)))
    if coefficient:
        assert trainer._means.take()["aux_loss"] > 1
    return {key: p.grad.clone() for key, p in policy.named_parameters() if p.grad is not None}, float(loss)


def with_balance(plan: TrainingPlan, coefficient: float) -> TrainingPlan:
    """The plan of a mixture of experts, which the built-in model's is not."""
    return plan.model_copy(update={"dpo": plan.dpo.model_copy(update={"router_balance": coefficient})})


@pytest.fixture
def moe_folder(model_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "moe"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    tiny_model("qwen3_moe", vocab_size=512, max_position_embeddings=256).save_pretrained(folder)
    return folder


def test_dpo_starts_at_its_own_loss_and_moves_by_the_balance_too(
    moe_folder: Path, plan_for: PlanMaker, train_spec: SpecMaker, prepared: Any, tmp_path: Path
) -> None:
    dataset, runs = write_pairs(prepared[0], tmp_path), []
    for coefficient in (0.0, 10.0):
        plan = with_balance(short_plan(plan_for, {}, steps=2, kernels="transformers"), coefficient)
        plan = plan.model_copy(update={"lora": plan.lora.model_copy(update={"target_modules": TARGETS})})
        out = tmp_path / f"dpo{coefficient:g}"
        runs.append(run_dpo(train_spec(plan, out, base_model=moe_folder, dataset=dataset)))
    plain, balanced = runs
    assert balanced.report["first_loss"] == pytest.approx(plain.report["first_loss"], abs=1e-6)
    assert "aux_loss" not in plain.rows[0]
    assert balanced.rows[0]["aux_loss"] > 1
    assert largest_difference(plain.adapter, balanced.adapter) > 1e-4


def test_a_model_that_returns_no_router_logits_is_refused() -> None:
    for name in ("llama", "deepseek_v3"):
        policy = tiny_policy(name, targets=["o_proj"])
        with pytest.raises(ConfigError, match=r"returns no router logits.*Set sft\.router_balance"):
            _packed_balance(policy, GROUPS)


def test_an_engine_that_does_not_hear_routers_refuses() -> None:
    with pytest.raises(ConfigError, match=r"set hardware\.kernels to `transformers`"):
        PlainEngine().watching_routers()


def test_trl_is_told_the_coefficient_and_takes_none_of_its_own(plan_for: PlanMaker, tmp_path: Path) -> None:
    """Left to itself, TRL adds a base's own coefficient for every base that has one."""
    for coefficient in (0.0, 0.01):
        plan = with_balance(plan_for(), coefficient)
        assert classic_arguments(plan, tmp_path)["router_aux_loss_coef"] == coefficient
