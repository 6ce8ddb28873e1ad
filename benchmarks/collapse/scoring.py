"""`cases`: how the verdicts before training do on published runs that went well and on ones that did not."""

from __future__ import annotations

import argparse
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.collapse.derive import BY_HAND, Procedure, derive
from benchmarks.collapse.published import SHIPPED, Case, judge, level_of, read_cases
from dpo_assets.checks.bands import Bands, default_bands
from dpo_assets.checks.statistics import Proportion, wilson
from dpo_assets.checks.verdict import Level
from dpo_assets.version import __version__

LEVELS: tuple[Level, ...] = ("pass", "warn", "error")


@dataclass(frozen=True)
class Score:
    """Shares with Wilson intervals: good cases that are warned of or blocked, bad ones that are either."""

    counts: Counter[tuple[str, Level]]

    def of(self, label: str, *levels: Level) -> Proportion:
        total = sum(self.counts[label, level] for level in LEVELS)
        return wilson(sum(self.counts[label, level] for level in levels), total)

    @property
    def good_warned(self) -> Proportion:
        return self.of("good", "warn")

    @property
    def good_blocked(self) -> Proportion:
        return self.of("good", "error")

    @property
    def bad_flagged(self) -> Proportion:
        return self.of("bad", "warn", "error")


@dataclass(frozen=True)
class HeldOut:
    """A case with its verdict under all sources, and under bands in which its own source has no part."""

    case: Case
    with_source: Level
    without_source: Level

    @property
    def moved(self) -> bool:
        return self.with_source != self.without_source


def score(cases: Sequence[Case], bands: Bands) -> Score:
    """Counts of (label, level)."""
    return Score(Counter((case.label, level_of(case, bands)) for case in cases))


def cross_validated(held_out: Sequence[HeldOut]) -> Score:
    """The score of cases that are each judged without their own source."""
    return Score(Counter((one.case.label, one.without_source) for one in held_out))


def leave_one_source_out(cases: Sequence[Case], shipped: Bands, procedure: Procedure = BY_HAND) -> list[HeldOut]:
    """Derives the bands again without each source, and judges that source's cases by them."""
    full, found = derive(cases, shipped, procedure), []
    for project in sorted({case.project for case in cases}):
        without = derive([case for case in cases if case.project != project], shipped, procedure)
        own = [case for case in cases if case.project == project]
        found += [HeldOut(case, level_of(case, full), level_of(case, without)) for case in own]
    return found


def sensitivity(cases: Sequence[Case], shipped: Bands) -> list[tuple[str, Score]]:
    """Each number of the procedure that is set by hand, lower and higher, with the score that follows."""
    found = []
    for name in (f.name for f in fields(Procedure) if isinstance(f.default, int | float)):
        # A share has an end, so that one is moved by a tenth and not halved and doubled.
        values = (0.8, 1.0) if name == "warned" else (0.5 * getattr(BY_HAND, name), 2.0 * getattr(BY_HAND, name))
        for value in values:
            changes: dict[str, Any] = {name: value}
            changed = replace(BY_HAND, **changes)
            found.append((f"{name} {value:g}", score(cases, derive(cases, shipped, changed))))
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
    print()
    _shares(scored)
    _list("good and blocked", [c for c in cases if c.label == "good" and level_of(c, bands) == "error"], bands)
    _list("bad and passed", [c for c in cases if c.label == "bad" and level_of(c, bands) == "pass"], bands)
    if args.every:
        _list("every verdict that is no pass", [c for c in cases if level_of(c, bands) != "pass"], bands)
    shipped = read_cases(SHIPPED)
    equal = derive(shipped, bands) == bands
    print(f"\nbands.yaml is what the shipped cases give: {'yes' if equal else 'NO'}")
    held_out = leave_one_source_out(shipped, bands)
    moved = [one for one in held_out if one.moved]
    print(f"leave one source out ({len({c.project for c in shipped})} sources): {len(moved)} verdicts move")
    for one in moved:
        print(f"  {one.case.project}: {one.case.model}: {one.with_source} -> {one.without_source}")
    _shares(cross_validated(held_out))
    print("\nnumbers set by hand, lower and higher:\n")
    print("| | good, warned | good, blocked | bad, flagged |\n|---|---|---|---|")
    for name, changed in sensitivity(shipped, bands):
        counts = (changed.good_warned, changed.good_blocked, changed.bad_flagged)
        print(f"| {name} | {' | '.join(_count(share) for share in counts)} |")
    return 0 if equal else 1


def _shares(scored: Score) -> None:
    print(f"good, warned:            {scored.good_warned}")
    print(f"good, blocked:           {scored.good_blocked}")
    print(f"bad, warned or blocked:  {scored.bad_flagged}")
    print(f"bad, blocked:            {scored.of('bad', 'error')}")


def _count(share: Proportion) -> str:
    return f"{round(share.value * share.n) if share.n else 0} of {share.n}"


def _list(title: str, cases: Sequence[Case], bands: Bands) -> None:
    print(f"\n{title}: {len(cases)}")
    for case in cases:
        c = case.configuration
        why = "; ".join(f"{v.check} {v.level}" for v in judge(case, bands) if not v.passed)
        size = "size not known" if c.billions is None else f"{c.billions:g}B"
        numbers = f"{c.method} {size} {'+'.join(c.losses)} lr {c.learning_rate:g} beta {c.beta}"
        print(f"  {case.label} {case.model}: {numbers}, {c.epochs} epochs, batch {c.batch} {why and f'[{why}]'}")
        print(f"    {case.source}")
