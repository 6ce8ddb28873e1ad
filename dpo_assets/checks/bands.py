"""The bands of `bands.yaml`, with what a recipe changes for its own pipeline.

A learning rate is judged on its own: while margins are small, beta only scales the gradient and Adam removes that
scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

from dpo_assets.errors import ConfigError
from dpo_assets.recipe import BandOverride

Method = Literal["lora", "full"]
LEARNING_RATE, BETA = "learning_rate_band", "beta_for_loss"


@dataclass(frozen=True)
class LearningRateBand:
    """Peak DPO learning rates for one method and model size.

    `reference`: the rate that doses are measured by, and that advice names. Above `ok_high` a run is warned of, above
    `error_above` blocked, below `ok_low` noted.
    """

    method: Method
    billions_below: float
    ok_low: float
    reference: float
    ok_high: float
    error_above: float
    source: str


@dataclass(frozen=True)
class BetaBand:
    """Betas of one loss: below `error_below` a run is blocked, outside [ok_low, ok_high] warned of.

    Below `weak_below` the pull towards the reference is weak; `usual` is what most runs have.
    """

    error_below: float
    ok_low: float
    weak_below: float
    usual: float
    ok_high: float
    source: str


@dataclass(frozen=True)
class Limit:
    """The numbers of one check, by name, and where they come from."""

    numbers: Mapping[str, float]
    source: str

    def __getitem__(self, name: str) -> float:
        return self.numbers[name]

    @property
    def warn(self) -> float:
        """Above it (or below, where the check says so) a value is warned of; infinite where nothing is."""
        return self.numbers.get("warn", math.inf)

    @property
    def error(self) -> float:
        """Above it (or below, where the check says so) a value blocks; infinite where nothing does."""
        return self.numbers.get("error", math.inf)


@dataclass(frozen=True)
class Bands:
    """All numbers. `reasons`: check -> why this pipeline changed some of them, for every verdict to show."""

    learning_rates: tuple[LearningRateBand, ...]
    betas: Mapping[str, BetaBand]
    limits: Mapping[str, Limit]
    reasons: Mapping[str, str] = field(default_factory=dict)

    def learning_rate(self, method: Method, billions: float | None) -> LearningRateBand:
        """The band for a method and a model of `billions` parameters; of a size that is not known, the widest."""
        rows = [band for band in self.learning_rates if band.method == method]
        if billions is None:
            return max(rows, key=lambda band: band.ok_high)
        return next(band for band in rows if billions < band.billions_below)

    def weak_beta(self, losses: Iterable[str], beta: float | None) -> BetaBand | None:
        """The band of the first of `losses` whose pull towards the reference is weak at this beta, or None."""
        known = (self.betas[name] for name in losses if name in self.betas)
        return next((band for band in known if beta is not None and beta < band.weak_below), None)

    def limit(self, check: str) -> Limit:
        return self.limits[check]

    def with_overrides(self, overrides: Mapping[str, BandOverride]) -> Bands:
        """These bands with a pipeline's own numbers.

        Raises:
            ConfigError: for a check or a number that does not exist, with the names that do.
        """
        bands = self
        for check, override in overrides.items():
            bands = bands._with(check, override)
        return bands

    def _with(self, check: str, override: BandOverride) -> Bands:
        known = {LEARNING_RATE: numbers_of(LearningRateBand), BETA: numbers_of(BetaBand)} | {
            name: tuple(limit.numbers) for name, limit in self.limits.items()
        }
        if check not in known:
            raise ConfigError(f"checks.bands: no check `{check}` has bands; these have: {', '.join(sorted(known))}")
        if unknown := sorted(set(override.numbers) - set(known[check])):
            raise ConfigError(
                f"checks.bands.{check}: no number is called {', '.join(unknown)}; it has {', '.join(known[check])}"
            )
        numbers = ", ".join(f"{name} {value:g}" for name, value in override.numbers.items())
        reasons = {**self.reasons, check: f"set by this pipeline ({numbers}): {override.reason}"}
        changes: dict[str, Any] = dict(override.numbers)
        if check == LEARNING_RATE:
            rows = tuple(replace(row, **changes) for row in self.learning_rates)
            return replace(self, learning_rates=rows, reasons=reasons)
        if check == BETA:
            betas = {loss: replace(band, **changes) for loss, band in self.betas.items()}
            return replace(self, betas=betas, reasons=reasons)
        limit = self.limits[check]
        limits = {**self.limits, check: replace(limit, numbers={**limit.numbers, **changes})}
        return replace(self, limits=limits, reasons=reasons)


def numbers_of(kind: type) -> tuple[str, ...]:
    """Names of a band's numbers that a recipe may set."""
    return tuple(f.name for f in fields(kind) if f.name not in ("method", "billions_below", "source"))


@cache
def default_bands() -> Bands:
    """What `bands.yaml` holds."""
    data = yaml.safe_load(files("dpo_assets.checks").joinpath("bands.yaml").read_text(encoding="utf-8"))
    limits = {name: dict(row) for name, row in data["limits"].items()}
    return Bands(
        tuple(LearningRateBand(**row) for row in data[LEARNING_RATE]),
        {loss: BetaBand(**row) for loss, row in data[BETA].items()},
        {name: Limit(source=row.pop("source"), numbers=row) for name, row in limits.items()},
    )


def first_loss_tolerance(expected: float, rounded_tokens: float = 0.0, bands: Bands | None = None) -> float:
    """How far the first loss may lie from `expected`: relative above 1, since ipo starts at 1 / (4 beta^2).

    Args:
        rounded_tokens: mean tokens of a pair's two answers where layers compute in 16 bit, 0 in fp32. Two forwards of
            other sizes round differently, by about as much a token; long answers would fail a fixed limit.

    Before any update the loss is that of zero margin: equation 7 of Rafailov et al., arXiv 2305.18290, and
    `training.losses.DpoLoss.at_zero_margin` for every other loss.
    """
    limit = (bands or default_bands()).limit("reference_is_start")
    return limit.error * max(1.0, abs(expected)) * max(1.0, rounded_tokens / limit["tokens"])


def first_loss_holds(loss: float, expected: float, rounded_tokens: float = 0.0) -> bool:
    """Whether a first loss shows that the reference is the start of training."""
    return abs(loss - expected) <= first_loss_tolerance(expected, rounded_tokens)
