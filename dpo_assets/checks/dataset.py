"""Verdicts on a prepared dataset, from its report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_assets.checks.bands import Bands
from dpo_assets.checks.dataset_quality import quality_verdicts
from dpo_assets.checks.drift import feedback_drift
from dpo_assets.checks.verdict import Level, Verdict
from dpo_assets.feedback.rules import TEMPLATE_FAULTS
from dpo_assets.recipe import FeedbackSection, Recipe

MIN_EVAL_PAIRS = 1
KEPT_IN_TRAIN = (
    "pairs that this eval_fraction and seed would hold out stay in train: kept models were trained on them, and no "
    "score may rest on those (docs/design.md, rules)"
)


def dataset_verdicts(report: Mapping[str, Any], recipe: Recipe, bands: Bands) -> list[Verdict]:
    """All checks of `dpo_dataset`. The recipe is the declared one: what the launchpad changes comes after the data.

    Raises:
        ConfigError: for a dataset whose pairs were not measured.
    """
    feedback = recipe.feedback
    return [
        every_pair_accounted_for(report),
        schema(report),
        split_leak(report),
        distinct_after_truncation(report),
        quarantine_rate(report, feedback),
        enough_pairs(report, feedback, bands),
        *quality_verdicts(report, recipe.dpo, bands),
        feedback_drift(report, bands),
    ]


def every_pair_accounted_for(report: Mapping[str, Any]) -> Verdict:
    """What ingestion counted against what lies in the tables of the dataset, and those against what was written."""
    rows, accepted = report["rows_in"], report["accepted"]
    train, held_out = report["train_pairs"], report["eval_pairs"]
    outside = report.get("outside_window", 0)
    kept = accepted + report["quarantined"] + report["duplicates"] + outside
    faults = [] if rows == kept else [f"{rows} rows came in, {kept} are accounted for"]
    if accepted != train + held_out:
        faults.append(f"{train} + {held_out} pairs were written, {accepted} lie in the tables")
    return Verdict(
        "every_pair_accounted_for",
        "error" if faults else "pass",
        f"{rows} in: {accepted} accepted, {report['quarantined']} quarantined, {report['duplicates']} duplicates"
        + (f", {outside} outside of the window" if outside else ""),
        "pairs and rejected rows of raw_preferences = accepted + quarantined + duplicates, and pairs outside of the "
        "recipe's window, in the tables on disk",
        "nothing is lost (docs/design.md, rules)",
        f"materialise again, and report a bug if it stays: {'; '.join(faults)}" if faults else "",
    )


def schema(report: Mapping[str, Any]) -> Verdict:
    """Rows that the pandera schema refused. They are in quarantine; any of them is a fault of a reader."""
    count = report["reasons"].get("schema", 0)
    return Verdict(
        "schema",
        "error" if count else "pass",
        count,
        "0 rows",
        "the pandera schema of dpo_assets.feedback.pair",
        "see quarantined_preferences, reason `schema`" if count else "",
        f"{report['accepted']} pairs satisfy it",
    )


def split_leak(report: Mapping[str, Any]) -> Verdict:
    """Prompts in both splits, by the texts of their openings as they stand in the tables, and by the ids that the split
    was made by: a leaked prompt makes every held-out score meaningless."""
    count = report["leaked_prompts"]
    return Verdict(
        "split_leak",
        "error" if count else "pass",
        count,
        "0 prompts in both splits",
        "held-out scores on seen prompts measure memory",
        "report a bug: the split keeps groups together by construction" if count else "",
    )


def distinct_after_truncation(report: Mapping[str, Any]) -> Verdict:
    """Accepted pairs that truncation makes equal: no preference is left in them."""
    count = report["identical_after_truncation"]
    return Verdict(
        "distinct_after_truncation",
        "error" if count else "pass",
        count,
        "0 pairs",
        "7 % of a default UltraFeedback slice (rlhf-book 504); OpenRLHF 1311",
        "raise feedback.max_length" if count else "",
        f"{report['reasons'].get('identical_after_truncation', 0)} such pairs are in quarantine",
    )


def quarantine_rate(report: Mapping[str, Any], feedback: FeedbackSection) -> Verdict:
    """Share of damaged rows. Rows left out by choice, or too long for the model, do not count."""
    rate = report["damaged"] / max(1, report["rows_in"])
    bad = rate > feedback.max_quarantine_rate
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(report["reasons"].items())) or "none"
    of_template = sum(report["reasons"].get(reason, 0) for reason in TEMPLATE_FAULTS)
    way = (
        "set base_model.chat_template to a Jinja file that renders such conversations whole"
        if 2 * of_template > report["damaged"]
        else "mend the export, or the `format` and `columns` of its source"
    )
    return Verdict(
        "quarantine_rate",
        "error" if bad else "pass",
        round(rate, 4),
        f"at most {feedback.max_quarantine_rate:g} of {report['rows_in']} rows",
        "feedback.max_quarantine_rate of the recipe",
        f"{way}: quarantined_preferences holds each row and its reason ({reasons})" if bad else "",
        reasons,
    )


def enough_pairs(report: Mapping[str, Any], feedback: FeedbackSection, bands: Bands) -> Verdict:
    """Enough to train on, and something to judge by. How many steps they make, `budget` judges."""
    train, held_out = report["train_pairs"], report["eval_pairs"]
    few = bands.limit("enough_pairs")
    enough = train >= feedback.min_pairs and held_out >= MIN_EVAL_PAIRS
    level: Level = "error" if not enough else "warn" if train < few.warn else "pass"
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(report["reasons"].items())) or "none"
    if outside := report.get("outside_window", 0):
        reasons += f"; outside of feedback.window {outside}"
    ways = {
        "pass": "",
        "warn": f"collect feedback until {few.warn:g} pairs train; rows left out: {reasons}",
        "error": f"collect more feedback, or lower feedback.min_pairs; rows left out: {reasons}",
    }
    return Verdict(
        "enough_pairs",
        level,
        f"{train} train, {held_out} eval",
        f"at least {max(few.warn, feedback.min_pairs):g} train; an error below {feedback.min_pairs} train, "
        f"{MIN_EVAL_PAIRS} eval",
        f"feedback.min_pairs of the recipe; {few.source}",
        ways[level],
        f"{kept} {KEPT_IN_TRAIN}" if (kept := report.get("kept_in_train", 0)) else "",
    )
