"""The grid's tables, as Markdown."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from statistics import fmean, median

from benchmarks.collapse import grid_faults as faults
from benchmarks.collapse import grid_labels as labels
from benchmarks.collapse import grid_runs as runs
from benchmarks.collapse import grid_scoring as scoring
from benchmarks.collapse.grid_scoring import Row, Scored
from dpo_assets.checks.statistics import Proportion, wilson
from dpo_assets.report.tables import table

WITHIN = 0.05  # Of the SFT model's facts, for a state that a stop kept.
MAPPED = (5e-6, 1e-5, 2e-5)
WINDOW = 5


def report(rows: Sequence[Row]) -> str:
    """All tables of a results file."""
    scored = scoring.score(rows)
    parts = [
        "#### What became of the runs", outcomes(scored),
        "#### Stopped or blocked", counts(rows, scored),
        "#### Which check", by_check(scored),
        "#### Undamaged runs that were blocked, damaged ones that were not", exceptions(scored),
        "#### One number alone", single_numbers(rows, scored),
        "#### Early stop", early_stop(rows),
        "#### Stopped for good", stopped(rows, scored),
        "#### Five seeds of the good configuration", controls(rows),
        "#### Between the rates", between(rows),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def share(found: Proportion) -> str:
    """`95/100 = 0.950 [0.888, 0.978]`."""
    if not found.n:
        return "none"
    return f"{round(found.value * found.n)}/{found.n} = {found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def of(items: Iterable[bool]) -> Proportion:
    found = list(items)
    return wilson(sum(found), len(found))


def outcomes(scored: Sequence[Scored]) -> str:
    """Labels by kind of data and rate, over betas and seeds."""
    names = {"damaged": "D", "moved": "m", "unmoved": "u"}
    lines = []
    for fault in faults.FAULTS:
        line = [fault]
        for times in runs.RATES:
            here = [one for one in scored if one.fault == fault and one.row["times"] == times]
            if fault in labels.MUST_BE_CAUGHT:
                line.append(f"caught {sum(one.caught for one in here)}/{len(here)}")
                continue
            found = Counter(one.label for one in here)
            caught = sum(one.caught for one in here)
            kinds = " ".join(f"{found[name]}{sign}" for name, sign in names.items() if found[name])  # type: ignore[index]
            line.append(f"{kinds}; blocked {caught}")
        lines.append(line)
    return table(["data", *(f"x{times:g}" for times in runs.RATES)], lines)


def counts(rows: Sequence[Row], scored: Sequence[Scored]) -> str:
    """Detection and false alarms, by gate and by half."""
    probed = scoring.score(rows, user_probe=True)
    numbers = scoring.tune(rows)
    tuned = scoring.score(rows, scoring.with_numbers(numbers))
    said = ", ".join(f"{name} {value:g}" for name, value in numbers.items())
    halves: dict[str, Callable[[Scored], bool]] = {
        "all": lambda one: True,
        f"seed {labels.TUNED_ON}": lambda one: one.row["seed"] == labels.TUNED_ON,
        f"seed {labels.REPORTED_ON}": lambda one: one.row["seed"] == labels.REPORTED_ON,
    }
    gates: dict[str, tuple[Sequence[Scored], Sequence[str]]] = {
        "data, while, after training": (scored, scoring.GATES),
        "the same, with a user's own capability probe": (probed, scoring.GATES),
        f"tuned on seed {labels.TUNED_ON} ({said})": (tuned, scoring.GATES),
        "while training alone": (scored, ("start", "while")),
        "after training alone": (scored, ("after",)),
        "data alone": (scored, ("data",)),
    }
    lines = []
    for what, (source, names) in gates.items():
        for half, inside in halves.items():
            if half != "all" and names != scoring.GATES:
                continue
            here = [one for one in source if inside(one)]
            lines.append(
                [
                    what,
                    half,
                    share(scoring.detection(here, names)),
                    share(scoring.false_alarms(here, False, names)),
                    share(scoring.false_alarms(here, True, names)),
                ]
            )
    lines += [mapped_line(scored, at) for at in MAPPED]
    lines.append(clustered_line(scored))
    caught = share(scoring.by_construction(scored))
    head = ["gates", "runs", "damaged runs stopped", "undamaged runs blocked", "of these, on sound data"]
    return f"{table(head, lines)}\n\nRuns that must be caught, by the check of their own fault: {caught}."


def clustered_line(scored: Sequence[Scored]) -> list[str]:
    """All gates, counting runs that differ in beta alone once, by the worst of them: they hardly differ otherwise."""
    groups: dict[tuple[object, ...], list[Scored]] = {}
    for one in scored:
        groups.setdefault((one.fault, one.row["times"], one.row["seed"]), []).append(one)
    damaged = [[one for one in group if one.label == "damaged"] for group in groups.values()]
    sound = [[one for one in group if one.label in ("moved", "unmoved")] for group in groups.values()]
    return [
        "data, while, after training; betas counted as one",
        "all",
        share(of(all(one.caught for one in group) for group in damaged if group)),
        share(of(any(one.caught for one in group) for group in sound if group)),
        share(of(any(one.caught for one in group) for group in sound if group and group[0].sound)),
    ]


def mapped_line(scored: Sequence[Scored], at: float) -> list[str]:
    """All gates and the plan's learning-rate band, were x1 the rate `at` for a model of 7B."""

    def blocked(one: Scored) -> bool:
        return one.caught or scoring.plan_blocks(one.row, at)

    undamaged = [one for one in scored if one.label in ("moved", "unmoved")]
    return [
        f"with the plan's band, x1 as {at:g} for LoRA of 7B",
        "all",
        share(of(blocked(one) for one in scored if one.label == "damaged")),
        share(of(blocked(one) for one in undamaged)),
        share(of(blocked(one) for one in undamaged if one.sound)),
    ]


def by_check(scored: Sequence[Scored]) -> str:
    """For each check: damaged runs that it stops, those that only it stops, undamaged runs that it blocks."""
    names = sorted({name for one in scored for found in one.blocked.values() for name in found})
    lines = []
    for name in names:
        hit = [one for one in scored if any(name in found for found in one.blocked.values())]
        alone = [one for one in hit if sum(len(found) for found in one.blocked.values()) == 1]
        count = {label: sum(one.label == label for one in hit) for label in ("damaged", "must_be_caught")}
        false = [one for one in hit if one.label in ("moved", "unmoved")]
        lines.append(
            [
                f"`{name}`",
                count["damaged"],
                sum(one.label == "damaged" for one in alone),
                len(false),
                sum(one.sound for one in false),
                count["must_be_caught"],
            ]
        )
    head = ["check", "damaged", "damaged, by it alone", "undamaged", "undamaged, sound data", "must be caught"]
    return table(head, lines)


def exceptions(scored: Sequence[Scored]) -> str:
    """Every run on which labels and checks disagree, except undamaged runs of faulty data."""
    lines = []
    for one in scored:
        missed = one.label == "damaged" and not one.caught
        false = one.label in ("moved", "unmoved") and one.caught and one.sound
        if missed or false:
            found = one.row.get("behaviour", {})
            said = ", ".join(f"{k} {found[k]:.3f}" for k in ("facts", "style_a", "repetition", "no_eos") if k in found)
            by = ", ".join(name for names in one.blocked.values() for name in names)
            lines.append([one.row["name"], one.label, ", ".join(one.damage), by or "nothing", said])
    return table(["run", "label", "damage", "blocked by", "behaviour"], lines) if lines else "None."


def _last_mean(name: str) -> Callable[[Scored], float]:
    """Largest mean of `WINDOW` logs in a row."""

    def value(one: Scored) -> float:
        found = one.row["metrics"].get(name, [])
        means = [fmean(found[n : n + WINDOW]) for n in range(max(1, len(found) - WINDOW + 1))]
        return max((v for v in means if not math.isnan(v)), default=math.inf)

    return value


def _largest(name: str, sign: float = 1.0) -> Callable[[Scored], float]:
    return lambda one: max((sign * v for v in one.row["metrics"].get(name, [])), default=0.0)


NUMBERS: dict[str, Callable[[Scored], float]] = {
    "NLL ratio of training pairs, 5-log mean": _last_mean("nll_ratio"),
    "fall of chosen, nats per token": _largest("chosen_nats_per_token", -1.0),
    "KL per token, probes": _largest("probe/kl_per_token"),
    "KL per token, after": lambda one: float(one.row["report"]["answers"]["kl"]["per_token"]),
    "NLL ratio of held-out pairs": lambda one: float(one.row["report"]["held_out"]["nll_ratio"]),
    "fall of held-out token accuracy": lambda one: float(
        one.row["report"]["capability"]["reference"] - one.row["report"]["capability"]["policy"]
    ),
    "adapter norm": lambda one: float(one.row["report"]["adapter_norm"]["largest"]),
    "1 - held-out accuracy": lambda one: 1 - float(one.row["report"]["held_out"]["accuracy"]["value"]),
    "gradient norm": _largest("grad_norm"),
    "training loss below ln 2": lambda one: math.log(2) - min(one.row["metrics"]["loss"]),
}


def single_numbers(rows: Sequence[Row], scored: Sequence[Scored]) -> str:
    """Each number alone, with the threshold that does best on one half, on the other half."""
    trained = [one for one in scored if "metrics" in one.row and one.label != "must_be_caught"]
    lines = []
    for name, number in NUMBERS.items():
        valued = [(number(one), one.label == "damaged", one.row["seed"]) for one in trained]
        tuned = [(v, bad) for v, bad, seed in valued if seed == labels.TUNED_ON]
        if not tuned or len({bad for _, bad in tuned}) < 2:
            continue
        limit = best_limit(tuned)
        test = [(v, bad) for v, bad, seed in valued if seed == labels.REPORTED_ON]
        lines.append(
            [
                name,
                f"{limit:.3g}",
                share(of(not v <= limit for v, bad in test if bad)),
                share(of(not v <= limit for v, bad in test if not bad)),
            ]
        )
    head = ["number", f"limit tuned on seed {labels.TUNED_ON}", "damaged above it, other half", "undamaged above it"]
    return table(head, lines)


def best_limit(valued: Sequence[tuple[float, bool]]) -> float:
    """The limit that leaves the most right, halfway between two values; of several the middle one."""
    found = sorted({v for v, _ in valued if math.isfinite(v)})
    between = [(a + b) / 2 for a, b in pairwise(found)] or found
    right = {limit: sum((not v <= limit) == bad for v, bad in valued) for limit in between}
    best = [limit for limit, count in right.items() if count == max(right.values())]
    return best[len(best) // 2]


def early_stop(rows: Sequence[Row]) -> str:
    """What the guard would have kept of the runs that it stops, for each `kl_per_token_sign` that was tried."""
    sft = next(row for row in rows if row["name"] == "sft")["behaviour"]
    kept = {row["name"]: row for row in rows if "kept_step" in row}
    lines = []
    for sign in scoring.TRIED["kl_per_token_sign"]:
        scored = scoring.score(rows, scoring.with_numbers({"kl_per_token_sign": sign}))
        for half in ("all", labels.TUNED_ON, labels.REPORTED_ON):
            stopped = [
                one
                for one in scored
                if one.trigger and one.label != "must_be_caught" and half in ("all", one.row["seed"])
            ]
            found = [
                (one, one.trigger, kept[name]["behaviour"])
                for one in stopped
                if one.trigger and (name := f"kept:{one.row['name']}@{one.kept_step}") in kept
            ]
            if not found:
                continue
            saved = [1 - trigger.step / one.row["steps"] for one, trigger, _ in found]
            lines.append(
                [
                    f"{sign:g}",
                    half if half == "all" else f"seed {half}",
                    len(stopped),
                    share(of(state["facts"] >= sft["facts"] - WITHIN for _, _, state in found)),
                    f"{fmean(state['facts'] for _, _, state in found):.3f}",
                    f"{min(state['facts'] for _, _, state in found):.3f}",
                    f"{fmean(saved):.3f} ({min(saved):.3f} to {max(saved):.3f})",
                    f"{median(trigger.step for _, trigger, _ in found):g}",
                    sum(one.kept_step == 0 for one, _, _ in found),
                ]
            )
    head = [
        "kl_per_token_sign", "runs", "stopped", f"kept facts within {100 * WITHIN:g} points of SFT's",
        "mean kept facts", "lowest", "share of steps saved", "median step of the stop", "kept the start itself",
    ]  # fmt: skip
    return f"Facts of the SFT model: {sft['facts']:.3f}.\n\n{table(head, lines)}" if lines else "Not measured."


def stopped(rows: Sequence[Row], scored: Sequence[Scored]) -> str:
    """Runs that the guard did stop, beside what was computed for the same run from its recorded metrics."""
    computed = {one.row["name"]: one for one in scored}
    kept = {row["name"]: row["behaviour"] for row in rows if "kept_step" in row}
    lines = []
    for row in rows:
        if row.get("set") != "stopped":
            continue
        one, real = computed[row["name"].removeprefix("stopped:")], row["report"]["stopped"]
        state = kept.get(f"kept:{one.row['name']}@{one.kept_step}", {})
        lines.append(
            [
                one.row["name"],
                f"{one.trigger.step}, {one.kept_step}" if one.trigger else "none",
                f"{real['step']}, {real['kept_step']}" if real else "none",
                f"{state['facts']:.3f}" if state else "not measured",
                f"{row['behaviour']['facts']:.3f}",
            ]
        )
    head = ["run", "computed: stop, kept", "stopped: stop, kept", "facts of the snapshot", "facts of the adapter"]
    return table(head, lines) if lines else "Not run."


def controls(rows: Sequence[Row]) -> str:
    return _few(scoring.score(rows, cells="seeds"))


def between(rows: Sequence[Row]) -> str:
    return _few(scoring.score(rows, cells="between"))


def _few(scored: Sequence[Scored]) -> str:
    lines = [
        [
            one.row["name"],
            one.label,
            f"{one.row['behaviour']['facts']:.3f}",
            f"{one.row['behaviour']['style_a']:.3f}",
            ", ".join(name for names in one.blocked.values() for name in names) or "nothing",
        ]
        for one in scored
        if "behaviour" in one.row
    ]
    return table(["run", "label", "facts", "style A", "blocked by"], lines) if lines else "Not run."
