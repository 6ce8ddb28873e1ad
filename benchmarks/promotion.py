"""How often the promotion rules are wrong: false promotions, power, and what printed intervals cover. Prints Markdown.

    python -m benchmarks.promotion            # some minutes on one core
    python -m benchmarks.promotion --scale 0.1
    python -m benchmarks.promotion --only power guards

`benchmarks.simulated` draws. Decisions are those of `rules.by_evidence`: two metrics are primaries, guards are on known
conversations, and looks of dry runs share a level. The end of an interval, which decides whether something is worse
beyond chance, is Student's at every size, where a pipeline draws it up to 400 conversations; the exact test is worked
out near its level alone. All seeds are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from benchmarks.simulated import (
    CORRELATION,
    DIFFER,
    NEAR,
    Floats,
    Ints,
    Metrics,
    Pairs,
    apart,
    chances,
    drawn,
    judged,
    knowing,
)
from benchmarks.trials import Tables, print_tables
from dpo_assets.checks.evidence.clusters import clustered_mean, clustered_ratio, clustered_share
from dpo_assets.checks.evidence.measured import MeanScore
from dpo_assets.checks.evidence.paired import compare
from dpo_assets.checks.evidence.power import EFFECT, FEWEST_PROMPTS, detectable, power_at
from dpo_assets.checks.evidence.rules import TOLERANCE, Evidence, by_evidence
from dpo_assets.checks.evidence.spending import ALPHA, HIGHEST, budget_after, share_of_look
from dpo_assets.checks.statistics import Proportion, wilson
from dpo_assets.report.tables import table

LONG_FEW, LONG = Pairs(60, 1, 3, 0.5, long=0.05), Pairs(200, 1, 3, 0.5, long=0.05)
PREVIEWED = Pairs(200, 1, 5, 0.3)
KNOWN = 400  # Conversations that guard the histories, one pair each.
FEW_DRAWS = 2_000  # Of the bootstrap, here: its ends move by less than what a thousand trials resolve.


def told(share: Proportion) -> str:
    return f"{100 * share.value:.2f} % [{100 * share.low:.2f}, {100 * share.high:.2f}]"


def of(found: Sequence[bool] | NDArray[np.bool_]) -> Proportion:
    return wilson(float(np.sum(found)), len(found))


# ------------------------------------------------------------------------------------------------------ one decision


def single_decisions(trials: int) -> Iterator[list[str]]:
    """A challenger no better than its champion, and a policy no better than its start, each judged once."""
    cases = (
        Pairs(50),
        Pairs(400),
        Pairs(60, 10, 10, 1.0),
        Pairs(100, 1, 10, 0.3),
        Pairs(400, 1, 10, 1.0),
        LONG_FEW,
        LONG,
    )
    for number, pairs in enumerate(cases):
        rng = np.random.default_rng([1, number])
        fresh = drawn(rng, pairs, trials)
        levels = np.full(trials, budget_after([]).level)
        alone = judged(fresh, levels).promoted
        guarded = judged(fresh, levels, knowing(rng, 100, 0.0)).promoted
        sizes = pairs.sizes(rng, trials)
        won = rng.binomial(sizes, chances(rng, 0.5, pairs.agreement, sizes.shape))
        by_start = [_first(wins, of_conversation, rng, pairs) for wins, of_conversation in zip(won, sizes, strict=True)]
        as_before = [wilson(float(wins.sum()), int(n.sum())).low > 0.5 for wins, n in zip(won, sizes, strict=True)]
        yield [str(pairs), told(of(alone)), told(of(guarded)), told(of(by_start)), told(of(as_before))]


def _first(won: Ints, sizes: Ints, rng: np.random.Generator, pairs: Pairs) -> bool:
    """Whether a policy is published first: wins against one half, guarded by its start on the same conversations."""
    reward = Metrics((2 * won - sizes)[None, None], sizes[None])
    if reward.z()[0, 0] < NormalDist().inv_cdf(1 - budget_after([]).level) - NEAR:
        return False
    start = Metrics(apart(rng, sizes[None], pairs.agreement, 0.0, DIFFER)[None], sizes[None])
    evidence = Evidence({"reward": reward.comparison(0, 0)}, {"logp": start.comparison(0, 0, exact=False)})
    return by_evidence(evidence, budget_after([]).level, first=True).decision == "first_publication"


# ---------------------------------------------------------------------------------------------------------- histories

Refresh = Callable[[np.random.Generator, int, int], Metrics | None]  # (rng, histories, refresh): None is not looked at.


def steady(pairs: Pairs) -> Refresh:
    return lambda rng, histories, _: drawn(rng, pairs, histories)


def drifting(rng: np.random.Generator, histories: int, refresh: int) -> Metrics:
    """Refresh by refresh conversations grow in number and size, their pairs agree more, and policies differ less."""
    part = refresh / 200
    pairs = Pairs(50 + int(100 * part), 1, 1 + int(9 * part), 0.9 * part)
    return drawn(rng, pairs, histories, differ=0.5 - 0.4 * part)


class Trickle:
    """10 to 40 new conversations a refresh: too few to look at, so they wait until there are 50."""

    def __init__(self) -> None:
        self.waiting: list[Metrics] = []

    def __call__(self, rng: np.random.Generator, histories: int, refresh: int) -> Metrics | None:
        self.waiting.append(drawn(rng, Pairs(int(rng.integers(10, 40, endpoint=True)), 1, 5, 0.5), histories))
        sums = np.concatenate([one.sums for one in self.waiting], axis=2)
        sizes = np.concatenate([one.sizes for one in self.waiting], axis=1)
        if sizes.shape[1] < FEWEST_PROMPTS:
            return None
        self.waiting = []
        return Metrics(sums, sizes)


class SameSet:
    """Every refresh on the same 200 conversations, challengers much like each other: not what the rules allow."""

    def __init__(self) -> None:
        self.latent: Floats | None = None

    def __call__(self, rng: np.random.Generator, histories: int, refresh: int) -> Metrics:
        new = rng.standard_normal((2, histories, 200))
        new[1] = CORRELATION * new[0] + math.sqrt(1 - CORRELATION**2) * new[1]
        self.latent = new if self.latent is None else 0.9 * self.latent + math.sqrt(1 - 0.9**2) * new
        edge = NormalDist().inv_cdf(1 - DIFFER / 2)
        sums = 2 * ((self.latent > edge).astype(np.int64) - (self.latent < -edge).astype(np.int64))
        return Metrics(sums, np.ones((histories, 200), dtype=np.int64))


def history(
    refresh_of: Refresh, seed: int, histories: int, refreshes: int, better: float = 0.0
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], Proportion]:
    """Histories with a false promotion, under the budget and at 2.5 % each; and how many better challengers were found.

    `better` of the refreshes, drawn for each history, are ten points better on fresh conversations and five on the
    known ones that guard every refresh, and promoting these is no error.
    """
    rng = np.random.default_rng([2, seed])
    budgeted, unbudgeted = np.zeros(histories, dtype=bool), np.zeros(histories, dtype=bool)
    found: list[tuple[bool, ...]] = [()] * histories
    hits = tries = 0
    for number in range(refreshes):
        fresh = refresh_of(rng, histories, number)
        if fresh is None:
            continue
        is_better = rng.random(histories) < better
        if is_better.any():
            some = drawn(rng, Pairs(fresh.sizes.shape[1], 1, 5, 0.3), histories, EFFECT)
            each = is_better[:, None]
            fresh = Metrics(np.where(each, some.sums, fresh.sums), np.where(each, some.sizes, fresh.sizes))

        def known(asked: Ints, is_better: NDArray[np.bool_] = is_better) -> Metrics:
            return drawn(rng, Pairs(KNOWN), len(asked), np.where(is_better[asked], EFFECT / 2, 0.0)[:, None])

        level_of = {past: budget_after(past).level for past in set(found)}
        now = judged(fresh, np.array([level_of[past] for past in found]), known).promoted
        found = [(*past, bool(success)) for past, success in zip(found, now, strict=True)]
        budgeted |= now & ~is_better
        left = np.flatnonzero(~unbudgeted & ~is_better)  # One false promotion is enough.
        unbudgeted[left] = judged(fresh.of(left), np.full(len(left), HIGHEST), knowing(rng, KNOWN, 0.0)).promoted
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
        ("few very long: 60 x 1 to 3 and 5 % of 30, agreement 0.5", steady(LONG_FEW), 0.0),
    )
    for number, (name, refresh_of, better) in enumerate(cases):
        budgeted, unbudgeted, hits = history(refresh_of, number, histories, refreshes, better)
        yield [name, told(of(budgeted)), told(of(unbudgeted)), told(hits) if hits.n else "-"]


# ------------------------------------------------------------------------------------------------------------- previews


def previewed(
    rng: np.random.Generator, trials: int, refreshes: int, policies: int, *, shared: bool = True
) -> NDArray[np.bool_]:
    """Trials with a false promotion where each refresh has dry runs of several policies on the same fresh
    conversations, and the first that passes is sent; where none does, the last one.

    Policies are drawn independently of each other, which finds most. `shared`: look k has its share of the level.
    """
    ever = np.zeros(trials, dtype=bool)
    found: list[tuple[bool, ...]] = [()] * trials
    for _ in range(refreshes):
        level_of = {past: budget_after(past).level for past in set(found)}
        levels, passed = np.array([level_of[past] for past in found]), np.zeros(trials, dtype=bool)
        for look in range(1, policies + 1):
            left = np.flatnonzero(~passed)
            at = levels[left] * (share_of_look(look) if shared else 1.0)
            passed[left] = judged(drawn(rng, PREVIEWED, len(left)), at, knowing(rng, KNOWN, 0.0)).promoted
        found = [(*past, bool(success)) for past, success in zip(found, passed, strict=True)]
        ever |= passed
    return ever


def previews_table(trials: int, histories: int, refreshes: int) -> Iterator[list[str]]:
    for policies in (1, 5, 20):
        rng = np.random.default_rng([7, policies])
        once, each = (previewed(rng, trials, 1, policies, shared=shared) for shared in (True, False))
        long = told(of(previewed(rng, histories, refreshes, policies))) if policies == 5 else "-"
        yield [str(policies), told(of(once)), told(of(each)), long]


# --------------------------------------------------------------------------------------------------------------- power


def power_table(trials: int) -> Iterator[list[str]]:
    """A challenger that is ten points better by both metrics, at the first test and at the tenth, without known
    conversations and with 100 on which it is as good as the champion. "By formula" is what a page says: one metric, no
    guard."""
    levels = (budget_after([]).level, budget_after([False] * 9).level)
    cases = (Pairs(50), Pairs(200), Pairs(400), Pairs(150, 1, 5, 0.3), Pairs(400, 1, 5, 0.3), Pairs(800), LONG)
    for number, pairs in enumerate(cases):
        rng = np.random.default_rng([3, number])
        fresh = drawn(rng, pairs, trials, EFFECT)
        error = float(fresh.differences()[0].std())
        cells = [str(pairs), f"{pairs.expected:.0f}"]
        for level in levels:
            at = np.full(trials, level)
            cells += [told(of(judged(fresh, at).promoted))]
            cells += [told(of(judged(fresh, at, knowing(rng, 100, 0.0)).promoted))]
            cells += [f"{100 * power_at(EFFECT, error, level):.0f} %", f"{100 * detectable(error, level):.1f}"]
        yield cells


def guards_table(trials: int) -> Iterator[list[str]]:
    """A challenger that is ten points better on 400 fresh conversations: how often known conversations hold it."""
    rng = np.random.default_rng(6)
    levels = np.full(trials, budget_after([]).level)
    for conversations in (10, 50, 100, 400):
        for effect in (-EFFECT, -EFFECT / 2, 0.0, EFFECT / 2):
            fresh, known = drawn(rng, Pairs(400), trials, EFFECT), drawn(rng, Pairs(conversations), trials, effect)
            found = judged(fresh, levels, known.of)
            seen = known.differences().min(axis=0) < -TOLERANCE
            points = f"{100 * effect:+.0f}" if effect else "0"
            yield [str(conversations), points, told(of(found.held)), told(of(found.promoted)), told(of(seen))]


# ------------------------------------------------------------------------------------------------------------ coverage


def share_coverage(trials: int) -> Iterator[list[str]]:
    """Of the interval of an accuracy, and of the one that takes pairs for independent."""
    usual = (((1, 1), 0.0), ((1, 10), 0.0), ((1, 10), 0.3), ((1, 10), 1.0), ((10, 10), 1.0))
    kinds = [Pairs(count, *sizes, agreement) for count in (50, 100, 400) for sizes, agreement in usual]
    for pairs in (*kinds, *(replace(LONG, conversations=count) for count in (50, 100, 400))):
        cells = []
        for share in (0.5, 0.65, 0.8, 0.9):
            rng = np.random.default_rng([4, *_seeds(pairs), int(100 * share)])
            drawn = [_wins(rng, pairs, share) for _ in range(trials)]
            scores = [clustered_share(wins, names) for wins, names in drawn]
            cells.append(of([score.low <= share <= score.high for score in scores]))
            if share == 0.65:
                plain = [wilson(sum(wins), len(wins)) for wins, _ in drawn]
                before = of([score.low <= share <= score.high for score in plain])
        yield [str(pairs), *(f"{100 * cell.value:.1f} %" for cell in cells), f"{100 * before.value:.1f} %"]


def _seeds(pairs: Pairs) -> list[int]:
    long = [int(100 * pairs.long)] if pairs.long else []
    return [pairs.conversations, pairs.fewest, pairs.most, int(10 * pairs.agreement), *long]


def _wins(rng: np.random.Generator, pairs: Pairs, share: float) -> tuple[list[float], list[int]]:
    names = np.repeat(np.arange(pairs.conversations), pairs.sizes(rng, 1)[0])
    chance = chances(rng, share, pairs.agreement, (pairs.conversations,))[names]
    return (rng.random(len(names)) < chance).astype(float).tolist(), names.tolist()


def other_coverage(trials: int) -> Iterator[list[str]]:
    """Of the mean margin (skewed, heavy tails, a part of the conversation's own), of a paired difference, and of a
    ratio of sums as a perplexity's or a KL's is: nats lost over tokens, where long answers lose less a token."""
    usual = (((1, 1), 0.0), ((1, 10), 0.3), ((1, 10), 1.0))
    kinds = [Pairs(count, *sizes, agreement) for count in (50, 100, 200, 600) for sizes, agreement in usual]
    for pairs in (*kinds, *(replace(LONG, conversations=count) for count in (50, 100, 200, 600))):
        rng, lengths = np.random.default_rng([5, *_seeds(pairs)]), np.random.default_rng([9, *_seeds(pairs)])
        margins, compared, ratios = [], [], []
        for _ in range(trials):
            names = np.repeat(np.arange(pairs.conversations), pairs.sizes(rng, 1)[0])
            own, shared = rng.gamma(4.0, 0.5, len(names)), rng.gamma(4.0, 0.5, pairs.conversations)[names]
            mixed = own * (1 - pairs.agreement) + shared * pairs.agreement
            margins.append(_holds(clustered_mean(mixed.tolist(), names.tolist()), 2.0))
            found = compare(*_five_points_better(rng, pairs, names), names.tolist(), draws=FEW_DRAWS)
            compared.append(found.low <= 0.05 <= found.high)
            tokens = lengths.geometric(1 / 50, len(names)) + 4.0
            ratio = clustered_ratio((mixed * np.sqrt(tokens)).tolist(), tokens.tolist(), names.tolist())
            ratios.append(_holds(ratio, 2.0 * ROOT_OVER_TOKENS))
        yield [str(pairs), told(of(margins)), told(of(compared)), told(of(ratios))]


def _holds(found: MeanScore, true: float) -> bool:
    return found.low is not None and found.high is not None and found.low <= true <= found.high


def _root_over_tokens() -> float:
    """E sqrt(tokens) / E tokens of the lengths above."""
    lengths = np.arange(1, 5_000)
    chance = (1 - 1 / 50) ** (lengths - 1) / 50
    return float((chance * np.sqrt(lengths + 4)).sum() / (chance * (lengths + 4)).sum())


ROOT_OVER_TOKENS = _root_over_tokens()


def _within(found: Proportion, true: float) -> bool:
    return found.low <= true <= found.high


def _five_points_better(rng: np.random.Generator, pairs: Pairs, names: Ints) -> tuple[list[float], list[float]]:
    chance = chances(rng, 0.5 + 0.05 / DIFFER / 2, pairs.agreement, (pairs.conversations,))[names]
    won = (rng.random(len(names)) < chance).astype(float)
    differ, agreed = rng.random(len(names)) < DIFFER, (rng.random(len(names)) < 0.6).astype(float)
    return np.where(differ, won, agreed).tolist(), np.where(differ, 1 - won, agreed).tolist()


def tables(scale: float) -> Tables:
    """Every table by its name, with what it shows."""
    many, fewer = (max(20, int(count * scale)) for count in (4_000, 1_000))
    refreshes, differ = 200, f"differing on {100 * DIFFER:.0f} % of pairs"

    def single() -> str:
        header = ["conversations x pairs", "against the champion", "and 100 known conversations", "against its start"]
        shown = table([*header, "against its start, pairs independent"], list(single_decisions(many)))
        return f"One decision, {many:,} trials: promoted although no better (95 % interval). Limit: 2.5 %.\n\n{shown}"

    def histories() -> str:
        header = ["evidence of a refresh", "with the budget", "2.5 % at each", "better ones promoted"]
        told = f"{refreshes} refreshes, {fewer:,} histories: at least one false promotion. Limit: {100 * ALPHA:g} %."
        return f"{told}\n\n{table(header, list(histories_table(fewer, refreshes)))}"

    def power() -> str:
        each = ["promoted, no known conversations", "promoted, 100 known", "by formula", "found with 80 %, points"]
        header = ["conversations x pairs", "pairs", *(f"test {k}: {one}" for k in (1, 10) for one in each)]
        told = f"Ten points better, {differ}, {fewer:,} trials: promoted, and by formula."
        return f"{told}\n\n{table(header, list(power_table(fewer)))}"

    def guards() -> str:
        header = [
            "known conversations",
            "better on them, points",
            "held by the guards",
            "promoted",
            "measured below -5 points",
        ]
        told = f"Ten points better on 400 fresh conversations, {differ}, {fewer:,} trials: held by guards."
        return f"{told}\n\n{table(header, list(guards_table(fewer)))}"

    def shares() -> str:
        header = [
            "conversations x pairs",
            *(f"share {share}" for share in (0.5, 0.65, 0.8, 0.9)),
            "0.65, pairs independent",
        ]
        shown = table(header, list(share_coverage(many // 2)))
        return f"Coverage of the 95 % interval of an accuracy, {many // 2:,} trials a cell.\n\n{shown}"

    def means() -> str:
        header = ["conversations x pairs", "mean margin", "paired difference", "ratio of sums"]
        told = "Coverage of the 95 % interval of the mean margin, of a paired difference, and of nats over tokens"
        return f"{told}, {fewer:,} trials a cell.\n\n{table(header, list(other_coverage(fewer)))}"

    def previews() -> str:
        header = ["policies looked at", "looks share the level", "each look has all of it", f"{refreshes} refreshes"]
        told = f"Dry runs of policies that are no better, {PREVIEWED}, {many:,} trials ({fewer:,} histories)"
        return f"{told}: promoted.\n\n{table(header, list(previews_table(many, fewer, refreshes)))}"

    return {f.__name__: f for f in (single, histories, previews, power, guards, shares, means)}


if __name__ == "__main__":
    print_tables((__doc__ or "").splitlines()[0], tables)
