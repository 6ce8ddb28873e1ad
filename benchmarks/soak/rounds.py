"""One refresh after another: the folder changes, the sensor asks, and everything is audited when the run has ended."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg

from benchmarks.soak.audit import (
    Measured,
    Refreshed,
    bytes_of,
    models_beyond,
    strangers,
    wrong_leftovers,
    wrong_promotions,
    wrong_rows,
)
from benchmarks.soak.inbox import Inbox
from benchmarks.soak.refreshing import Refreshing
from dpo_assets.artifact import ArtifactTree
from dpo_assets.assets.pipeline import Pipeline
from dpo_assets.assets.promotion import read_ledger
from dpo_assets.assets.retention import retain
from dpo_assets.retention import MAY_GO

REPO = "org/soak"
GRACE_SECONDS = 20.0  # For processes of a run that Dagster calls finished.
TRAINS = ("sft_checkpoint", "dpo_adapter")


@dataclass(frozen=True)
class Round:
    """What a refresh came to. `wrong`: what must not be, a sentence each."""

    number: int
    change: str
    status: str
    seconds: float
    pairs: int
    decision: str
    released: bool
    measured: dict[str, Measured]
    store_bytes: int
    model_bytes: int
    wrong: list[str]


@dataclass
class Soak:
    """A pipeline, the folder it reads, and who refreshes it.

    Args:
        late: share of refreshes that are followed by a change which comes while they are under way.
        retention: refreshes from one deletion to the next.
    """

    inbox: Inbox
    refreshing: Refreshing
    instance: dg.DagsterInstance
    pipeline: Pipeline
    tree: ArtifactTree
    home: Path
    hub: Any
    warm: int  # The process whose forks are the workers.
    late: float = 0.15
    retention: int = 10
    chance: random.Random = field(default_factory=lambda: random.Random(7))
    _ahead: str = ""  # A change that was made while the last run was under way.
    _retained_at: int = 0

    def rounds(self, count: int) -> Iterator[Round]:
        """Refreshes so often, after a first one on what the folder held at the start."""
        change = "first"
        for number in range(count + 1):
            if number:
                change, self._ahead = self._ahead or self.inbox.change(), ""
            yield self._round(number, change)

    def _round(self, number: int, change: str) -> Round:
        expected, began = self.inbox.expected(), time.monotonic()
        meanwhile = self._meanwhile() if self.chance.random() < self.late else lambda run: None
        run = self.refreshing.next_run(meanwhile)
        seconds = time.monotonic() - began
        refreshed = Refreshed.of(self.instance, run, self.tree)
        wrong = [*wrong_rows(refreshed, expected), *self._wrong_run(refreshed, expected.red, change)]
        if not self._ahead:  # Otherwise the next run may be at work by now.
            wrong += self._wrong_now()
            if number - self._retained_at >= self.retention:
                self._retained_at = number
                wrong += self._retained()
        shown = refreshed.metadata.get("promotion", {})
        return Round(
            number,
            change,
            run.status.value,
            round(seconds, 1),
            len(expected.accepted),
            str(shown.get("verdict", "")),
            "published_model" in refreshed.made,
            dict(self.refreshing.measured()),
            bytes_of(self.tree.root),
            sum(bytes_of(self.tree.root / kind) for kind in MAY_GO),
            wrong,
        )

    def _meanwhile(self) -> Callable[[dg.DagsterRun], None]:
        """Changes the folder once the run has read it."""

        def look(run: dg.DagsterRun) -> None:
            if self._ahead or self.inbox.red:
                return
            latest = self.instance.get_latest_materialization_event(self.pipeline.key("raw_preferences"))
            if latest is not None and latest.run_id == run.run_id:
                self._ahead = f"{self.inbox.change()}, while a refresh is under way"

        return look

    def _wrong_run(self, refreshed: Refreshed, red: str, change: str) -> Iterator[str]:
        if not red and not refreshed.run.is_success:
            yield f"run {refreshed.run.run_id} ended as {refreshed.run.status.value}, red: {refreshed.red}"
        if change == "mended":
            for node in TRAINS:
                if node in refreshed.made and refreshed.metadata[node]["reused"] == "no":
                    yield f"{node} was made again for feedback that it had been made of"

    def _wrong_now(self) -> Iterator[str]:
        deadline = time.monotonic() + GRACE_SECONDS
        while (there := strangers(self.home, {*self.refreshing.stays, self.warm})) and time.monotonic() < deadline:
            time.sleep(0.5)
        yield from there
        yield from wrong_leftovers(self.tree, self.home / "tmp")
        if self.hub is not None:
            yield from wrong_promotions(read_ledger(self.tree), self.hub, REPO)

    def _retained(self) -> Iterator[str]:
        rules = self.pipeline.recipe.retention
        retain(self.instance, self.pipeline, self.tree, lambda _: None, really=True)
        yield from models_beyond(self.tree, rules, len(read_ledger(self.tree).releases))


def summary(rounds: list[Round], inbox: Inbox) -> dict[str, Any]:
    """The figures of all rounds. A slope is that of the second half, by least squares."""
    later = rounds[len(rounds) // 2 :]
    names = sorted({name for one in rounds for name in one.measured})
    mib = 2**20
    seconds = sorted(one.seconds for one in rounds[1:])
    return {
        "refreshes": len(rounds) - 1,
        "changes": dict(sorted(inbox.kinds.items())),
        "refreshes_with_faults": sum(bool(one.wrong) for one in rounds),
        "wrong": [f"{one.number}: {said}" for one in rounds for said in one.wrong],
        "runs": dict(Counter(one.status for one in rounds)),
        "decisions": dict(Counter(one.decision or "none" for one in rounds)),
        "releases": sum(one.released for one in rounds),
        "pairs_at_the_end": rounds[-1].pairs,
        "median_seconds": seconds[len(seconds) // 2] if seconds else None,
        "resident_mib": {
            name: {
                "first": round(rounds[0].measured[name].resident / mib, 1),
                "last": round(rounds[-1].measured[name].resident / mib, 1),
                "per_100_refreshes": round(
                    100 * _slope([(one.number, one.measured[name].resident / mib) for one in later]), 2
                ),
                "handles": [rounds[0].measured[name].handles, rounds[-1].measured[name].handles],
                "threads": [rounds[0].measured[name].threads, rounds[-1].measured[name].threads],
            }
            for name in names
        },
        "model_mib": {"most": round(max(one.model_bytes for one in rounds) / mib, 1),
                      "per_100_refreshes": round(100 * _slope([(o.number, o.model_bytes / mib) for o in later]), 2)},
        "store_mib": {"last": round(rounds[-1].store_bytes / mib, 1),
                      "per_100_refreshes": round(100 * _slope([(o.number, o.store_bytes / mib) for o in later]), 2)},
    }  # fmt: skip


def _slope(points: list[tuple[float, float]]) -> float:
    count = len(points)
    x_mean, y_mean = sum(x for x, _ in points) / count, sum(y for _, y in points) / count
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / spread if spread else 0.0
