"""Which safetensors files a model is loaded from, and what in them is refused before anything is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.errors import ConfigError
from dpo_assets.planning.weights import INDEX, SINGLE, read_header, read_weights, unused_files
from dpo_assets_tests.planning.weights import save_index, save_raw, save_tensors

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS = {"a": FIRST, "b": SECOND}


def sharded(folder: Path) -> Path:
    """Two tensors in two files."""
    save_tensors(folder / FIRST, {"a": [2, 3]})
    save_tensors(folder / SECOND, {"b": [4]})
    save_index(folder, SHARDS)
    return folder


@pytest.mark.parametrize(
    ("raw", "length"),
    [
        (b"", 8),
        (b"{", None),
        (b'{"a": {"shape"', None),
        (b"\xff\xff", None),
        (b'{"a": {"dtype": "F32"}}', None),
        (b'{"a": {"dtype": "F32", "shape": [1]}}', None),
        (b'{"a": [1]}', None),
        (b'{"a": {"dtype": "F32", "data_offsets": [0, 4], "shape": 5}}', None),
        (b'{"a": {"dtype": "F32", "data_offsets": [0, 4], "shape": ["x"]}}', None),
        (b'{"a": {"dtype": "F32", "data_offsets": ["0", "4"], "shape": [1]}}', None),
        (b'{"a": {"shape": [1', 2**62),
        (b"[]", None),
        (b'"x"', None),
        (b"5", None),
        (b"[" * 100_000, None),
    ],
)
def test_a_weight_file_with_a_broken_header_is_refused(tmp_path: Path, raw: bytes, length: int | None) -> None:
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        read_header(save_raw(tmp_path / SINGLE, raw, length=length))


def test_a_weight_file_of_a_few_bytes_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"1234567"):
        (tmp_path / SINGLE).write_bytes(content)
        with pytest.raises(ConfigError, match="not a readable safetensors file"):
            read_weights(tmp_path)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_weight_file_whose_download_was_cut_short_is_refused(tmp_path: Path, change: int) -> None:
    path = save_tensors(tmp_path / SINGLE, {"a": [2, 3], "b": [4]})
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] if change < 0 else whole + b"x")
    with pytest.raises(ConfigError, match=f"has {len(whole) + change} bytes, its header describes {len(whole)}"):
        read_weights(tmp_path)


def test_a_header_that_does_not_describe_its_bytes_is_refused(tmp_path: Path) -> None:
    raw = b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}'
    with pytest.raises(ConfigError, match="does not describe the bytes of a"):
        read_header(save_raw(tmp_path / SINGLE, raw, data=bytes(8)))


@settings(max_examples=60, deadline=None)
@given(shapes=st.lists(st.lists(st.integers(0, 12), max_size=3), max_size=5))
def test_parameters_are_the_products_of_the_shapes(shapes: list[list[int]], tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("counted")
    save_tensors(folder / SINGLE, {f"t{n}": shape for n, shape in enumerate(shapes)})
    assert read_weights(folder).parameters == sum(math.prod(shape) for shape in shapes)


def test_a_second_copy_of_the_weights_is_not_counted_and_is_named(tmp_path: Path) -> None:
    """mistralai/Mistral-7B-Instruct-v0.3 holds its weights in two layouts."""
    save_tensors(tmp_path / SINGLE, {"a": [2, 3]})
    save_tensors(tmp_path / "consolidated.safetensors", {"tok.a": [2, 3]})
    weights = read_weights(tmp_path)
    assert (weights.parameters, weights.names) == (6, (SINGLE,))
    assert unused_files(tmp_path, weights.names) == ["consolidated.safetensors"]


def test_the_single_file_is_taken_before_parts_as_transformers_does(tmp_path: Path) -> None:
    sharded(tmp_path)
    assert read_weights(tmp_path).parameters == 10
    save_tensors(tmp_path / SINGLE, {"a": [1]})
    weights = read_weights(tmp_path)
    assert (weights.parameters, weights.names) == (1, (SINGLE,))
    assert unused_files(tmp_path, weights.names) == [FIRST, SECOND]


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / SECOND).unlink()
    with pytest.raises(ConfigError, match=f"names {SECOND}, which is not in"):
        read_weights(tmp_path)


def test_a_tensor_that_the_index_knows_and_no_file_holds_is_named(tmp_path: Path) -> None:
    save_index(sharded(tmp_path), SHARDS | {"c": SECOND})
    with pytest.raises(ConfigError, match="names c, but no file holds it"):
        read_weights(tmp_path)


def test_a_tensor_in_two_files_is_named(tmp_path: Path) -> None:
    save_tensors(sharded(tmp_path) / SECOND, {"a": [2, 3], "b": [4]})
    with pytest.raises(ConfigError, match=f"a is in {FIRST} and in {SECOND}"):
        read_weights(tmp_path)


def test_weights_under_a_name_that_nothing_loads_are_named(tmp_path: Path) -> None:
    save_tensors(tmp_path / "consolidated.safetensors", {"a": [2, 3]})
    with pytest.raises(ConfigError, match=r"holds consolidated\.safetensors, but neither model\.safetensors"):
        read_weights(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_an_index_that_names_nothing_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json (is not JSON|has no `weight_map`)"):
        read_weights(tmp_path)


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    save_index(tmp_path, {"a": "../other/model.safetensors"})
    with pytest.raises(ConfigError, match="which is not a file beside it"):
        read_weights(tmp_path)
