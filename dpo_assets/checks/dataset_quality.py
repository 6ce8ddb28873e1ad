"""Verdicts on what the pairs of a dataset are like, from the measures in its report (`feedback.quality`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dpo_assets.checks.bands import Bands
from dpo_assets.checks.verdict import Level, Verdict, upper_limit, worst
from dpo_assets.errors import ConfigError
from dpo_assets.recipe import DpoSection

SFT = "sft"
BINS = 100  # Of distances and of loops: width 0.01.


def quality_of(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """The measures of a dataset.

    Raises:
        ConfigError: for a dataset that was made before there were any.
    """
    if "quality" not in report:
        raise ConfigError("this `dpo_dataset` is of an earlier version, which did not measure; materialise it again.")
    quality: Mapping[str, Any] = report["quality"]
    return quality


def quality_verdicts(report: Mapping[str, Any], dpo: DpoSection, bands: Bands) -> list[Verdict]:
    """The checks of `dpo_dataset` that judge its pairs, in the order of the catalogue."""
    quality = quality_of(report)
    verdicts = [
        answers_truncated(quality, bands),
        pair_distance(quality, dpo, bands),
        length_bias(quality, bands),
        label_conflicts(report, bands),
        degenerate_chosen(quality, bands),
        too_easy(quality, bands),
    ]
    if quality["pairs"]:
        return verdicts
    # Nothing was measured, so nothing passed; `enough_pairs` says what to do about it.
    return [v if v.passed else replace(v, value="no pair to measure", fix="see enough_pairs") for v in verdicts]


def answers_truncated(quality: Mapping[str, Any], bands: Bands) -> Verdict:
    """Share of answers that `max_length` cuts. A cut answer has lost its end, and with it the EOS."""
    limit, measured = bands.limit("answers_truncated"), quality["truncation"]
    share = _number(measured["share"])
    level = upper_limit(share, limit.warn, limit.error)
    return Verdict(
        "answers_truncated",
        level,
        share,
        f"at most {limit.warn:g} of the answers, an error above {limit.error:g}",
        limit.source,
        "" if level == "pass" else _enough_room(measured, limit.warn),
        f"{2 * quality['pairs']} answers",
    )


def _enough_room(measured: Mapping[str, Any], allowed: float) -> str:
    needed = ((float(p), length) for p, length in measured["needed"].items())
    length = min((length for percentile, length in needed if percentile >= 100 * (1 - allowed)), default=None)
    if length is None:
        return "collect pairs: there is none"
    if length > measured["context"]:
        return (
            f"leave out the longest answers: {length} tokens would hold enough of them, and the model reads "
            f"{measured['context']}; or take a base with a longer context"
        )
    return f"set feedback.max_length to {length}, or leave out the longest answers"


def sft_weight(dpo: DpoSection) -> float:
    """Weight of the `sft` term in the loss; 0 without one."""
    weights = dpo.loss_weights or [1.0] * len(dpo.losses)
    return sum(weight for name, weight in zip(dpo.losses, weights, strict=True) if name == SFT)


def pair_distance(quality: Mapping[str, Any], dpo: DpoSection, bands: Bands) -> Verdict:
    """Median token edit distance of the answers, and the share of pairs that are nearly equal.

    Nearly equal pairs are no error where an `sft` term holds the chosen answers up (RPO, arXiv 2404.19733).
    """
    limit, measured = bands.limit("pair_distance"), quality["distance"]
    median = _number(measured["median"])
    near = _share_from(measured["bins"], quality["sample"], below=limit["near"])
    held = sft_weight(dpo) >= limit["sft_weight"]
    level: Level = worst(
        upper_limit(-median, -limit["median_warn"], math.inf),
        upper_limit(near, limit["near_warn"], math.inf if held else limit["near_error"]),
    )
    fix = "leave out pairs whose answers are nearly equal, or collect rejected answers that differ more"
    if level == "error":
        fix += f"; or add a term that keeps chosen answers likely: {_with_sft(dpo, limit['sft_weight'])}"
    return Verdict(
        "pair_distance",
        level,
        f"median {median:.4g}, {near:.4g} of the pairs below {limit['near']:g}",
        f"median at least {limit['median_warn']:g}, at most {limit['near_warn']:g} of the pairs below "
        f"{limit['near']:g}; an error above {limit['near_error']:g} without an sft term of {limit['sft_weight']:g}",
        limit.source,
        "" if level == "pass" else fix,
        f"{_sampled(quality)}; common first tokens {_number(measured['shared_prefix']):.4g} of the longer answer, on "
        f"average; sft term {sft_weight(dpo):g}",
    )


def _with_sft(dpo: DpoSection, weight: float) -> str:
    others = [name for name in dpo.losses if name != SFT]
    kept = dict(zip(dpo.losses, dpo.loss_weights or [1.0] * len(dpo.losses), strict=True))
    names, weights = [*others, SFT], [*(kept[name] for name in others), weight]
    return f"dpo.loss [{', '.join(names)}] with dpo.loss_weights [{', '.join(f'{w:g}' for w in weights)}]"


def length_bias(quality: Mapping[str, Any], bands: Bands) -> Verdict:
    """How much longer chosen answers are than rejected ones, and how well length alone tells the label.

    Both ways: chosen answers that are always the short ones teach a model to stop early. Only the ratio of the means
    has an error limit: people prefer longer answers, and length alone tells much of every published set.
    """
    limit, measured = bands.limit("length_bias"), quality["lengths"]
    ratio, auc = _number(measured["ratio"]), _number(measured["auc"])
    either_way = max(ratio, 1 / ratio) if ratio else math.nan
    level: Level = worst(
        upper_limit(either_way, limit["ratio_warn"], limit["ratio_error"]),
        upper_limit(max(auc, 1 - auc), limit["auc_warn"], math.inf),
    )
    word = "shorter" if ratio < 1 else "longer"
    return Verdict(
        "length_bias",
        level,
        f"ratio {ratio:.4g}, AUC {auc:.4g}",
        f"mean length of chosen over rejected from {1 / limit['ratio_warn']:.4g} to {limit['ratio_warn']:g}, an error "
        f"outside {1 / limit['ratio_error']:.4g} to {limit['ratio_error']:g}; AUC of length from "
        f"{1 - limit['auc_warn']:.4g} to {limit['auc_warn']:g}",
        limit.source,
        ""
        if level == "pass"
        else f"leave out pairs whose chosen answer is much {word}, until both lie inside the band; where you keep "
        "them, hold the policy against `pick_the_longer` in eval_scores",
        f"chosen {_number(measured['chosen_mean']):.4g} tokens, rejected {_number(measured['rejected_mean']):.4g}; "
        f"chosen longer in {_number(measured['chosen_longer']):.4g} of the pairs, ties half",
    )


def label_conflicts(report: Mapping[str, Any], bands: Bands) -> Verdict:
    """Share of the rows read that contradict another: exact reversals (in quarantine), near ones, and circles."""
    limit, found = bands.limit("label_conflicts"), quality_of(report)["contradictions"]
    reversed_, rows = report["reasons"].get("conflict", 0), report["rows_in"]
    share = (reversed_ + found["pairs"]) / max(1, rows)
    level = upper_limit(share, limit.warn, limit.error)
    return Verdict(
        "label_conflicts",
        level,
        round(share, 6),
        f"at most {limit.warn:g} of the rows read, an error above {limit.error:g}",
        limit.source,
        ""
        if level == "pass"
        else "judge these prompts again and keep one label for each pair (quarantined_preferences, reason `conflict`, "
        "and the rows shown here); where labels stay noisy, dpo.loss robust with dpo.label_smoothing",
        f"{reversed_} rows are exact reversals, in quarantine; of {found['compared']} pairs that share their prompt "
        f"with another, {found['pairs']} lie in a circle",
    )


def degenerate_chosen(quality: Mapping[str, Any], bands: Bands) -> Verdict:
    """Share of chosen answers that no model should learn: loops, no end, template marks, nothing said."""
    limit, measured = bands.limit("degenerate_chosen"), quality["degenerate"]
    n = quality["sample"]
    looped = _share_from(measured["loops"], n, above=limit["loop_share"])
    share = (measured["others"] / n if n else math.nan) + _share_from(
        measured["other_loops"], n, above=limit["loop_share"]
    )
    level = upper_limit(share, limit.warn, limit.error)
    fixes = {
        "no_end": "make the chat template end every assistant turn with the tokenizer's EOS",
        "template": "remove the marks of another chat template from the answers",
        "blank": "leave out answers that say nothing",
        "misread": "export these answers again as UTF-8: their letters were lost or misread",
    }
    kinds = [kind for kind in fixes if measured.get(kind)]
    ways = [fixes[kind] for kind in kinds] + (["leave out answers that repeat themselves"] if looped else [])
    unseen = "" if measured["ends_known"] else "; the model folder names no EOS, so ends were not looked for"
    if "misread" not in measured:  # A dataset that an earlier version made.
        unseen += "; misread letters were not looked for"
    return Verdict(
        "degenerate_chosen",
        level,
        round(share, 6),
        f"at most {limit.warn:g} of the chosen answers, an error above {limit.error:g}",
        limit.source,
        "" if level == "pass" else "; ".join(ways) or "collect pairs: there is none",
        f"{_sampled(quality)}: {measured['no_end']} without EOS, {measured['template']} with template marks, "
        f"{measured['blank']} blank, {measured.get('misread', 0)} with letters lost or misread, "
        f"{round((looped or 0.0) * n) if n else 0} with a loop over "
        f"{limit['loop_share']:g} of their words{unseen}",
    )


def too_easy(quality: Mapping[str, Any], bands: Bands) -> Verdict:
    """How well a regression on the form of answers tells the label. Never an error: such pairs can be true."""
    limit, measured = bands.limit("too_easy"), quality["surface"]
    n, auc = quality["sample"], measured["auc"]
    band = f"held-out AUC of form at most {limit.warn:g}, from {limit['pairs']:g} pairs on"
    if n < limit["pairs"] or auc is None:
        return Verdict("too_easy", "pass", "too few pairs to judge", band, limit.source, note=f"{n} pairs")
    level: Level = "warn" if upper_limit(auc, limit.warn, math.inf) != "pass" else "pass"
    strongest = sorted(measured["features"].items(), key=lambda item: (-abs(item[1] - 0.5), item[0]))[:3]
    told = ", ".join(f"{name} {value:.4g}" for name, value in strongest)
    return Verdict(
        "too_easy",
        level,
        auc,
        band,
        limit.source,
        ""
        if level == "pass"
        else f"collect rejected answers of the same form as the chosen ones ({strongest[0][0]} tells most), or leave "
        "out pairs that differ in it",
        f"{_sampled(quality)}; AUC of a feature alone: {told}",
    )


def _number(value: float | None) -> float:
    """NaN for what could not be measured: it never passes."""
    return math.nan if value is None else value


def _share_from(counts: Mapping[str, int], n: int, *, below: float = math.inf, above: float = 0.0) -> float:
    """Share of `n` values in bins of 0.01 that lie below one limit and at or above another; limits in hundredths."""
    if not n:
        return math.nan
    first, end = round(BINS * above), BINS + 1 if math.isinf(below) else round(BINS * below)
    return sum(count for bin_, count in counts.items() if first <= int(bin_) < end) / n


def _sampled(quality: Mapping[str, Any]) -> str:
    n, pairs = quality["sample"], quality["pairs"]
    return f"{n} pairs" if n == pairs else f"{n} of {pairs} pairs, the first by id: a random sample"
