"""How often the promotion rules are wrong: false promotions, power, and what printed intervals cover. Prints Markdown.

    python -m benchmarks.promotion            # some minutes on one core
    python -m benchmarks.promotion --scale 0.1

Two policies of known skill are drawn on the pairs of simulated prompts. On each pair they differ with a chance; who
wins then is drawn with a chance of the prompt's own, so that pairs of one prompt agree: `agreement` is the intra-class
correlation of the wins, 0 (independent) to 1 (one answer a prompt). All seeds are fixed.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from dpo_assets.checks.evidence.clusters import clustered_mean, clustered_share
from dpo_assets.checks.evidence.ledger import Ledger
from dpo_assets.checks.evidence.paired import compare, sign_flip_tail
from dpo_assets.checks.evidence.power import EFFECT, FEWEST_PROMPTS, detectable, power_at
from dpo_assets.checks.evidence.rules import Evidence, judge
from dpo_assets.checks.evidence.spending import ALPHA, HIGHEST, budget_after
from dpo_assets.checks.statistics import Proportion, wilson
from dpo_assets.report.tables import table

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
DIFFER = 0.3  # Share of pairs on which two policies of one lineage differ.
FEW_DRAWS = 2_000  # Of the bootstrap, here: its ends move by less than what a thousand trials resolve.


@dataclass(frozen=True)
class Pairs:
    """Held-out pairs: how many prompts, the fewest and most pairs of one, and how far these agree."""

    prompts: int
    fewest: int = 1
    most: int = 1
    agreement: float = 0.0

    def __str__(self) -> str:
        sizes = f"{self.fewest}" if self.fewest == self.most else f"{self.fewest} to {self.most}"
        return f"{self.prompts} x {sizes}, agreement {self.agreement:g}"

    def sizes(self, rng: np.random.Generator, trials: int) -> Ints:
        """(trials, prompts)"""
        return rng.integers(self.fewest, self.most, (trials, self.prompts), endpoint=True)


def chances(rng: np.random.Generator, mean: float, agreement: float, shape: tuple[int, ...]) -> Floats:
    """A chance for each prompt, with that mean, whose draws have that intra-class correlation."""
    if agreement <= 0:
        return np.full(shape, mean)
    if agreement >= 1:
        return (rng.random(shape) < mean).astype(float)
    size = 1 / agreement - 1
    return rng.beta(mean * size, (1 - mean) * size, shape)


def differences(
    rng: np.random.Generator, pairs: Pairs, trials: int, effect: float = 0.0, differ: float = DIFFER
) -> Ints:
    """Challenger's less champion's wins within each prompt, doubled as the test counts them: (trials, prompts)."""
    discordant = rng.binomial(pairs.sizes(rng, trials), differ)
    won = rng.binomial(discordant, chances(rng, 0.5 + effect / differ / 2, pairs.agreement, discordant.shape))
    return np.asarray(2 * (2 * won - discordant))


def promoted(sums: Ints, levels: Floats) -> NDArray[np.bool_]:
    """Which trials, of (trials, prompts), the exact test promotes at their levels. Only near ones are worked out."""
    spread = np.sqrt(np.square(sums).sum(axis=1).astype(float))
    z = sums.sum(axis=1) / np.maximum(spread, 1e-9)
    needed = np.array([NormalDist().inv_cdf(1 - level) for level in levels])
    found = np.zeros(len(sums), dtype=bool)
    for trial in np.flatnonzero(z > needed - 0.6):
        found[trial] = sign_flip_tail(sums[trial]) <= levels[trial]
    return found


def told(share: Proportion) -> str:
    return f"{100 * share.value:.2f} % [{100 * share.low:.2f}, {100 * share.high:.2f}]"


def of(found: Sequence[bool] | NDArray[np.bool_]) -> Proportion:
    return wilson(float(np.sum(found)), len(found))


# ------------------------------------------------------------------------------------------------------ one decision


def two_policies(rng: np.random.Generator, pairs: Pairs) -> tuple[Floats, Floats, Ints]:
    """Wins of challenger and champion, alike in skill, and the prompt of each pair: three times (n)."""
    sizes = pairs.sizes(rng, 1)[0]
    names = np.repeat(np.arange(pairs.prompts), sizes)

    def wins(mean: float) -> Floats:
        return (rng.random(len(names)) < chances(rng, mean, pairs.agreement, (pairs.prompts,))[names]).astype(float)

    agreed, challenger = wins(0.6), wins(0.5)
    differ = rng.random(len(names)) < DIFFER
    return np.where(differ, challenger, agreed), np.where(differ, 1 - challenger, agreed), names


def single_decisions(trials: int) -> Iterator[list[str]]:
    """A challenger no better than its champion, and a policy no better than its start, each judged once."""
    cases = (Pairs(50), Pairs(400), Pairs(60, 10, 10, 1.0), Pairs(100, 1, 10, 0.3), Pairs(400, 1, 10, 1.0))
    for number, pairs in enumerate(cases):
        rng = np.random.default_rng([1, number])
        judged, first, as_before = [], [], []
        for _ in range(trials):
            challenger, champion, names = two_policies(rng, pairs)
            compared = compare(challenger.tolist(), champion.tolist(), names.tolist(), draws=50)
            judged.append(judge(Evidence({"accuracy": compared}), Ledger()).found)
            wins = (rng.random(len(names)) < chances(rng, 0.5, pairs.agreement, (pairs.prompts,))[names]).astype(float)
            against_chance = compare(wins.tolist(), [0.5] * len(wins), names.tolist(), draws=50)
            first.append(judge(Evidence({"reward": against_chance}), Ledger()).found)
            as_before.append(wilson(float(wins.sum()), len(wins)).low > 0.5)
        yield [str(pairs), told(of(judged)), told(of(first)), told(of(as_before))]


# ---------------------------------------------------------------------------------------------------------- histories

Refresh = Callable[[np.random.Generator, int, int], Ints | None]  # (rng, histories, refresh): None is not looked at.


def steady(pairs: Pairs) -> Refresh:
    return lambda rng, histories, _: differences(rng, pairs, histories)


def drifting(rng: np.random.Generator, histories: int, refresh: int) -> Ints:
    """Prompts grow in number and size, pairs of one agree more, and policies differ less, from refresh to refresh."""
    part = refresh / 200
    pairs = Pairs(50 + int(100 * part), 1, 1 + int(9 * part), 0.9 * part)
    return differences(rng, pairs, histories, differ=0.5 - 0.4 * part)


class Trickle:
    """10 to 40 new prompts a refresh: too few to look at, so they wait until there are 50."""

    def __init__(self) -> None:
        self.waiting: list[Ints] = []

    def __call__(self, rng: np.random.Generator, histories: int, refresh: int) -> Ints | None:
        self.waiting.append(differences(rng, Pairs(int(rng.integers(10, 40, endpoint=True)), 1, 5, 0.5), histories))
        sums = np.concatenate(self.waiting, axis=1)
        if sums.shape[1] < FEWEST_PROMPTS:
            return None
        self.waiting = []
        return sums


class SameSet:
    """Every refresh on the same 200 prompts, each challenger much like the one before: not what the rules allow."""

    def __init__(self) -> None:
        self.latent: Floats | None = None

    def __call__(self, rng: np.random.Generator, histories: int, refresh: int) -> Ints:
        drawn = rng.standard_normal((histories, 200))
        self.latent = drawn if self.latent is None else 0.9 * self.latent + math.sqrt(1 - 0.9**2) * drawn
        edge = NormalDist().inv_cdf(1 - DIFFER / 2)
        return 2 * ((self.latent > edge).astype(np.int64) - (self.latent < -edge).astype(np.int64))


def history(
    refresh_of: Refresh, seed: int, histories: int, refreshes: int, better: float = 0.0
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], Proportion]:
    """Histories with a false promotion, under the budget and at 2.5 % each; and how many better challengers were found.

    `better` of the refreshes, drawn for each history, are ten points better, and promoting these is no error.
    """
    rng = np.random.default_rng([2, seed])
    budgeted, unbudgeted = np.zeros(histories, dtype=bool), np.zeros(histories, dtype=bool)
    found: list[tuple[bool, ...]] = [()] * histories
    hits = tries = 0
    for number in range(refreshes):
        sums = refresh_of(rng, histories, number)
        if sums is None:
            continue
        is_better = rng.random(histories) < better
        improved = differences(rng, Pairs(sums.shape[1], 1, 5, 0.3), histories, EFFECT)
        sums = np.where(is_better[:, None], improved, sums)
        level_of = {past: budget_after(past).level for past in set(found)}
        now = promoted(sums, np.array([level_of[past] for past in found]))
        found = [(*past, bool(success)) for past, success in zip(found, now, strict=True)]
        budgeted |= now & ~is_better
        unbudgeted |= promoted(sums, np.full(histories, HIGHEST)) & ~is_better
        hits, tries = hits + int((now & is_better).sum()), tries + int(is_better.sum())
    return budgeted, unbudgeted, wilson(hits, tries)


def histories_table(histories: int, refreshes: int) -> Iterator[list[str]]:
    cases: tuple[tuple[str, Refresh, float], ...] = (
        ("400 x 1", steady(Pairs(400)), 0.0),
        ("100 x 1 to 10, agreement 0.3", steady(Pairs(100, 1, 10, 0.3)), 0.0),
        ("60 x 10, agreement 1", steady(Pairs(60, 10, 10, 1.0)), 0.0),
        ("small: 50 x 1", steady(Pairs(50)), 0.0),
        ("trickle: 10 to 40 x 1 to 5 a refresh, agreement 0.5", Trickle(), 0.0),
        ("drifting: size, agreement, share that differs", drifting, 0.0),
        ("one refresh in ten is ten points better; 200 x 1 to 5", steady(Pairs(200, 1, 5, 0.3)), 0.1),
        ("against the rules: one set of 200, challengers correlated 0.9", SameSet(), 0.0),
    )
    for number, (name, refresh_of, better) in enumerate(cases):
        budgeted, unbudgeted, hits = history(refresh_of, number, histories, refreshes, better)
        yield [name, told(of(budgeted)), told(of(unbudgeted)), told(hits) if hits.n else "-"]


# --------------------------------------------------------------------------------------------------------------- power


def power_table(trials: int) -> Iterator[list[str]]:
    """A challenger that is ten points better, at the first test and at the tenth."""
    levels = (budget_after([]).level, budget_after([False] * 9).level)
    cases = (Pairs(50), Pairs(200), Pairs(400), Pairs(150, 1, 5, 0.3), Pairs(400, 1, 5, 0.3), Pairs(800))
    for number, pairs in enumerate(cases):
        rng = np.random.default_rng([3, number])
        sums = differences(rng, pairs, trials, EFFECT)
        mean_pairs = pairs.prompts * (pairs.fewest + pairs.most) / 2
        error = float((sums.sum(axis=1) / 2 / mean_pairs).std())
        cells = [str(pairs), f"{mean_pairs:.0f}"]
        for level in levels:
            found = of(promoted(sums, np.full(trials, level)))
            least = 100 * detectable(error, level)
            cells += [told(found), f"{100 * power_at(EFFECT, error, level):.0f} %", f"{least:.1f}"]
        yield cells


# ------------------------------------------------------------------------------------------------------------ coverage


def share_coverage(trials: int) -> Iterator[list[str]]:
    """Of the interval of an accuracy, and of the one that takes pairs for independent."""
    for prompts in (50, 100, 400):
        for sizes, agreement in (((1, 1), 0.0), ((1, 10), 0.0), ((1, 10), 0.3), ((1, 10), 1.0), ((10, 10), 1.0)):
            pairs, cells = Pairs(prompts, *sizes, agreement), []
            for share in (0.5, 0.65, 0.8, 0.9):
                rng = np.random.default_rng([4, prompts, *sizes, int(10 * agreement), int(100 * share)])
                drawn = [_wins(rng, pairs, share) for _ in range(trials)]
                scores = [clustered_share(wins, names) for wins, names in drawn]
                cells.append(of([score.low <= share <= score.high for score in scores]))
                if share == 0.65:
                    plain = [wilson(sum(wins), len(wins)) for wins, _ in drawn]
                    before = of([score.low <= share <= score.high for score in plain])
            yield [str(pairs), *(f"{100 * cell.value:.1f} %" for cell in cells), f"{100 * before.value:.1f} %"]


def _wins(rng: np.random.Generator, pairs: Pairs, share: float) -> tuple[list[float], list[int]]:
    names = np.repeat(np.arange(pairs.prompts), pairs.sizes(rng, 1)[0])
    chance = chances(rng, share, pairs.agreement, (pairs.prompts,))[names]
    return (rng.random(len(names)) < chance).astype(float).tolist(), names.tolist()


def other_coverage(trials: int) -> Iterator[list[str]]:
    """Of the mean margin (skewed, heavy tails, a part of the prompt's own), and of a paired difference."""
    for prompts in (50, 100, 200, 600):
        for sizes, agreement in (((1, 1), 0.0), ((1, 10), 0.3), ((1, 10), 1.0)):
            pairs = Pairs(prompts, *sizes, agreement)
            rng = np.random.default_rng([5, prompts, *sizes, int(10 * agreement)])
            margins, compared = [], []
            for _ in range(trials):
                names = np.repeat(np.arange(prompts), pairs.sizes(rng, 1)[0])
                own, shared = rng.gamma(4.0, 0.5, len(names)), rng.gamma(4.0, 0.5, prompts)[names]
                mean = clustered_mean((own * (1 - agreement) + shared * agreement).tolist(), names.tolist())
                margins.append(mean.low is not None and mean.high is not None and mean.low <= 2.0 <= mean.high)
                found = compare(*_five_points_better(rng, pairs, names), names.tolist(), draws=FEW_DRAWS)
                compared.append(found.low <= 0.05 <= found.high)
            yield [str(pairs), told(of(margins)), told(of(compared))]


def _five_points_better(rng: np.random.Generator, pairs: Pairs, names: Ints) -> tuple[list[float], list[float]]:
    chance = chances(rng, 0.5 + 0.05 / DIFFER / 2, pairs.agreement, (pairs.prompts,))[names]
    won = (rng.random(len(names)) < chance).astype(float)
    differ, agreed = rng.random(len(names)) < DIFFER, (rng.random(len(names)) < 0.6).astype(float)
    return np.where(differ, won, agreed).tolist(), np.where(differ, 1 - won, agreed).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="part of the trials")
    scale = parser.parse_args().scale
    many, fewer = (max(20, int(count * scale)) for count in (4_000, 1_000))
    refreshes, started = 200, time.process_time()
    print(f"Python {platform.python_version()}, numpy {version('numpy')}, {platform.machine()}.\n")
    print(f"One decision, {many:,} trials: promoted although no better (95 % interval). Limit: 2.5 %.\n")
    header = ["prompts x pairs", "against the champion", "against its start", "against its start, pairs independent"]
    print(table(header, list(single_decisions(many))))
    print(f"\n{refreshes} refreshes, {fewer:,} histories: at least one false promotion. Limit: {100 * ALPHA:g} %.\n")
    header = ["evidence of a refresh", "with the budget", "2.5 % at each", "better ones promoted"]
    print(table(header, list(histories_table(fewer, refreshes))))
    differ = f"differing on {100 * DIFFER:.0f} % of pairs"
    print(f"\nTen points better, {differ}, {fewer:,} trials: promoted, and by formula.\n")
    each = ["promoted", "by formula", "found with 80 %, points"]
    header = ["prompts x pairs", "pairs", *(f"test {k}: {one}" for k in (1, 10) for one in each)]
    print(table(header, list(power_table(fewer))))
    print(f"\nCoverage of the 95 % interval of an accuracy, {many // 2:,} trials a cell.\n")
    header = ["prompts x pairs", *(f"share {share}" for share in (0.5, 0.65, 0.8, 0.9)), "0.65, pairs independent"]
    print(table(header, list(share_coverage(many // 2))))
    print(f"\nCoverage of the 95 % interval of the mean margin and of a paired difference, {fewer:,} trials a cell.\n")
    print(table(["prompts x pairs", "mean margin", "paired difference"], list(other_coverage(fewer))))
    print(f"\n{time.process_time() - started:.0f} s of one core.")


if __name__ == "__main__":
    main()
