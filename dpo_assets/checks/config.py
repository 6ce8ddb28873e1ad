"""Verdicts that need no GPU and no data: they stop a run before any training process starts."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

from dpo_assets.checks import losses
from dpo_assets.checks.bands import Bands, BetaBand
from dpo_assets.checks.catalog import checks_of
from dpo_assets.checks.configuration import Configuration
from dpo_assets.checks.coverage import lora_coverage
from dpo_assets.checks.rates import dpo_rate_against_sft, learning_rate_band, training_dose
from dpo_assets.checks.refresh import refresh_policy
from dpo_assets.checks.verdict import Level, Verdict, worst
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.planning.schedule import warmup_steps
from dpo_assets.recipe import DpoSection


def verdicts(configuration: Configuration, bands: Bands) -> list[Verdict]:
    """The checks that need nothing but the configuration, in the order of the catalog."""
    return [
        learning_rate_band(configuration, bands),
        training_dose(configuration, bands),
        dpo_rate_against_sft(configuration, bands),
        beta_for_loss(configuration, bands),
        budget(configuration, bands),
        schedule_and_precision(configuration, bands),
        lora_scale(configuration, bands),
    ]


def plan_verdicts(plan: TrainingPlan, bands: Bands, *, pairs_known: bool = True) -> list[Verdict]:
    """All checks of `dpo_plan`. Without `pairs_known` the number of steps is supposed, and not judged; nor is what DPO
    starts from, which a store says."""
    configuration = Configuration.of_plan(plan, pairs_known=pairs_known)
    found = [
        *verdicts(configuration, bands),
        loss_supported(plan),
        lora_coverage(plan.coverage, plan.lora.rank, bands),
        memory_fits(plan),
        *([refresh_policy(plan)] if pairs_known else []),
    ]
    order = [check.name for check in checks_of("dpo_plan")]
    return sorted(found, key=lambda verdict: order.index(verdict.check))


def beta_for_loss(configuration: Configuration, bands: Bands) -> Verdict:
    """Beta against the band of its loss; of several losses the worst verdict counts. `sft` has no beta.

    Only the weak side blocks: a beta that is too large for its loss holds the policy where it is.
    """
    beta, names = configuration.beta, [name for name in configuration.losses if name != "sft"]
    if beta is None:
        return Verdict("beta_for_loss", "pass", "not known", "not judged")
    known = [(name, bands.betas[name]) for name in names if name in bands.betas]
    if not names or len(known) < len(names):
        note = "loss_supported says which losses there are"
        return Verdict("beta_for_loss", "pass", beta, "none known for this loss, so not judged", note=note)
    level = worst(*(_beta_level(beta, band) for _, band in known))
    name, band = next((name, band) for name, band in known if _beta_level(beta, band) == level)
    low, high = max(b.ok_low for _, b in known), min(b.ok_high for _, b in known)
    fix = f"set dpo.beta between {low:g} and {high:g}"
    if low > high:
        fix = f"no beta suits {' and '.join(names)} at once, their units differ: leave one of them out of dpo.loss"
    return Verdict(
        "beta_for_loss",
        level,
        beta,
        f"{band.ok_low:g} to {band.ok_high:g}, blocked below {band.error_below:g} (loss {name})",
        band.source,
        fix if level != "pass" else "",
    )


def _beta_level(beta: float, band: BetaBand) -> Level:
    if not math.isfinite(beta) or beta < band.error_below:
        return "error"
    return "pass" if band.ok_low <= beta <= band.ok_high else "warn"


@dataclass(frozen=True)
class LossFault:
    """A loss setting that cannot work, or that would act on nothing."""

    value: str
    fix: str
    source: str = losses.LOSS_SOURCE


def loss_faults(dpo: DpoSection) -> list[LossFault]:
    """Everything that is wrong with the loss of a recipe, names first. An option that no loss would use is a fault."""
    faults = [LossFault(name, _name_fix(name)) for name in dpo.losses if name not in losses.LOSSES]
    if faults:
        return faults
    facts = {name: losses.LOSSES[name] for name in dpo.losses}
    shown = " + ".join(facts)
    if set(facts) == {"sft"}:
        fix = "set dpo.loss to a preference loss and sft, as in [sigmoid, sft]: sft alone ignores rejected answers"
        faults.append(LossFault(shown, fix))
    if dpo.trainer == "trl" and losses.TRL_LACKS & set(facts):
        faults.append(LossFault(f"{shown} with trainer trl", "set dpo.trainer to packed: TRL 1.15 has no cdpo"))
    smoothing = {fact.smoothing for fact in facts.values()}
    if dpo.label_smoothing > 0 and smoothing == {"ignored"}:
        use = "set dpo.loss to cdpo, the sigmoid loss with label smoothing, or " if "sigmoid" in facts else ""
        fix = f"{use}set dpo.label_smoothing to 0: the {shown} loss ignores it"
        value = f"{shown} with label_smoothing {dpo.label_smoothing:g}"
        faults.append(LossFault(value, fix, losses.SMOOTHING_SOURCE))
    if dpo.label_smoothing == 0 and "needed" in smoothing:
        fix = f"set dpo.label_smoothing to {losses.EXO_SMOOTHING}: exo_pair takes its logarithm"
        faults.append(LossFault("exo_pair with label_smoothing 0", fix, losses.SMOOTHING_SOURCE))
    unfit = [name for name, fact in facts.items() if not fact.f_divergence]
    if dpo.f_divergence != "reverse_kl" and unfit:
        fits = ", ".join(name for name, fact in losses.LOSSES.items() if fact.f_divergence)
        fix = f"set dpo.f_divergence to reverse_kl, or dpo.loss to one of: {fits}"
        faults.append(LossFault(f"{', '.join(unfit)} with {dpo.f_divergence}", fix, losses.F_DIVERGENCE_SOURCE))
    unused = {"alpha": dpo.f_divergence != "alpha_divergence", "discopop_tau": "discopop" not in facts}
    user = {"alpha": "dpo.f_divergence to alpha_divergence", "discopop_tau": "dpo.loss to discopop"}
    for field, is_unused in unused.items():
        default, value = DpoSection.model_fields[field].default, getattr(dpo, field)
        if is_unused and value != default:
            fix = f"set {user[field]}, or dpo.{field} back to {default:g}: nothing else uses it"
            faults.append(LossFault(f"{shown} with {field} {value:g}", fix))
    return faults


def _name_fix(name: str) -> str:
    """What to write instead of a name that is no loss."""
    if name in losses.LOSS_ADVICE:
        return losses.LOSS_ADVICE[name]
    near = difflib.get_close_matches(name, losses.SUPPORTED_LOSSES, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}set dpo.loss to one of: {', '.join(losses.SUPPORTED_LOSSES)}"


def loss_supported(plan: TrainingPlan) -> Verdict:
    """The names of the losses, and every option only where a loss uses it."""
    dpo, known = plan.dpo, ", ".join(losses.SUPPORTED_LOSSES)
    faults = loss_faults(dpo)
    if faults:
        return Verdict(
            "loss_supported",
            "error",
            "; ".join(fault.value for fault in faults),
            known,
            "; ".join(dict.fromkeys(fault.source for fault in faults)),
            "; ".join(fault.fix for fault in faults),
        )
    shown = " + ".join(dpo.losses)
    plain = [name for name in ("cdpo", "robust") if name in dpo.losses]
    if plain and dpo.label_smoothing == 0:
        fix = f"set dpo.label_smoothing to the share of wrong labels, {losses.NOISE} is usual, or dpo.loss to sigmoid"
        value = f"{' + '.join(plain)} with label_smoothing 0, which is sigmoid"
        return Verdict("loss_supported", "warn", value, known, losses.LOSS_SOURCE, fix)
    return Verdict("loss_supported", "pass", shown, known, losses.LOSS_SOURCE)


def budget(configuration: Configuration, bands: Bands) -> Verdict:
    """Number of steps: with few nothing can be judged. An unusual batch or number of epochs is noted.

    What those do to a model depends on the learning rate, and `training_dose` is where they add up.
    """
    limit = bands.limit("budget")
    batch, epochs, steps = configuration.batch, configuration.epochs, configuration.steps
    unfinished = any(x is not None and not math.isfinite(x) for x in (batch, epochs))
    few = steps is not None and steps < limit["steps_warn"]
    fixes = ["set dpo.epochs and dpo.batch_size to positive numbers"] if unfinished else []
    fixes += [f"collect more pairs: {steps} steps are too few to judge a run by"] if few else []
    notes = []
    if batch is not None and batch < limit["batch_usual"]:
        notes.append(f"a batch below {limit['batch_usual']:g} is unusual")
    if epochs is not None and epochs > limit["epochs_usual"]:
        notes.append(f"more than {limit['epochs_usual']:g} epochs are unusual")
    parts = [
        "" if batch is None else f"{batch:g} pairs" + ("" if steps is None else f" x {steps} steps"),
        "" if epochs is None else f"{epochs:g} epochs",
    ]
    return Verdict(
        "budget",
        "error" if unfinished else "warn" if few else "pass",
        ", ".join(part for part in parts if part) or "not known",
        f"steps >= {limit['steps_warn']:g}",
        limit.source,
        "; ".join(fixes),
        "; ".join([*notes, *(["training_dose says what they add up to"] if notes else [])]),
    )


def schedule_and_precision(configuration: Configuration, bands: Bands) -> Verdict:
    """Warm-up, gradient clipping and number format: each alone warns."""
    limit = bands.limit("schedule_and_precision")
    warmup, norm, precision = configuration.warmup, configuration.max_grad_norm, configuration.precision
    low, high = limit["warmup_low"], limit["warmup_high"]
    faults = []
    if warmup is not None and not low <= warmup <= high:
        faults.append(f"set dpo.warmup_ratio between {low:g} and {high:g} (0.1 is usual)")
    if norm is not None and not norm <= limit["grad_norm_warn"]:
        faults.append("set dpo.max_grad_norm to 1")
    if precision == "fp16":
        faults.append("set hardware.precision to bf16 on a card from Ampere on, or to fp32 where that fits")
    parts = [
        "" if warmup is None else f"warm-up {100 * warmup:.3g}%{_of_steps(warmup, configuration.steps)}",
        "" if norm is None else f"max_grad_norm {norm:g}",
        precision or "",
    ]
    return Verdict(
        "schedule_and_precision",
        "warn" if faults else "pass",
        ", ".join(part for part in parts if part) or "not known",
        f"warm-up {100 * low:g}% to {100 * high:g}%, max_grad_norm 1 (warned above {limit['grad_norm_warn']:g}), "
        "no fp16",
        limit.source,
        "; ".join(faults),
    )


def _of_steps(warmup: float, steps: int | None) -> str:
    """What a share of the steps comes to: rounded up, one of two steps is far more than a tenth."""
    return "" if steps is None else f" ({warmup_steps(warmup, steps)} of {steps} steps)"


def lora_scale(configuration: Configuration, bands: Bands) -> Verdict:
    """alpha / rank, which multiplies the update, and the learning rate of a large rank. rsLoRA is not offered here."""
    limit, rank, alpha = bands.limit("lora_scale"), configuration.rank, configuration.alpha
    most, wide, rate = limit["alpha_over_rank"], limit["rank"], limit["learning_rate"]
    band = f"alpha / rank <= {most:g}; from rank {wide:g} on a learning rate of {rate:g} or less"
    if rank is None or alpha is None:
        return Verdict("lora_scale", "pass", "not known", band, limit.source)
    faults = []
    if not alpha / rank <= most:
        faults.append(f"set lora.alpha to {most * rank:g} or less")
    if rank >= wide and not configuration.learning_rate <= rate:
        faults.append(f"set dpo.learning_rate to {rate:g} or less, or lora.rank below {wide:g}")
    return Verdict(
        "lora_scale",
        "warn" if faults else "pass",
        f"rank {rank}, alpha {alpha}: scale {alpha / rank:g}",
        band,
        limit.source,
        "; ".join(faults),
    )


def memory_fits(plan: TrainingPlan) -> Verdict:
    """The estimated peak against the device's memory, with room for fragments; the fix is what would fit."""
    within = plan.memory_gib <= plan.memory_available_gib
    fits = plan.fits and within
    advice = "use a smaller base, a shorter feedback.max_length, or hardware.precision: 4bit on a GPU"
    return Verdict(
        "memory_fits",
        "pass" if fits else "error",
        round(plan.memory_gib, 2),
        f"at most {plan.memory_available_gib:.1f} GiB on {plan.device_name}, with room for fragments",
        "weights + adapter and optimizer + activations of one forward (docs/engine.md, memory)",
        "" if fits else "; or ".join(plan.would_fit) or advice,
        "it is within the device's memory, but leaves no room for fragments" if within and not fits else "",
    )
