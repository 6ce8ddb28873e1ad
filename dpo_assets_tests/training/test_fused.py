"""The fused layers against Transformers with PEFT: equal scores and equal gradients, on the same weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from dpo_assets.training.batches.packing import Group, pack
from dpo_assets.training.engines import attention
from dpo_assets.training.engines.fused.decoder import attach_fused
from dpo_assets.training.engines.transformers import engine_of
from dpo_assets.training.scoring.logprobs import score_groups, score_tokens, sequence_logps

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "attn_implementation": attention.NAME,
}  # fmt: skip
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUPS = [
    Group([5, 6, 7, 8], ([9, 10, 11], [12, 13, 14, 15, 16])),
    Group([20], ([21, 22], [23])),
    Group([30, 31, 32], ([33], [34, 35, 36, 37])),
]


def llama(**more: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**SMALL, **more))


MODELS = {
    "llama": llama,
    "tied embeddings": lambda: llama(tie_word_embeddings=True),
    "heads wider than hidden": lambda: llama(head_dim=16),
    "scaled rotary": lambda: llama(
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        }
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
}  # fmt: skip


def with_lora(
    base: Any,
    targets: Sequence[str] | str = TARGETS,
    rank: int = 4,
) -> PeftModel:
    named = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(r=rank, lora_alpha=8, target_modules=named, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        elif "bias" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def loss_and_gradients(model: Any, groups: Sequence[Group] = GROUPS) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    batch = pack(groups)
    logps = sequence_logps(score_tokens(model, batch), batch)
    torch.nn.functional.logsigmoid(logps.view(-1, 2).diff(dim=1)).sum().backward()
    return logps.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def packed_attention() -> None:
    attention.register()
    torch.manual_seed(0)


@pytest.fixture(params=list(MODELS))
def base(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def assert_same(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-4, rtol=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("recomputed", [0, 2])
def test_scores_and_gradients_equal_those_of_transformers(base: Any, recomputed: int) -> None:
    model = with_lora(base)
    theirs = loss_and_gradients(model)
    assert attach_fused(model, torch.float32, recomputed) == ""
    assert_same(loss_and_gradients(model), theirs)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("down_proj",), ("k_proj", "o_proj", "up_proj")])
def test_an_adapter_on_some_projections_only(targets: tuple[str, ...]) -> None:
    model = with_lora(llama(), targets, rank=3)
    theirs = loss_and_gradients(model)
    assert attach_fused(model, torch.float32) == ""
    assert_same(loss_and_gradients(model), theirs)


def named(model: Any, *parts: str) -> list[torch.nn.Parameter]:
    """The adapter's parameters whose name holds all parts."""
    return [p for n, p in model.named_parameters() if "lora_" in n and all(part in n for part in parts)]


@pytest.mark.parametrize(
    "frozen",
    [("q_proj",), ("v_proj",), ("lora_A",), ("lora_B",), ("q_proj", "lora_A"), ("v_proj", "lora_B"), ("down_proj",)],
    ids="-".join,
)
def test_a_frozen_factor_keeps_no_other_from_its_gradient(frozen: tuple[str, ...]) -> None:
    """Part of an adapter may be frozen: A alone in LoRA-FA (Zhang et al., arXiv 2308.03303), some layers elsewhere."""
    model = with_lora(llama())
    for parameter in named(model, *frozen):
        parameter.requires_grad_(False)
    theirs = loss_and_gradients(model)
    assert 0 < len(theirs[1]) == len(named(model)) - len(named(model, *frozen))
    assert attach_fused(model, torch.float32) == ""
    assert_same(loss_and_gradients(model), theirs)


@pytest.mark.parametrize(
    "cleared",
    [("q_proj", "lora_A"), ("q_proj", "lora_B"), ("v_proj",), ("lora_A",), ("lora_B",), ("up_proj", "lora_A")],
    ids="-".join,
)
def test_a_gradient_that_is_cleared_begins_anew_and_no_other(cleared: tuple[str, ...]) -> None:
    model = with_lora(llama())
    assert attach_fused(model, torch.float32) == ""
    batch = pack(GROUPS)

    def backward() -> None:
        torch.nn.functional.logsigmoid(sequence_logps(score_tokens(model, batch), batch)).sum().backward()

    backward()
    once = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    anew = named(model, *cleared)
    for parameter in anew:
        parameter.grad = None
    backward()
    for name, parameter in model.named_parameters():
        if name in once:
            times = 1 if any(parameter is other for other in anew) else 2
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, once[name] * times, msg=lambda m, n=name: f"{n}: {m}")


def test_gradients_that_are_zero_before_the_first_backward_are_added_to() -> None:
    model = with_lora(llama())
    theirs = loss_and_gradients(model)
    assert attach_fused(model, torch.float32) == ""
    for parameter in named(model):
        parameter.grad = torch.ones_like(parameter)
    model.zero_grad(set_to_none=False)
    batch = pack(GROUPS)
    logps = sequence_logps(score_tokens(model, batch), batch)
    torch.nn.functional.logsigmoid(logps.view(-1, 2).diff(dim=1)).sum().backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert_same((logps.detach(), ours), theirs)


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_an_adapter_that_diverged_leaves_the_base_alone_where_it_is_switched_off(factor: str) -> None:
    model = with_lora(llama())
    with model.disable_adapter():
        base = score_groups(model, GROUPS, budget=20)[0]
        assert attach_fused(model, torch.float32) == ""
    with torch.no_grad():
        named(model, "o_proj", factor)[0].fill_(torch.nan)
    assert any(math.isnan(score) for score in score_groups(model, GROUPS, budget=20)[0])
    with model.disable_adapter():
        assert score_groups(model, GROUPS, budget=20)[0] == pytest.approx(base, abs=1e-3)


def test_training_with_an_optimizer_that_leaves_no_trace_is_seen() -> None:
    """Fused AdamW changes parameters without their version: the matrices must be read again at every step."""
    theirs, ours = with_lora(llama()), with_lora(llama())
    ours.load_state_dict(theirs.state_dict())
    assert attach_fused(ours, torch.float32) == ""
    curves = []
    for model in (theirs, ours):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            engine_of(model).renew()
            batch = pack(GROUPS)
            loss = -sequence_logps(score_tokens(model, batch), batch).mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        scored = score_groups(model, GROUPS, budget=20)[0]
        curves.append([*losses, *scored])
    assert curves[1] == pytest.approx(curves[0], abs=1e-3)
    assert curves[0][0] - curves[0][3] > 0.1


def test_small_updates_survive_in_bf16_where_peft_rounds_them_away() -> None:
    """PEFT adds LoRA's term to an output that bf16 has rounded already: below half a unit in its last place it is lost.

    Here both are one product with one rounding, so the first steps at a usual learning rate move the loss as in fp32.
    """

    def falls(dtype: torch.dtype, fused: bool) -> float:
        torch.manual_seed(4)
        wide = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 500, "initializer_range": 0.1}
        base = LlamaForCausalLM(LlamaConfig(**(SMALL | wide))).to(torch.bfloat16).to(dtype)
        model = get_peft_model(base, LoraConfig(r=8, lora_alpha=8, target_modules=list(TARGETS), task_type="CAUSAL_LM"))
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
        if fused:
            assert attach_fused(model, dtype) == ""
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        ids = torch.randint(0, 500, (8, 3, 12), generator=generator).tolist()
        batch = pack([Group(prompt, (chosen, rejected)) for prompt, chosen, rejected in ids])

        def margin() -> Tensor:
            engine_of(model).renew()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
                logps = sequence_logps(score_tokens(model, batch), batch).view(-1, 2)
            return logps[:, 0] - logps[:, 1]

        start = margin().detach()
        for _ in range(3):
            optimizer.zero_grad()
            (-torch.nn.functional.logsigmoid(0.1 * (margin() - start))).mean().backward()
            optimizer.step()
        return float((margin() - start).mean())

    exact, ours, theirs = falls(torch.float32, False), falls(torch.bfloat16, True), falls(torch.bfloat16, False)
    assert ours > 0.75 * exact
    assert theirs < 0.6 * exact
