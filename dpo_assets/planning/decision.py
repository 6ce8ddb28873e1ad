"""What a recipe makes of a device: precision, kernels, size of a forward; and what would fit where these do not."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_assets.errors import ConfigError
from dpo_assets.planning.cards import CARDS
from dpo_assets.planning.dataset import DatasetStats
from dpo_assets.planning.engines import beyond_unsloth, why_not
from dpo_assets.planning.memory import MemoryFit, fit
from dpo_assets.planning.precision import Device, Precision, PrecisionChoice, choose_precision
from dpo_assets.planning.shape import Kernels, ModelShape
from dpo_assets.recipe import ALL_LINEAR, Recipe

SHORTEST_LENGTH = 64  # Tokens; a shorter max_length leaves no answer worth comparing.
UNSLOTH_FP8 = (9, 0)  # Unsloth 2026.10.9 refuses fp8 below this capability.
SMALLER: tuple[Precision, ...] = ("bf16", "fp16", "8bit", "4bit")  # From the largest weights to the smallest.


@dataclass(frozen=True)
class Decision:
    """How a run would use a device."""

    precision: Precision
    reason: str
    kernels: Kernels
    memory: MemoryFit


def decide(recipe: Recipe, shape: ModelShape, data: DatasetStats, device: Device) -> Decision:
    """Resolves `hardware` for a model, a dataset and a device. The decision may not fit; `memory.fits` tells.

    Raises:
        ConfigError: when an explicit precision or kernel cannot work on the device.
    """
    kernels = choose_kernels(recipe, shape, data.max_length, device)

    def fitted(precision: Precision) -> MemoryFit:
        return fit(
            shape,
            precision,
            kernels,
            recipe.lora,
            device.memory_gib,
            data.longest_pair,
            data.mean_pair * recipe.dpo.batch_size,
            device.kind,
            bases=2 if recipe.dpo.reference_strategy == "model" else 1,
        )

    choice: PrecisionChoice = choose_precision(device, recipe.hardware.precision, fitted)
    if choice.precision == "fp8" and kernels == "unsloth" and (device.capability or (0, 0)) < UNSLOTH_FP8:
        raise ConfigError(
            f"hardware.kernels `unsloth` has fp8 from capability 9.0 on, and {device.name} is older; "
            "use `kernels: auto`, or another precision."
        )
    return Decision(choice.precision, choice.reason, kernels, fitted(choice.precision))


def choose_kernels(recipe: Recipe, shape: ModelShape, max_length: int, device: Device) -> Kernels:
    """Fused layers where the architecture has them on a GPU; what the recipe names, where it can work.

    Raises:
        ConfigError: for kernels that do not compute the model, or rows of that length, with the reason.
    """
    requested = recipe.hardware.kernels
    if requested == "unsloth" and (other := beyond_unsloth(recipe.lora)):
        raise ConfigError(
            f"hardware.kernels `unsloth` adapts {', '.join(ALL_LINEAR)} alone, and lora names {', '.join(other)}; use "
            "`auto`."
        )
    if requested == "unsloth" and shape.beside:
        raise ConfigError(
            f"hardware.kernels `unsloth` loads {shape.architecture} whole, with what is no text in it, and names its "
            "layers otherwise than the release does; use `auto`."
        )
    if recipe.hardware.speedups:
        _check_speedups(recipe, device)
        requested = "transformers"
    packed = recipe.dpo.trainer == "packed"  # TRL's trainer calls the model in its own way.
    if requested == "fused" and _drops_out(recipe):
        raise ConfigError(
            "hardware.kernels `fused` computes no dropout, and SFT would train with lora.dropout "
            f"{recipe.lora.dropout:g}; set lora.dropout to 0, or kernels to `auto`."
        )
    if requested == "fused" and not packed:
        raise ConfigError(
            "hardware.kernels `fused` is for the packed trainer; with dpo.trainer `trl` use `transformers`, `unsloth` "
            "or `auto`."
        )
    if requested == "auto":
        return _served(recipe, shape, max_length, device)
    if packed and (why := why_not(requested, shape.decoder, max_length, recipe.lora)):
        raise ConfigError(
            f"hardware.kernels `{requested}` cannot serve {shape.architecture or 'this model'} with max_length "
            f"{max_length}: {why}. Use `auto`."
        )
    return requested


def _served(recipe: Recipe, shape: ModelShape, max_length: int, device: Device) -> Kernels:
    """The engine that `auto` takes: the first of fused layers, Transformers' and rows that computes the model."""
    if recipe.dpo.trainer != "packed":
        return "transformers"
    fused = device.kind == "cuda" and not _drops_out(recipe)
    order: tuple[Kernels, ...] = ("fused", "transformers", "rows") if fused else ("transformers", "rows")
    return next(kernels for kernels in order if not why_not(kernels, shape.decoder, max_length, recipe.lora))


def _check_speedups(recipe: Recipe, device: Device) -> None:
    speedups = ", ".join(recipe.hardware.speedups)
    if recipe.hardware.kernels in ("fused", "unsloth"):
        raise ConfigError(
            f"hardware.speedups ({speedups}) are for Transformers' layers; kernels `{recipe.hardware.kernels}` have "
            "their own. Leave speedups out, or set hardware.kernels to `transformers`."
        )
    if "liger" in recipe.hardware.speedups and device.kind == "cpu":
        raise ConfigError(
            "hardware.speedups `liger` needs a GPU: its layers are Triton kernels. Leave it out on a CPU."
        )


def _drops_out(recipe: Recipe) -> bool:
    """Whether SFT trains with dropout, which fused layers do not compute."""
    return recipe.lora.dropout > 0 and recipe.sft.strategy == "train"


def what_would_fit(recipe: Recipe, shape: ModelShape, data: DatasetStats, device: Device) -> list[str]:
    """Single changes that would make a decision fit, each as an instruction: precision, length, card."""
    decided = decide(recipe, shape, data, device)
    found = [
        f"set hardware.precision to `{p}` ({_peak(other)})"
        for p in _smaller(decided.precision)
        if (other := _try(_with_precision(recipe, p), shape, data, device))
    ][:1]
    length = data.max_length // 2
    while length >= SHORTEST_LENGTH:
        if other := _try(recipe, shape, data.cut_to(length), device):
            found.append(f"set feedback.max_length to {length} ({_peak(other)})")
            break
        length //= 2
    larger = [card for card in CARDS if device.kind == "cpu" or card.memory_gib > device.memory_gib]
    for card in sorted(larger, key=lambda card: card.memory_gib):
        if other := _try(recipe, shape, data, card.device()):
            found.append(
                f"use a {card.name} ({card.memory_gib:g} GiB, `{card.key}`: {other.precision}, {_peak(other)})"
            )
            break
    return found


def _smaller(precision: Precision) -> tuple[Precision, ...]:
    if precision == "fp8":
        return ("4bit",)
    return SMALLER[SMALLER.index(precision) + 1 :] if precision in SMALLER else SMALLER


def _with_precision(recipe: Recipe, precision: Precision) -> Recipe:
    return recipe.model_copy(update={"hardware": recipe.hardware.model_copy(update={"precision": precision})})


def _try(recipe: Recipe, shape: ModelShape, data: DatasetStats, device: Device) -> Decision | None:
    """The decision if it fits, or None."""
    try:
        decision = decide(recipe, shape, data, device)
    except ConfigError:
        return None
    return decision if decision.memory.fits else None


def _peak(decision: Decision) -> str:
    return f"peak {decision.memory.peak_gib:.1f} GiB"
