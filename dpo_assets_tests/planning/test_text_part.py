"""Which tensors of a checkpoint are the language model's, from names and config.json alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_assets.planning.text_part import TextPart

TEXT: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 8}
BOTH: dict[str, Any] = {"text_config": TEXT, "vision_config": {"num_hidden_layers": 4}}
OWN = [
    "model.embed_tokens.weight",
    *(f"model.layers.{n}.{part}.weight" for n in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj", "input_norm")),
    "model.norm.weight",
]
TOWERS = {
    "siglip": [f"vision_tower.vision_model.encoder.layers.{n}.self_attn.q_proj.weight" for n in range(4)],
    "llama 4": [f"vision_model.model.layers.{n}.self_attn.q_proj.weight" for n in range(4)],
    "qwen": [f"model.visual.blocks.{n}.attn.qkv.weight" for n in range(4)] + ["mtp.layers.0.self_attn.q_proj.weight"],
    "older qwen": [f"visual.blocks.{n}.attn.qkv.weight" for n in range(4)],
    "more tensors than the decoder": [f"speech_tower.layers.{n}.part_{i}.weight" for n in range(4) for i in range(9)],
    "a head of its own": ["vision_tower.lm_head.weight", "multi_modal_projector.linear_1.weight"],
}
# (before the decoder, before the head) as published checkpoints have them.
FORMS = {
    "gemma 3, mistral 3, llama 4": ("language_model.model.", "language_model."),
    "qwen 3.5, gemma 4": ("model.language_model.", ""),
    "smolvlm": ("model.text_model.", ""),
    "decoder without a model": ("language_model.", "language_model."),
}


@given(
    st.sampled_from(sorted(FORMS)),
    st.sets(st.sampled_from(sorted(TOWERS)), min_size=1),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_every_tensor_is_the_language_models_under_one_name_or_beside_it(
    form: str, towers: set[str], head: bool, random: Any
) -> None:
    decoder, before_head = FORMS[form]
    wanted = {name: decoder + name.removeprefix("model.") for name in OWN}
    wanted |= {"lm_head.weight": f"{before_head}lm_head.weight"} if head else {}
    beside = [name for tower in towers for name in TOWERS[tower]]
    names = [*wanted.values(), *beside]
    random.shuffle(names)
    part = TextPart.of(BOTH, names)
    assert part.names == wanted
    assert sorted(part.beside) == sorted(beside)
    assert all(part.stored_as(name) == stored for name, stored in wanted.items())
    assert part.stored_as("model.layers.1.mlp.down_proj.weight") == f"{decoder}layers.1.mlp.down_proj.weight"
    assert part.tied is not head


@given(st.lists(st.sampled_from([*OWN, "lm_head.weight", "visual.patch.weight"]), unique=True))
def test_of_a_checkpoint_of_text_alone_every_tensor_is_its_own_by_its_own_name(names: list[str]) -> None:
    part = TextPart.of(TEXT, names)
    assert (dict(part.names), part.beside, part.prefixes) == ({name: name for name in names}, (), ())


@pytest.mark.parametrize(
    "further",
    [
        ["mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight", "mtp.embed_tokens.weight", "mtp.lm_head.weight"],
        [
            "model.layers.2.eh_proj.weight",
            "model.layers.2.embed_tokens.weight",
            "model.layers.2.shared_head.head.weight",
        ],
        ["model.mtp_layers.0.norm.weight"],
    ],
    ids=["qwen3_next", "deepseek_v3, glm4_moe", "mimo"],
)
@pytest.mark.parametrize("form", [None, *FORMS])
def test_layers_that_predict_further_tokens_are_no_part_of_the_model_alone_or_beside_a_tower(
    form: str | None, further: list[str]
) -> None:
    decoder = "model." if form is None else FORMS[form][0]
    own = [name.replace("model.", decoder, 1) for name in OWN]
    also = [name.replace("model.", decoder, 1) for name in further]
    part = TextPart.of(TEXT if form is None else BOTH, [*own, *also])
    assert sorted(part.names.values()) == sorted(own)
    assert list(part.beside) == sorted(also)


@pytest.mark.parametrize("text", [{"model_type": "gemma3_text"}, {}, {"model_type": "of_no_family"}])
def test_a_text_part_that_leaves_its_number_of_layers_to_its_class_is_told_from_its_tower(text: dict[str, Any]) -> None:
    """No layers at all were found, and the tower was counted and trained for as text."""
    config = {"model_type": "gemma3", "text_config": {"hidden_size": 8} | text, "vision_config": {}}
    own = [name.replace("model.", "language_model.model.", 1) for name in OWN]
    part = TextPart.of(config, [*own, *TOWERS["siglip"]])
    assert sorted(part.names) == sorted(OWN)
    assert sorted(part.beside) == sorted(TOWERS["siglip"])


@pytest.mark.parametrize(
    ("stated", "head", "tied"),
    [
        ({}, True, False),
        ({}, False, True),
        ({"tie_word_embeddings": True}, True, True),
        ({"tie_word_embeddings": False}, False, False),
        # Transformers 5 writes the default of Mistral 3's wrapper beside what its text part says.
        ({"tie_word_embeddings": True, "text_config": TEXT | {"tie_word_embeddings": False}}, True, False),
        ({"tie_word_embeddings": True, "text_config": TEXT | {"tie_word_embeddings": False}}, False, True),
        ({"text_config": TEXT | {"tie_word_embeddings": True}}, True, True),
    ],
)
def test_a_head_is_the_embedding_as_the_config_says_or_else_as_the_files_do(
    stated: dict[str, Any], head: bool, tied: bool
) -> None:
    names = [f"model.language_{name}" for name in OWN] + (["lm_head.weight"] if head else [])
    assert TextPart.of(BOTH | stated, names).tied is tied
