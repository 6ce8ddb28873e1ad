"""Verdicts that need no GPU and no data: they stop a run before any training process starts."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from dpo_assets.checks import losses
from dpo_assets.checks.bands import Bands, BetaBand, Method
from dpo_assets.checks.verdict import Level, Verdict, upper_limit, worst
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.recipe import DpoSection


def plan_verdicts(plan: TrainingPlan, bands: Bands) -> list[Verdict]:
    """All checks of `dpo_plan`."""
    return [
        learning_rate_band(plan, bands),
        beta_for_loss(plan, bands),
        loss_supported(plan),
        budget(plan, bands),
        memory_fits(plan),
    ]


def learning_rate_band(plan: TrainingPlan, bands: Bands) -> Verdict:
    """The DPO learning rate against the band of its method and model size."""
    dpo, billions = plan.dpo, plan.parameters / 1e9
    method: Method = "lora"
    band, low_beta, much = bands.learning_rate(method, billions), bands.limit("low_beta"), bands.limit("heavy")
    ok_high = band.ok_high
    if dpo.beta < low_beta["below"] and {"sigmoid", "cdpo", "robust", "hinge"} & set(dpo.losses):
        ok_high = min(ok_high, low_beta[method])
    heavy = dpo.epochs >= much["epochs"] or dpo.batch_size < much["batch"]
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


def beta_for_loss(plan: TrainingPlan, bands: Bands) -> Verdict:
    """Beta against the band of its loss; of several losses the worst verdict counts. `sft` has no beta."""
    beta, names = plan.dpo.beta, [name for name in plan.dpo.losses if name != "sft"]
    known = [(name, bands.betas[name]) for name in names if name in bands.betas]
    if not names or len(known) < len(names):
        return Verdict("beta_for_loss", "warn", beta, "none known for this loss", "", "see loss_supported")
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
        f"{band.ok_low:g} to {band.ok_high:g}, blocked outside {band.error_below:g} to {band.error_above:g} "
        f"(loss {name})",
        band.source,
        fix if level != "pass" else "",
    )


def _beta_level(beta: float, band: BetaBand) -> Level:
    if not band.error_below <= beta <= band.error_above:
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


def budget(plan: TrainingPlan, bands: Bands) -> Verdict:
    """Effective batch, epochs and number of steps."""
    dpo, limit = plan.dpo, bands.limit("budget")
    batch: Level = (
        "error" if dpo.batch_size < limit["batch_error"] else "warn" if dpo.batch_size < limit["batch_warn"] else "pass"
    )
    epochs = upper_limit(dpo.epochs, limit["epochs_warn"], limit["epochs_error"])
    steps: Level = "warn" if plan.dpo_steps < limit["steps_warn"] else "pass"
    fixes = [
        text
        for level, text in (
            (batch, f"raise dpo.batch_size to {limit['batch_warn']:g} or more"),
            (epochs, f"lower dpo.epochs to {limit['epochs_warn']:g} or less"),
            (steps, f"collect more pairs: {plan.dpo_steps} steps are too few to judge a run by"),
        )
        if level != "pass"
    ]
    return Verdict(
        "budget",
        worst(batch, epochs, steps),
        f"{dpo.batch_size} pairs x {plan.dpo_steps} steps, {dpo.epochs:g} epochs",
        f"batch >= {limit['batch_warn']:g} (blocked below {limit['batch_error']:g}), epochs <= "
        f"{limit['epochs_warn']:g} (blocked above {limit['epochs_error']:g}), steps >= {limit['steps_warn']:g}",
        limit.source,
        "; ".join(fixes),
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
