"""How far training may move the weights: the learning rate alone, with epochs and batch, and beside that of SFT."""

from __future__ import annotations

import math

from dpo_assets.checks.bands import Bands, LearningRateBand
from dpo_assets.checks.configuration import Configuration, rate_ceilings
from dpo_assets.checks.verdict import Level, Verdict, upper_limit

LORA, FULL = "LoRA", "full fine-tuning"


def learning_rate_band(configuration: Configuration, bands: Bands) -> Verdict:
    """The DPO learning rate against the band of its method and model size.

    A block here needs no second cause: the rate is above every one that a good published run of the class is known for,
    save single ones. A low rate is noted and no more: it moves little, and ruins nothing.
    """
    rate, ceilings = configuration.learning_rate, rate_ceilings(configuration, bands)
    band, notes = ceilings.band, list(ceilings.moved)
    level: Level = upper_limit(rate, band.ok_high, band.error_above)
    if rate < band.ok_low:
        notes.append(f"below {band.ok_low:g} a run hardly moves")
    return Verdict(
        "learning_rate_band",
        level,
        rate,
        f"at most {band.ok_high:g}, blocked above {band.error_above:g} ({_class_of(configuration, band)})",
        band.source,
        "" if level == "pass" else f"set dpo.learning_rate to {band.reference:g} or less (5e-6 is the usual start)",
        "; ".join(notes),
    )


def _class_of(configuration: Configuration, band: LearningRateBand) -> str:
    if configuration.billions is None:
        return f"{LORA if band.method == 'lora' else FULL}, the widest of its bands: the model's size is not known"
    size = f"under {band.billions_below:g}B" if math.isfinite(band.billions_below) else "of any larger size"
    if band.method == "lora":
        size = "under 1B" if band.billions_below == 1 else "of 1B or more"
    return f"{LORA if band.method == 'lora' else FULL}, model {size}"


def training_dose(configuration: Configuration, bands: Bands) -> Verdict:
    """How far each training pair may move the weights: where causes add up that are none alone.

        dose = learning rate / its reference x epochs / batch

    No unit. An Adam step moves a weight by about the learning rate, so rate x steps bounds the way it goes, and
    epochs / batch is the number of steps for each pair. The reference is the band's: the median of good runs. It blocks
    only above the reference: at a usual rate neither epochs nor a small batch is known to ruin a model.
    """
    rate, limit = configuration.learning_rate, bands.limit("training_dose")
    row = rate_ceilings(configuration, bands).band
    reference = row.reference
    updates = configuration.updates_per_pair
    band = f"at most {limit.warn:g}; blocked above {limit.error:g} where the rate is above its reference, {reference:g}"
    if updates is None or configuration.epochs is None or configuration.batch is None:
        return Verdict("training_dose", "pass", "epochs or batch not known", band, limit.source)
    relative = rate / reference
    dose = relative * updates
    level: Level = upper_limit(dose, limit.warn, limit.error)
    if level == "error" and math.isfinite(dose) and rate <= reference:
        level = "warn"
    causes = [
        ("learning rate", f"{rate:g}", f"{relative:.3g} times its reference of {reference:g}"),
        ("epochs", f"{configuration.epochs:g}", "each pair is seen that often"),
        ("batch", f"{configuration.batch:g}", "pairs share one step"),
        ("together", f"{dose:.3g}", band),
    ]
    rows = "\n".join(f"| {name} | {value} | {meaning} |" for name, value, meaning in causes)
    note = f"{relative:.3g} x the reference rate, {configuration.epochs:g} epochs, {configuration.batch:g} pairs a step"
    return Verdict(
        "training_dose",
        level,
        dose,
        band,
        limit.source,
        "" if level == "pass" else _smaller_dose(configuration, row, limit.warn),
        note,
        {"what adds up": f"| cause | value | |\n|---|---|---|\n{rows}"},
    )


def _smaller_dose(configuration: Configuration, band: LearningRateBand, most: float) -> str:
    """A rate that passes by itself, and a batch that passes at a rate of the reference or less."""
    rate, epochs, batch = configuration.learning_rate, configuration.epochs, configuration.batch
    if not all(x is not None and math.isfinite(x) and x > 0 for x in (rate, epochs, batch)):
        return "set dpo.learning_rate, dpo.epochs and dpo.batch_size to positive numbers"
    assert epochs is not None
    assert batch is not None
    ways, reference = [], band.reference
    lower = _floor(min(reference, reference * most * batch / epochs))
    if lower >= band.ok_low:
        ways.append(f"set dpo.learning_rate to {lower:g} or less")
    held = min(rate, reference)
    larger = math.ceil(held / reference * epochs / most)
    if larger > batch:
        at = f" at a dpo.learning_rate of {held:g}" if held < rate else ""
        ways.append(f"raise dpo.batch_size to {larger} or more{at}")
    return ", or ".join(ways)


def _floor(value: float) -> float:
    """Rounded down to two significant digits."""
    power = math.floor(math.log10(value)) - 1
    return float(f"{math.floor(round(value / 10**power, 6)) * 10**power:.2g}")


def dpo_rate_against_sft(configuration: Configuration, bands: Bands) -> Verdict:
    """The DPO learning rate over that of the SFT run that trained the same adapter.

    It sees a rate copied from SFT, also for a model whose band is wrong. A rate that is not above its reference is only
    noted: there the SFT rate is low, and that is no fault.
    """
    rate, sft, limit = configuration.learning_rate, configuration.sft_learning_rate, bands.limit("dpo_rate_against_sft")
    band = f"at most {limit['ok']:g} of SFT's; warned above {limit.warn:g}, blocked from {limit.error:g} on"
    if sft is None:
        return Verdict("dpo_rate_against_sft", "pass", "no SFT here", band, limit.source)
    share = rate / sft if sft > 0 else math.nan
    if not math.isfinite(share):
        fix = "set dpo.learning_rate and sft.learning_rate to positive numbers"
        return Verdict("dpo_rate_against_sft", "error", share, band, limit.source, fix)
    level: Level = "error" if share >= limit.error else upper_limit(share, limit.warn, limit.error)
    if level != "pass" and rate <= rate_ceilings(configuration, bands).band.reference:
        note = "the DPO rate is a usual one: it is SFT's that is low, and that does no harm"
        return Verdict("dpo_rate_against_sft", "pass", share, band, limit.source, note=note)
    fix = "" if level == "pass" else f"set dpo.learning_rate to {_floor(sft * limit['ok']):g} or less"
    return Verdict("dpo_rate_against_sft", level, share, band, limit.source, fix)
