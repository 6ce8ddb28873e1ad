"""How much error each decision of a pipeline may spend, so that all of them together spend no more than `ALPHA`.

Every refresh is another test. At 2.5% each, policies no better than the champion are promoted at least once with 26%
after 12 and 73% after 52. Here test k of a pipeline, without end, brings ALPHA * share(k) to a purse, and the shares
sum to one. The purse pays for the level of the test; a test that finds something costs nothing, so what it was to cost
is there for the next. That is the online fallback of Tian and Ramdas (2021, "Online control of the familywise error
rate", arXiv 1910.04900) with the shares of their ADDIS-spending, and with no level above `HIGHEST`. If each p value is
valid given what was decided before, which evidence that no earlier decision saw makes it, then the chance of even one
false promotion is at most ALPHA: up to the first one, every test of a policy that is no better has paid for its level,
and the purse never holds more than was brought.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ALPHA = 0.05  # One-sided, over all decisions of a pipeline.
HIGHEST = 0.025  # Of any one test: one end of a 95% interval.
EXPONENT = 1.6  # Later tests keep more than with the usual 2, and the first one gets less than HIGHEST.
ZETA = 2.2857656656801293  # The sum of k^-1.6 over all k: Riemann's zeta of EXPONENT.


def share(test: int) -> float:
    """The part of the whole error that the test of this number, from 1, brings to the purse."""
    return float(test**-EXPONENT / ZETA)


def share_of_look(look: int) -> float:
    """The part of a test's level that the look of this number, from 1, at its conversations has: 1/2, 1/6, 1/12, ...

    They sum to one without end, so whichever look is acted on, the first that passes or the best of all, the level is
    that of one test (Bonferroni with unequal weights). The number of looks so far would not do as a divisor: whoever
    stops at the first that passes has spent 1 + 1/2 + 1/3 + ... of it. A policy that was made after what earlier looks
    showed is not covered by this.
    """
    return 1 / (look * (look + 1))


@dataclass(frozen=True)
class Budget:
    """Where the error of a pipeline stands before its next test."""

    alpha: float
    tests: int
    spent: float
    level: float

    @property
    def left(self) -> float:
        return self.alpha - self.spent


def budget_after(found: Iterable[bool], alpha: float = ALPHA) -> Budget:
    """What the tests so far spent, and the level of the next; `found` says of each, in order, whether it promoted."""
    purse, spent, tests = alpha * share(1), 0.0, 0
    for success in found:
        level = min(HIGHEST, purse)
        if not success:
            purse, spent = purse - level, spent + level
        tests += 1
        purse += alpha * share(tests + 1)
    return Budget(alpha, tests, spent, min(HIGHEST, purse))
