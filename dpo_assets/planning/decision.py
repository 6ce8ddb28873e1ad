"""What a recipe makes of a device: precision, engine, size of a forward; and what would fit where these do not."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dpo_assets.errors import ConfigError
from dpo_assets.planning.cards import CARDS
from dpo_assets.planning.dataset import DatasetStats
from dpo_assets.planning.engines import beyond_unsloth
from dpo_assets.planning.memory import FRAMEWORK_GIB, MemoryFit, expert_parameters, usable_share
from dpo_assets.planning.offers import BUILT_IN, EngineOffer, Offers, balances_routers
from dpo_assets.planning.precision import Device, Precision, PrecisionChoice, choose_precision
from dpo_assets.planning.shape import Kernels, ModelShape, Part
from dpo_assets.planning.targets import kinds_of
from dpo_assets.recipe import ALL_LINEAR, Recipe

SHORTEST_LENGTH = 64  # Tokens; a shorter max_length leaves no answer worth comparing.
SMALLER: tuple[Precision, ...] = ("bf16", "fp16", "8bit", "4bit")  # From the largest weights to the smallest.


@dataclass(frozen=True)
class Decision:
    """How a run would use a device."""

    precision: Precision
    reason: str
    kernels: Kernels
    memory: MemoryFit
    engines: tuple[EngineOffer, ...]


def decide(
    recipe: Recipe,
    shape: ModelShape,
    data: DatasetStats,
    device: Device,
    installed: frozenset[Part] = BUILT_IN,
) -> Decision:
    """Resolves `hardware` for a model, a dataset and a device. The decision may not fit; `memory.fits` tells.

    Precision comes first, engine second: of the fewest compromises that any engine fits with, the fastest engine.

    Args:
        installed: engines that may be taken without being named, and fla-core (`offers.installed_here`).

    Raises:
        ConfigError: when an explicit precision or engine cannot work on the device.
    """
    offers = Offers(recipe, shape, data, device, installed)
    refuse_engine(offers)
    choice: PrecisionChoice = choose_precision(
        device,
        recipe.hardware.precision,
        lambda precision: offers.fitted(offers.best(precision), precision),
        unquantised=_unquantised(shape),
    )
    kernels = offers.best(choice.precision)
    if reason := offers.cannot(kernels, choice.precision):
        raise ConfigError(
            f"hardware.kernels `{kernels}` cannot train in {choice.precision}: {reason}. Use `kernels: auto`, or "
            "another precision."
        )
    memory = offers.fitted(kernels, choice.precision)
    return Decision(choice.precision, choice.reason, kernels, memory, offers.table(choice.precision, kernels))


def _unquantised(shape: ModelShape) -> str:
    """Why quantised weights save little of a mixture of experts; empty for another model."""
    experts = expert_parameters(shape)
    every = max(shape.parameters, experts)
    if not experts:
        return ""
    return f"{experts / 1e9:.1f} of {every / 1e9:.1f} billion weights are experts and stay in 16 bit"


def refuse_engine(offers: Offers) -> None:
    """Refuses an engine that the recipe names and that cannot compute the run.

    Raises:
        ConfigError: with the reason and the way out.
    """
    recipe, shape, asked = offers.recipe, offers.shape, offers.asked
    if recipe.hardware.speedups:
        _check_speedups(recipe, offers.device)
    if balances_routers(recipe):
        _check_routers(recipe, shape)
    if asked == "unsloth" and (other := beyond_unsloth(recipe.lora)):
        raise ConfigError(
            f"hardware.kernels `unsloth` adapts {', '.join(ALL_LINEAR)} alone, and lora names {', '.join(other)}; use "
            "`auto`."
        )
    if asked in ("fused", "rows") and recipe.dpo.trainer == "trl":
        raise ConfigError(
            f"hardware.kernels `{asked}` is for the packed trainer; with dpo.trainer `trl` use `transformers`, "
            "`unsloth` or `auto`."
        )
    if asked == "fused" and recipe.lora.dropout > 0 and recipe.sft.strategy == "train":
        raise ConfigError(
            "hardware.kernels `fused` computes no dropout, and SFT would train with lora.dropout "
            f"{recipe.lora.dropout:g}; set lora.dropout to 0, or kernels to `auto`."
        )
    if asked is not None and (reason := offers.cannot(asked)):
        raise ConfigError(
            f"hardware.kernels `{asked}` cannot serve {shape.architecture or 'this model'} with max_length "
            f"{offers.data.max_length}: {reason}. {_way_out(offers)}"
        )


def _way_out(offers: Offers) -> str:
    """`auto`, where that finds an engine."""
    hardware = offers.recipe.hardware.model_copy(update={"kernels": "auto", "speedups": []})
    recipe = offers.recipe.model_copy(update={"hardware": hardware})
    try:
        replace(offers, recipe=recipe).possible()
    except ConfigError as error:
        return f"`auto` has no other: {error}"
    return "Use `auto`."


def _check_routers(recipe: Recipe, shape: ModelShape) -> None:
    kinds, kernels = kinds_of(shape), recipe.hardware.kernels
    if kinds is not None and not any(kind.role == "experts" for kind in kinds):
        raise ConfigError(
            f"router_balance is for mixtures of experts, and {shape.architecture or 'this base'} has no experts; set "
            "sft.router_balance and dpo.router_balance to 0."
        )
    if kernels not in ("auto", "transformers"):
        raise ConfigError(
            f"hardware.kernels `{kernels}` do not tell what routers say, which router_balance needs; use "
            "`transformers` or `auto`, or set sft.router_balance and dpo.router_balance to 0."
        )


def _check_speedups(recipe: Recipe, device: Device) -> None:
    speedups = ", ".join(recipe.hardware.speedups)
    if recipe.hardware.kernels not in ("auto", "transformers"):
        raise ConfigError(
            f"hardware.speedups ({speedups}) are for Transformers' layers on packed batches, not for kernels "
            f"`{recipe.hardware.kernels}`. Leave speedups out, or set hardware.kernels to `transformers`."
        )
    if "liger" in recipe.hardware.speedups and device.kind == "cpu":
        raise ConfigError(
            "hardware.speedups `liger` needs a GPU: its layers are Triton kernels. Leave it out on a CPU."
        )


def what_would_fit(
    recipe: Recipe,
    shape: ModelShape,
    data: DatasetStats,
    device: Device,
    installed: frozenset[Part] = BUILT_IN,
    whole_gib: float = 0.0,
) -> list[str]:
    """Single changes that would make a decision fit, each as an instruction: cap, precision, length, card.

    Args:
        device: with the memory that the run may use.
        whole_gib: the device's memory, where `hardware.memory_gib` leaves the run less; 0: it does not.
    """

    def tried(changed: Recipe, pairs: DatasetStats, on: Device) -> Decision | None:
        """The decision if it fits, or None."""
        try:
            decision = decide(changed, shape, pairs, on, installed)
        except ConfigError:
            return None
        return decision if decision.memory.fits else None

    decided = decide(recipe, shape, data, device, installed)
    found = []
    for gib in _enough(decided, device):
        if device.memory_gib < gib <= whole_gib and (other := tried(recipe, data, replace(device, memory_gib=gib))):
            found.append(f"raise hardware.memory_gib to {gib:g} ({_peak(other)})")
            break
    found += [
        f"set hardware.precision to `{p}` ({_peak(other)})"
        for p in _smaller(decided.precision)
        if (other := tried(_with_precision(recipe, p), data, device))
    ][:1]
    length = data.max_length // 2
    while length >= SHORTEST_LENGTH:
        if other := tried(recipe, data.cut_to(length), device):
            found.append(f"set feedback.max_length to {length} ({_peak(other)})")
            break
        length //= 2
    own = max(device.memory_gib, whole_gib)
    larger = [card for card in CARDS if device.kind == "cpu" or card.memory_gib > own]
    uncapped = " without hardware.memory_gib" if own > device.memory_gib else ""
    for card in sorted(larger, key=lambda card: card.memory_gib):
        if other := tried(recipe, data, card.device()):
            found.append(
                f"use a {card.name}{uncapped} "
                f"({card.memory_gib:g} GiB, `{card.key}`: {other.precision}, {_peak(other)})"
            )
            break
    return found


def _enough(decision: Decision, device: Device) -> list[float]:
    """GiB of a device that engines would fit, the least first: what does not fit is planned in its smallest forward."""
    return sorted(
        math.ceil(10 * (offer.peak_gib + FRAMEWORK_GIB[device.kind]) / usable_share(device.kind, offer.name)) / 10
        for offer in decision.engines
        if offer.peak_gib is not None
    )


def _smaller(precision: Precision) -> tuple[Precision, ...]:
    if precision == "fp8":
        return ("4bit",)
    return SMALLER[SMALLER.index(precision) + 1 :] if precision in SMALLER else SMALLER


def _with_precision(recipe: Recipe, precision: Precision) -> Recipe:
    return recipe.model_copy(update={"hardware": recipe.hardware.model_copy(update={"precision": precision})})


def _peak(decision: Decision) -> str:
    return f"peak {decision.memory.peak_gib:.1f} GiB"
