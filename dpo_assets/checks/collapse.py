"""When a DPO run is about to ruin its model: rules over the rows of its metric log.

Pure functions, so that the callback that stops a run, the check that judges it later and a benchmark that scores the
rules all use the same ones. A row is what a run logs at one step: `step`, and any of

    nll_ratio                  NLL of the step's chosen answers, policy over reference (1 at the start)
    chosen_nats_per_token      log pi(y) - log pi_ref(y) of chosen answers, in nats per token (0 at the start)
    mean_token_accuracy        share of chosen tokens that greedy decoding would pick
    entropy                    of the policy's next-token distribution, in nats
    probe/...                  of answers that the policy samples to a few prompts, at some of the steps

A key that a row lacks is a rule that stays silent; a value that is not finite never passes. No rule looks at reward
accuracy, at a small loss, or at a negative chosen reward: NeuralHermes and Zephyr were healthy with those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from pydantic import BaseModel, ConfigDict

from dpo_assets.checks.bands import Bands
from dpo_assets.checks.statistics import significant_fall, significant_rise

Row = Mapping[str, float]
CHECK = "collapse"
NLL, NATS, ACCURACY, ENTROPY = "nll_ratio", "chosen_nats_per_token", "mean_token_accuracy", "entropy"
REPETITION, NO_EOS, KL = "probe/repetition", "probe/no_eos", "probe/kl_per_token"
# Of the reference's answers to the same prompts; how many answers; tasks that only the reference, only the policy met.
REFERENCE_REPETITION, REFERENCE_NO_EOS = "probe/reference_repetition", "probe/reference_no_eos"
ANSWERS, LOST, GAINED, TASKS = "probe/answers", "probe/tasks_lost", "probe/tasks_gained", "probe/tasks"
CAPABILITY = "probe/capability"
# What the rules look at, by the metric without which they stay silent.
SIGNS = {
    "likelihood of chosen answers": NLL, "token accuracy": ACCURACY, "entropy": ENTROPY,
    "sampled answers": REPETITION, "divergence": KL,
}  # fmt: skip
JUDGED = (NLL, NATS, ACCURACY, ENTROPY, REPETITION, NO_EOS, KL, CAPABILITY, "loss", "grad_norm")


class CollapseLimits(BaseModel):
    """The numbers of `collapse` in `bands.yaml`, with what depends on the run resolved.

    Logs are smoothed over `window`; the level of a run is the mean of its first `base_logs`. Rules over logs are silent
    until `window` logs and `warmup_steps` have passed. `..._sign` numbers never stop a run by themselves: they decide
    whether a state is worth keeping, and lend weight to another sign.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    window: int
    base_logs: int
    nll_ratio: float
    nll_ratio_sign: float
    least_fall: float
    chosen_fall: float
    chosen_fall_sign: float
    accuracy_fall: float
    accuracy_fall_sign: float
    entropy_low: float
    entropy_high: float
    answers_rise: float
    kl_per_token: float
    kl_per_token_sign: float
    tasks_fall: float
    near_identical: float
    confidence: float
    warmup_steps: int = 0

    @classmethod
    def of(cls, bands: Bands, *, losses: Sequence[str], beta: float, warmup_steps: int = 0) -> CollapseLimits:
        """The limits for a run. A healthy policy goes further at a weak beta: zephyr-7b-dpo-full, at 0.01, had 1.40."""
        numbers: dict[str, Any] = dict(bands.limit(CHECK).numbers)
        ratio, sign = (numbers.pop(name) for name in ("weak_beta_nll_ratio", "weak_beta_nll_ratio_sign"))
        if bands.weak_beta(losses, beta):
            numbers |= {"nll_ratio": ratio, "nll_ratio_sign": sign}
        return cls(**numbers, warmup_steps=warmup_steps)


@dataclass(frozen=True)
class Trigger:
    """The rule that a row broke: at which step, which metric, its value as judged, and the limit that it crossed."""

    rule: str
    metric: str
    step: int
    value: float
    limit: float
    band: str


def first_trigger(rows: Sequence[Row], limits: CollapseLimits) -> Trigger | None:
    """The first row at which a run should stop, or None."""
    return next((found for n in range(len(rows)) if (found := trigger_at(rows[: n + 1], limits))), None)


def trigger_at(rows: Sequence[Row], limits: CollapseLimits) -> Trigger | None:
    """What the last of `rows` breaks, given those before it."""
    if not rows:
        return None
    for name in JUDGED:
        if name in rows[-1] and not math.isfinite(rows[-1][name]):
            return _trigger("finite", name, rows, rows[-1][name], 0.0, "every judged value finite")
    rules: tuple[Callable[[Sequence[Row], CollapseLimits], Trigger | None], ...] = (_likelihood, _accuracy, _entropy)
    if _settled(rows, limits):
        for rule in rules:
            if found := rule(rows, limits):
                return found
    return _answers(rows, limits) or _divergence(rows, limits) or _tasks(rows, limits)


def healthy(rows: Sequence[Row], limits: CollapseLimits) -> bool:
    """Whether the last row shows no sign of a collapse, so that its state is worth going back to.

    Stricter than `trigger_at`: a state may only be kept from before the damage.
    """
    if not rows:
        return True
    row = rows[-1]
    if trigger_at(rows, limits) is not None:
        return False
    lost_likelihood = row.get(NLL, 1.0) > limits.nll_ratio_sign and _far_enough(row.get(NATS), limits)
    rises = (
        row[share] - row[reference]
        for share, reference in ((REPETITION, REFERENCE_REPETITION), (NO_EOS, REFERENCE_NO_EOS))
        if share in row and reference in row
    )
    return not (
        lost_likelihood
        or _accuracy_fall(rows, limits) > limits.accuracy_fall_sign
        or _entropy_outside(rows, limits) is not None
        or row.get(KL, 0.0) > limits.kl_per_token_sign
        or any(rise > limits.answers_rise for rise in rises)
    )


def silent_signs(rows: Sequence[Row]) -> list[str]:
    """The signs that no row of a log tells, so that no rule looked at them."""
    return [sign for sign, metric in SIGNS.items() if not any(metric in row for row in rows)]


def _settled(rows: Sequence[Row], limits: CollapseLimits) -> bool:
    """Whether the rules over logs may speak: the run has logged a whole window and is past its warm-up."""
    return len(rows) > limits.window and rows[-1].get("step", math.inf) > limits.warmup_steps


def _mean(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return fmean(values) if values else None


def _middle(rows: Sequence[Row], name: str) -> float | None:
    """The median, for ratios: one batch of odd pairs must not stop a run."""
    values = [row[name] for row in rows if name in row]
    return median(values) if values else None


def _far_enough(nats: float | None, limits: CollapseLimits) -> bool:
    """Where a model is sure of its answers (0.09 nats a token), a ratio moves far on very little. Unknown counts."""
    return nats is None or -nats >= limits.least_fall


def _accuracy_fall(rows: Sequence[Row], limits: CollapseLimits) -> float:
    """Points of token accuracy below the first logs, as a share; 0 where it is not logged."""
    base, now = _mean(rows[: limits.base_logs], ACCURACY), _mean(rows[-limits.window :], ACCURACY)
    return 0.0 if base is None or now is None else base - now


def _entropy_outside(rows: Sequence[Row], limits: CollapseLimits) -> float | None:
    """Entropy over that of the first logs where it has left its range, else None."""
    base, now = _mean(rows[: limits.base_logs], ENTROPY), _mean(rows[-limits.window :], ENTROPY)
    if not base or now is None:
        return None
    times = now / base
    return None if limits.entropy_low <= times <= limits.entropy_high else times


def _likelihood(rows: Sequence[Row], limits: CollapseLimits) -> Trigger | None:
    """Likelihood displacement (Razin et al., arXiv 2410.08847): chosen answers become unlikely, all of them."""
    window = rows[-limits.window :]
    ratio, nats = _middle(window, NLL), _middle(window, NATS)
    if ratio is None or ratio <= limits.nll_ratio or not _far_enough(nats, limits):
        return None
    band = f"NLL of chosen answers over the reference's, at most {limits.nll_ratio:g} (median of {limits.window} logs)"
    return _trigger("likelihood", NLL, rows, ratio, limits.nll_ratio, band)


def _accuracy(rows: Sequence[Row], limits: CollapseLimits) -> Trigger | None:
    """Token accuracy on chosen answers. Other pairs have another one; that the NLL rose too shows the policy in it."""
    fall, window = _accuracy_fall(rows, limits), rows[-limits.window :]
    ratio, nats = _middle(window, NLL), _middle(window, NATS)
    if ratio is not None and ratio <= 1:
        return None
    if fall > limits.accuracy_fall:
        band = f"token accuracy at most {limits.accuracy_fall:g} below the mean of the first {limits.base_logs} logs"
        return _trigger("token_accuracy", ACCURACY, rows, -fall, -limits.accuracy_fall, band)
    if nats is not None and -nats > limits.chosen_fall and fall > limits.accuracy_fall_sign:
        band = (
            f"chosen answers at most {limits.chosen_fall:g} nats per token below the reference, while token accuracy "
            f"is more than {limits.accuracy_fall_sign:g} below the first logs"
        )
        return _trigger("chosen_nats", NATS, rows, nats, -limits.chosen_fall, band)
    return None


def _entropy(rows: Sequence[Row], limits: CollapseLimits) -> Trigger | None:
    """Entropy never stops a run alone: another sign must stand beside it."""
    times, window = _entropy_outside(rows, limits), rows[-limits.window :]
    if times is None:
        return None
    ratio, nats = _middle(window, NLL), _middle(window, NATS)
    signs = (
        ratio is not None and ratio > limits.nll_ratio_sign and _far_enough(nats, limits),
        nats is not None and -nats > limits.chosen_fall_sign,
        _accuracy_fall(rows, limits) > limits.accuracy_fall_sign,
    )
    if not any(signs):
        return None
    limit = limits.entropy_high if times > limits.entropy_high else limits.entropy_low
    band = f"entropy within x{limits.entropy_low:g} to x{limits.entropy_high:g} of the first logs, or no other sign"
    return _trigger("entropy", ENTROPY, rows, times, limit, band)


def _answers(rows: Sequence[Row], limits: CollapseLimits) -> Trigger | None:
    """Sampled answers that repeat themselves, or never end, more often than the reference's, beyond chance."""
    row = rows[-1]
    for metric, reference in ((REPETITION, REFERENCE_REPETITION), (NO_EOS, REFERENCE_NO_EOS)):
        if not {metric, reference, ANSWERS} <= row.keys():
            continue
        rise, count = row[metric] - row[reference], round(row[ANSWERS])
        if rise > limits.answers_rise and significant_rise(row[metric], row[reference], count, limits.confidence):
            band = f"at most +{limits.answers_rise:g} over the reference's answers to the same prompts, beyond chance"
            return _trigger(
                metric.removeprefix("probe/"), metric, rows, row[metric], row[reference] + limits.answers_rise, band
            )
    return None


def _divergence(rows: Sequence[Row], limits: CollapseLimits) -> Trigger | None:
    """KL(policy || reference) on the policy's own answers (Rafailov et al., arXiv 2406.02900)."""
    value = rows[-1].get(KL)
    if value is None or value <= limits.kl_per_token:
        return None
    return _trigger("kl", KL, rows, value, limits.kl_per_token, f"at most {limits.kl_per_token:g} nats per token")


def _tasks(rows: Sequence[Row], limits: CollapseLimits) -> Trigger | None:
    """Tasks of the user's own probe that the reference met and the policy no longer meets."""
    row = rows[-1]
    if not {LOST, GAINED, TASKS, CAPABILITY} <= row.keys():
        return None
    lost, gained, tasks = round(row[LOST]), round(row[GAINED]), round(row[TASKS])
    fall = (lost - gained) / max(1, tasks)
    if fall <= limits.tasks_fall or not significant_fall(lost, gained, limits.confidence):
        return None
    band = f"at most {100 * limits.tasks_fall:g} points below the reference on the same tasks, beyond chance"
    return _trigger("capability", CAPABILITY, rows, row[CAPABILITY], row[CAPABILITY] + fall - limits.tasks_fall, band)


def _trigger(rule: str, metric: str, rows: Sequence[Row], value: float, limit: float, band: str) -> Trigger:
    return Trigger(rule, metric, round(rows[-1].get("step", len(rows))), float(value), float(limit), band)
