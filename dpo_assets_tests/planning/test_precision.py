"""The precision of a device, and the reason for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.errors import ConfigError
from dpo_assets.planning.precision import Device, Precision, choose_precision
from dpo_assets.planning.shape import ModelShape
from dpo_assets_tests.planning.cases import (
    A100,
    CPU,
    EIGHT_B,
    H200,
    L4,
    ONE_B,
    RTX_4090,
    SEVENTY_B,
    T4,
    TINY,
    V100,
    planned,
)

UNKNOWN = Device("cuda", "unknown card", 140.0, None)
PASCAL = Device("cuda", "P100", 16.0, (6, 0))
MAXWELL = Device("cuda", "Titan X", 12.0, (5, 2))


@dataclass(frozen=True)
class Need:
    """A memory estimate with a peak of one's own."""

    fits: bool
    peak_gib: float = 10.0
    recomputed_layers: int = 0


def never(precision: Precision) -> Need:
    raise AssertionError(f"a choice of the recipe needs no estimate, and {precision} was asked for")


@pytest.mark.parametrize(
    ("device", "shape", "precision", "reason"),
    [
        (CPU, TINY, "fp32", "a CPU has no fast 16-bit training"),
        (CPU, SEVENTY_B, "fp32", "a CPU"),
        (T4, ONE_B, "fp16", "loss scaling: Tesla T4 is older than Ampere"),
        (T4, EIGHT_B, "4bit", "on the 14.5 GiB of Tesla T4; in 4 bit the peak is"),
        (V100, ONE_B, "fp16", "older than Ampere"),
        (L4, ONE_B, "bf16", "L4 supports it and it fits"),
        (RTX_4090, EIGHT_B, "bf16", "GeForce RTX 4090 supports it and it fits"),
        (H200, EIGHT_B, "bf16", "of 139.7 GiB at the peak"),
        (H200, SEVENTY_B, "4bit", "GiB at least, more than a run can plan with on the 139.7 GiB of H200"),
        (T4, SEVENTY_B, "4bit", "even 4 bit needs"),
        (UNKNOWN, ONE_B, "fp16", "older than Ampere"),
        (A100, EIGHT_B, "bf16", "A100 80 GB supports it"),
    ],
)
def test_the_device_gets_the_fewest_compromises_that_fit_and_the_reason(
    device: Device, shape: ModelShape, precision: Precision, reason: str
) -> None:
    made = planned(shape, device)
    assert made.precision == precision
    assert made.precision_reason.startswith(precision)
    assert reason in made.precision_reason


def test_layers_are_computed_twice_before_weights_are_quantised() -> None:
    tight = Need(fits=True, recomputed_layers=12)
    choice = choose_precision(L4, "auto", lambda _: tight)
    assert choice.precision == "bf16"
    assert "12 layers computed twice" in choice.reason


def test_fp8_and_8bit_are_never_chosen_unasked() -> None:
    asked: list[Precision] = []

    def fitted(precision: Precision) -> Need:
        asked.append(precision)
        return Need(fits=precision in ("fp8", "8bit", "4bit"))

    assert choose_precision(H200, "auto", fitted).precision == "4bit"
    assert asked == ["bf16", "4bit"]


def test_a_card_too_old_for_4bit_keeps_its_16_bit_and_says_that_it_does_not_fit() -> None:
    choice = choose_precision(MAXWELL, "auto", lambda _: Need(fits=False))
    assert choice.precision == "fp16"
    assert "does not fit" in choice.reason


@pytest.mark.parametrize(
    ("device", "requested", "message"),
    [
        *((CPU, p, f"`{p}` needs a GPU; on this CPU use `fp32`") for p in ("4bit", "8bit", "fp8", "bf16", "fp16")),
        (T4, "bf16", "(capability 7.5) has no bf16; use `fp16` or `auto`"),
        (T4, "fp8", "needs capability 8.9; Tesla T4 (capability 7.5) lacks it. Use `8bit`, or `fp16`"),
        (A100, "fp8", "A100 80 GB (capability 8.0) lacks it. Use `8bit`, or `bf16`"),
        (V100, "fp8", "Use `4bit`, or `fp16`"),
        (V100, "8bit", "needs capability 7.5; Tesla V100 16 GB (capability 7.0) lacks it. Use `4bit`, or `fp16`"),
        (MAXWELL, "4bit", "needs capability 6.0; Titan X (capability 5.2) lacks it. Use `fp16`."),
        (UNKNOWN, "bf16", "has no bf16"),
    ],
)
def test_a_precision_that_the_device_lacks_is_refused_with_the_nearest_one(
    device: Device, requested: Precision, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        choose_precision(device, requested, never)
    assert message in str(refused.value)


@settings(max_examples=100, deadline=None)
@given(major=st.integers(3, 12), minor=st.integers(0, 9), requested=st.sampled_from(get_args(Precision)))
def test_every_way_out_of_a_refused_precision_is_open(major: int, minor: int, requested: Precision) -> None:
    device = Device("cuda", "card", 80.0, (major, minor))
    try:
        choose_precision(device, requested, never)
    except ConfigError as error:
        advice = str(error).replace("`auto`", "").partition("`" if requested == "bf16" else "Use ")[2]
        named = [p for p in get_args(Precision) if f"`{p}`" in "`" + advice]
        assert named
        assert requested not in named
        for precision in named:
            choose_precision(device, precision, never)
    else:
        assert device.supports(requested)


@pytest.mark.parametrize(
    ("device", "requested"),
    [
        (CPU, "fp32"),
        (PASCAL, "4bit"),
        (T4, "fp16"),
        (T4, "4bit"),
        (T4, "8bit"),
        (T4, "fp32"),
        (A100, "bf16"),
        (L4, "8bit"),
        (L4, "fp8"),
        (RTX_4090, "fp8"),
        (H200, "fp8"),
        (H200, "fp32"),
    ],
)
def test_a_choice_in_the_recipe_wins_where_the_device_can_follow(device: Device, requested: Precision) -> None:
    choice = choose_precision(device, requested, never)
    assert (choice.precision, choice.reason) == (requested, f"{requested}: chosen in the recipe")
