"""Mixtures of experts by grouped products: scores and gradients are those of Transformers' loop over experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dpo_assets.recipe import LoraSection
from dpo_assets.training.models import experts
from dpo_assets.training.models.loading import load_base
from dpo_assets.training.models.structure import causal_lm
from dpo_assets.training.models.targets import coverage, peft_targets
from dpo_assets_tests.training.conftest import PlanMaker
from dpo_assets_tests.training.row_by_row import assert_equal, packed, row_by_row, tiny_policy
from dpo_assets_tests.training.test_recurrent import GROUPS, weights
from dpo_assets_tests.training.tiny_models import tiny_folder, tiny_model

FAMILIES: dict[str, list[str]] = {
    "qwen3_moe": ["q_proj", "v_proj"],
    "mixtral": ["q_proj", "v_proj"],
    "qwen3_5_moe_text": ["q_proj", "in_proj_qkv", "shared_expert.up_proj"],
    "deepseek_v3": ["q_a_proj", "o_proj"],
    "granitemoehybrid": ["q_proj", "in_proj", "shared_mlp.output_linear"],
    "gpt_oss": ["q_proj", "o_proj"],
}
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def by_a_loop(policy: Any) -> Any:
    """Scores and gradients of the model's own forward, expert by expert and row by row."""
    causal_lm(policy).set_experts_implementation("eager")
    return row_by_row(policy, GROUPS, weights(GROUPS))


@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_experts_are_computed_and_differentiated_as_one_by_one(name: str) -> None:
    policy = tiny_policy(name, targets=FAMILIES[name])
    theirs = by_a_loop(policy)
    experts.serve_experts(causal_lm(policy))
    assert_equal(packed(policy, GROUPS, weights(GROUPS)), theirs)


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "a GPU without grouped products"])
def test_experts_with_biases_and_a_gate_of_their_own(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of gpt-oss: transposed weights, gate and up in turns, clamped. The layer alone, in fp32."""
    monkeypatch.setattr(experts, "_has_grouped_products", lambda device: grouped)
    lm = tiny_model("gpt_oss")
    block = next(module for module in lm.modules() if hasattr(module, "router") and hasattr(module, "experts"))
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(False)
        if name.endswith("bias"):  # They start at zero.
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(1, 23, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for implementation in ("eager", experts.NAME):
        lm.set_experts_implementation("eager")
        if implementation != "eager":
            experts.serve_experts(lm)
        leaf = x.clone().requires_grad_()
        out = block(leaf)
        out = out[0] if isinstance(out, tuple) else out
        (gradient,) = torch.autograd.grad((out * out.detach().cos()).sum(), leaf)
        results.append((out.detach(), gradient))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "qwen3_5_moe_text", "gpt_oss"])
def test_experts_with_an_adapter_are_trained(name: str) -> None:
    policy = tiny_policy(name, targets=["q_proj"], target_parameters=PARAMETERS)
    theirs = by_a_loop(policy)
    experts.serve_experts(causal_lm(policy))
    ours = packed(policy, GROUPS, weights(GROUPS))
    assert_equal(ours, theirs)
    assert sum("experts" in key for key in ours[1]) >= 4
    assert all(gradient.any() for gradient in ours[1].values())


@pytest.mark.parametrize("name", [*FAMILIES, "llama4_text"])
def test_experts_that_stay_frozen_are_told_by_name(name: str) -> None:
    block = {"granitemoehybrid": "block_sparse_moe", "llama4_text": "feed_forward"}.get(name, "mlp")
    kinds = {f"{block}.{parameter}" for parameter in PARAMETERS}
    frozen = coverage(_adapted(name, []), "default")
    assert kinds <= set(frozen.frozen)
    assert frozen.frozen_experts
    trained = coverage(_adapted(name, PARAMETERS), "default")
    assert not kinds & set(trained.frozen)
    assert not trained.frozen_experts


def _adapted(name: str, parameters: list[str]) -> Any:
    lm = tiny_model(name)
    targets = peft_targets(lm, LoraSection(rank=2, target_parameters=parameters))
    return get_peft_model(lm, LoraConfig(r=2, task_type="CAUSAL_LM", **targets))


def test_no_weight_of_frozen_experts_is_given_a_gradient_or_kept_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a token and an expert, gate and up are kept, and nothing of the hidden width."""
    policy = tiny_policy("qwen3_moe", targets=["q_proj"])
    experts.serve_experts(causal_lm(policy))
    kept: list[tuple[int, ...]] = []
    own = experts._FrozenExperts.forward

    def watched(ctx: Any, *args: Any) -> Any:
        out = own(ctx, *args)
        kept.extend(tuple(tensor.shape) for tensor in ctx.to_save)
        return out

    monkeypatch.setattr(experts._FrozenExperts, "forward", staticmethod(watched))
    packed(policy, GROUPS, weights(GROUPS))
    tokens = sum(group.tokens for group in GROUPS)
    assert set(kept) == {(2 * tokens, 32), (tokens, 2)}  # Two choices a token; gate and up of width 16.
    assert not any(p.grad is not None for key, p in policy.named_parameters() if "experts" in key)


def test_a_loaded_base_runs_its_experts_by_grouped_products(tmp_path: Path, plan_for: PlanMaker) -> None:
    lm = load_base(tiny_folder("qwen3_moe", tmp_path), plan_for())
    assert lm.config._experts_implementation == experts.NAME


def test_a_model_without_experts_stays_as_it_is() -> None:
    lm = tiny_model("llama")
    before = lm.config._experts_implementation
    experts.serve_experts(lm)
    assert lm.config._experts_implementation == before


def test_a_gradient_of_the_routing_weights_that_is_left_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that the comparisons above are for: the router's input would get a part of its gradient only."""
    policy = tiny_policy("qwen3_moe", targets=["q_proj", "v_proj"])
    theirs = by_a_loop(policy)
    own = experts._FrozenExperts.backward
    monkeypatch.setattr(
        experts._FrozenExperts, "backward", staticmethod(lambda ctx, dy: (own(ctx, dy)[0], None, None, None))
    )
    experts.serve_experts(causal_lm(policy))
    with pytest.raises(AssertionError):
        assert_equal(packed(policy, GROUPS, weights(GROUPS)), theirs)
