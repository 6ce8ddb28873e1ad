"""Parts of the held-out pairs that are scored on their own: what was forgotten of one source hides in the whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Literal

from dpo_assets.checks.evidence.measured import Comparison
from dpo_assets.checks.statistics import Proportion

By = Literal["source", "margin"]
MOST_SOURCES = 12  # The largest; all others are one part.


@dataclass(frozen=True)
class SliceScore:
    """Implicit-reward accuracy of a part, and its accuracy by log-probability against that of SFT.

    `champion` is the champion's implicit-reward accuracy, `against_champion` the policy's less that; None: none was
    scored.
    """

    by: By
    name: str
    reward: Proportion
    against_sft: Comparison
    champion: Proportion | None = None
    against_champion: Comparison | None = None


@dataclass(frozen=True)
class Part:
    """Indices of the pairs of one part."""

    by: By
    name: str
    pairs: tuple[int, ...]


def parts(sources: Sequence[str], margins: Sequence[float | None]) -> list[Part]:
    """Pairs by source and by quartile of the feedback's own margin: how much better chosen was rated. One entry a pair.

    A division into a single part tells nothing new and is left out; equal margins stay together. Every pair is in
    exactly one part of each division that is there.
    """
    return [*_divided("source", _by_source(sources)), *_divided("margin", _by_margin(margins))]


def _divided(by: By, names: Sequence[str]) -> Iterator[Part]:
    found = sorted(set(names))
    for name in found if len(found) > 1 else ():
        yield Part(by, name, tuple(n for n, one in enumerate(names) if one == name))


def _by_source(sources: Sequence[str]) -> list[str]:
    counts = Counter(sources)
    largest = {name for name, _ in counts.most_common(MOST_SOURCES)}
    other = f"{len(counts) - len(largest)} other sources"
    return [source if source in largest else other for source in sources]


def _by_margin(margins: Sequence[float | None]) -> list[str]:
    told = [margin for margin in margins if margin is not None]
    edges = quantiles(told, n=4, method="inclusive") if len(told) > 1 else []
    names = [f"quartile {1 + sum(m > edge for edge in edges)}" if m is not None else "no margin" for m in margins]
    return names if edges else []
