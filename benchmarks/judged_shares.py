"""How often intervals of a judge's shares hold the true share: as judged, corrected by people's pairs, at equal length.

    python -m benchmarks.judged_shares [--scale 0.1] [--only corrected]

A judge prefers the better of two answers with a skill of the conversation's own, whichever answer is better, and says
"tie" with a chance, as one that is swayed by the order does. Whether the policy's answer is the better one is drawn
with a chance of the conversation's own too. `alike` is the intra-class correlation of both. People's pairs are of the
same conversations, as in a pipeline, or of others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.simulated import chances
from benchmarks.trials import Tables, print_tables
from dpo_assets.checks.statistics import wilson
from dpo_assets.judging.comparing import Comparison
from dpo_assets.judging.rates import at_equal_length
from dpo_assets.judging.shares import Share, corrected
from dpo_assets.report.tables import table

CONFIDENCE = 0.95
TRUE = (0.05, 0.3, 0.5, 0.8, 0.95)


@dataclass(frozen=True)
class Setting:
    """One judge on one held-out side.

    Attributes:
        answers: conversations with answers, one to `turns` each.
        people: conversations with pairs of people, one to `turns` each.
        agreement: of the judge with people, a tie counted half.
        shared: whether both are of the same conversations, as far as there are as many.
    """

    answers: int
    people: int
    agreement: float
    ties: float = 0.0
    turns: int = 1
    alike: float = 0.0
    shared: bool = True

    def __str__(self) -> str:
        each = "" if self.turns == 1 else f" x 1 to {self.turns}, alike {self.alike:g}"
        return f"{self.answers} answers, {self.people} pairs{each}{'' if self.shared else ', others'}"

    @property
    def skill(self) -> float:
        """How often it is right where it decides."""
        return (self.agreement - self.ties / 2) / (1 - self.ties)

    def draw(self, rng: np.random.Generator, true: float) -> tuple[Share, Share]:
        """What it says of the answers, and of people's pairs."""
        count = max(self.answers, self.people)
        skills = chances(rng, self.skill, self.alike, (count,))
        if self.shared:
            return self._said(rng, skills[: self.answers], true), self._said(rng, skills[: self.people], 1.0)
        others = chances(rng, self.skill, self.alike, (self.people,))
        return self._said(rng, skills[: self.answers], true), self._said(rng, others, 1.0, first=count)

    def _said(self, rng: np.random.Generator, skills: np.ndarray, true: float, first: int = 0) -> Share:
        of = np.repeat(np.arange(len(skills)), rng.integers(1, self.turns, len(skills), endpoint=True))
        alike = self.alike if true < 1 else 0.0
        better = rng.random(len(of)) < chances(rng, true, alike, (len(skills),))[of]
        right = rng.random(len(of)) < skills[of]
        scores = np.where(rng.random(len(of)) < self.ties, 0.5, (right == better).astype(float))
        return Share.of(scores.tolist(), (of + first).tolist(), CONFIDENCE)


SETTINGS = (
    *(Setting(answers, people, 0.8) for answers in (16, 50, 200) for people in (50, 200)),
    *(Setting(100, 100, agreement) for agreement in (0.62, 0.7, 0.9, 0.97)),
    *(Setting(100, 100, agreement, ties) for agreement, ties in ((0.62, 0.5), (0.7, 0.3), (0.8, 0.3), (0.7, 0.5))),
    Setting(100, 50, 0.62),
    Setting(60, 60, 0.8, 0.2, 5, 0.3),
    Setting(60, 60, 0.8, 0.2, 5, 0.3, shared=False),
    Setting(100, 200, 0.7, 0.3, 3, 0.5),
    Setting(100, 200, 0.9, 0.0, 3, 0.5),
    Setting(200, 200, 0.8, 0.0, 5, 0.2),
)


def corrected_coverage(trials: int) -> Iterator[list[str]]:
    """By true share: of the corrected interval where there is one; then how often there is none."""
    for number, setting in enumerate(SETTINGS):
        cells, none = [], []
        for true in TRUE:
            rng = np.random.default_rng([7, number, round(100 * true)])
            found = [corrected(*setting.draw(rng, true), CONFIDENCE) for _ in range(trials)]
            printed = [one for one in found if not math.isnan(one.value)]
            held = sum(one.low <= true <= one.high for one in printed)
            cells.append(f"{100 * held / len(printed):.1f} %" if printed else "-")
            none.append(1 - len(printed) / trials)
        yield [str(setting), f"{setting.agreement:g}", f"{setting.ties:g}", *cells, f"{100 * max(none):.0f} %"]


def share_coverage(trials: int) -> Iterator[list[str]]:
    """Of the interval of what a judge says, ties and all, and of Wilson's beside it."""
    for number, (answers, turns, alike) in enumerate(((16, 1, 0.0), (50, 1, 0.0), (200, 1, 0.0), (60, 5, 0.3))):
        for ties in (0.0, 0.3, 0.6):
            cells, plain = [], []
            for decided in (0.5, 0.7, 0.9):
                setting = Setting(answers, answers, ties / 2 + (1 - ties) * decided, ties, turns, alike)
                rng = np.random.default_rng([8, number, round(10 * ties), round(100 * decided)])
                drawn = [setting.draw(rng, 1.0)[0] for _ in range(trials)]
                found = [one.proportion(CONFIDENCE) for one in drawn]
                before = [wilson(one.value * one.n, one.n, CONFIDENCE) for one in drawn]
                true = setting.agreement
                cells += [f"{100 * np.mean([one.low <= true <= one.high for one in found]):.1f} %"]
                plain += [f"{100 * np.mean([one.low <= true <= one.high for one in before]):.1f} %"]
            each = "" if turns == 1 else f" x 1 to {turns}, alike {alike:g}"
            yield [f"{answers}{each}", f"{ties:g}", *cells, *plain]


def equal_length_coverage(trials: int) -> Iterator[list[str]]:
    """Of the share at equal length: a judge with a taste for length, and a policy that is longer."""
    for prompts in (50, 100, 200):
        for share in (0.5, 0.6, 0.8):
            rng, held = np.random.default_rng([9, prompts, round(100 * share)]), 0
            for _ in range(trials):
                gaps = rng.normal(20, 60, prompts)
                taste = np.tanh(gaps / math.sqrt(float(np.square(gaps).mean())))
                odds = math.log(share / (1 - share)) + taste
                won = rng.random(prompts) < 1 / (1 + np.exp(-odds))
                compared = [Comparison("win" if one else "loss", False, ("", "")) for one in won]
                lengths = [(1000 + round(gap), 1000) for gap in gaps.tolist()]
                found = at_equal_length(compared, lengths, range(prompts), CONFIDENCE)
                held += found.low <= share <= found.high
            yield [str(prompts), f"{share:g}", f"{100 * held / trials:.1f} %"]


def tables(scale: float) -> Tables:
    """Every table by its name."""
    many, fewer = (max(20, int(count * scale)) for count in (2_000, 1_000))

    def shares() -> str:
        of = ("0.5", "0.7", "0.9")
        header = ["comparisons", "ties", *(f"right {one}" for one in of), *(f"Wilson, {one}" for one in of)]
        return f"A judge's share, {many:,} trials a cell.\n\n{table(header, list(share_coverage(many)))}"

    def corrected_shares() -> str:
        header = ["held-out side", "agreement", "ties", *(f"true {one:g}" for one in TRUE), "none at most"]
        return f"Corrected share, {many:,} trials a cell.\n\n{table(header, list(corrected_coverage(many)))}"

    def equal_length() -> str:
        header = ["prompts", "share at equal length", "held"]
        return f"At equal length, {fewer:,} trials a cell.\n\n{table(header, list(equal_length_coverage(fewer)))}"

    return {"shares": shares, "corrected": corrected_shares, "equal_length": equal_length}


if __name__ == "__main__":
    print_tables((__doc__ or "").splitlines()[0], tables)
