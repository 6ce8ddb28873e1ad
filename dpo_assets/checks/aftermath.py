"""Verdicts on what DPO did to the policy, from what stage `dpo` measured: each against the reference.

What was not measured is a warning with the reason, never a pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_assets.checks.bands import Bands
from dpo_assets.checks.collapse import CHECK, CollapseLimits, Row, first_trigger
from dpo_assets.checks.statistics import significant_fall, significant_rise
from dpo_assets.checks.verdict import Level, Verdict, upper_limit, worst

OLDER = "this adapter was made without these measurements, by an earlier version or by hand; materialise it again"
LOWER_RATE = "lower dpo.learning_rate 5 to 10 times, or raise dpo.beta"
SHARES = ("repetition", "no_eos", "empty")
Report = Mapping[str, Any]


def aftermath_verdicts(report: Report, bands: Bands) -> list[Verdict]:
    """The checks of `dpo_adapter` on held-out pairs, sampled answers and weights."""
    return [
        learned(report, bands),
        kl_budget(report, bands),
        generation_health(report, bands),
        capability_retention(report, bands),
        adapter_norm(report, bands),
    ]


def why_not_measured(part: Any) -> str:
    """Why a part of the report holds no numbers; empty when it does."""
    return OLDER if not isinstance(part, Mapping) else str(part.get("not_measured", ""))


def unmeasured(check: str, why: str, bands: Bands) -> Verdict:
    """The warning of a check that has nothing to judge."""
    limit = bands.limits.get(check)
    fix = (
        "materialise dpo_adapter again"
        if why == OLDER
        else "see the value; a recipe's checks section sets what is measured"
    )
    return Verdict(check, "warn", f"not measured: {why}", "measured", limit.source if limit else "", fix)


def collapse_verdict(report: Report, rows: Sequence[Row], limits: CollapseLimits, bands: Bands) -> Verdict:
    """Whether the run collapsed: it was stopped, or its metric log breaks a rule.

    Args:
        rows: the metric log, so that the rules can be asked again with other numbers, without training.
    """
    source = bands.limit(CHECK).source
    if "stopped" not in report:
        return unmeasured(CHECK, OLDER, bands)
    stopped, recorded = report["stopped"], report.get("trigger")
    if stopped:
        return Verdict(
            CHECK,
            "error",
            f"{stopped['metric']} {stopped['value']:.4g} at step {stopped['step']} of {stopped['of_steps']}",
            stopped["band"],
            stopped["source"],
            stopped["fix"],
            f"stopped by the rule {stopped['rule']}; the adapter is that of step {stopped['kept_step']}, the last "
            f"healthy one; {stopped['steps_saved']} steps were not run",
        )
    found = first_trigger(rows, limits)
    if found is not None:
        return Verdict(
            CHECK,
            "error",
            f"{found.metric} {found.value:.4g} at step {found.step}",
            found.band,
            source,
            (recorded or {}).get("fix", LOWER_RATE),
            f"the rule {found.rule} fired; training went on to its end",
        )
    return Verdict(CHECK, "pass", f"no rule fired in {len(rows)} logs", "no sign of a collapse", source)


def learned(report: Report, bands: Bands) -> Verdict:
    """Implicit-reward accuracy on held-out pairs. Too little learned never blocks; a policy that is inverted does."""
    name, part, limit = "learned", report.get("held_out"), bands.limit("learned")
    if why := why_not_measured(part):
        return unmeasured(name, why, bands)
    assert isinstance(part, Mapping)
    accuracy, margin, chance = part["accuracy"], part["margin_nats"], limit["chance"]
    level: Level = "pass"
    fix = ""
    if not math.isfinite(accuracy["value"]) or not math.isfinite(margin):
        level, fix = "error", "a score is not finite: lower dpo.learning_rate 5 to 10 times"
    elif accuracy["high"] < chance:
        level, fix = "error", "look at the pairs: chosen and rejected look swapped where the feedback is read"
    elif accuracy["low"] <= chance or margin <= 0:
        level, fix = "warn", "collect more pairs, hold out more of them, or train longer inside the learning-rate band"
    return Verdict(
        name,
        level,
        round(accuracy["value"], 4),
        f"held-out accuracy beyond chance ({chance:g}); blocked where its interval lies below it",
        limit.source,
        fix,
        f"{part['pairs']} held-out pairs, interval [{accuracy['low']:.3f}, {accuracy['high']:.3f}], mean margin "
        f"{margin:.3g} nats",
    )


def displacement(report: Report, bands: Bands) -> Verdict:
    """NLL of chosen answers, policy over reference: held-out pairs where they were scored, else the last logs."""
    limit, part = bands.limit("displacement"), report.get("held_out")
    held_out = isinstance(part, Mapping) and "nll_ratio" in part
    ratio = float(part["nll_ratio"] if held_out and isinstance(part, Mapping) else report["nll_ratio"])
    nats = float(part["chosen_nats_per_token"]) if held_out and isinstance(part, Mapping) else math.nan
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
        f"held-out pairs, {nats:+.3f} nats per token" if held_out else "training pairs, mean of the last logs",
    )


def kl_budget(report: Report, bands: Bands) -> Verdict:
    """KL(policy || reference) per token on the policy's own answers: how far it went for what it learned."""
    name, part, limit = "kl_budget", report.get("answers"), bands.limit("kl_budget")
    why = why_not_measured(part) or why_not_measured(part["kl"] if isinstance(part, Mapping) else None)
    if why:
        return unmeasured(name, why, bands)
    assert isinstance(part, Mapping)
    value, low = part["kl"]["per_token"], part["kl"].get("low", -math.inf)
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
        f"{part['prompts']} answers sampled at temperature 1; lower end of the 95% interval {low:.3g}",
    )


def generation_health(report: Report, bands: Bands) -> Verdict:
    """Sampled answers of policy and reference to the same prompts: repetition, endings, length, variety.

    A rise blocks only where it is beyond chance for so few answers.
    """
    name, part, limit = "generation_health", report.get("answers"), bands.limit("generation_health")
    if why := why_not_measured(part):
        return unmeasured(name, why, bands)
    assert isinstance(part, Mapping)
    before, after, count = part["reference"], part["policy"], part["prompts"]
    found: dict[str, tuple[Level, str]] = {}
    for share in SHARES:
        rise = after[share] - before[share]
        beyond_chance = significant_rise(after[share], before[share], count)
        level = upper_limit(rise, limit.warn, limit.error)
        if not beyond_chance:
            level = "warn" if level == "error" else "pass"
        found[share] = (level, f"{share} {rise:+.3f}")
    found["length"] = _length(before, after, part, limit)
    variety = after["distinct_2"] / before["distinct_2"] if before["distinct_2"] else 1.0
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
        f"{count} answers each at temperature 1, of at most {part['most_tokens']} tokens",
    )


def _length(before: Report, after: Report, part: Report, limit: Any) -> tuple[Level, str]:
    times = after["mean_tokens"] / before["mean_tokens"] if before["mean_tokens"] else 1.0
    longer, shorter = part["longer"], part["shorter"]
    level: Level = "pass"
    if not math.isfinite(times):
        level = "error"
    elif times > limit["length_high"] and significant_fall(longer, shorter):
        level = "error" if times > limit["length_error"] else "warn"
    elif times < limit["length_low"] and significant_fall(shorter, longer):
        level = "warn"
    return level, f"length x{times:.3f}"


def capability_retention(report: Report, bands: Bands) -> Verdict:
    """What the reference could do and the policy cannot any more, task by task."""
    name, part, limit = "capability_retention", report.get("capability"), bands.limit("capability_retention")
    if why := why_not_measured(part):
        return unmeasured(name, why, bands)
    assert isinstance(part, Mapping)
    fall = part["reference"] - part["policy"]
    level = upper_limit(fall, limit.warn, limit.error)
    if level == "error" and math.isfinite(fall) and not significant_fall(part["lost"], part["gained"]):
        level = "warn"
    what = "tasks met" if part["kind"] == "tasks" else "next tokens of held-out chosen answers"
    return Verdict(
        name,
        level,
        round(-100 * fall, 3) + 0.0,
        f"at most {100 * limit.warn:g} points below the reference, blocked above {100 * limit.error:g} beyond chance",
        limit.source,
        "" if level == "pass" else f"{LOWER_RATE}, or set dpo.loss to [sigmoid, sft]",
        f"{what}: {part['reference']:.3f} before, {part['policy']:.3f} after; of {part['tasks']}, {part['lost']} worse "
        f"and {part['gained']} better",
    )


def adapter_norm(report: Report, bands: Bands) -> Verdict:
    """How large a change the adapter is, in the layer where it is largest."""
    name, part, limit = "adapter_norm", report.get("adapter_norm"), bands.limit("adapter_norm")
    if why := why_not_measured(part):
        return unmeasured(name, why, bands)
    assert isinstance(part, Mapping)
    level = upper_limit(part["largest"], limit.warn, limit.error)
    return Verdict(
        name,
        level,
        float(f"{part['largest']:.4g}"),
        f"change of a layer's weights over their norm, at most {limit.warn:g}, error above {limit.error:g}",
        limit.source,
        "" if level == "pass" else "lower dpo.learning_rate, or lora.alpha",
        f"largest at {part['layer']}, of {part['layers']} layers",
    )
