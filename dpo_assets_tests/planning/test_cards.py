"""The catalogues: cards by the names people use, models by their size."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dpo_assets.errors import ConfigError
from dpo_assets.planning.cards import CARDS, device_of, find_card, rates_of
from dpo_assets.planning.precision import Device
from dpo_assets.planning.sizes import SIZES, Size, find_model
from dpo_assets.planning.speed import predicted_by
from dpo_assets.planning.targets import kinds_of
from dpo_assets_tests.pipelines import STORIES


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("t4", "t4"),
        ("Tesla T4", "t4"),
        ("NVIDIA L4", "l4"),
        ("l40s", "l40s"),
        ("3090", "rtx3090"),
        ("RTX 4090", "rtx4090"),
        ("rtx-4090", "rtx4090"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("GeForce RTX 2080 Ti", "rtx2080ti"),
        ("A100-40", "a100-40"),
        ("a100_80gb", "a100-80"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA H200", "h200"),
        ("B200", "b200"),
        ("h100", "h100"),
        ("V100 32GB", "v100-32"),
        ("nvidia rtx a6000", "a6000"),
        ("rtx4080 super", "rtx4080super"),
        ("4070ti", "rtx4070ti"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
    ],
)
def test_a_card_answers_to_the_names_of_people_and_of_drivers(name: str, key: str) -> None:
    assert find_card(name).key == key


def test_every_card_answers_to_its_key_and_its_name() -> None:
    for card in CARDS:
        assert find_card(card.key) is card
        assert find_card(card.key.upper().replace("-", " ")) is card
    assert len({card.key for card in CARDS}) == len(CARDS)


@pytest.mark.parametrize(("name", "sizes"), [("a100", "`a100-40` or `a100-80`"), ("V100", "`v100-16` or `v100-32`")])
def test_a_name_of_two_sizes_is_refused_with_both(name: str, sizes: str) -> None:
    with pytest.raises(ConfigError, match="more than one size") as refused:
        find_card(name)
    assert sizes in str(refused.value)


@pytest.mark.parametrize(
    ("name", "near"), [("h1000", "`h100`"), ("rtx4900", "`rtx4090`"), ("a10", "`a10g`"), ("3090 ti", "`rtx3090`")]
)
def test_an_unknown_card_is_refused_with_near_names_and_the_list(name: str, near: str) -> None:
    with pytest.raises(ConfigError) as refused:
        find_card(name)
    assert near in str(refused.value).partition("Known:")[0]
    assert "Known: cpu, v100-16" in str(refused.value)


@given(name=st.text(max_size=12))
def test_any_other_text_is_refused_as_a_config_error(name: str) -> None:
    known = {card.key for card in CARDS}
    try:
        key = find_card(name).key
    except ConfigError as error:
        key = next(iter(known)) if any(k in str(error) for k in known) else ""
    assert key in known


@pytest.mark.parametrize(
    ("key", "lacks"),
    [
        ("v100-16", {"8bit", "fp8", "bf16"}),
        ("t4", {"fp8", "bf16"}),
        ("a100-40", {"fp8"}),
        ("l4", set()),
        ("b200", set()),
    ],
)
def test_a_card_tells_what_it_trains_in(key: str, lacks: set[str]) -> None:
    assert {"4bit", "8bit", "fp8", "bf16", "fp16", "fp32"} - set(find_card(key).precisions) == lacks


def test_a_card_has_less_memory_than_its_box_says() -> None:
    for key, box in {"t4": 16, "l4": 24, "rtx4090": 24, "a100-80": 80, "h200": 141, "b200": 192}.items():
        assert 0.88 * box < find_card(key).memory_gib < box


def test_the_cpu_is_this_machine() -> None:
    key, device = device_of("CPU")
    assert (key, device.kind, device.capability) == ("cpu", "cpu", None)
    assert 0 <= psutil.virtual_memory().total / 2**30 - device.memory_gib < 1


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.key)
def test_the_parameters_of_a_size_are_those_of_its_shape(size: Size) -> None:
    """Of the model that Transformers builds of its config.json, without values."""
    config = dict(size.config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config.pop("model_type")](**config))
    assert size.shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert size.shape.architecture == type(model).__name__
    embeddings = size.shape.vocabulary * size.shape.hidden * (1 if size.shape.tied else 2)
    matrices = sum(kind.weights for kind in kinds_of(size.shape) or ())
    # The rest is norms, biases, sinks and convolutions.
    assert 0 <= size.shape.parameters - embeddings - matrices < 0.01 * size.shape.parameters


@pytest.mark.parametrize(("name", "key"), [("8b", "8b"), ("8B", "8b"), (" 0.5b ", "0.5b"), ("135M", "135m")])
def test_a_size_is_found_however_it_is_written(name: str, key: str) -> None:
    assert find_model(name).key == key


def test_a_local_folder_is_planned_for_with_its_own_shape() -> None:
    size = find_model(str(STORIES))
    assert (size.key, size.shape.layers, size.shape.hidden) == (str(STORIES), 5, 64)


@pytest.mark.parametrize(("name", "near"), [("9b", "`8b`"), ("65b", "`70b`"), ("0.6b", "`0.5b`"), ("500m", "`0.5b`")])
def test_an_unknown_size_is_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match="neither a size nor a local model folder") as refused:
        find_model(name)
    assert f"did you mean {near}?" in str(refused.value)


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "b", "-3b", "nanb", "infb", "?"])
def test_what_is_no_size_is_refused_with_the_list(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"Sizes: 135m, 0\.5b"):
        find_model(name)


@pytest.mark.parametrize(
    ("name", "memory", "key"),
    [
        ("NVIDIA H100 80GB HBM3", 26.0, "h100"),
        ("NVIDIA H100 NVL", 90.0, "h100-nvl"),
        ("NVIDIA H100 PCIe", 79.0, "h100-pcie"),
        ("NVIDIA GeForce RTX 4070 Ti", 11.6, "rtx4070ti"),
        ("NVIDIA GeForce RTX 4080 SUPER", 15.6, "rtx4080super"),
        ("NVIDIA A100-SXM4-80GB", 79.0, "a100-80"),
        ("NVIDIA A100-PCIE-40GB", 39.0, "a100-40"),
        ("NVIDIA GeForce RTX 4090", 23.5, "rtx4090"),
        ("NVIDIA RTX A6000", 47.0, "a6000"),
        ("NVIDIA RTX 6000 Ada Generation", 47.0, "rtx6000ada"),
        ("NVIDIA L4", 22.0, "l4"),
        ("NVIDIA L40S", 44.0, "l40s"),
        ("NVIDIA L40", 44.0, None),
        ("Tesla V100-SXM2-32GB", 31.0, "v100-32"),
        ("GeForce GTX 1080", 7.9, None),
        ("CPU", 16.0, None),
    ],
)
def test_a_drivers_name_is_found_among_the_cards_or_none_is_taken_for_it(
    name: str, memory: float, key: str | None
) -> None:
    """Speeds are predicted by the card, and another card's would mislead."""
    found = rates_of(Device("cuda", name, memory, (8, 0)))
    assert (found.card.key if found else None) == key
    assert found is None or not found.note


@pytest.mark.parametrize(
    ("name", "key", "share", "note"),
    [
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "h100", 10 / 79.1, "at 13% of the rates of an H100 80 GB"),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "a100-80", 40 / 79.2, "at 51% of the rates of an A100 80 GB"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx4090", 0.5, "at 50% of the rates of a GeForce RTX 4090"),
        ("NVIDIA GeForce RTX 3090 Ti", "rtx3090", 1.0, "at the rates of a GeForce RTX 3090"),
        ("NVIDIA GeForce RTX 4070 SUPER", "rtx4070", 1.0, "at the rates of a GeForce RTX 4070"),
    ],
)
def test_a_part_or_a_sibling_of_a_card_does_not_silently_get_its_rates(
    name: str, key: str, share: float, note: str
) -> None:
    memory = 9.0 if "1g" in name else 39.0 if "3g" in name else 15.6
    found = rates_of(Device("cuda", name, memory, (8, 0)))
    assert found is not None
    whole = find_card(key)
    assert (found.card.key, found.note) == (key, note)
    assert found.card.tflops == pytest.approx(share * whole.tflops)
    assert found.card.terabytes_per_s == pytest.approx(share * whole.terabytes_per_s)


@pytest.mark.parametrize("name", ["NVIDIA A10", "NVIDIA L40", "NVIDIA GeForce RTX 3080", "NVIDIA GB200"])
def test_a_card_that_is_not_in_the_catalogue_is_predicted_by_another_and_says_so(name: str) -> None:
    found = predicted_by(Device("cuda", name, 22.0, (8, 6)))
    assert (found.card.key, found.note) == ("h100", f"at an H100's rates: {name} is not in the catalogue")


def test_a_card_of_the_catalogue_needs_no_word() -> None:
    assert not any(predicted_by(card.device()).note for card in CARDS)
    assert not predicted_by(Device("cpu", "CPU", 16.0)).note


def test_every_card_is_found_by_its_own_name_and_has_its_rates() -> None:
    for card in CARDS:
        found = rates_of(card.device())
        assert found is not None
        assert found.card is card
        # Operations for each byte of memory: 60 (RTX 3060, T4's 200) to 420 (L40S), of all that there are.
        assert 50 < card.tflops / card.terabytes_per_s < 500, card.key
