"""Verdicts on what DPO did to the policy, from what stage `dpo` measured: each against the reference.

What was not measured is a warning with the reason, never a pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from dpo_assets.checks.bands import Bands, Limit
from dpo_assets.checks.collapse import CHECK, SIGNS, CollapseLimits, Row, first_trigger, silent_signs
from dpo_assets.checks.reports import (
    Aftermath,
    AnswerHealth,
    Divergence,
    DpoReport,
    HeldOutPairs,
    NotMeasured,
    SampledAnswers,
)
from dpo_assets.checks.statistics import significant_fall, significant_rise
from dpo_assets.checks.verdict import Level, Verdict, upper_limit, worst

OLDER = "this adapter was made without these measurements, by an earlier version or by hand; materialise it again"
LOWER_RATE = "lower dpo.learning_rate 5 to 10 times, or raise dpo.beta"
SHARES = ("repetition", "no_eos", "empty")
T = TypeVar("T")


def aftermath_verdicts(report: Aftermath, bands: Bands) -> list[Verdict]:
    """The checks of `dpo_adapter` on held-out pairs, sampled answers and weights."""
    return [
        learned(report, bands),
        kl_budget(report, bands),
        generation_health(report, bands),
        capability_retention(report, bands),
        adapter_norm(report, bands),
    ]


def measured(part: T | NotMeasured | None) -> tuple[T | None, str]:
    """A part of the report with its numbers, or None and why there are none."""
    if part is None or isinstance(part, NotMeasured):
        return None, part.not_measured if part else OLDER
    return part, ""


def unmeasured(check: str, why: str, bands: Bands) -> Verdict:
    """The warning of a check that has nothing to judge."""
    limit = bands.limits.get(check)
    fix = (
        "materialise dpo_adapter again"
        if why == OLDER
        else "see the value; a recipe's checks section sets what is measured"
    )
    return Verdict(check, "warn", f"not measured: {why}", "measured", limit.source if limit else "", fix)


def collapse_verdict(report: DpoReport, rows: Sequence[Row], limits: CollapseLimits, bands: Bands) -> Verdict:
    """Whether the run collapsed: it was stopped, or its metric log breaks a rule.

    Args:
        rows: the metric log, so that the rules can be asked again with other numbers, without training.
    """
    source = bands.limit(CHECK).source
    if not report.guarded:
        return unmeasured(CHECK, OLDER, bands)
    stopped = report.stopped
    if stopped:
        return Verdict(
            CHECK,
            "error",
            f"{stopped.metric} {stopped.value:.4g} at step {stopped.step} of {stopped.of_steps}",
            stopped.band,
            stopped.source,
            stopped.fix,
            f"stopped by the rule {stopped.rule}; the adapter is that of step {stopped.kept_step}, the last "
            f"healthy one; {stopped.steps_saved} steps were not run",
        )
    found = first_trigger(rows, limits)
    if found is not None:
        return Verdict(
            CHECK,
            "error",
            f"{found.metric} {found.value:.4g} at step {found.step}",
            found.band,
            source,
            report.trigger.fix if report.trigger else LOWER_RATE,
            f"the rule {found.rule} fired; training went on to its end",
        )
    silent = silent_signs(rows)
    if len(silent) == len(SIGNS):
        return unmeasured(CHECK, f"the {len(rows)} logs of the run tell none of {', '.join(silent)}", bands)
    note = f"not looked at, as the run did not log it: {', '.join(silent)}" if silent else ""
    return Verdict(CHECK, "pass", f"no rule fired in {len(rows)} logs", "no sign of a collapse", source, note=note)


def learned(report: Aftermath, bands: Bands) -> Verdict:
    """Implicit-reward accuracy on held-out pairs. Too little learned never blocks; a policy that is inverted does."""
    name, limit = "learned", bands.limit("learned")
    part, why = measured(report.held_out)
    if part is None:
        return unmeasured(name, why, bands)
    accuracy, margin, chance = part.accuracy, part.margin_nats, limit["chance"]
    level: Level = "pass"
    fix = ""
    if not math.isfinite(accuracy.value) or not math.isfinite(margin):
        level, fix = "error", "a score is not finite: lower dpo.learning_rate 5 to 10 times"
    elif accuracy.high < chance:
        level, fix = "error", "look at the pairs: chosen and rejected look swapped where the feedback is read"
    elif accuracy.low <= chance or margin <= 0:
        level, fix = "warn", "collect more pairs, hold out more of them, or train longer inside the learning-rate band"
    return Verdict(
        name,
        level,
        round(accuracy.value, 4),
        f"held-out accuracy beyond chance ({chance:g}); blocked where its interval lies below it",
        limit.source,
        fix,
        f"{part.pairs} held-out pairs, interval [{accuracy.low:.3f}, {accuracy.high:.3f}], mean margin "
        f"{margin:.3g} nats",
    )


def displacement(report: DpoReport, bands: Bands) -> Verdict:
    """NLL of chosen answers, policy over reference: held-out pairs where they were scored, else the last logs."""
    limit, part = bands.limit("displacement"), report.held_out
    ratio, nats, measured_on = report.nll_ratio, math.nan, "training pairs, mean of the last logs"
    if isinstance(part, HeldOutPairs):
        ratio, nats = part.nll_ratio, part.chosen_nats_per_token
        measured_on = f"held-out pairs, {nats:+.3f} nats per token"
    level = upper_limit(ratio, limit.warn, limit.error)
    if math.isfinite(ratio) and -nats < limit["least_fall"]:  # A model that is sure of its answers moves far on little.
        level = "pass"
    return Verdict(
        "displacement",
        level,
        round(ratio, 4),
        f"NLL of chosen answers, policy over reference, at most {limit.warn:g}",
        limit.source,
        "" if level == "pass" else f"{LOWER_RATE}, or set dpo.loss to [sigmoid, sft]",
        measured_on,
    )


def kl_budget(report: Aftermath, bands: Bands) -> Verdict:
    """KL(policy || reference) per token on the policy's own answers: how far it went for what it learned."""
    name = "kl_budget"
    part, why = measured(report.answers)
    kl, why_no_kl = measured(part.kl) if part else (None, why)
    if part is None or kl is None:
        return unmeasured(name, why_no_kl, bands)
    return divergence_verdict(name, kl, bands, f"{part.prompts} answers sampled at temperature 1")


def divergence_verdict(name: str, kl: Divergence, bands: Bands, note: str) -> Verdict:
    """KL(policy || reference) per token against the limits of `kl_budget`."""
    limit = bands.limit("kl_budget")
    value, low = kl.per_token, -math.inf if kl.low is None else kl.low
    level = upper_limit(value, limit.warn, limit.error)
    if level == "error" and math.isfinite(value) and not low > limit.warn:
        level = "warn"  # Few answers: the estimate's interval holds a harmless value.
    return Verdict(
        name,
        level,
        round(value, 4),
        f"at most {limit.warn:g} nats per token, blocked above {limit.error:g}",
        limit.source,
        "" if level == "pass" else LOWER_RATE,
        f"{note}; lower end of the 95% interval {low:.3g}",
    )


def generation_health(report: Aftermath, bands: Bands) -> Verdict:
    """Sampled answers of policy and reference to the same prompts: repetition, endings, length, variety.

    A rise blocks only where it is beyond chance for so few answers.
    """
    name, limit = "generation_health", bands.limit("generation_health")
    part, why = measured(report.answers)
    if part is None:
        return unmeasured(name, why, bands)
    before, after, count = part.reference, part.policy, part.prompts
    found: dict[str, tuple[Level, str]] = {}
    for share in SHARES:
        then, now = getattr(before, share), getattr(after, share)
        rise = now - then
        beyond_chance = significant_rise(now, then, count)
        level = upper_limit(rise, limit.warn, limit.error)
        if not beyond_chance:
            level = "warn" if level == "error" else "pass"
        found[share] = (level, f"{share} {rise:+.3f}")
    found["length"] = _length(before, after, part, limit)
    variety = after.distinct_2 / before.distinct_2 if before.distinct_2 else 1.0
    found["distinct_2"] = ("pass" if variety >= limit["distinct_low"] else "warn", f"distinct_2 x{variety:.3f}")
    level = worst(*(level for level, _ in found.values()))
    shown = (
        [said for each, said in found.values() if each == level] if level != "pass" else [s for _, s in found.values()]
    )
    return Verdict(
        name,
        level,
        ", ".join(shown),
        f"repetition, no end, empty: at most +{limit.warn:g} over the reference, blocked above +{limit.error:g} "
        f"beyond chance; length x{limit['length_low']:g} to x{limit['length_high']:g}, "
        f"blocked above x{limit['length_error']:g}",
        limit.source,
        "" if level == "pass" else "lower dpo.learning_rate, and read the answers beside this check",
        f"{count} answers each at temperature 1, of at most {part.most_tokens} tokens",
    )


def _length(before: AnswerHealth, after: AnswerHealth, part: SampledAnswers, limit: Limit) -> tuple[Level, str]:
    times = after.mean_tokens / before.mean_tokens if before.mean_tokens else 1.0
    longer, shorter = part.longer, part.shorter
    level: Level = "pass"
    if not math.isfinite(times):
        level = "error"
    elif times > limit["length_high"] and significant_fall(longer, shorter):
        level = "error" if times > limit["length_error"] else "warn"
    elif times < limit["length_low"] and significant_fall(shorter, longer):
        level = "warn"
    return level, f"length x{times:.3f}"


def capability_retention(report: Aftermath, bands: Bands) -> Verdict:
    """What the reference could do and the policy cannot any more, task by task."""
    name, limit = "capability_retention", bands.limit("capability_retention")
    part, why = measured(report.capability)
    if part is None:
        return unmeasured(name, why, bands)
    fall = part.reference - part.policy
    level = upper_limit(fall, limit.warn, limit.error)
    if level == "error" and math.isfinite(fall) and not significant_fall(part.lost, part.gained):
        level = "warn"
    what = "tasks met" if part.kind == "tasks" else "next tokens of held-out chosen answers"
    return Verdict(
        name,
        level,
        round(-100 * fall, 3) + 0.0,
        f"at most {100 * limit.warn:g} points below the reference, blocked above {100 * limit.error:g} beyond chance",
        limit.source,
        "" if level == "pass" else f"{LOWER_RATE}, or set dpo.loss to [sigmoid, sft]",
        f"{what}: {part.reference:.3f} before, {part.policy:.3f} after; of {part.tasks}, {part.lost} worse "
        f"and {part.gained} better",
    )


def adapter_norm(report: Aftermath, bands: Bands) -> Verdict:
    """How large a change the adapter is, in the layer where it is largest."""
    name, limit = "adapter_norm", bands.limit("adapter_norm")
    part, why = measured(report.adapter_norm)
    if part is None:
        return unmeasured(name, why, bands)
    level = upper_limit(part.largest, limit.warn, limit.error)
    return Verdict(
        name,
        level,
        float(f"{part.largest:.4g}"),
        f"change of a layer's weights over their norm, at most {limit.warn:g}, error above {limit.error:g}",
        limit.source,
        "" if level == "pass" else "lower dpo.learning_rate, or lora.alpha",
        f"largest at {part.layer}, of {part.layers} layers",
    )
