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
from dpo_assets.planning.cards import find_card
from dpo_assets.planning.memory import (
    FRAMEWORK_GIB,
    GIB,
    HEAD_CHUNKS,
    Training,
    adapter_bytes,
    body_parameters,
    fit,
    head_chunk,
    weights_bytes,
)
from dpo_assets.planning.model_folder import inspect_model
from dpo_assets.planning.precision import Precision
from dpo_assets.planning.shape import Kernels, ModelShape, Trainer
from dpo_assets.planning.work import Work
from dpo_assets.recipe import ALL_LINEAR, LoraSection
from dpo_assets_tests.planning.cases import EIGHT_B, ONE_B, SEVENTY_B, TINY
from dpo_assets_tests.planning.measured import SHAPES

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
KERNELS: tuple[Kernels, ...] = get_args(Kernels)
Where = Literal["cpu", "cuda"]
LORA = LoraSection()
H100 = find_card("h100")

shapes = st.sampled_from([TINY, ONE_B, EIGHT_B, SEVENTY_B, SHAPES["gemma3-4b"]])
gib = st.floats(0.01, 300.0)


def training(
    shape: ModelShape, precision: Precision = "bf16", kernels: Kernels = "fused", rank: int = 16,
    device: Where = "cuda", trainer: Trainer = "packed",
) -> Training:  # fmt: skip
    return Training(shape, precision, kernels, LoraSection(rank=rank), device, trainer=trainer)


def work(longest: int, step_tokens: float, pairs: int = 16, **changes: Any) -> Work:
    mean = step_tokens / pairs
    return Work(pairs, longest, mean, mean / 5, max_length=max(1, longest // 2), **changes)


@st.composite
def requests(draw: st.DrawFn) -> tuple[Training, Work]:
    """Arguments of `fit` but the memory: any model, precision, engine and dataset."""
    longest = draw(st.integers(2, 20_000))
    trainer: Trainer = draw(st.sampled_from(["packed", "packed", "trl"]))
    kernels: Kernels = draw(st.sampled_from(KERNELS if trainer == "packed" else ("transformers", "unsloth")))
    # At most 64 forwards of the longest pair: see the test of large batches.
    tokens = draw(st.floats(1.0, 50.0)) * longest / draw(st.floats(1.0, 4.0))
    asked = training(
        draw(shapes), draw(st.sampled_from(PRECISIONS)), kernels, draw(st.sampled_from([1, 16, 256])),
        draw(st.sampled_from(["cpu", "cuda"])), trainer,
    )  # fmt: skip
    return asked, work(longest, tokens, trainer=trainer)


def steps(asked: Training) -> list[int]:
    """Numbers of recomputed layers that the engine can do."""
    layers = asked.shape.layers
    return list(range(layers + 1)) if asked.stepwise else [0, layers]


@settings(max_examples=150, deadline=None)
@given(requests(), gib)
def test_a_forward_holds_the_longest_pair_and_what_fits_leaves_room(
    request: tuple[Training, Work], available: float
) -> None:
    asked, step = request
    found = fit(asked, step, available)
    assert found.token_budget >= step.longest_pair - (step.longest_pair % 2 if step.trainer == "trl" else 0)
    assert found.recomputed_layers in steps(asked)
    assert found.gradient_checkpointing is (found.recomputed_layers > 0)
    assert found.peak_gib == pytest.approx(sum(found.parts.values()))
    assert all(size >= 0 for size in found.parts.values())
    needed = found.peak_gib + FRAMEWORK_GIB[asked.device]
    assert found.fits is (needed <= asked.usable(available))
    if asked.trainer == "packed":
        again = asked.peak(found.token_budget, found.recomputed_layers)
        assert again == pytest.approx(found.peak_gib)


@settings(max_examples=150, deadline=None)
@given(requests(), gib, st.floats(0.0, 100.0))
def test_more_memory_never_takes_a_fit_away_nor_makes_it_slower(
    request: tuple[Training, Work], available: float, more: float
) -> None:
    small, large = (fit(*request, available_gib=size) for size in (available, available + more))
    assert large.fits >= small.fits
    if small.fits:
        assert large.step_seconds <= small.step_seconds * memory.ABOUT_AS_FAST * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(requests(), gib)
def test_of_the_forwards_that_are_about_as_fast_as_the_fastest_the_least_is_taken(
    request: tuple[Training, Work], available: float
) -> None:
    asked, step = request
    found = fit(asked, step, available)
    for budget in memory._candidates(asked, step):
        for recomputed in steps(asked):
            if asked.needed(budget, recomputed) <= asked.usable(available):
                assert found.fits
                seconds = asked.seconds(step, budget, recomputed, H100)
                assert found.step_seconds <= seconds * memory.ABOUT_AS_FAST * (1 + 1e-9)
                # What needs less is slower than the fastest by more than predictions are sure of.
                assert seconds > found.step_seconds / memory.ABOUT_AS_FAST * (1 - 1e-9) or (
                    (1 - memory.WORTH_SAVING) * asked.needed(found.token_budget, found.recomputed_layers)
                    <= asked.needed(budget, recomputed) * (1 + 1e-9)
                )
                break


@settings(max_examples=60, deadline=None)
@given(requests())
def test_a_plan_that_does_not_fit_names_the_memory_that_would_do(request: tuple[Training, Work]) -> None:
    """The peak of a plan that does not fit is that of the smallest forward, so that much memory is enough."""
    refused = fit(*request, available_gib=0.0)
    assert not refused.fits
    assert refused.token_budget == fit(*request, available_gib=1e-6).token_budget
    enough = (refused.peak_gib + FRAMEWORK_GIB[request[0].device]) / request[0].usable(1.0)
    assert fit(*request, available_gib=enough * (1 + 1e-9)).fits


@pytest.mark.parametrize("pairs", [16, 128, 1024])
def test_whether_a_model_fits_does_not_depend_on_the_pairs_of_a_step(pairs: int) -> None:
    """A step takes as many forwards as it needs."""
    assert fit(training(EIGHT_B, "4bit"), work(1500, 600.0 * pairs, pairs), 11.0).fits


@settings(max_examples=100, deadline=None)
@given(requests(), st.integers(1, 40_000), st.integers(0, 10_000), st.integers(0, 79))
def test_larger_forwards_take_more_memory_and_recomputed_layers_less(
    request: tuple[Training, Work], tokens: int, more: int, recomputed: int
) -> None:
    asked = request[0]
    layers = asked.shape.layers
    few = min(recomputed, layers - 1)
    assert asked.peak(tokens + more, few) >= asked.peak(tokens, few)
    assert asked.peak(tokens, layers) <= asked.peak(tokens, 0)
    if few + 1 < layers:
        assert asked.peak(tokens, few + 1) < asked.peak(tokens, few)


@pytest.mark.parametrize("available", [10.3, 16.0, 20.0, 26.0, 40.0])
@pytest.mark.parametrize("kernels", ["fused", "transformers", "rows"])
@pytest.mark.parametrize("model", ["qwen3-8b", "gemma3-4b", "qwen3-1.7b"])
def test_a_plan_uses_the_memory_that_it_was_given(model: str, kernels: Kernels, available: float) -> None:
    """With all layers recomputed or none, plans left a quarter of the memory and recomputed more than they had to."""
    asked, step = training(SHAPES[model], "4bit", kernels), work(1_892, 16 * 841.8)
    found = fit(asked, step, available)
    # What is left would not hold what one layer more keeps, unless it is recomputed: no plan recomputes for nothing.
    if found.recomputed_layers:
        assert asked.needed(found.token_budget, found.recomputed_layers - 1) > asked.usable(available)
        assert found.peak_gib + FRAMEWORK_GIB["cuda"] > 0.8 * asked.usable(available)


def test_transformers_layers_are_recomputed_in_part() -> None:
    found = fit(training(SHAPES["qwen3-1.7b"], "bf16", "transformers"), work(1_892, 16 * 841.8), 20.0)
    assert 0 < found.recomputed_layers < SHAPES["qwen3-1.7b"].layers


def test_two_percent_of_speed_are_given_for_memory() -> None:
    """A step of 16 pairs in one forward is 1 % faster on an H100 than in two, and takes twice the activations."""
    asked, step = training(EIGHT_B), work(1_892, 16 * 841.8)
    found, whole = fit(asked, step, 79.0), next(memory._candidates(asked, step))
    assert found.token_budget < whole
    assert found.peak_gib < asked.peak(whole, 0) - 10
    assert found.step_seconds <= memory.ABOUT_AS_FAST * asked.seconds(step, whole, 0, H100)


def test_speed_is_not_given_for_little_memory() -> None:
    """Llama-8B in 4 bit on 10.3 GiB: smaller forwards with fewer recomputed layers fill the same memory."""
    asked, step = training(EIGHT_B, "4bit"), work(1_892, 16 * 841.8)
    found = fit(asked, step, 10.3)
    tried = [
        (budget, asked.fewest_recomputed(budget, asked.usable(10.3))) for budget in memory._candidates(asked, step)
    ]
    fitting = [each for each in tried if asked.needed(*each) <= asked.usable(10.3)]
    assert found.step_seconds == min(asked.seconds(step, *each, H100) for each in fitting)


def test_forwards_of_few_long_pairs_are_planned_as_the_whole_pairs_that_they_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three pairs of 11,607 tokens are more than the largest forward, so that forwards hold two."""
    monkeypatch.setattr(memory, "ABOUT_AS_FAST", 1.0)
    alike = fit(training(ONE_B), work(11_955, 16 * 11_607.0), 79.0)
    assert 2 * 11_607 < alike.token_budget <= 2 * 11_955
    mixed = fit(training(ONE_B), work(16_000, 16 * 11_607.0), 79.0)
    assert mixed.token_budget == memory.LARGEST_FORWARD["cuda"]


def test_trls_trainer_is_planned_in_whole_micro_batches() -> None:
    asked = training(EIGHT_B, "bf16", "transformers", trainer="trl")
    step = work(2_048, 16 * 900.0, trainer="trl")
    assert fit(asked, step, 79.0).token_budget == 2 * 2 * 1_024
    assert fit(asked, step, 18.0).token_budget == 2 * 1_024
    chosen = work(2_048, 16 * 900.0, trainer="trl", micro_batch=8)
    assert fit(asked, chosen, 79.0).token_budget == 2 * 8 * 1_024


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
    described = shape.described()
    layer = described.layers[0]
    assert {name.split(".")[-1]: {(rows, cols)} for name, rows, cols in layer.linears(described.hidden)} == seen
    assert body_parameters(shape) == shape.layers * sum(math.prod(*sizes) for sizes in seen.values())


def test_an_adapter_is_counted_by_its_rank_and_its_projections() -> None:
    one, two = (adapter_bytes(EIGHT_B, LoraSection(rank=rank)) for rank in (8, 16))
    assert two == 2 * one
    parts = [adapter_bytes(EIGHT_B, LoraSection(rank=8, target_modules=[name])) for name in ALL_LINEAR]
    assert sum(parts) == one
    # Weights, gradients and two moments in fp32, and a 16-bit copy, of Llama-3.1-8B's 20.97 million at rank 8.
    assert one == 18 * 20_971_520


def test_a_quantised_base_needs_room_for_what_a_block_begins_and_ends_with() -> None:
    for precision in PRECISIONS:
        found = fit(training(EIGHT_B, precision), work(1000, 8000.0), 200.0)
        first, last = max(2 * 14_336 * 4_096, 4_096 * (4_096 + 2 * 1_024)), max(14_336 * 4_096, 4_096 * 4_096)
        expected = (first + last) * 2 / GIB if precision in ("4bit", "8bit", "fp8") else 0.0
        assert found.parts["dequantised layers"] == pytest.approx(expected), precision


def test_the_parts_are_written_as_a_plan_keeps_them() -> None:
    found = fit(training(ONE_B), work(1000, 8000.0), 24.0)
    assert json.loads(json.dumps(found.parts)) == found.parts
