"""What planning reads from a model folder: shape, weights, template, licence."""

from __future__ import annotations

import json
import math
import struct
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.errors import ConfigError
from dpo_assets.planning.model_folder import card_licence, count_parameters, inspect_model
from dpo_assets.planning.shape import ModelShape


def safetensors(path: Path, header: Any, *, length: int | None = None, raw: bytes | None = None) -> Path:
    body = json.dumps(header).encode() if raw is None else raw
    path.write_bytes(struct.pack("<Q", len(body) if length is None else length) + body)
    return path


def model(folder: Path, *, config: Any = None, tokenizer: Any = None, card: str | None = None) -> Path:
    shape: Any = {"num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 16, "architectures": ["LlamaForCausalLM"]}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape if config is None else config))
    (folder / "tokenizer_config.json").write_text(json.dumps({} if tokenizer is None else tokenizer))
    safetensors(folder / "model.safetensors", {"a": {"shape": [2, 3]}, "b": {"shape": []}, "__metadata__": {"x": "y"}})
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def test_the_embedded_model_is_what_its_name_says() -> None:
    facts = inspect_model(Path(str(files("dpo_assets") / "data/stories260k")))
    assert 250_000 < facts.shape.parameters < 300_000
    assert facts.safetensors == ("model.safetensors",)
    assert facts.pickled == ()
    assert facts.has_chat_template
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
    )
    assert (facts.architecture, facts.licence, facts.eos_token) == ("LlamaForCausalLM", "apache-2.0", "</s>")
    assert (facts.safetensors, facts.pickled) == (("model.safetensors",), ("old.bin", "optimizer.pt"))
    assert facts.has_chat_template


LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "vocab_size": 16,
    "num_attention_heads": 8,
}


def test_the_embedded_model_tells_its_heads_and_that_its_head_is_tied() -> None:
    shape = inspect_model(Path(str(files("dpo_assets") / "data/stories260k"))).shape
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.tied) == (8, 4, 8, True)
    assert (shape.architecture, shape.fusable, shape.sliding_window) == ("LlamaForCausalLM", True, None)


def test_a_config_without_kv_heads_or_head_width_has_the_usual_ones(tmp_path: Path) -> None:
    shape = inspect_model(model(tmp_path, config=LLAMA)).shape
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.tied) == (8, 8, 8, False)


@pytest.mark.parametrize(
    ("changes", "fusable"),
    [
        ({}, True),
        ({"architectures": ["MistralForCausalLM"]}, True),
        ({"architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu"}, True),
        ({"architectures": ["Qwen3ForCausalLM"]}, False),
        ({"architectures": ["GPT2LMHeadModel"]}, False),
        ({"architectures": None}, False),
        ({"hidden_act": "gelu"}, False),
        ({"mlp_bias": True}, False),
        ({"attention_bias": True}, False),
        ({"num_attention_heads": None}, False),
    ],
)
def test_only_what_the_fused_kernels_compute_is_fusable(tmp_path: Path, changes: Any, fusable: bool) -> None:
    assert inspect_model(model(tmp_path, config=LLAMA | changes)).shape.fusable is fusable


@pytest.mark.parametrize(
    ("changes", "window", "at"),
    [
        ({}, None, True),
        ({"sliding_window": None}, None, True),
        ({"sliding_window": 4096}, 4096, True),
        ({"sliding_window": 1023}, 1023, False),
        # Qwen2 writes a window down and turns it off.
        ({"sliding_window": 1000, "use_sliding_window": False}, None, True),
        ({"sliding_window": 1000, "use_sliding_window": True}, 1000, False),
    ],
)
def test_a_window_shorter_than_a_row_keeps_the_fused_kernels_out(
    tmp_path: Path, changes: Any, window: int | None, at: bool
) -> None:
    shape = inspect_model(model(tmp_path, config=LLAMA | changes)).shape
    assert shape.sliding_window == window
    assert shape.fused_at(1024) is at


def test_facts_written_before_shapes_grew_still_parse() -> None:
    old = {"parameters": 7, "layers": 2, "hidden": 8, "intermediate": 32, "vocabulary": 16, "context": 512}
    shape = ModelShape.model_validate(old | {"architecture": "LlamaForCausalLM", "licence": "mit", "source": "x"})
    assert (shape.heads, shape.fusable, shape.fused_at(64)) == (0, False, False)


def test_shards_are_added_up_and_a_text_config_inside_is_found(tmp_path: Path) -> None:
    inner = {
        "num_hidden_layers": 3,
        "hidden_size": 4,
        "vocab_size": 5,
        "intermediate_size": 6,
        "max_position_embeddings": 7,
    }
    folder = model(tmp_path, config={"text_config": inner})
    safetensors(folder / "model-2.safetensors", {"c": {"shape": [10]}})
    facts = inspect_model(folder)
    assert facts.safetensors == ("model-2.safetensors", "model.safetensors")
    assert facts.shape == ModelShape(
        parameters=17, layers=3, hidden=4, intermediate=6, vocabulary=5, context=7, architecture="unknown"
    )
    assert (facts.architecture, facts.has_chat_template, facts.eos_token) == ("unknown", False, None)


def test_a_template_beside_the_tokenizer_counts_and_an_eos_as_text_too(tmp_path: Path) -> None:
    folder = model(tmp_path, tokenizer={"eos_token": "<|im_end|>"})
    (folder / "chat_template.jinja").write_text("{{ x }}")
    assert (inspect_model(folder).has_chat_template, inspect_model(folder).eos_token) == (True, "<|im_end|>")


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


@pytest.mark.parametrize(
    ("raw", "length"),
    [
        (b"", 8),
        (b"{", None),
        (b'{"a": {"shape"', None),
        (b"\xff\xff", None),
        (b'{"a": {"dtype": "F32"}}', None),
        (b'{"a": [1]}', None),
        (b'{"a": {"shape": 5}}', None),
        (b'{"a": {"shape": ["x"]}}', None),
        (b'{"a": {"shape": [1', 2**62),
    ],
)
def test_a_cut_or_broken_weight_file_is_refused(tmp_path: Path, raw: bytes, length: int | None) -> None:
    path = safetensors(tmp_path / "model.safetensors", None, raw=raw, length=length)
    with pytest.raises(ConfigError, match="not a readable safetensors file; download it again"):
        count_parameters(path)


def test_a_weight_file_of_a_few_bytes_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"1234567"):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ConfigError, match="not a readable safetensors file"):
            count_parameters(tmp_path / "model.safetensors")


@pytest.mark.parametrize("raw", [b"[]", b'"x"', b"5", b"[" * 100_000], ids=["list", "text", "number", "deep"])
def test_a_weight_file_whose_header_is_no_object_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = safetensors(tmp_path / "model.safetensors", None, raw=raw)
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        count_parameters(path)


@settings(max_examples=60, deadline=None)
@given(shapes=st.lists(st.lists(st.integers(0, 50), max_size=3), max_size=5))
def test_parameters_are_the_products_of_the_shapes(shapes: list[list[int]], tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "counted.safetensors"
    safetensors(path, {f"t{n}": {"shape": shape} for n, shape in enumerate(shapes)})
    assert count_parameters(path) == sum(math.prod(shape) for shape in shapes)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (None, None),
        ("", None),
        ("# Model\nlicense: mit\n", None),
        ("# Model\n---\nlicense: mit\n---\n", None),
        ("---", None),
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\ntags: [a]\n---\n", None),
        ("---\nlicense: [mit, apache-2.0]\n---\n", None),
        ("---\n- license\n---\n", None),
        ("---\nlicense: [mit\n---\n", None),
        ("---\nlicense: \n---\n", None),
    ],
)
def test_the_licence_is_read_from_the_front_matter_and_from_nowhere_else(
    tmp_path: Path, card: str | None, licence: str | None
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card, newline="")
    assert card_licence(tmp_path / "README.md") == licence


def test_three_dashes_inside_a_value_do_not_end_the_front_matter(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nbase_model: org/a---b\nlicense: mit\n---\n# Model\n")
    assert card_licence(tmp_path / "README.md") == "mit"
