"""Which precision a device should train in, and why. Pure: the device is described, never touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from dpo_assets.errors import ConfigError

Precision = Literal["4bit", "8bit", "fp8", "bf16", "fp16", "fp32"]
Half = Literal["bf16", "fp16"]
Compute = Literal["bf16", "fp16", "fp32"]
QUANTISED: tuple[Precision, ...] = ("4bit", "8bit", "fp8")
# Least CUDA capability of each precision. bf16: Ampere. fp8: hardware conversion from e4m3, which Ada (8.9) brought;
# weights are stored in it and computed with in 16 bit. int8 and NF4: bitsandbytes' installation guide.
NEEDED_CAPABILITY: dict[Precision, tuple[int, int]] = {
    "4bit": (6, 0), "8bit": (7, 5), "fp8": (8, 9), "bf16": (8, 0), "fp16": (0, 0), "fp32": (0, 0),
}  # fmt: skip
WORTH_QUANTISING = 0.1  # Of the peak that 16 bit needs: what saves less, and does not fit, is not worth the rounding.
AMPERE = NEEDED_CAPABILITY["bf16"]


@dataclass(frozen=True)
class Device:
    """What a run would train on. `capability` is CUDA's, None on a CPU."""

    kind: Literal["cpu", "cuda"]
    name: str
    memory_gib: float
    capability: tuple[int, int] | None = None
    index: int = 0  # Which GPU of the machine, as NVML counts them.
    uuid: str = ""  # NVML's name of this very GPU, or of a part of one (MIG); empty where it is only described.

    @property
    def half(self) -> Half:
        """The 16-bit format that this device computes in. PyTorch computes bf16 on any CPU."""
        return "bf16" if self.kind == "cpu" or (self.capability or (0, 0)) >= AMPERE else "fp16"

    def supports(self, precision: Precision) -> bool:
        if self.kind == "cpu":
            return precision == "fp32"
        return (self.capability or (0, 0)) >= NEEDED_CAPABILITY[precision]


def compute_format(precision: Precision, half: Half) -> Compute:
    """What layers compute in: plain weights in their own format, quantised ones in `half`, the device's 16 bit."""
    match precision:
        case "bf16" | "fp16" | "fp32":
            return precision
    return half


class Fitted(Protocol):
    """What the choice asks of a memory estimate (`memory.MemoryFit`)."""

    @property
    def fits(self) -> bool: ...
    @property
    def peak_gib(self) -> float: ...
    @property
    def recomputed_layers(self) -> int: ...


@dataclass(frozen=True)
class PrecisionChoice:
    """A precision and the reason for it, in words."""

    precision: Precision
    reason: str


def choose_precision(
    device: Device,
    requested: Precision | Literal["auto"],
    fitted: Callable[[Precision], Fitted],
    unquantised: str = "",
) -> PrecisionChoice:
    """The fewest compromises that fit; a user's choice wins where the device can follow it.

    Computing layers again in the backward pass costs time and no quality, so it comes before quantised weights.

    Args:
        fitted: the memory estimate of a precision on this device.
        unquantised: what of the model no precision makes smaller, in words; empty where that is little.

    Raises:
        ConfigError: when the requested precision cannot run on this device, with the nearest one that can.
    """
    if requested != "auto":
        refuse_impossible(device, requested)
        return PrecisionChoice(requested, f"{requested}: chosen in the recipe")
    if device.kind == "cpu":
        return PrecisionChoice("fp32", "fp32: a CPU has no fast 16-bit training, and fp32 needs no loss scaling")
    half, name, memory = device.half, device.name, f"{device.memory_gib:.1f} GiB"
    plain = fitted(half)
    if plain.fits:
        recomputed = "" if not plain.recomputed_layers else f", {plain.recomputed_layers} layers computed twice"
        need = f"{plain.peak_gib:.1f} of {memory} at the peak{recomputed}"
        if half == "bf16":
            return PrecisionChoice("bf16", f"bf16: {name} supports it and it fits ({need})")
        return PrecisionChoice("fp16", f"fp16 with loss scaling: {name} is older than Ampere, so no bf16 ({need})")
    if not device.supports("4bit"):
        return PrecisionChoice(half, f"{half}: it does not fit, and {name} is too old for 4-bit weights")
    why = f"{half} needs {plain.peak_gib:.1f} GiB at least, more than a run can plan with on the {memory} of {name}"
    small = fitted("4bit")
    stays = f"; {unquantised}" if unquantised else ""
    if small.fits:
        return PrecisionChoice("4bit", f"4bit: {why}; in 4 bit the peak is {small.peak_gib:.1f} GiB{stays}")
    if small.peak_gib > (1 - WORTH_QUANTISING) * plain.peak_gib:
        return PrecisionChoice(half, f"{why}; 4 bit would need {small.peak_gib:.1f} GiB, hardly less{stays}")
    return PrecisionChoice("4bit", f"4bit: {why}; even 4 bit needs {small.peak_gib:.1f} GiB{stays}")


def refuse_impossible(device: Device, requested: Precision) -> None:
    """Raises:
    ConfigError: when the device cannot train in `requested`, with the nearest precision that it can.
    """
    if device.supports(requested):
        return
    if device.kind == "cpu":
        raise ConfigError(f"hardware.precision `{requested}` needs a GPU; on this CPU use `fp32` or `auto`.")
    who = f"{device.name} (capability {_dotted(device.capability or (0, 0))})"
    if requested == "bf16":
        raise ConfigError(f"{who} has no bf16; use `fp16` or `auto`.")
    needs = f"hardware.precision `{requested}` needs capability {_dotted(NEEDED_CAPABILITY[requested])}"
    # 8-bit integers take the memory of fp8; where the card has neither, 4 bit or the plain 16-bit format.
    nearest = next((p for p in _NEAREST[requested] if device.supports(p)), device.half)
    plain = "" if nearest == device.half else f", or `{device.half}` where memory allows"
    raise ConfigError(f"{needs}; {who} lacks it. Use `{nearest}`{plain}.")


_NEAREST: dict[Precision, tuple[Precision, ...]] = {"fp8": ("8bit", "4bit"), "8bit": ("4bit",), "4bit": ()}


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
