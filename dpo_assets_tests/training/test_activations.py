"""What the planner says a layer keeps, beside what autograd keeps of it: tiny models of the families that follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dpo_assets.planning.activations import kept_bytes, made_bytes
from dpo_assets.planning.families import describe
from dpo_assets.planning.targets import EXPERT_PARAMETERS
from dpo_assets.recipe import LoraSection
from dpo_assets.training.models.experts import serve_experts
from dpo_assets.training.models.targets import peft_targets
from dpo_assets_tests.training.tiny_models import tiny_model

TOKENS, RANK = 192, 2
# Wide enough that what has no width (statistics of norms, tables) is small, as it is in a real model.
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
DENSE = (
    "llama", "qwen2", "qwen3", "ministral3", "phi3", "smollm3", "granite", "glm4", "ernie4_5", "hunyuan_v1_dense",
    "seed_oss", "olmo2", "olmo3", "gemma3_text", "exaone4", "mistral+window", "starcoder2",
)  # fmt: skip
ROUGH = ("qwen3_moe", "mixtral", "lfm2", "falcon_h1")
DELTA_NETS = ("qwen3_5_text", "qwen3_next")
WIDE_HEADS = {
    "linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4
}  # fmt: skip


def kept_a_token(name: str, lora: LoraSection, **changes: Any) -> list[tuple[float, float]]:
    """(measured, planned) bytes a token of each layer of the model's own forward in fp32."""
    model = tiny_model(name, **WIDE | changes)
    config = model.config.to_dict()
    model.set_attn_implementation("sdpa")
    serve_experts(model)
    # Not PEFT's own `all-linear`, which takes experts too.
    policy = get_peft_model(model, LoraConfig(r=RANK, **peft_targets(model, lora))).train()
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    layers = model.get_decoder().layers
    kept: list[dict[int, Tensor]] = [{} for _ in layers]
    now: list[int] = []

    def keep(value: Tensor) -> Tensor:
        place = value.untyped_storage().data_ptr()
        # Tables and masks are no activations: the one grows with the square of a row, the other all layers share.
        square = value.ndim > 1 and value.shape[-1] == value.shape[-2] == TOKENS
        if now and place not in weights and value.numel() >= TOKENS and not square:
            kept[now[-1]].setdefault(place, value)
        return value

    for n, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, n=n: now.append(n))
        layer.register_forward_hook(lambda *_: now.clear())
    ids = torch.randint(3, 60, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with saved_tensors_hooks(keep, lambda value: value):
        policy.get_base_model().get_decoder()(input_ids=ids, use_cache=False)
    everywhere = set.intersection(*(set(held) for held in kept))
    decoder = describe(config)
    assert decoder is not None
    planned = [kept_bytes(layer, decoder, "rows", lora, 4) for layer in decoder.layers]
    measured = [
        sum(value.untyped_storage().nbytes() for place, value in held.items() if place not in everywhere) / TOKENS
        for held in kept
    ]
    return list(zip(measured, planned, strict=True))


@pytest.mark.parametrize("name", DENSE)
def test_a_layer_is_planned_to_keep_what_autograd_keeps_of_it(name: str) -> None:
    for measured, planned in kept_a_token(name, LoraSection(rank=RANK)):
        assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_layer_with_fewer_adapters_keeps_less(name: str) -> None:
    """Frozen linear layers need no input for their backward pass."""
    few = LoraSection(rank=RANK, target_modules=["q_proj", "v_proj"])
    # Not of the first layer, whose input has no gradient: it keeps less than any other.
    (measured, planned), (_, whole) = kept_a_token(name, few)[-1], kept_a_token(name, LoraSection(rank=RANK))[-1]
    assert planned == pytest.approx(measured, rel=0.1)
    assert planned < whole


@pytest.mark.parametrize("name", ROUGH)
def test_experts_and_mixers_with_a_state_are_planned_for_within_a_factor(name: str) -> None:
    """Their modules differ by kernel and library, so the plan holds what is sure to be kept."""
    for measured, planned in kept_a_token(name, LoraSection(rank=RANK)):
        assert 0.5 < planned / measured < 2


@pytest.mark.parametrize("name", DELTA_NETS)
def test_a_delta_net_by_pytorch_is_planned_to_keep_what_autograd_keeps_of_it(name: str) -> None:
    """Its scan keeps 15 copies of its values in fp32, which flash-linear-attention computes again."""
    measured, planned = kept_a_token(name, LoraSection(rank=RANK), **WIDE_HEADS)[0]
    assert planned == pytest.approx(measured, rel=0.1)


def test_the_weights_that_peft_makes_of_adapted_experts_are_planned_for() -> None:
    """Of all experts of a layer, whatever a forward holds: the backward pass reads them."""
    model = tiny_model("qwen3_moe")
    decoder = describe(model.config.to_dict())
    assert decoder is not None
    serve_experts(model)
    lora = LoraSection(rank=RANK, target_parameters=list(EXPERT_PARAMETERS))
    policy = get_peft_model(model, LoraConfig(r=RANK, **peft_targets(model, lora))).train()
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in own and value.numel() in (4 * 32 * 32, 4 * 16 * 32):
            kept.setdefault(value.untyped_storage().data_ptr(), value)
        return value

    with saved_tensors_hooks(keep, lambda value: value):
        policy.get_base_model().get_decoder()(input_ids=torch.randint(3, 60, (1, 10)), use_cache=False)
    found = sum(value.untyped_storage().nbytes() for value in kept.values())
    assert found == sum(made_bytes(layer, decoder, lora, 4) for layer in decoder.layers) > 0
