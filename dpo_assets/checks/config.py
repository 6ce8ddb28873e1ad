"""Verdicts that need no GPU and no data: they stop a run before any training process starts."""

from __future__ import annotations

from dpo_assets.checks import bands
from dpo_assets.checks.verdict import Level, Verdict, upper_limit, worst
from dpo_assets.planning.plan import TrainingPlan


def plan_verdicts(plan: TrainingPlan) -> list[Verdict]:
    """All checks of `dpo_plan`."""
    return [
        learning_rate_band(plan),
        beta_for_loss(plan),
        loss_supported(plan),
        budget(plan),
        memory_fits(plan),
    ]


def learning_rate_band(plan: TrainingPlan) -> Verdict:
    """The DPO learning rate against the band of its method and model size."""
    dpo, billions = plan.dpo, plan.parameters / 1e9
    method: bands.Method = "lora"
    band = next(b for b in bands.LEARNING_RATE if b.method == method and billions < b.billions_below)
    ok_high = band.ok_high
    if dpo.beta < bands.LOW_BETA and dpo.loss in ("sigmoid", "hinge", "robust"):
        ok_high = min(ok_high, bands.LOW_BETA_CEILING[method])
    heavy = dpo.epochs >= bands.HEAVY_EPOCHS or dpo.batch_size < bands.HEAVY_BATCH
    level: Level = upper_limit(dpo.learning_rate, ok_high, ok_high if heavy else band.error_above)
    fix = "" if level == "pass" else f"set dpo.learning_rate to {ok_high:g} or less (5e-6 is the usual start)"
    if level == "pass" and dpo.learning_rate < band.ok_low:
        level, fix = "warn", f"raise dpo.learning_rate to {band.ok_low:g} or more: below it a run hardly moves"
    size = "under 1B" if billions < 1 else "of 1B or more"
    note = "epochs >= 3 or batch < 8: above the ok band is an error" if heavy else ""
    return Verdict(
        "learning_rate_band",
        level,
        dpo.learning_rate,
        f"{band.ok_low:g} to {ok_high:g}, blocked above {ok_high if heavy else band.error_above:g} "
        f"(LoRA, model {size})",
        band.source,
        fix,
        note,
    )


def beta_for_loss(plan: TrainingPlan) -> Verdict:
    """Beta against the band of its loss."""
    dpo = plan.dpo
    band = bands.BETA.get(dpo.loss)
    if band is None:
        return Verdict("beta_for_loss", "warn", dpo.beta, "none known for this loss", "", "see loss_supported")
    level: Level = "pass"
    if not band.error_below <= dpo.beta <= band.error_above:
        level = "error"
    elif not band.ok_low <= dpo.beta <= band.ok_high:
        level = "warn"
    return Verdict(
        "beta_for_loss",
        level,
        dpo.beta,
        f"{band.ok_low:g} to {band.ok_high:g}, blocked outside {band.error_below:g} to {band.error_above:g} "
        f"(loss {dpo.loss})",
        band.source,
        f"set dpo.beta between {band.ok_low:g} and {band.ok_high:g}" if level != "pass" else "",
    )


def loss_supported(plan: TrainingPlan) -> Verdict:
    """The loss name, and label smoothing only where a loss uses it."""
    dpo = plan.dpo
    known = ", ".join(bands.SUPPORTED_LOSSES)
    if dpo.loss not in bands.SUPPORTED_LOSSES:
        advice = bands.LOSS_ADVICE.get(dpo.loss, f"set dpo.loss to one of: {known}")
        return Verdict("loss_supported", "error", dpo.loss, known, "losses of this version", advice)
    if dpo.label_smoothing > 0:
        return Verdict(
            "loss_supported",
            "error",
            f"{dpo.loss} with label_smoothing {dpo.label_smoothing:g}",
            f"{known}, label_smoothing 0",
            bands.SMOOTHING_SOURCE,
            f"set dpo.label_smoothing to 0: the {dpo.loss} loss ignores it",
        )
    return Verdict("loss_supported", "pass", dpo.loss, known, "losses of this version")


def budget(plan: TrainingPlan) -> Verdict:
    """Effective batch, epochs and number of steps."""
    dpo = plan.dpo
    batch: Level = (
        "error" if dpo.batch_size < bands.BATCH_ERROR else "warn" if dpo.batch_size < bands.BATCH_OK else "pass"
    )
    epochs = upper_limit(dpo.epochs, bands.EPOCHS_OK, bands.EPOCHS_ERROR)
    steps: Level = "warn" if plan.dpo_steps < bands.STEPS_TO_JUDGE else "pass"
    fixes = [
        text
        for level, text in (
            (batch, f"raise dpo.batch_size to {bands.BATCH_OK} or more"),
            (epochs, f"lower dpo.epochs to {bands.EPOCHS_OK:g} or less"),
            (steps, f"collect more pairs: {plan.dpo_steps} steps are too few to judge a run by"),
        )
        if level != "pass"
    ]
    return Verdict(
        "budget",
        worst(batch, epochs, steps),
        f"{dpo.batch_size} pairs x {plan.dpo_steps} steps, {dpo.epochs:g} epochs",
        f"batch >= {bands.BATCH_OK} (blocked below {bands.BATCH_ERROR}), epochs <= {bands.EPOCHS_OK:g} "
        f"(blocked above {bands.EPOCHS_ERROR:g}), steps >= {bands.STEPS_TO_JUDGE}",
        bands.BUDGET_SOURCE,
        "; ".join(fixes),
    )


def memory_fits(plan: TrainingPlan) -> Verdict:
    """The estimated peak against the device's memory."""
    fits = plan.memory_gib <= plan.memory_available_gib
    return Verdict(
        "memory_fits",
        "pass" if fits else "error",
        round(plan.memory_gib, 2),
        f"at most {plan.memory_available_gib:.1f} GiB on {plan.device_name}",
        "weights + adapter and optimizer + activations of one forward (docs/design.md, planning)",
        "" if fits else "use a smaller base, a shorter feedback.max_length, or hardware.precision: 4bit on a GPU",
    )
