"""Which engine computes which description, and the reason where one does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.planning.decoder import Decoder
from dpo_assets.planning.engines import KERNELS, why_not, why_not_fused, why_not_transformers, why_not_unsloth
from dpo_assets.planning.families import FAMILIES, describe
from dpo_assets.recipe import LoraSection

FUSED = {
    "llama", "mistral", "ministral3", "qwen2", "qwen3", "phi3", "smollm3", "granite", "olmo2", "olmo3", "gemma",
    "gemma2", "gemma3_text", "glm4", "seed_oss", "hunyuan_v1_dense", "ernie4_5", "exaone4", "gpt_oss", "qwen3_moe",
    "mixtral", "ministral", "glm", "olmoe", "granitemoe", "qwen2_moe", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next",
    "lfm2",  # By its class's defaults, which have no convolutions.
}  # fmt: skip


def of(family: str, **changes: Any) -> Decoder:
    found = describe({"model_type": family, **changes})
    assert found is not None
    return found


def test_fused_layers_compute_what_there_are_words_for() -> None:
    assert {family for family in FAMILIES if not why_not_fused(of(family))} == FUSED


@pytest.mark.parametrize(
    ("decoder", "reason"),
    [
        (None, "nothing describes"),
        (of("gpt2"), "no words for norms that take the mean away, learnt positions"),
        (of("lfm2", full_attn_idxs=[0]), "no form of its short conv layers"),
        (of("granitemoehybrid", num_local_experts=0), "no form of its mamba layers"),
        (replace(of("nemotron"), beyond=""), "its MLP has no gate"),
        (of("llama", hidden_act="relu2"), "no MLP with the activation relu2"),
        (of("llama", hidden_act="relu"), "no words for the activation relu"),
    ],
)
def test_fused_layers_say_what_they_do_not_compute(decoder: Decoder | None, reason: str) -> None:
    assert reason in why_not_fused(decoder, 1024)


def test_a_granite_4_without_mamba_is_fused() -> None:
    assert why_not_fused(of("granitemoehybrid", num_local_experts=0, layer_types=["attention"] * 32)) == ""


@pytest.mark.parametrize(
    ("decoder", "settings", "reason"),
    [
        (of("llama"), {}, ""),
        (of("cohere"), {}, ""),
        (of("gemma3_text"), {}, "knows llama, mistral, qwen2, qwen3, cohere, granite alone"),
        (None, {}, "nothing describes"),
        (of("mistral", sliding_window=1024), {}, ""),
        (of("mistral", sliding_window=1023), {}, "one of 1023 tokens is shorter than a row"),
        (of("qwen2", sliding_window=512, use_sliding_window=True), {}, "one of 512 tokens"),
        (of("qwen2", sliding_window=512), {}, ""),
        (of("llama"), {"precision": "8bit"}, "8-bit models are not on its own forward"),
        (of("llama"), {"precision": "4bit"}, ""),
        (of("llama"), {"lora": LoraSection(target_modules=["q_proj", "qkv_proj"])}, "lora names qkv_proj"),
        (of("llama"), {"lora": LoraSection(target_parameters=["experts.down_proj"])}, "lora names experts.down_proj"),
        (of("llama"), {"lora": LoraSection()}, ""),
    ],
)
def test_unsloth_computes_the_families_that_it_is_written_for(
    decoder: Decoder | None, settings: dict[str, Any], reason: str
) -> None:
    found = why_not_unsloth(decoder, 1024, **settings)
    assert reason in found if reason else found == ""


def test_a_soft_cap_keeps_unsloth_out() -> None:
    capped = of("llama")
    layer = capped.layers[0]
    assert "soft caps" in why_not_unsloth(
        replace(capped, layers=(replace(layer, mixer=replace(of("gemma2").attentions[0], window=None)),))
    )


def test_packed_layers_are_tried_where_nothing_is_known_and_rows_serve_everything() -> None:
    assert why_not_transformers(None, 1024) == ""
    assert "the chunk that a token attends in" in why_not_transformers(of("llama4_text"))
    served = {family for family in FAMILIES if not why_not_transformers(of(family))}
    assert served == set(FAMILIES) - {"llama4_text", "nemotron"}
    assert {why_not("rows", decoder) for decoder in (None, *(of(family) for family in FAMILIES))} == {""}


LONG = {"rope_scaling": {"type": "longrope"}, "max_position_embeddings": 131_072}


@pytest.mark.parametrize("kernels", ["fused", "transformers"])
@pytest.mark.parametrize(
    ("decoder", "longest"),
    [
        (of("phi3", **LONG), 4_096),
        (of("llama", rope_scaling={"type": "dynamic"}, max_position_embeddings=8_192), 8_192),
        (of("gemma3_text", rope_scaling={"rope_type": "dynamic"}, max_position_embeddings=512), 512),
    ],
    ids=["longrope", "dynamic", "one of two tables"],
)
def test_rows_of_one_forward_share_tables_that_their_length_does_not_change(
    kernels: Any, decoder: Decoder, longest: int
) -> None:
    assert why_not(kernels, decoder, longest) == ""
    assert f"beyond {longest:,} tokens" in why_not(kernels, decoder, longest + 1)
    assert f"beyond {longest:,} tokens" in why_not(kernels, decoder)


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)), kernels=st.sampled_from(KERNELS), window=st.integers(1, 4096),
    length=st.integers(1, 8192), shorter=st.integers(1, 8192),
)  # fmt: skip
def test_what_computes_long_rows_computes_shorter_ones(
    family: str, kernels: Any, window: int, length: int, shorter: int
) -> None:
    decoder = of(family, sliding_window=window)
    if not why_not(kernels, decoder, max(length, shorter)):
        assert why_not(kernels, decoder, min(length, shorter)) == ""
