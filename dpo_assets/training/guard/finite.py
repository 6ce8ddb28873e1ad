"""What stops a running stage. Each guard raises a GateError that carries value, band, source and the way out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpo_assets.checks.bands import default_bands, first_loss_holds, first_loss_tolerance
from dpo_assets.errors import GateError


def check_first_loss(loss: float, expected: float, reference: str, rounded_tokens: float = 0.0) -> None:
    """The first loss, before any update, must be the loss at zero margin (ln 2 for sigmoid).

    `rounded_tokens` as in `bands.first_loss_tolerance`.

    Raises:
        GateError: `finite` when it is no number, `reference_is_start` when it is another one: the reference is not the
            policy that training starts from.
    """
    if not math.isfinite(loss):
        raise diverged("finite", "loss", loss, "the first step")
    tolerance = first_loss_tolerance(expected, rounded_tokens)
    if first_loss_holds(loss, expected, rounded_tokens):
        return
    fix = (
        "set dpo.reference to `sft`: the policy starts from the SFT checkpoint, so its log-ratios must be measured "
        "against that"
        if reference == "base"
        else "the reference and the policy were scored by different weights or kernels: delete the reference cache, "
        "or set hardware.kernels to `transformers`"
    )
    raise GateError(
        "reference_is_start",
        f"the first loss is {loss:.6f}, not {expected:.6f}: the reference is not the start of training",
        value=loss,
        band=f"{expected:.6f} +- {tolerance:g}",
        source=default_bands().limit("reference_is_start").source,
        fix=fix,
    )


def diverged(check: str, name: str, value: float, place: str) -> GateError:
    """The error for a number that is none."""
    return GateError(
        check,
        f"`{name}` is {value} at {place}: the run diverged, or started from weights that are not finite",
        value=str(value),
        band="every logged value finite",
        source="TRL 1473, 2435, 2553: training goes on through NaN and reports success",
        fix="lower the learning rate 5 to 10 times; on a GPU prefer bf16 to fp16",
    )


def first_non_finite(values: Mapping[str, Any]) -> tuple[str, float] | None:
    """Name and value of the first number that is NaN or infinite."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            return name, value
    return None


def check_trained(check: str, model: nn.Module) -> None:
    """What was trained must be numbers. The last update comes after the last loss, so no log tells of it.

    Raises:
        GateError: naming the first parameter that is not finite.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise diverged(check, name, math.nan, "the end of training")


class StopOnNonFinite(TrainerCallback):
    """Ends a run at the first logged value that is not finite.

    Transformers hides a NaN loss by default (`logging_nan_inf_filter`), so training arguments switch that off.
    """

    def __init__(self, check: str) -> None:
        self.check = check

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        found = first_non_finite(logs or {})
        if found is not None:
            raise diverged(self.check, *found, f"step {state.global_step}")
