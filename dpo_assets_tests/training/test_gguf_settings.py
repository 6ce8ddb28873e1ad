"""Settings of a GGUF file beside config.json's. The file is a mapping here: none of these needs a weight."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dpo_assets.training.models.gguf_settings import Settings

PLAIN: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
YARN: dict[str, Any] = PLAIN | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
LINEAR: dict[str, Any] = PLAIN | {"rope_type": "linear", "factor": 8.0}
SAID_YARN = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 2048,
}  # fmt: skip
BOTH_KINDS = {"full_attention": LINEAR, "sliding_attention": PLAIN}  # As Gemma 3 has them.


def settings(said: dict[str, Any], tensors: frozenset[str] = frozenset(), **config: Any) -> Settings:
    """Of a file that says this, and as for the rest what the config has."""
    config = {"rope_parameters": PLAIN, "max_position_embeddings": 8192} | config
    return Settings(
        ({"rope.freq_base": 10000.0, "context_length": 8192} | said).get, tensors, SimpleNamespace(**config)
    )


SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no scaling": ({}, {}),
    "no scaling, said": ({"rope.scaling.type": "none"}, {}),
    "a factor of one": ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, {}),
    "yarn": (SAID_YARN, {"rope_parameters": YARN}),
    "linear, of full attention": (
        {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, {"rope_parameters": BOTH_KINDS},
    ),
    "a window": ({"attention.sliding_window": 512}, {"sliding_window": 512}),
    "a window that no layer has": ({}, {"sliding_window": 512, "layer_types": ["full_attention"]}),
    "a window longer than any text": ({}, {"sliding_window": 9000}),
    "soft caps": (
        {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "no soft caps": ({}, {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "what llama.cpp derives": ({}, {"head_dim": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}),
    "latent keys": ({"attention.key_length": 192}, {"head_dim": 64, "kv_lora_rank": 512}),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_a_file_that_says_the_same_leaves_nothing_to_say(case: str) -> None:
    said, config = SAME[case]
    found = settings(said, **config)
    assert (found.differ(), found.doubts()) == ((), ())


DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rope.scaling.type: linear, not yarn": (
        SAID_YARN | {"rope.scaling.type": "linear"}, {"rope_parameters": YARN},
    ),
    "rope.scaling.type: yarn, not none": (SAID_YARN, {}),
    "rope.scaling.type: yarn, not llama3": (SAID_YARN, {"rope_parameters": PLAIN | {"rope_type": "llama3"}}),
    "rope.scaling.factor: 4, not 8": (
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_parameters": LINEAR},
    ),
    "rope.scaling.original_context_length: 8192, not 2048": (
        SAID_YARN | {"rope.scaling.original_context_length": 8192}, {"rope_parameters": YARN},
    ),
    "context_length: 2048, not 8192": ({"context_length": 2048}, {}),
    "attention.sliding_window: 0, not 512": ({"attention.sliding_window": 0}, {"sliding_window": 512}),
    "attn_logit_softcapping: 30, not 50": ({"attn_logit_softcapping": 30.0}, {"attn_logit_softcapping": 50.0}),
    "final_logit_softcapping: 50, not 30": ({"final_logit_softcapping": 50.0}, {"final_logit_softcapping": 30.0}),
    "rope.freq_base: 20000, not 10000": ({"rope.freq_base": 20000.0}, {}),
}  # fmt: skip


@pytest.mark.parametrize("told", DIFFERENT)
def test_a_setting_that_the_file_has_otherwise_is_a_fault(told: str) -> None:
    said, config = DIFFERENT[told]
    assert told in settings(said, **config).differ()


SILENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rope.scaling.factor (4), rope.scaling.original_context_length (2048), rope.scaling.type (yarn)": (
        {}, {"rope_parameters": YARN},
    ),
    "rope.scaling.factor (8), rope.scaling.type (linear)": ({}, {"rope_parameters": BOTH_KINDS}),
    "rope_freqs.weight, the factors of rotary scaling of type llama3": (
        {}, {"rope_parameters": PLAIN | {"rope_type": "llama3", "factor": 8.0}},
    ),
    "rotary scaling of type dynamic, for which GGUF has no name": (
        {}, {"rope_parameters": PLAIN | {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "attention.sliding_window (4096)": ({}, {"sliding_window": 4096}),
    "attn_logit_softcapping (50), final_logit_softcapping (30)": (
        {}, {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "context_length (8192)": ({"context_length": None}, {}),
}  # fmt: skip


@pytest.mark.parametrize("told", SILENT)
def test_a_setting_that_the_model_computes_with_and_the_file_does_not_say_is_warned_of(told: str) -> None:
    said, config = SILENT[told]
    found = settings(said, **config)
    assert found.doubts() == (f"the file does not say {told}, and llama.cpp computes without",)
    assert found.differ() == ()


def test_factors_of_rotary_scaling_that_the_file_has_as_a_tensor_are_said() -> None:
    rope = {"rope_parameters": PLAIN | {"rope_type": "llama3", "factor": 8.0}}
    assert settings({}, frozenset({"rope_freqs.weight"}), **rope).doubts() == ()


def test_a_context_that_the_converter_made_longer_is_warned_of_and_no_fault() -> None:
    found = settings({"context_length": 2**20})
    assert found.differ() == ()
    assert found.doubts() == ("llama.cpp takes texts of 1,048,576 tokens, and config.json says 8,192",)
