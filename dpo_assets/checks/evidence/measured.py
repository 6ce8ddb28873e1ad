"""Comparisons and means as they were measured: plain numbers that a report keeps."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_assets.artifact import Number


@dataclass(frozen=True)
class MeanScore:
    """A mean over pairs with its interval, clustered by conversation. Ends are None where too few bound nothing.

    `p_below` is the one-sided p that the true mean is below zero: the chance of a mean as low as this one were it zero.
    None where there are no ends, and in scores of earlier versions.
    """

    value: Number
    low: float | None
    high: float | None
    n: int
    clusters: int
    p_below: float | None = None

    @property
    def p_above(self) -> float | None:
        """The same of a true mean above zero."""
        return None if self.p_below is None else 1 - self.p_below

    def __str__(self) -> str:
        ends = "" if self.low is None or self.high is None else f" [{self.low:+.3f}, {self.high:+.3f}]"
        return f"{self.value:+.3f}{ends} (n={self.n}, {self.clusters} conversations)"


@dataclass(frozen=True)
class Comparison:
    """A paired difference of two tie-aware accuracies on the same pairs, challenger minus champion.

    `difference`, `low`, `high` and `error` (the cluster-robust standard error) are shares, from -1 to 1. `p_better` and
    `p_worse` are one-sided, over conversations. `p_pairs` is the exact McNemar test for `better` that takes pairs for
    independent: a cross-check, too small where pairs of a prompt agree.
    """

    difference: Number
    low: Number
    high: Number
    error: Number
    p_better: Number
    p_worse: Number
    p_pairs: Number
    n: int
    clusters: int
    discordant: int

    def __str__(self) -> str:
        ends = f"{self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"
        return f"{ends} (n={self.n}, {self.clusters} conversations, p={self.p_better:.2g})"
