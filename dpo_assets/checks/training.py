"""Verdicts on what training produced, from the reports of its stages. None of them needs a GPU to be asked again."""

from __future__ import annotations

import math

from dpo_assets.checks.aftermath import displacement
from dpo_assets.checks.bands import Bands, first_loss_tolerance
from dpo_assets.checks.coverage import adapter_attached
from dpo_assets.checks.reports import AdoptedBase, Carried, DpoReport, MergeReport, SftReport
from dpo_assets.checks.verdict import Verdict, upper_limit
from dpo_assets.untrusted import in_cell

NAMED = 4  # Weights that a value lists.


def sft_verdicts(report: SftReport | AdoptedBase, bands: Bands) -> list[Verdict]:
    """All checks of `sft_checkpoint`. An adopted base passes: nothing was trained."""
    if isinstance(report, AdoptedBase):
        note = "the base was adopted as it is"
        return [
            Verdict(name, "pass", "not trained", "-", note=note) for name in ("sft_finite", "sft_learned", "eos_kept")
        ]
    before, after = report.held_out_nll_before, report.held_out_nll_after
    learned = after < before
    eos, kept = report.ends_with_eos, bands.limit("eos_kept")
    return [
        _finite("sft_finite", report),
        Verdict(
            "sft_learned",
            "pass" if learned else "warn",
            round(after, 4),
            f"below {before:.4f}, the held-out loss before",
            "negative log-likelihood per token of held-out chosen answers",
            "" if learned else "lower sft.learning_rate, or start from a model nearer to the data with strategy: adopt",
        ),
        Verdict(
            "eos_kept",
            "pass" if eos >= kept.error else "error",
            round(eos, 4),
            f"at least {kept.error} of the answers end with EOS",
            kept.source,
            "" if eos >= kept.error else "the chat template must end every assistant turn with the tokenizer's EOS",
        ),
    ]


def dpo_verdicts(report: DpoReport, bands: Bands) -> list[Verdict]:
    """The checks of `dpo_adapter` on its metric log. `checks.aftermath` has those on what was measured afterwards."""
    return [
        reference_is_start(report, bands),
        _finite("finite", report),
        adapter_attached(report, bands),
        engine_as_planned(report),
        displacement(report, bands),
    ]


def engine_as_planned(report: DpoReport) -> Verdict:
    """Whether the plan's engine computed the run. Where it was not exact another did, and nothing else says so."""
    note = report.kernels_note
    return Verdict(
        "engine_as_planned",
        "warn" if note else "pass",
        report.kernels,
        "the engine that the plan names",
        "an engine is held against the model's own forward before it trains; the next one that is exact takes over",
        "set hardware.kernels to what computed it, so that time and memory are planned for it" if note else "",
        note=in_cell(note),
    )


def reference_is_start(report: DpoReport, bands: Bands) -> Verdict:
    """The first loss against the loss at zero margin, where that is known."""
    name, expected = "reference_is_start", report.expected_first_loss
    if expected is None and report.trainer == "trl" and math.isfinite(report.first_loss):
        why = "not measured: with an `sft` term the loss at zero margin depends on the data"
        fix = "set dpo.trainer to `packed`, which computes it; TRL's trainer does not tell its parts"
        return Verdict(name, "warn", why, "measured", bands.limit(name).source, fix)
    expected = math.nan if expected is None else expected  # Computed always, and no number.
    off = abs(report.first_loss - expected)
    tolerance = first_loss_tolerance(expected, report.first_loss_tokens, bands)
    level = upper_limit(off, tolerance, tolerance)
    return Verdict(
        name,
        level,
        report.first_loss,
        f"{expected:.6f} +- {tolerance:g}",
        bands.limit(name).source,
        "" if level == "pass" else "set dpo.reference to `sft`, or delete the reference cache",
    )


def merge_verdicts(report: MergeReport, bands: Bands) -> list[Verdict]:
    """All checks of `merged_model`."""
    difference = report.mean_difference_per_token
    limit = bands.limit("fidelity")
    level = upper_limit(difference, limit.warn, limit.error)
    finite, proven = report.finite, report.proven_in
    return [
        Verdict(
            "fidelity",
            level,
            float(difference),
            f"at most {limit.warn} nats per token, blocked above {limit.error}",
            limit.source,
            "" if level == "pass" else "set hardware.precision to bf16 or fp32 and train again",
            f"{report.probe_pairs} held-out pairs" + (f", in {proven}" if proven else ""),
        ),
        Verdict(
            "all_finite",
            "pass" if finite else "error",
            "all finite" if finite else f"NaN or infinity in {', '.join(report.not_finite[:NAMED])}",
            "every weight finite",
            "a NaN weight answers nothing but NaN",
            "" if finite else "lower the learning rate and train again",
            f"{report.parameters} values of the release as it loads",
        ),
        _tensors_kept(report.carried),
    ]


def _tensors_kept(carried: Carried | None) -> Verdict:
    """Whether the release holds what the base holds, towers and heads beside the language model included."""
    check, band = "tensors_kept", "every tensor of the base under its name, byte for byte unless it has an adapter"
    source = "a merge by plain names drops the vision tower (vllm 15031, 19139)"
    if carried is None:
        return Verdict(check, "warn", "not compared: an earlier version merged it", band, source, "merge it again")
    faults = [
        f"{len(names)} {what}: {', '.join(names[:NAMED])}"
        for what, names in (("lost", carried.lost), ("altered", carried.altered), ("added", carried.added))
        if names
    ]
    if carried.by_name_alone and not carried.lost:
        why = f"{carried.tensors} tensors by name and shape alone; " + ("; ".join(faults) or "none added")
        return Verdict(check, "warn", why, band, source, "only an adapter that adds layers needs another layout")
    said = f"{carried.tensors - carried.adapted} of {carried.tensors} tensors as they were, {carried.adapted} adapted"
    return Verdict(
        check,
        "pass" if carried.whole else "error",
        "; ".join(faults) or said,
        band,
        source,
        "" if carried.whole else "do not release it: report this base, and the names above, as a fault of the merge",
        f"{carried.beside} tensors beside the language model" if carried.beside else "",
    )


def _finite(check: str, report: SftReport | DpoReport) -> Verdict:
    finite = report.finite
    return Verdict(
        check,
        "pass" if finite else "error",
        "all finite" if finite else "NaN or infinity",
        "every logged value finite",
        "TRL 1473, 2435, 2553",
        "" if finite else "lower the learning rate 5 to 10 times",
        f"{report.steps} steps",
    )
