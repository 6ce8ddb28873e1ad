"""What planning reads from a model folder: shape, weights, template, licence."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import pytest

from dpo_assets.errors import ConfigError
from dpo_assets.planning.families import describe
from dpo_assets.planning.memory import cache_bytes
from dpo_assets.planning.model_folder import inspect_model, uses_name
from dpo_assets.planning.shape import ModelShape
from dpo_assets_tests.planning.cases import TINY
from dpo_assets_tests.planning.weights import save_index, save_tensors


def model(folder: Path, *, config: Any = None, tokenizer: Any = None, card: str | None = None) -> Path:
    shape: Any = {
        "num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 16, "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape if config is None else config))
    (folder / "tokenizer_config.json").write_text(json.dumps({} if tokenizer is None else tokenizer))
    save_tensors(folder / "model.safetensors", {"a": [2, 3], "b": []})
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def test_the_embedded_model_is_what_its_name_says() -> None:
    facts = inspect_model(Path(str(files("dpo_assets") / "data/stories260k")))
    assert 250_000 < facts.shape.parameters < 300_000
    assert facts.safetensors == ("model.safetensors",)
    assert facts.pickled == ()
    assert "message.content" in facts.chat_template
    assert facts.eos_token


def test_a_folder_tells_its_shape_weights_template_licence_and_eos(tmp_path: Path) -> None:
    folder = model(
        tmp_path,
        tokenizer={"eos_token": {"content": "</s>"}, "chat_template": "{{ x }}"},
        card="---\nlicense: apache-2.0\n---\n# Model\n",
    )
    (folder / "old.bin").write_bytes(b"")
    (folder / "optimizer.pt").write_bytes(b"")
    facts = inspect_model(folder)
    assert facts.shape == ModelShape(
        parameters=7,
        layers=2,
        hidden=8,
        intermediate=32,
        vocabulary=16,
        context=2**20,
        architecture="LlamaForCausalLM",
        stored="fp32",
    )
    assert (facts.architecture, facts.licence and facts.licence.identifier, facts.eos_token) == (
        "LlamaForCausalLM",
        "apache-2.0",
        "</s>",
    )
    assert (facts.safetensors, facts.pickled) == (("model.safetensors",), ("old.bin", "optimizer.pt"))
    assert facts.chat_template == "{{ x }}"


LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "vocab_size": 16,
    "num_attention_heads": 8,
    "tie_word_embeddings": False,
}


def test_the_embedded_model_tells_its_heads_and_that_its_head_is_tied() -> None:
    shape = inspect_model(Path(str(files("dpo_assets") / "data/stories260k"))).shape
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.tied) == (8, 4, 8, True)
    assert shape.architecture == "LlamaForCausalLM"
    assert shape.decoder == TINY.decoder


@pytest.mark.parametrize(
    ("stated", "stored", "tied", "parameters"),
    [
        (None, {"embed": [16, 8]}, True, 128),
        (None, {"embed": [16, 8], "lm_head.weight": [16, 8]}, False, 256),
        (False, {"embed": [16, 8]}, False, 128),
        # Tied, and the head is stored as well: it is the embedding once more.
        (True, {"embed": [16, 8], "lm_head.weight": [16, 8]}, True, 128),
    ],
)
def test_a_head_is_tied_as_the_config_says_and_where_it_says_nothing_as_the_files_do(
    tmp_path: Path, stated: bool | None, stored: dict[str, list[int]], tied: bool, parameters: int
) -> None:
    """Gemma's config.json leaves it to its class."""
    config = {k: v for k, v in (LLAMA | {"tie_word_embeddings": stated}).items() if v is not None}
    folder = model(tmp_path, config=config)
    save_tensors(folder / "model.safetensors", stored)
    shape = inspect_model(folder).shape
    assert (shape.tied, shape.parameters) == (tied, parameters)


@pytest.mark.parametrize(
    ("tokens", "template", "eos", "refused"),
    [
        ([(15, "<|mine|>", False)], "", "</s>", False),
        ([(16, "<|mine|>", False)], "", "</s>", True),
        # A mark that only images would need: text-only Gemma 3 has one beyond its embedding.
        ([(16, "<image>", True)], "{{ x }}", "</s>", False),
        ([(16, "<image>", True)], "<image>{{ x }}", "</s>", True),
        ([(16, "<eos>", True)], "{{ x }}", "<eos>", True),
    ],
    ids=["last row", "one too many", "unused mark", "mark of the template", "mark of the tokenizer"],
)
def test_a_token_without_an_embedding_is_refused_with_both_numbers(
    tmp_path: Path, tokens: list[tuple[int, str, bool]], template: str, eos: str, refused: bool
) -> None:
    folder = model(tmp_path, tokenizer={"eos_token": eos, "chat_template": template})
    added = [{"id": n, "content": text, "special": special} for n, text, special in tokens]
    vocabulary = {"a": 0, "b": 1}
    whole = {"added_tokens": added, "model": {"vocab": vocabulary}}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    if not refused:
        assert inspect_model(folder).shape.vocabulary == 16
        return
    with pytest.raises(ConfigError, match=r"up to 16, but the embedding has 16 rows"):
        inspect_model(folder)


@pytest.mark.parametrize("vocabulary", [{"a": 0, "b": 16}, [["a", 0.0]] * 17], ids=["byte pair encoding", "unigram"])
def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path, vocabulary: Any) -> None:
    folder = model(tmp_path)
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": {"vocab": vocabulary}}))
    with pytest.raises(ConfigError, match=r"there is none for `[ab]` \(16\)"):
        inspect_model(folder)


def test_a_token_that_only_the_tokenizers_config_adds_counts_too(tmp_path: Path) -> None:
    added = {"added_tokens_decoder": {"16": {"content": "<|mine|>", "special": False}}}
    with pytest.raises(ConfigError, match=r"`<\|mine\|>` \(16\)"):
        inspect_model(model(tmp_path, tokenizer=added))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised already \(gptq"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, r"quantised already \(fp8"),
        (
            {"quantization_config": {"quant_method": "mxfp4"}},
            r"quantised already \(mxfp4.*Mxfp4Config\(dequantize=True",
        ),
        ({"dtype": "F8_E4M3"}, r"stores layer\.weight \(F8_E4M3\)"),
        ({"adapter": True}, "merge the adapter into its base first"),
    ],
    ids=["quantised", "its text part is quantised", "in MXFP4", "in 8 bit", "an adapter"],
)
def test_what_is_no_16_bit_base_is_refused_with_the_way_out(
    tmp_path: Path, damage: dict[str, Any], message: str
) -> None:
    config = {k: v for k, v in damage.items() if k in ("quantization_config", "text_config")}
    folder = model(tmp_path, config=LLAMA | config)
    save_tensors(folder / "model.safetensors", {"layer.weight": [2, 3]}, dtype=damage.get("dtype", "BF16"))
    if damage.get("adapter"):
        (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=message):
        inspect_model(folder)


def test_buffers_in_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    folder = model(tmp_path)
    save_tensors(folder / "model.safetensors", {"h.0.attn.bias": [1, 4]}, dtype="U8")
    assert inspect_model(folder).shape.parameters == 4


@pytest.mark.parametrize(
    ("name", "template", "used"),
    [
        ("enable_thinking", "{% if enable_thinking is defined %}", True),
        ("enable_thinkin", "{% if enable_thinking is defined %}", False),
        ("x", "", False),
    ],
)
def test_an_argument_that_a_template_has_no_use_for_is_told(name: str, template: str, used: bool) -> None:
    assert uses_name(template, name) is used


def test_several_named_templates_are_read_together(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "{{ a }}"}, {"name": "tool_use", "template": "{{ strftime_now('%Y') }}"}]
    facts = inspect_model(model(tmp_path, tokenizer={"chat_template": named}))
    assert facts.chat_template == "{{ a }}\n{{ strftime_now('%Y') }}"
    assert facts.prints_date


def test_a_config_without_kv_heads_or_head_width_has_the_usual_ones(tmp_path: Path) -> None:
    shape = inspect_model(model(tmp_path, config=LLAMA)).shape
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.tied) == (8, 8, 8, False)


@pytest.mark.parametrize("name", ["bloom", "mpt", "gpt2"])
def test_sizes_under_other_names_are_found(tmp_path: Path, name: str) -> None:
    keys = {
        "bloom": ("n_layer", "hidden_size", "n_head"), "mpt": ("n_layers", "d_model", "n_heads"),
        "gpt2": ("n_layer", "n_embd", "n_head"),
    }[name]  # fmt: skip
    sizes = dict(zip(keys, (3, 64, 4), strict=True)) | {"vocab_size": 16, "model_type": name}
    shape = inspect_model(model(tmp_path, config=sizes)).shape
    assert (shape.layers, shape.hidden, shape.heads, shape.head_dim) == (3, 64, 4, 16)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "num_attention_heads": 0},
        {"model_type": "llama", "num_hidden_layers": "two"},
        {"model_type": "qwen3", "layer_types": ["full_attention"], "use_sliding_window": True},
        {"model_type": "gemma3_text", "rope_scaling": 8.0},
        {"text_config": "llama"},
    ],
    ids=["no heads", "words for numbers", "too few layer types", "a number for a table", "text for a part"],
)
def test_a_config_that_its_own_class_would_not_read_is_refused_by_its_name(tmp_path: Path, config: Any) -> None:
    with pytest.raises(ConfigError, match=r"config\.json holds a value that its own architecture could not be built"):
        inspect_model(model(tmp_path, config=config))


def test_facts_written_before_shapes_grew_still_parse() -> None:
    old = {"parameters": 7, "layers": 2, "hidden": 8, "intermediate": 32, "vocabulary": 16, "context": 512}
    shape = ModelShape.model_validate(old | {"architecture": "LlamaForCausalLM", "licence": "mit", "source": "x"})
    assert (shape.heads, shape.decoder) == (0, None)


def test_shards_are_added_up_and_a_text_config_inside_is_found(tmp_path: Path) -> None:
    inner = {
        "num_hidden_layers": 3,
        "hidden_size": 4,
        "vocab_size": 5,
        "intermediate_size": 6,
        "max_position_embeddings": 7,
        "tie_word_embeddings": False,
    }
    folder = model(tmp_path, config={"text_config": inner})
    (folder / "model.safetensors").unlink()
    save_tensors(folder / "one.safetensors", {"a": [2, 3], "b": []})
    save_tensors(folder / "two.safetensors", {"c": [10]})
    save_index(folder, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    facts = inspect_model(folder)
    assert facts.safetensors == ("one.safetensors", "two.safetensors")
    assert facts.shape == ModelShape(
        parameters=17,
        layers=3,
        hidden=4,
        intermediate=6,
        vocabulary=5,
        context=7,
        architecture="unknown",
        stored="fp32",
        more_than_text=True,
    )
    assert (facts.architecture, facts.chat_template, facts.eos_token) == ("unknown", "", None)


def test_what_a_short_config_leaves_to_its_class_is_its_default(tmp_path: Path) -> None:
    """Gemma 3 writes no vocabulary and no heads: neither is an error, and neither is nothing."""
    inner = {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 96, "model_type": "gemma3_text"}
    folder = model(tmp_path, config={"model_type": "gemma3", "text_config": inner})
    shape = inspect_model(folder).shape
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.vocabulary, shape.tied) == (8, 4, 256, 262_208, True)
    assert (shape.model_type, shape.decoder) == ("gemma3_text", describe({"model_type": "gemma3_text"} | inner))


def test_what_an_unknown_family_leaves_to_its_class_is_read_from_the_files(tmp_path: Path) -> None:
    inner = {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 96, "model_type": "gemma9_text"}
    folder = model(tmp_path, config={"model_type": "gemma9", "text_config": inner})
    attention = {"q_proj.weight": [64, 48], "k_proj.weight": [32, 48], "q_norm.weight": [16]}
    layer = {f"language_model.model.layers.0.self_attn.{name}": shape for name, shape in attention.items()}
    table = {"language_model.model.embed_tokens.weight": [20, 48]}
    save_tensors(folder / "model.safetensors", table | layer)
    shape = inspect_model(folder).shape
    assert (shape.vocabulary, shape.heads, shape.kv_heads, shape.head_dim) == (20, 4, 2, 16)
    assert (shape.model_type, shape.decoder) == ("gemma9_text", None)
    save_tensors(folder / "model.safetensors", table)
    unknown = inspect_model(folder).shape
    assert unknown.heads == 0
    assert cache_bytes(unknown, 10) == 4 * 10 * 2 * 48


def test_a_template_beside_the_tokenizer_counts_and_an_eos_as_text_too(tmp_path: Path) -> None:
    folder = model(tmp_path, tokenizer={"eos_token": "<|im_end|>"})
    (folder / "chat_template.jinja").write_text("{{ x }}")
    assert (inspect_model(folder).chat_template, inspect_model(folder).eos_token) == ("{{ x }}", "<|im_end|>")


Part = Literal["config.json", "tokenizer_config.json"]


@pytest.mark.parametrize("part", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is missing"), (b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"[]", "is not a JSON object")],
)
def test_a_folder_without_a_readable_file_is_refused_with_its_name(
    tmp_path: Path, part: Part, content: bytes | None, message: str
) -> None:
    folder = model(tmp_path)
    (folder / part).unlink()
    if content is not None:
        (folder / part).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as refused:
        inspect_model(folder)
    assert part in str(refused.value)


def test_a_folder_that_does_not_exist_and_a_config_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        inspect_model(tmp_path / "missing")
    with pytest.raises(ConfigError, match="has no 'num_hidden_layers': only decoder language models"):
        inspect_model(model(tmp_path, config={"hidden_size": 8, "vocab_size": 16}))


@pytest.mark.parametrize(
    "config",
    [{"num_hidden_layers": None, "hidden_size": 8, "vocab_size": 16}, {"text_config": "llama"}],
    ids=["null layers", "text_config is text"],
)
def test_a_config_of_wrong_types_is_refused_as_a_config_error(tmp_path: Path, config: Any) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        inspect_model(model(tmp_path, config=config))
