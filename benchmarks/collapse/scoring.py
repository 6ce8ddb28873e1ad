"""`cases`: how the verdicts before training do on published runs that went well and on ones that did not."""

from __future__ import annotations

import argparse
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import date
from pathlib import Path

from benchmarks.collapse.derive import BY_HAND, Procedure, derive, with_limit
from benchmarks.collapse.published import SHIPPED, Case, judge, level_of, read_cases
from dpo_assets.checks.bands import Bands, default_bands
from dpo_assets.checks.statistics import Proportion, wilson
from dpo_assets.checks.verdict import Level
from dpo_assets.version import __version__

LEVELS: tuple[Level, ...] = ("pass", "warn", "error")


@dataclass(frozen=True)
class Score:
    """Shares with Wilson intervals: good cases that are blocked, bad ones that are warned of or blocked."""

    counts: Counter[tuple[str, Level]]

    def of(self, label: str, *levels: Level) -> Proportion:
        total = sum(self.counts[label, level] for level in LEVELS)
        return wilson(sum(self.counts[label, level] for level in levels), total)

    @property
    def good_blocked(self) -> Proportion:
        return self.of("good", "error")

    @property
    def bad_flagged(self) -> Proportion:
        return self.of("bad", "warn", "error")


@dataclass(frozen=True)
class Moved:
    """A case whose verdict changes when its own source has no part in the bands."""

    case: Case
    with_source: Level
    without_source: Level


def score(cases: Sequence[Case], bands: Bands) -> Score:
    """Counts of (label, level)."""
    return Score(Counter((case.label, level_of(case, bands)) for case in cases))


def leave_one_source_out(cases: Sequence[Case], shipped: Bands, procedure: Procedure = BY_HAND) -> list[Moved]:
    """Derives the bands again without each source, and judges that source's cases by them."""
    full, moved = derive(cases, shipped, procedure), []
    for project in sorted({case.project for case in cases}):
        without = derive([case for case in cases if case.project != project], shipped, procedure)
        for case in (case for case in cases if case.project == project):
            before, after = level_of(case, full), level_of(case, without)
            if before != after:
                moved.append(Moved(case, before, after))
    return moved


def sensitivity(cases: Sequence[Case], shipped: Bands) -> list[tuple[str, Score]]:
    """Each number of the procedure that is set by hand, halved and doubled, with the score that follows."""
    found = []
    for name in (f.name for f in fields(Procedure) if isinstance(f.default, int | float)):
        for factor in (0.5, 2.0):
            changed = replace(BY_HAND, **{name: getattr(BY_HAND, name) * factor})
            found.append((f"{name} x {factor:g}", score(cases, derive(cases, shipped, changed))))
    for check, name in (("low_beta", "below"), ("sft_term", "factor")):
        for factor in (0.5, 2.0):
            bands = with_limit(shipped, check, **{name: shipped.limit(check)[name] * factor})
            found.append((f"{check} {name} x {factor:g}", score(cases, derive(cases, bands))))
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `cases`."""
    parser.add_argument("--cases", type=Path, default=SHIPPED, help="CSV to score (default: the shipped cases)")
    parser.add_argument("--every", action="store_true", help="also print every case that is warned of or blocked")


def run(args: argparse.Namespace) -> int:
    """Scores the shipped bands on a CSV, and derives them from the shipped cases. Status 1: they differ."""
    cases, bands = read_cases(args.cases), default_bands()
    scored = score(cases, bands)
    print(f"{date.today()}, dpo_assets {__version__}, Python {platform.python_version()}, {args.cases.name}")
    print(f"{len(cases)} cases of {len({case.project for case in cases})} sources\n")
    print("| | pass | warn | blocked |\n|---|---|---|---|")
    for label in ("good", "bad"):
        print(f"| {label} | " + " | ".join(str(scored.counts[label, level]) for level in LEVELS) + " |")
    print(f"\ngood, blocked:           {scored.good_blocked}")
    print(f"bad, warned or blocked:  {scored.bad_flagged}")
    print(f"bad, blocked:            {scored.of('bad', 'error')}")
    _list("good and blocked", [c for c in cases if c.label == "good" and level_of(c, bands) == "error"], bands)
    _list("bad and passed", [c for c in cases if c.label == "bad" and level_of(c, bands) == "pass"], bands)
    if args.every:
        _list("every verdict that is no pass", [c for c in cases if level_of(c, bands) != "pass"], bands)
    shipped = read_cases(SHIPPED)
    equal = derive(shipped, bands) == bands
    print(f"\nbands.yaml is what the shipped cases give: {'yes' if equal else 'NO'}")
    moved = leave_one_source_out(shipped, bands)
    print(f"leave one source out ({len({c.project for c in shipped})} sources): {len(moved)} verdicts move")
    for move in moved:
        print(f"  {move.case.project}: {move.case.model}: {move.with_source} -> {move.without_source}")
    print("\nnumbers set by hand, halved and doubled:\n\n| | good, blocked | bad, flagged |\n|---|---|---|")
    for name, changed in sensitivity(shipped, bands):
        print(f"| {name} | {_count(changed.good_blocked)} | {_count(changed.bad_flagged)} |")
    return 0 if equal else 1


def _count(share: Proportion) -> str:
    return f"{round(share.value * share.n) if share.n else 0} of {share.n}"


def _list(title: str, cases: Sequence[Case], bands: Bands) -> None:
    print(f"\n{title}: {len(cases)}")
    for case in cases:
        c = case.configuration
        why = "; ".join(f"{v.check} {v.level}" for v in judge(case, bands) if not v.passed)
        numbers = f"{c.method} {c.billions:g}B {'+'.join(c.losses)} lr {c.learning_rate:g} beta {c.beta}"
        print(f"  {case.label} {case.model}: {numbers}, {c.epochs} epochs, batch {c.batch} {why and f'[{why}]'}")
        print(f"    {case.source}")
