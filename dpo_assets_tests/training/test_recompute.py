"""Recomputing the lowest layers of a model's own: which run again in the backward pass, and that gradients stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from dpo_assets.errors import ConfigError
from dpo_assets.training.engines.recompute import recompute_lowest
from dpo_assets.training.models.structure import causal_lm, decoder_layers
from dpo_assets_tests.training.tiny_models import tiny_model

LAYERS = 4
IDS = torch.arange(3, 23)[None]


def policy(name: str, **changes: Any) -> PeftModel:
    model = get_peft_model(
        tiny_model(name, num_hidden_layers=LAYERS, **changes), LoraConfig(r=2, target_modules="all-linear")
    )
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def forwards_and_gradients(model: PeftModel) -> tuple[list[int], dict[str, Tensor]]:
    """How often each layer's MLP was computed for one loss and its gradients, and those gradients."""
    counts = [0] * LAYERS

    def counting(n: int) -> Any:
        def count(*_: Any) -> None:
            counts[n] += 1

        return count

    hooks = [
        layer.mlp.register_forward_pre_hook(counting(n)) for n, layer in enumerate(decoder_layers(causal_lm(model))[1])
    ]
    model.zero_grad()
    model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)[..., 5].sum().backward()
    for hook in hooks:
        hook.remove()
    return counts, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe"])
def test_the_lowest_layers_alone_run_again_and_no_gradient_changes(name: str) -> None:
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2} if name == "gemma3_text" else {}
    model = policy(name, **kinds)
    counts, plain = forwards_and_gradients(model)
    assert counts == [1] * LAYERS
    for recomputed in (1, 3, LAYERS):
        recompute_lowest(model, recomputed)
        counts, gradients = forwards_and_gradients(model)
        assert counts == [2] * recomputed + [1] * (LAYERS - recomputed)
        assert gradients.keys() == plain.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, plain[key], atol=0.0, rtol=0.0, msg=key)
    recompute_lowest(model, 0)
    assert forwards_and_gradients(model)[0] == [1] * LAYERS


def test_nothing_is_recomputed_outside_of_training() -> None:
    model = policy("llama").eval()
    recompute_lowest(model, LAYERS)
    assert forwards_and_gradients(model)[0] == [1] * LAYERS


def test_a_model_that_cannot_recompute_says_so_before_it_runs_out_of_memory() -> None:
    model = policy("llama")
    lm = causal_lm(model)
    lm.supports_gradient_checkpointing = False
    recompute_lowest(model, 0)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM cannot recompute its layers.*recomputes 2 to fit"):
        recompute_lowest(model, 2)
