"""Where the training of a refresh starts, and on which pairs: from SFT on all, or from the release that is live.

Pure: what models were trained on is told as sets of pair ids, and what is kept of them by the digests of artefacts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import polars as pl

Policy = Literal["full", "replay", "continue"]
MOST_SFT = 5  # Earlier checkpoints that are looked at: for each its dataset is read.


class SftData(BaseModel):
    """The pairs whose chosen answers the SFT policy of a run is trained on: those of now, or of an earlier dataset."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    dataset: str = Field(default="", description="Digest of that `dpo_dataset`; empty: the one that the plan read.")
    pairs: int = Field(default=0, description="Pairs of its train split.")
    newer: int = Field(default=0, description="Training pairs of now that are not among them.")


class Refresh(BaseModel):
    """What a run trains from and on. It holds no reason: an equal run after this one must come to an equal plan."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    policy: Policy = Field(default="full", description="The one that is followed, whatever was asked for.")
    generation: int = Field(default=1, ge=1, description="1: DPO starts from SFT. One more for each release behind it.")
    adapter: str = Field(default="", description="Digest of the `dpo_adapter` that training goes on from.")
    since: str = Field(default="", description="Digest of the `dpo_dataset` of that release: other pairs are new.")
    new: int = Field(default=0, description="Pairs that are new since then; of `full` nothing is counted.")
    sampled: int = Field(default=0, description="Earlier pairs that are trained on beside them.")
    sft: SftData = SftData()

    @property
    def whole(self) -> bool:
        """Whether DPO trains on all pairs."""
        return self.policy == "full"

    def settings(self) -> dict[str, object]:
        """What an adapter depends on."""
        return self.model_dump(include={"policy", "adapter", "since", "sampled"})


@dataclass(frozen=True)
class Moved:
    """How far the training pairs of now are from those that something was trained on."""

    pairs: int  # Of now.
    new: int  # Of now, and not of then.
    gone: int  # Of then, and not of now.

    @classmethod
    def between(cls, then: pl.Series, now: pl.Series) -> Moved:
        """From the ids of both."""
        then, now = then.unique(), now.unique()
        kept = int(now.is_in(then.implode()).sum())
        return cls(len(now), len(now) - kept, len(then) - kept)

    @property
    def share(self) -> float:
        """Of the pairs of now, those that are new."""
        return self.new / self.pairs if self.pairs else 0.0

    def allows_sft(self, limit: float) -> bool:
        """Whether an SFT policy that was trained then is kept: nothing of it is gone, and few pairs are new.

        Args:
            limit: largest share of the pairs of now that may be new.
        """
        return not self.gone and self.share <= limit

    def told(self) -> str:
        return f"{self.new} of {self.pairs} training pairs are new since, and {self.gone} gone"


@dataclass(frozen=True)
class EarlierSft:
    """An SFT checkpoint with the settings of this run, and how far the pairs moved since."""

    checkpoint: str  # Digest.
    dataset: str  # Digest of what it was trained on.
    pairs: int
    moved: Moved


@dataclass(frozen=True)
class ChosenSft:
    """What SFT trains on, the checkpoint that is taken up (None: one is trained), and why."""

    data: SftData
    checkpoint: str | None
    why: str


def choose_sft(earlier: Iterable[EarlierSft], dataset: str, pairs: int, limit: float) -> ChosenSft:
    """The first earlier checkpoint that may stay, or else one that is trained on the pairs of now.

    Args:
        earlier: in the order of preference; looked at one by one.
        dataset: digest of the dataset of now, with `pairs` to train on.
        limit: largest share of these that a checkpoint may lack.
    """
    passed = ""
    for one in islice(earlier, MOST_SFT):
        if one.moved.allows_sft(limit):
            data = SftData(dataset=one.dataset, pairs=one.pairs, newer=one.moved.new)
            return ChosenSft(data, one.checkpoint, f"SFT is taken up: {one.moved.told()} ({_rule(limit)})")
        passed = passed or f"{one.moved.told()} ({_rule(limit)})"
    why = passed or "there is none with these settings"
    return ChosenSft(SftData(dataset=dataset, pairs=pairs), None, f"SFT is trained: {why}")


def _rule(limit: float) -> str:
    return f"it is renewed above {limit:.0%} new, or with any gone"


@dataclass(frozen=True)
class Ancestor:
    """A release that training may go on from: the one that is live, or one before it that it went on from itself.

    Attributes:
        adapter: digest of its adapter.
        dataset: digest of the dataset whose pairs it, with the releases behind it, was trained on.
        generation: as in `Refresh`.
        moved: how far the pairs moved since.
        refused: why nothing can go on from it; empty: something can.
    """

    adapter: str
    dataset: str
    generation: int
    moved: Moved
    refused: str = ""


@dataclass(frozen=True)
class ChosenStart:
    """Where DPO starts, and why there."""

    refresh: Refresh
    why: str


def choose_start(
    asked: Policy, ancestors: Iterable[Ancestor], sft: SftData, *, replayed: float, most_continued: int
) -> ChosenStart:
    """Follows the recipe's policy, or trains in full where that cannot be followed, and says why.

    A release that was trained on all pairs of now is passed over for the one that it went on from: so a run in which
    nothing changed comes to the plan of the release that is live, and what was made then is taken up.

    Args:
        ancestors: the release that is live and those behind it, newest first.
        replayed: earlier pairs for each new one, for `replay`.
        most_continued: releases in a row that may go on with new pairs alone.
    """

    def full(why: str) -> ChosenStart:
        return ChosenStart(Refresh(sft=sft), why)

    if asked == "full":
        return full("full: DPO starts from SFT, on all pairs")
    found = False
    for one in ancestors:
        found = True
        if one.refused:
            return full(f"full, where {asked} was asked for: {one.refused}")
        moved = one.moved
        if moved.gone:
            return full(
                f"full, where {asked} was asked for: {moved.gone} pairs that the release was trained on are not in "
                "train any more, and only a new start unlearns them"
            )
        if not moved.new:
            continue
        if asked == "continue" and one.generation > most_continued:
            return full(f"full, where continue was asked for: {one.generation - 1} releases in a row went on already")
        old = moved.pairs - moved.new
        sampled = min(old, math.ceil(replayed * moved.new)) if asked == "replay" else 0
        refresh = Refresh(
            policy=asked, generation=one.generation + 1, adapter=one.adapter, since=one.dataset, new=moved.new,
            sampled=sampled, sft=sft,
        )  # fmt: skip
        return ChosenStart(refresh, f"{asked}: {moved.told()}; {sampled} of the others are trained on again")
    why = "no training pair is new to the release that is live" if found else "no release is live to go on from"
    return full(f"full, where {asked} was asked for: {why}")


def drawn(earlier: pl.Series, count: int, seed: int, start: str) -> pl.Series:
    """`count` of the earlier pairs, each as likely as any other, the same in every process.

    Args:
        start: what the draw is for: another release draws others.
    """

    import polars as pl

    def place(pair: str) -> str:
        return hashlib.sha256(f"{seed}:{start}:{pair}".encode()).hexdigest()

    return pl.Series(earlier.name, sorted(earlier.to_list(), key=place)[:count], dtype=pl.String)


def trained_pairs(now: pl.Series, then: pl.Series, refresh: Refresh, seed: int) -> pl.Series:
    """Ids of the pairs that DPO trains on: those that are new since a release, and a draw of the others."""
    old = now.is_in(then.implode())
    return now.filter(~old).append(drawn(now.filter(old), refresh.sampled, seed, refresh.adapter))
