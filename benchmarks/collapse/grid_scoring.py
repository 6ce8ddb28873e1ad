"""Runs of the grid against the checks: which gate stops which run, and what the counts say. Nothing is trained here.

Every number is computed from the rows of the results file with the verdict functions of the pipeline, so bands may
change and the grid be scored again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from benchmarks.collapse import grid_faults as faults
from benchmarks.collapse import grid_labels as labels
from benchmarks.collapse import grid_runs as runs
from dpo_assets.checks.aftermath import aftermath_verdicts
from dpo_assets.checks.bands import Bands, default_bands
from dpo_assets.checks.catalog import severity_of
from dpo_assets.checks.collapse import CollapseLimits, Trigger, first_trigger, healthy
from dpo_assets.checks.config import plan_verdicts
from dpo_assets.checks.dataset import dataset_verdicts
from dpo_assets.checks.drift import DRIFT
from dpo_assets.checks.reports import DpoReport
from dpo_assets.checks.statistics import Proportion, wilson
from dpo_assets.checks.training import dpo_verdicts
from dpo_assets.checks.verdict import Verdict, with_severity
from dpo_assets.planning.plan import DatasetStats, make_plan
from dpo_assets.planning.precision import Device
from dpo_assets.planning.schedule import warmup_steps
from dpo_assets.planning.sizes import find_model
from dpo_assets.recipe import BandOverride, DpoSection, Severity

Row = dict[str, Any]
UNDATED: dict[str, Any] = {DRIFT: None}  # The grid's pairs have no dates, and its reports were made without windows.
GATES = ("data", "start", "while", "after")
# What catches a fault by construction.
OWN_CHECKS = {
    faults.LEAKED: {"split_leak"},
    # The pipeline sets all pairs of `truncated` aside, so nothing is left to train on.
    faults.TRUNCATED: {"enough_pairs", "distinct_after_truncation"},
    faults.WRONG_REFERENCE: {"reference_is_start"},
}


@dataclass(frozen=True)
class Scored:
    """A run with its label and, gate by gate, the checks that blocked it."""

    row: Row
    label: labels.Label
    blocked: Mapping[str, tuple[str, ...]]
    trigger: Trigger | None = None
    kept_step: int = 0
    damage: tuple[str, ...] = field(default=())

    @property
    def fault(self) -> str:
        return str(self.row["fault"])

    @property
    def caught(self) -> bool:
        return any(self.blocked.values())

    def caught_by(self, *gates: str) -> bool:
        return any(self.blocked[gate] for gate in gates)

    @property
    def sound(self) -> bool:
        return self.fault in labels.SOUND


def errors(verdicts: Iterable[Verdict], severity: Mapping[str, Severity]) -> tuple[str, ...]:
    """Names of the checks that block, under the catalog's severities and a recipe's."""
    judged = (with_severity(v, severity_of(v.check, severity)) for v in verdicts)
    return tuple(v.check for v in judged if v.level == "error")


def metric_rows(row: Row) -> list[dict[str, float]]:
    """The metric log of a run, a dictionary a step (`grid_runs.columns` the other way round)."""
    names = row["metrics"]
    probes = {
        step: {name: float(names[name][n]) for name in names if name.startswith("probe/") and name != "probe/step"}
        for n, step in enumerate(names.get("probe/step", []))
    }
    logs = [name for name in names if not name.startswith("probe/")]
    return [
        {name: float(names[name][n]) for name in logs} | probes.get(step, {}) for n, step in enumerate(names["step"])
    ]


def kept_step(rows: Sequence[Mapping[str, float]], limits: CollapseLimits, trigger: Trigger | None) -> int:
    """The probe whose state the guard would have put back: the last healthy one before the trigger; 0 is the start."""
    kept = 0
    for n, row in enumerate(rows):
        if trigger is not None and row["step"] >= trigger.step:
            break
        if "probe/answers" in row and healthy(rows[: n + 1], limits):
            kept = round(row["step"])
    return kept


def limits_of(row: Row, bands: Bands) -> CollapseLimits:
    steps = row["steps"]
    warmup = warmup_steps(DpoSection().warmup_ratio, steps)
    return CollapseLimits.of(bands, losses=("sigmoid",), beta=row["beta"], warmup_steps=warmup)


def tasks_part(before: str, after: str) -> dict[str, Any]:
    """The capability part of a report from which tasks SFT and policy met (`runs.tasks_met`)."""
    pairs = [(a == "1", b == "1") for a, b in zip(before, after, strict=True)]
    return {
        "kind": "tasks",
        "tasks": len(pairs),
        "reference": sum(a for a, _ in pairs) / len(pairs),
        "policy": sum(b for _, b in pairs) / len(pairs),
        "lost": sum(a and not b for a, b in pairs),
        "gained": sum(b and not a for a, b in pairs),
    }


def score(
    rows: Sequence[Row],
    bands: Bands | None = None,
    severity: Mapping[str, Severity] | None = None,
    user_probe: bool = False,
    cells: str = "grid",
) -> list[Scored]:
    """Every run of a set with its label and its gates.

    Args:
        user_probe: judge `capability_retention` by a user's own tasks instead of the built-in token accuracy.
    """
    bands, severity = bands or default_bands(), severity or {}
    sft = next(row for row in rows if row["name"] == "sft")
    tasks = next((row["tasks"] for row in rows if row["name"] == "sft-tasks"), "")
    # Checks of data ask a recipe for its losses and sizes, which all runs share.
    recipe = runs.recipe_of(runs.ANY_FOLDER, runs.Cell(1.0, 0.1, faults.CLEAN, 0))
    data = {
        row["name"]: errors(dataset_verdicts(UNDATED | row["report"], recipe, bands), severity)
        for row in rows
        if row["name"].startswith("data:")
    }
    scored = []
    for row in rows:
        if "fault" not in row or row.get("set", "grid") != cells or "kept_step" in row:
            continue
        blocked: dict[str, tuple[str, ...]] = dict.fromkeys(GATES, ())
        blocked["data"] = data[f"data:{row['fault']}-{row['seed']}"]
        blocked["start"] = (row["stopped_by"],) if row.get("stopped_by") == "reference_is_start" else ()
        trigger, kept, after = None, 0, row.get("behaviour")
        if "metrics" in row:
            logs, limits = metric_rows(row), limits_of(row, bands)
            trigger = first_trigger(logs, limits)
            kept = kept_step(logs, limits, trigger)
            blocked["while"] = (f"collapse/{trigger.rule}",) if trigger else ()
            measured = row["report"]
            if user_probe:
                measured = measured | {"capability": tasks_part(tasks, row["tasks"])}
            # The rows keep a trigger without its texts; these checks do not ask for it.
            read = DpoReport.model_validate({**measured, "trigger": None, "stopped": None})
            verdicts = [*dpo_verdicts(read, bands), *aftermath_verdicts(read, bands)]
            blocked["after"] = errors(verdicts, severity)
        elif row.get("stopped_by") not in (None, "reference_is_start"):
            blocked["while"] = (row["stopped_by"],)  # A number that is not finite ends the stage.
        label = labels.label(sft["behaviour"], after, row["fault"])
        found = tuple(labels.damage(sft["behaviour"], after, row["fault"])) if after else ()
        scored.append(Scored(row, label, blocked, trigger, kept, found))
    return scored


def detection(scored: Iterable[Scored], gates: Sequence[str] = GATES) -> Proportion:
    """Share of damaged runs that a gate blocks before `merged_model`."""
    found = [one.caught_by(*gates) for one in scored if one.label == "damaged"]
    return wilson(sum(found), len(found))


def false_alarms(scored: Iterable[Scored], sound_only: bool, gates: Sequence[str] = GATES) -> Proportion:
    """Share of undamaged runs that a gate blocks; `sound_only`: of those on data without a fault of its own."""
    found = [
        one.caught_by(*gates) for one in scored if one.label in ("moved", "unmoved") and (one.sound or not sound_only)
    ]
    return wilson(sum(found), len(found))


def by_construction(scored: Iterable[Scored]) -> Proportion:
    """Share of the runs that must be caught that their own check caught."""
    found = [
        bool(OWN_CHECKS[one.fault] & {name for names in one.blocked.values() for name in names})
        for one in scored
        if one.label == "must_be_caught"
    ]
    return wilson(sum(found), len(found))


def plan_blocks(row: Row, at: float, bands: Bands | None = None) -> bool:
    """Whether the plan's checks of the rate block a run, were x1 the rate `at` for the adapter of a 7B model.

    Bands for models of billions of parameters cannot judge a rate for 260,000 literally.
    """
    cell = runs.Cell(row["times"], row["beta"], row["fault"], row["seed"])
    stats = DatasetStats(train_pairs=514, eval_pairs=126, max_length=72, longest_pair=67, mean_pair=58.0)
    device = Device("cuda", "any card", 80.0, (9, 0))
    plan = make_plan(runs.recipe_of(runs.ANY_FOLDER, cell, at), find_model("7b").shape, stats, device)
    found = errors(plan_verdicts(plan, bands or default_bands()), {})
    return bool({"learning_rate_band", "training_dose"} & set(found))


# Numbers of `collapse` that are tuned, each with the values tried; the first is the shipped one.
TRIED = {
    "least_fall": (0.1, 0.15, 0.2, 0.3),
    "nll_ratio": (2.0, 1.75, 1.5),
    "kl_per_token_sign": (0.05, 0.1, 0.15),
}


def with_numbers(numbers: Mapping[str, float]) -> Bands:
    """The shipped bands with other numbers of `collapse`."""
    return default_bands().with_overrides(
        {"collapse": BandOverride(numbers=dict(numbers), reason="tuned on one half of the grid")}
    )


def tune(rows: Sequence[Row]) -> dict[str, float]:
    """The numbers of `collapse` that do best on the half that is tuned on.

    Fewest false alarms on sound data, then most damaged runs stopped while they train, then the nearest to the shipped
    numbers. What a stop keeps is not tuned: its behaviour is what the early stop is judged by.
    """
    half = [row for row in rows if "fault" not in row or row["seed"] == labels.TUNED_ON]
    names = ("least_fall", "nll_ratio")
    best: tuple[tuple[float, ...], dict[str, float]] | None = None
    for values in product(*(TRIED[name] for name in names)):
        numbers = dict(zip(names, values, strict=True))
        scored = score(half, with_numbers(numbers))
        alarms = round(false_alarms(scored, True).value * false_alarms(scored, True).n)
        stopped = sum(one.label == "damaged" and one.caught_by("start", "while") for one in scored)
        changes = sum(TRIED[name].index(value) for name, value in numbers.items())
        key = (alarms, -stopped, changes)
        if best is None or key < best[0]:
            best = (key, numbers)
    assert best is not None
    return best[1]
