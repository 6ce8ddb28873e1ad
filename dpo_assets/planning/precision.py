"""Which precision a device should train in, and why. Pure: the device is described, never touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpo_assets.errors import ConfigError

Precision = Literal["4bit", "8bit", "fp8", "bf16", "fp16", "fp32"]
BYTES_PER_WEIGHT: dict[Precision, float] = {"fp32": 4, "bf16": 2, "fp16": 2, "8bit": 1.1, "fp8": 1.1, "4bit": 0.7}
AMPERE, HOPPER = (8, 0), (9, 0)


@dataclass(frozen=True)
class Device:
    """What a run would train on. `capability` is CUDA's, None on a CPU."""

    kind: Literal["cpu", "cuda"]
    name: str
    memory_gib: float
    capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class PrecisionChoice:
    """A precision and the reason for it, in words."""

    precision: Precision
    reason: str


def weights_gib(parameters: int, precision: Precision) -> float:
    """Memory of the base weights. 4-bit counts NF4 blocks, their scales and the 16-bit embeddings."""
    return parameters * BYTES_PER_WEIGHT[precision] / 2**30


def choose_precision(device: Device, parameters: int, requested: Precision | Literal["auto"]) -> PrecisionChoice:
    """The fewest compromises that fit; a user's choice wins where the device can follow it.

    Raises:
        ConfigError: when the requested precision cannot run on this device, with the nearest one that can.
    """
    if requested != "auto":
        _refuse_impossible(device, requested)
        return PrecisionChoice(requested, f"{requested}: chosen in the recipe")
    if device.kind == "cpu":
        return PrecisionChoice("fp32", "fp32: a CPU has no fast 16-bit training, and fp32 needs no loss scaling")
    name, capability = device.name, device.capability or (0, 0)
    half: Precision = "bf16" if capability >= AMPERE else "fp16"
    # A 16-bit run wants room for activations beside the weights: half the card is where packing still pays.
    if weights_gib(parameters, half) <= 0.55 * device.memory_gib:
        need = f"the weights need {weights_gib(parameters, half):.1f} of {device.memory_gib:.0f} GiB"
        if half == "bf16":
            return PrecisionChoice("bf16", f"bf16: {name} supports it and it fits ({need})")
        return PrecisionChoice("fp16", f"fp16 with loss scaling: {name} is older than Ampere, so no bf16 ({need})")
    return PrecisionChoice(
        "4bit",
        f"4bit: {half} weights need {weights_gib(parameters, half):.1f} GiB, too much beside activations on the "
        f"{device.memory_gib:.0f} GiB of {name}",
    )


def _refuse_impossible(device: Device, requested: Precision) -> None:
    if device.kind == "cpu" and requested != "fp32":
        raise ConfigError(f"hardware.precision `{requested}` needs a GPU; on this CPU use `fp32` or `auto`.")
    capability = device.capability or (0, 0)
    if requested == "bf16" and device.kind == "cuda" and capability < AMPERE:
        raise ConfigError(
            f"{device.name} (capability {capability[0]}.{capability[1]}) has no bf16; use `fp16` or `auto`."
        )
    if requested == "fp8" and capability < HOPPER:
        raise ConfigError(
            f"fp8 needs capability 9.0 (Unsloth 2026.10.9); {device.name} has {capability[0]}.{capability[1]}. "
            f"Use `{'bf16' if capability >= AMPERE else 'fp16'}`, or `4bit` to save memory."
        )
