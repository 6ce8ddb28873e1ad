"""Memory by parts, and the forward size: what fits goes on to fit with more memory, whatever the batch is."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from dpo_assets.planning import memory
from dpo_assets.planning.memory import (
    FRAMEWORK_GIB,
    GIB,
    HEAD_CHUNKS,
    USABLE,
    MemoryFit,
    adapter_bytes,
    body_parameters,
    estimate_peak,
    fit,
    head_chunk,
    weights_bytes,
)
from dpo_assets.planning.model_folder import inspect_model
from dpo_assets.planning.precision import Precision
from dpo_assets.planning.shape import Kernels, ModelShape
from dpo_assets.recipe import ALL_LINEAR, LoraSection
from dpo_assets_tests.planning.cases import EIGHT_B, ONE_B, SEVENTY_B, TINY

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
KERNELS: tuple[Kernels, ...] = get_args(Kernels)
Where = Literal["cpu", "cuda"]
LORA = LoraSection()

shapes = st.sampled_from([TINY, ONE_B, EIGHT_B, SEVENTY_B])
gib = st.floats(0.01, 300.0)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `fit` but the memory: any model, precision and dataset."""
    longest = draw(st.integers(1, 20_000))
    return {
        "shape": draw(shapes),
        "precision": draw(st.sampled_from(PRECISIONS)),
        "kernels": draw(st.sampled_from(KERNELS)),
        "lora": LoraSection(rank=draw(st.sampled_from([1, 16, 256]))),
        "longest_pair": longest,
        # At most 64 forwards of the longest pair: see the test of large batches.
        "step_tokens": draw(st.floats(1.0, 50.0)) * longest / draw(st.floats(1.0, 4.0)),
        "device": draw(st.sampled_from(["cpu", "cuda"])),
    }


def usable(available: float, device: Where) -> float:
    return USABLE[device] * available


@settings(max_examples=150, deadline=None)
@given(requests(), gib)
def test_a_forward_holds_the_longest_pair_and_what_fits_leaves_room(asked: dict[str, Any], available: float) -> None:
    found = fit(**asked, available_gib=available)
    assert found.token_budget >= asked["longest_pair"]
    assert 0 <= found.recomputed_layers <= asked["shape"].layers
    if asked["kernels"] != "fused":
        assert found.recomputed_layers in (0, asked["shape"].layers)
    assert found.gradient_checkpointing is (found.recomputed_layers > 0)
    assert found.peak_gib == pytest.approx(sum(found.parts.values()))
    assert all(size >= 0 for size in found.parts.values())
    needed = found.peak_gib + FRAMEWORK_GIB[asked["device"]]
    assert found.fits is (needed <= usable(available, asked["device"]))
    again = estimate_peak(
        asked["shape"], asked["precision"], asked["kernels"], asked["lora"], found.token_budget,
        found.recomputed_layers, asked["device"],
    )  # fmt: skip
    assert again == pytest.approx(found.peak_gib)


def cost(found: MemoryFit, asked: dict[str, Any]) -> float:
    """Estimated seconds a token of the forwards that were chosen."""
    estimate = memory._Estimate(
        asked["shape"], asked["precision"], asked["kernels"], asked["lora"], found.token_budget, asked["device"]
    )
    return estimate.cost_per_token(found.recomputed_layers)


@settings(max_examples=150, deadline=None)
@given(requests(), gib, st.floats(0.0, 100.0))
def test_more_memory_never_takes_a_fit_away_nor_makes_it_slower(
    asked: dict[str, Any], available: float, more: float
) -> None:
    small, large = (fit(**asked, available_gib=size) for size in (available, available + more))
    assert large.fits >= small.fits
    if small.fits:
        assert cost(large, asked) <= cost(small, asked) * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(requests(), gib)
def test_of_the_forwards_that_fit_the_fastest_is_taken(asked: dict[str, Any], available: float) -> None:
    found = fit(**asked, available_gib=available)
    device, layers = asked["device"], asked["shape"].layers
    where = (asked["shape"], asked["precision"], asked["kernels"], asked["lora"])
    for budget in memory._candidates(asked["longest_pair"], asked["step_tokens"], device):
        for recomputed in range(layers + 1) if asked["kernels"] == "fused" else (0, layers):
            needed = estimate_peak(*where, budget, recomputed, device) + FRAMEWORK_GIB[device]
            if needed <= usable(available, device):
                assert found.fits
                other = MemoryFit(budget, recomputed, 0.0, {}, True)
                assert cost(found, asked) <= cost(other, asked) * (1 + 1e-9)
                break


@settings(max_examples=60, deadline=None)
@given(requests())
def test_a_plan_that_does_not_fit_names_the_memory_that_would_do(asked: dict[str, Any]) -> None:
    """The peak of a plan that does not fit is that of the smallest forward, so that much memory is enough."""
    refused = fit(**asked, available_gib=0.0)
    assert not refused.fits
    assert refused.token_budget == fit(**asked, available_gib=1e-6).token_budget
    enough = (refused.peak_gib + FRAMEWORK_GIB[asked["device"]]) / USABLE[asked["device"]]
    assert fit(**asked, available_gib=enough * (1 + 1e-9)).fits


@pytest.mark.parametrize("pairs", [16, 128, 1024])
def test_whether_a_model_fits_does_not_depend_on_the_pairs_of_a_step(pairs: int) -> None:
    """A step takes as many forwards as it needs."""
    assert fit(EIGHT_B, "4bit", "fused", LORA, 11.0, 1500, 600.0 * pairs, "cuda").fits


@settings(max_examples=100, deadline=None)
@given(requests(), st.integers(1, 40_000), st.integers(0, 10_000), st.integers(0, 79))
def test_larger_forwards_take_more_memory_and_recomputed_layers_less(
    asked: dict[str, Any], tokens: int, more: int, recomputed: int
) -> None:
    layers = asked["shape"].layers
    where = (asked["shape"], asked["precision"], asked["kernels"], asked["lora"])

    def peak(size: int, again: int) -> float:
        return estimate_peak(*where, size, again, asked["device"])

    few = min(recomputed, layers - 1)
    assert peak(tokens + more, few) >= peak(tokens, few)
    assert peak(tokens, layers) <= peak(tokens, 0)
    if asked["kernels"] == "fused" and few + 1 < layers:
        assert peak(tokens, few + 1) < peak(tokens, few)


# --- parts --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 200_000), st.integers(0, 200_000), st.sampled_from(["cpu", "cuda"]))
def test_a_chunk_of_the_head_grows_with_the_forward_within_its_bounds(budget: int, more: int, device: Where) -> None:
    smallest, largest = HEAD_CHUNKS[device]
    small, large = head_chunk(budget, device), head_chunk(budget + more, device)
    assert smallest <= small <= large <= largest
    assert small & (small - 1) == 0
    assert (head_chunk(0, device), head_chunk(10**9, device)) == (smallest, largest)


@pytest.mark.parametrize("shape", [ONE_B, EIGHT_B, SEVENTY_B], ids=["1b", "8b", "70b"])
def test_fewer_bits_are_fewer_bytes(shape: ModelShape) -> None:
    size = {precision: weights_bytes(shape, precision) for precision in PRECISIONS}
    assert size["4bit"] < size["8bit"] == size["fp8"] < size["fp16"] == size["bf16"] < size["fp32"]
    assert size["fp32"] == 4 * shape.parameters
    assert size["bf16"] == 2 * shape.parameters
    assert size["bf16"] - size["fp8"] == body_parameters(shape)


def test_the_linear_layers_are_those_of_the_built_in_model() -> None:
    folder = Path(str(files("dpo_assets") / "data" / "stories260k"))
    shape = inspect_model(folder).shape
    seen: dict[str, set[tuple[int, ...]]] = {}
    with safe_open(folder / "model.safetensors", framework="numpy") as weights:
        for name in weights.keys():  # noqa: SIM118 (no mapping)
            if name.endswith("_proj.weight"):
                seen.setdefault(name.split(".")[-2], set()).add(tuple(weights.get_slice(name).get_shape()))
    assert {name: {size} for name, size in shape.linear_shapes().items()} == seen
    assert body_parameters(shape) == shape.layers * sum(math.prod(*sizes) for sizes in seen.values())


def test_an_adapter_is_counted_by_its_rank_and_its_projections() -> None:
    one, two = (adapter_bytes(EIGHT_B, LoraSection(rank=rank)) for rank in (8, 16))
    assert two == 2 * one
    parts = [adapter_bytes(EIGHT_B, LoraSection(rank=8, target_modules=[name])) for name in ALL_LINEAR]
    assert sum(parts) == one
    # Weights, gradients and two moments in fp32, and a 16-bit copy, of Llama-3.1-8B's 20.97 million at rank 8.
    assert one == 18 * 20_971_520


def test_a_quantised_base_needs_room_for_one_dequantised_layer() -> None:
    for precision in PRECISIONS:
        found = fit(EIGHT_B, precision, "fused", LORA, 200.0, 1000, 8000.0, "cuda")
        largest = max(2 * 14_336 * 4_096, 4_096 * (4_096 + 2 * 1_024)) * 2 / GIB
        expected = largest if precision in ("4bit", "8bit", "fp8") else 0.0
        assert found.parts["dequantised layer"] == pytest.approx(expected), precision


def test_the_parts_are_written_as_a_plan_keeps_them() -> None:
    found = fit(ONE_B, "bf16", "fused", LORA, 24.0, 1000, 8000.0, "cuda")
    assert json.loads(json.dumps(found.parts)) == found.parts
