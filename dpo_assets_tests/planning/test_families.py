"""Descriptions of decoders against Transformers: its defaults, its older keys, and what its models compute.

Transformers is the other side of every comparison here, so that a row that it has left behind turns red.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from dpo_assets.planning.decoder import (
    Attention,
    Decoder,
    Experts,
    Layer,
    Mlp,
    Norms,
    QkNorm,
    QueryGrowth,
    Recurrent,
    Rope,
)
from dpo_assets.planning.families import FAMILIES, TEXT_OF, describe
from dpo_assets.planning.matrices import described_matrices, matrices_of
from dpo_assets.planning.shape import ModelShape
from dpo_assets_tests.planning.cases import TINY
from dpo_assets_tests.planning.described import described_logits
from dpo_assets_tests.training import tiny_models
from dpo_assets_tests.training.tiny_models import NAMES, tiny_config, tiny_model

IDS = torch.tensor([3 + 7 * n % 60 for n in range(30)])
DESCRIBED = tuple(name for name in NAMES if name.partition("+")[0] in FAMILIES)
BEYOND = {
    "cohere2": "norms that take the mean away, attention and MLP side by side",
    "deepseek_v3": "latent queries, keys and values",
    "falcon_h1": "attention and Mamba side by side",
    "gemma4_text": "keys and values of other layers, embeddings for each layer",
    "gpt2": "learnt positions",
    "granitemoehybrid": "an MLP beside the experts",
    "llama4_text": "attention in chunks of 8 tokens",
    "nemotron": "norms that take the mean away",
    "starcoder2": "norms that take the mean away",
}
IN_WORDS = tuple(name for name in DESCRIBED if name not in BEYOND)
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
GRANITE_4: dict[str, Any] = MAMBA | {
    "num_local_experts": 0, "shared_intermediate_size": 48, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
    "attention_multiplier": 0.2, "logits_scaling": 3.0,
}  # fmt: skip
# Settings that the tiny models of every architecture leave at their usual: what, of which type, set how.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("gemma", {"head_dim": 8}),
    "ministral": (
        "ministral", {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    ),
    "glm": ("glm", {"head_dim": 8}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": (
        "granitemoe",
        {
            "num_local_experts": 4, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
            "attention_multiplier": 0.2, "logits_scaling": 3.0,
        },
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16, "use_sliding_window": True, "sliding_window": 8,
            "decoder_sparse_step": 2,
        },
    ),
    "llama, GELU and biases": ("llama", {"hidden_act": "gelu", "attention_bias": True, "mlp_bias": True}),
    "llama, its own width of heads": ("llama", {"head_dim": 16}),
    "qwen2, windows in the upper layers": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    ),
    "qwen2, windows by layer types": (
        "qwen2",
        {
            "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 28,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3, windows": (
        "qwen3", {"head_dim": 8, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    ),
    "qwen3_moe, windows, a dense layer": (
        "qwen3_moe",
        {
            "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 8,
        },
    ),
    "qwen3_moe, experts in every other layer": (
        "qwen3_moe",
        {
            "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "decoder_sparse_step": 2,
        },
    ),
    "mixtral, windows": ("mixtral", {"num_local_experts": 4, "sliding_window": 8}),
    "ministral3, windows": ("ministral3", {"head_dim": 8, "sliding_window": 8}),
    "smollm3, windows where nothing is rotated": (
        "smollm3", {"no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 8}
    ),
    "exaone4, no windows": (
        "exaone4", {"head_dim": 8, "sliding_window": None, "layer_types": ["full_attention"] * 2}
    ),
    "glm4, rotated whole": ("glm4", {"head_dim": 8, "partial_rotary_factor": 1.0}),
    "lfm2, an adjusted width": ("lfm2", {"layer_types": ["full_attention", "conv"], "block_multiple_of": 8}),
    "granite 4, rotated": (
        "granitemoehybrid",
        GRANITE_4 | {"layer_types": ["attention", "mamba"], "position_embedding_type": "rope"},
    ),
    "granite 4, not rotated": ("granitemoehybrid", GRANITE_4 | {"layer_types": ["mamba", "attention"]}),
}  # fmt: skip


def whole(config: PreTrainedConfig) -> dict[str, Any]:
    """Everything that a configuration holds, as it would stand in config.json."""
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return found


def described(config: dict[str, Any]) -> Decoder:
    found = describe(config)
    assert found is not None
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_the_default_of_its_class(family: str) -> None:
    assert describe({"model_type": family}) == describe(whole(CONFIG_MAPPING[family]()))


@pytest.mark.parametrize("name", DESCRIBED)
def test_a_saved_config_says_what_the_whole_one_does(name: str) -> None:
    """Transformers writes what differs from a default."""
    config = tiny_config(name)
    assert describe(json.loads(config.to_json_string())) == described(whole(config))


def same_as_its_class(config: dict[str, Any]) -> Decoder:
    """The description, which must be that of what the class makes of the same keys."""
    found = described(config)
    arguments = {key: value for key, value in config.items() if key != "model_type"}
    assert found == describe(whole(CONFIG_MAPPING[config["model_type"]](**json.loads(json.dumps(arguments)))))
    return found


LONGROPE = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
OLDER: dict[str, dict[str, Any]] = {
    "llama, scaled": {
        "model_type": "llama", "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama, dynamic": {
        "model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 4096
    },
    "phi4": {
        "model_type": "phi3", "num_attention_heads": 24, "partial_rotary_factor": 0.75, "rope_theta": 1e4,
        "max_position_embeddings": 131_072, "rope_scaling": LONGROPE | {"type": "longrope"},
    },
    "phi3, su": {
        "model_type": "phi3", "original_max_position_embeddings": 2048, "rope_theta": 1e4,
        "rope_scaling": LONGROPE | {"type": "su", "original_max_position_embeddings": 2048},
    },
    "gemma3": {
        "model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "olmo3": {
        "model_type": "olmo3", "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192},
    },
    "glm4": {"model_type": "glm4", "partial_rotary_factor": 0.25, "rope_theta": 1e4},
    "nemotron": {"model_type": "nemotron", "partial_rotary_factor": 0.25, "rope_theta": 1e4},
    "qwen3_5": {"model_type": "qwen3_5_text", "full_attention_interval": 2, "partial_rotary_factor": 0.5},
    "qwen3_next": {"model_type": "qwen3_next", "full_attention_interval": 8, "mlp_only_layers": [1]},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 64, "decoder_sparse_step": 2},
    "mixtral": {"model_type": "mixtral", "num_experts": 4},
    "gpt_oss": {"model_type": "gpt_oss", "num_experts": 4},
    "deepseek": {"model_type": "deepseek_v3", "n_routed_experts": 8, "n_group": 1, "topk_group": 1},
    "lfm2": {"model_type": "lfm2", "block_ff_dim": 6000, "tie_embedding": False, "full_attn_idxs": [2, 5]},
    "cohere2": {"model_type": "cohere2", "sliding_window_pattern": 2},
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 3},
    "granite 4": {"model_type": "granitemoehybrid", "layers_block_type": ["linear_attention", "full_attention"] * 16},
    "gemma4": {
        "model_type": "gemma4_text", "global_head_dim": 128, "attention_k_eq_v": True, "num_global_key_value_heads": 2
    },
    "gemma4, its last layer": {"model_type": "gemma4_text", "layer_types": ["sliding_attention"] * 30},
    "gpt2": {"model_type": "gpt2", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2},
    "null": {"model_type": "llama", "num_key_value_heads": None, "head_dim": None},
}  # fmt: skip


@pytest.mark.parametrize("config", OLDER.values(), ids=OLDER)
def test_keys_of_earlier_checkpoints_mean_what_their_class_takes_them_for(config: dict[str, Any]) -> None:
    same_as_its_class(config)


SWITCHED = ("qwen2", "qwen3", "qwen2_moe", "smollm3")  # Their windows are written down and then switched on.


@settings(max_examples=80, deadline=None)
@given(
    family=st.sampled_from([*SWITCHED, "gemma2", "gemma3_text", "olmo3", "cohere2", "gpt_oss", "ministral"]),
    layers=st.integers(1, 12), window=st.integers(1, 4096), from_layer=st.integers(0, 12), on=st.booleans(),
    stated=st.one_of(st.none(), st.lists(st.sampled_from(["sliding_attention", "full_attention"]), min_size=12)),
)  # fmt: skip
def test_windows_lie_where_the_class_puts_them(
    family: str, layers: int, window: int, from_layer: int, on: bool, stated: list[str] | None
) -> None:
    config: dict[str, Any] = {"model_type": family, "num_hidden_layers": layers, "sliding_window": window}
    if family in SWITCHED:
        config |= {"use_sliding_window": on, "max_window_layers": from_layer}
    if stated is not None:
        config["layer_types"] = stated[:layers]
    found = same_as_its_class(config)
    kinds = CONFIG_MAPPING[family](**{k: v for k, v in config.items() if k != "model_type"}).layer_types
    switched = on or family not in SWITCHED
    expected = [window if kind == "sliding_attention" and switched else None for kind in kinds]
    assert [attention.window for attention in found.attentions] == expected


def assert_computes(model: Any) -> None:
    """A model's logits, linear layers and matrices are those of its description."""
    decoder = described(whole(model.config))
    assert decoder.beyond == ""
    with torch.no_grad():
        own = model(IDS[None]).logits[0]
    torch.testing.assert_close(described_logits(model, decoder, IDS), own, atol=1e-5, rtol=0)
    for module, layer in zip(model.get_decoder().layers, decoder.layers, strict=True):
        real = {n: tuple(m.weight.shape) for n, m in module.named_modules() if isinstance(m, nn.Linear)}
        real.pop("mlp.shared_expert_gate", None)  # Counted with the routers, which no adapter is put on.
        assert {name: (rows, columns) for name, rows, columns in layer.linears(decoder.hidden)} == real
    stored = matrices_of(((name, tensor.shape) for name, tensor in model.state_dict().items()), len(decoder.layers))
    counted = {kind.name: (kind.role, kind.count, kind.weights, kind.sides) for kind in described_matrices(decoder)}
    read = {kind.name: (kind.role, kind.count, kind.weights, kind.sides) for kind in stored}
    read.pop("mlp.shared_expert_gate", None)
    assert counted == read


@pytest.mark.parametrize("name", IN_WORDS)
def test_a_description_computes_what_its_model_does(name: str) -> None:
    assert_computes(tiny_model(name))


@pytest.mark.parametrize(("family", "changes"), SETTINGS.values(), ids=SETTINGS)
def test_a_setting_is_described_as_the_model_takes_it(
    family: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny_models.SETTINGS, family, changes)
    assert_computes(tiny_model(family))


@pytest.mark.parametrize(("name", "words"), BEYOND.items(), ids=BEYOND)
def test_what_there_are_no_words_for_is_said_and_sizes_are_told_all_the_same(name: str, words: str) -> None:
    config = tiny_config(name)
    decoder = described(whole(config))
    assert words in decoder.beyond
    assert (len(decoder.layers), decoder.hidden) == (config.num_hidden_layers, config.hidden_size)


@pytest.mark.parametrize("name", [name for name in BEYOND if name not in ("gpt2", "granitemoehybrid")])
def test_sizes_windows_and_experts_of_what_is_beyond_words_are_the_model_s(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(name))
    decoder = described(whole(model.config))
    layers = next(m for n, m in model.named_modules() if n.endswith("layers") and len(m) == len(decoder.layers))
    for module, layer, mixer in zip(layers, decoder.layers, decoder.attentions, strict=True):
        if name not in ("deepseek_v3", "gemma4_text"):
            real = {n: tuple(m.weight.shape) for n, m in module.named_modules() if isinstance(m, nn.Linear)}
            real.pop("feed_forward.router", None)
            assert {n: (rows, columns) for n, rows, columns in layer.linears(decoder.hidden)} == real
        assert module.self_attn.o_proj.in_features == mixer.query_width
        assert module.self_attn.scaling == pytest.approx(mixer.scale)
        assert getattr(module.self_attn, "sliding_window", None) == mixer.window
        mlp = module.get_submodule(layer.mlp.module)
        experts = getattr(mlp, "experts", None)
        assert (experts is not None) == isinstance(layer.mlp, Experts)
        if isinstance(layer.mlp, Experts):
            assert sorted(experts.down_proj.shape) == sorted((layer.mlp.count, layer.mlp.width, decoder.hidden))
            assert mlp.get_submodule(layer.mlp.shared_module).down_proj.in_features == layer.mlp.shared
        else:
            assert mlp.get_submodule(layer.mlp.output).in_features == layer.mlp.width


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llama", "hidden_act": "relu"}, "the activation relu"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "attention to what follows"),
        ({"model_type": "granitemoehybrid", "num_local_experts": 4}, "an MLP beside the experts"),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "clipped queries, keys and values"),
        ({"model_type": "gemma4_text", "enable_moe_block": True}, "experts beside the MLP"),
        ({"model_type": "gemma4_text", "attention_k_eq_v": True}, "keys as values"),
    ],
)
def test_a_setting_without_words_is_said(config: dict[str, Any], words: str) -> None:
    assert words in described(config).beyond


@pytest.mark.parametrize("name", ["falcon_h1", "starcoder2"])
def test_what_is_beyond_words_is_not_computed_by_them(name: str) -> None:
    model = tiny_model(name)
    decoder = described(whole(model.config))
    with torch.no_grad():
        own = model(IDS[None]).logits[0]
    assert (described_logits(model, decoder, IDS) - own).abs().max() > 0.01


@pytest.mark.parametrize(("outer", "family"), TEXT_OF.items())
def test_the_text_part_of_a_checkpoint_with_more_than_text_is_described(outer: str, family: str) -> None:
    inner = {"num_hidden_layers": 4, "hidden_size": 512}
    alone = described({"model_type": family, **inner})
    assert describe({"model_type": outer, "text_config": inner}) == alone
    assert describe({"model_type": outer, "text_config": {"model_type": family, **inner}}) == alone
    config = CONFIG_MAPPING[outer](text_config={"model_type": family, **inner})
    assert config.get_text_config().model_type == family
    assert describe(whole(config)) == alone


def test_a_tied_head_may_be_stated_beside_the_text_part() -> None:
    inner = {"model_type": "qwen3_5_text"}
    tied = [
        described({"model_type": "qwen3_5", "tie_word_embeddings": outside, "text_config": inner | inside}).tied
        for outside, inside in ((True, {}), (False, {}), (True, {"tie_word_embeddings": False}))
    ]
    assert tied == [True, False, False]


@pytest.mark.parametrize("config", [{}, {"model_type": "mpt"}, {"text_config": {"model_type": "t5"}}])
def test_a_family_without_a_row_is_not_described(config: dict[str, Any]) -> None:
    assert describe(config) is None


finite = st.floats(-1e6, 1e6, allow_nan=False)
sizes = st.integers(1, 1 << 20)
names = st.text(max_size=8)
ropes = st.builds(Rope, sizes, st.sampled_from(["halves", "neighbours"]), names, st.integers(1, 3), st.none() | sizes)
norms = st.builds(QkNorm, st.sampled_from(["head", "projection"]), st.booleans(), st.tuples(names, names))
attentions = st.builds(
    Attention, sizes, sizes, sizes, finite, st.none() | ropes, st.none() | sizes, names,
    st.lists(names, min_size=1, max_size=3).map(tuple), names, st.none() | norms,
    st.none() | st.builds(QueryGrowth, finite, sizes), st.none() | finite, st.booleans(), st.booleans(),
)  # fmt: skip
recurrents = st.builds(
    Recurrent, st.sampled_from(["delta_net", "short_conv", "mamba"]), names, sizes,
    st.lists(st.tuples(names, sizes, sizes), max_size=2).map(tuple), sizes, sizes,
)  # fmt: skip
mlps = st.builds(
    Mlp, sizes, st.sampled_from(["silu", "gelu", "relu2"]), names, st.lists(names, max_size=2).map(tuple), names,
    st.booleans(),
)  # fmt: skip
experts = st.builds(Experts, sizes, sizes, sizes, sizes, names, st.just("clamped_silu"), names, names)
layers = st.builds(
    Layer, attentions | recurrents, mlps | experts, st.builds(Norms, names, names, names, names), st.none() | recurrents
)
decoders = st.builds(
    Decoder, names, sizes, sizes, st.lists(layers, max_size=3).map(tuple), finite, finite, finite, finite, names,
    finite, st.none() | finite, st.booleans(), names, names,
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(decoders)
def test_a_description_in_a_shape_is_the_same_after_it_was_written_and_read(decoder: Decoder) -> None:
    shape = TINY.model_copy(update={"decoder": decoder})
    assert ModelShape.model_validate_json(shape.model_dump_json()) == shape
    assert ModelShape.model_validate(json.loads(json.dumps(shape.model_dump()))) == shape


@pytest.mark.parametrize("family", FAMILIES)
def test_the_description_of_every_family_can_be_kept(family: str) -> None:
    shape = TINY.model_copy(update={"decoder": describe({"model_type": family})})
    read = ModelShape.model_validate_json(shape.model_dump_json())
    assert read == shape
    assert hash(read.decoder) == hash(shape.decoder)
