"""Whether a refresh is asked for now: what changed since the last ingest, and what happened to what was asked for.

Nothing is remembered of what was asked: it is held against what the newest `raw_preferences` read and against the runs
that there are, so a sensor that was off, moved or lost its cursor asks for what is missing and for nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_assets.feedback.watching import Content, Look
from dpo_assets.recipe.running import RefreshSection

RETRY_MINUTES = 10.0  # After the first failure; doubled with each further one.
Outcome = Literal["under way", "succeeded", "failed", "cancelled"]


class Cursor(BaseModel):
    """What the sensor notes from tick to tick: times alone, so that a lost one costs patience and no run.

    Args:
        key: of what all sources held.
        since: when they were first seen so, in seconds since the epoch.
        changed_since: since when there is something that was not read.
        busy_since: since when a file is being written.
        broken: sources that could not be looked at.
    """

    model_config = ConfigDict(extra="forbid")
    version: Literal[2] = 2
    key: str
    since: float
    changed_since: float | None = None
    busy_since: float | None = None
    broken: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str | None) -> tuple[Self | None, str]:
        """The cursor, and what is wrong with the text of a damaged one, which counts as none."""
        if not text:
            return None, ""
        try:
            return cls.model_validate_json(text), ""
        except ValidationError:
            return None, f"the cursor was damaged or of another version, and is begun anew ({text[:40]!r})"


@dataclass(frozen=True)
class Refresh:
    """A run of the refresh job. Times in seconds since the epoch; `ended` is None while it is under way."""

    run_id: str
    outcome: Outcome
    started: float
    ended: float | None
    key: str = ""  # Of what it was asked for by the sensor; empty: somebody else started it.


@dataclass(frozen=True)
class GpuUse:
    """GPU hours of a run of the pipeline, whoever started it. `ended`: seconds since the epoch; now, if it goes on."""

    ended: float
    hours: float


@dataclass(frozen=True)
class Answer:
    """What a tick comes to.

    Args:
        asks: whether a refresh is asked for.
        reason: what people read.
        cursor: for the next tick.
        key: goes with the run that is asked for.
        waits_since: since when feedback has been held back (seconds since the epoch); None: nothing is.
    """

    asks: bool
    reason: str
    cursor: Cursor
    key: str = ""
    waits_since: float | None = None


@dataclass(frozen=True)
class Tick:
    """Everything that a tick knows.

    Args:
        now: seconds since the epoch.
        cursor: of the last tick; None: there is none.
        looks: at every source.
        read: what the newest `raw_preferences` read, by source.
        refreshes: runs of the refresh job, newest first.
        settings: of the recipe.
        count: new pairs of a source that changed; None where nothing tells. Asked only where it decides.
        gpu: what runs used; needed where there is a budget.
    """

    now: float
    cursor: Cursor | None
    looks: Sequence[Look]
    read: Mapping[str, Content]
    refreshes: Sequence[Refresh]
    settings: RefreshSection
    count: Callable[[Look, Content | None], int | None] = field(repr=False)
    gpu: Sequence[GpuUse] = ()

    @property
    def changed(self) -> list[Look]:
        """Sources that hold something else than what was read of them."""
        return [look for look in self.looks if look.content is not None and look.content != self.read.get(look.name)]

    @property
    def key(self) -> str:
        """Of what a refresh would read; a source that cannot be looked at now counts as it was read."""
        held = {look.name: look.content or self.read.get(look.name) for look in self.looks}
        rows = [[name, content.digest if content else ""] for name, content in sorted(held.items())]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]

    def answer(self) -> Answer:
        """Whether to ask for a refresh, and why."""
        cursor = self._cursor()
        asks, reason = self._decide(cursor)
        asides = [f"`{look.name}` is broken, the others go on: {look.fault}" for look in self.looks if look.fault]
        asides += [f"a file of `{look.name}` is still being written" for look in self.looks if look.busy]
        asides += [
            f"`{look.name}`: its server says nothing by which a change could be seen, so only the schedule reads it"
            for look in self.looks
            if look.blind
        ]
        if (budget := self.settings.gpu_hours) is not None:
            spent = sum(use.hours for use in self._used())
            asides.append(
                f"{spent:.2f} of {budget:g} GPU hours of the last {self.settings.gpu_days:g} days are spent, "
                f"{max(0.0, budget - spent):.2f} are left"
            )
        waits = None if asks or self._is_served(cursor) else cursor.changed_since
        return Answer(asks, "; ".join([reason, *asides]), cursor, self.key, waits)

    def _tried(self, cursor: Cursor) -> list[Refresh]:
        """Refreshes for what the sources hold, newest first."""
        return [one for one in self.refreshes if one.key == self.key and one.started >= cursor.since]

    def _is_served(self, cursor: Cursor) -> bool:
        """Whether a refresh is under way, or one ran for what they hold: some look otherwise after each reading."""
        tried = self._tried(cursor)
        done = bool(tried) and tried[0].outcome == "succeeded"
        return done or any(one.outcome == "under way" for one in self.refreshes)

    def _cursor(self) -> Cursor:
        before = self.cursor
        broken = tuple(look.name for look in self.looks if look.fault)
        same = before is not None and before.key == self.key
        # One that came back is a reason to ask again for what failed without it.
        back = before is not None and bool(set(before.broken) - set(broken))
        changed = before.changed_since if before is not None else None
        busy = before.busy_since if before is not None else None
        return Cursor(
            key=self.key,
            since=before.since if before is not None and same and not back else self.now,
            changed_since=(changed or self.now) if self.changed else None,
            busy_since=(busy or self.now) if any(look.busy for look in self.looks) else None,
            broken=broken,
        )

    def _decide(self, cursor: Cursor) -> tuple[bool, str]:
        settings = self.settings
        if under_way := [one for one in self.refreshes if one.outcome == "under way"]:
            return False, f"refresh {under_way[0].run_id} is under way; what it does not read is asked for afterwards"
        tried = self._tried(cursor)
        failed = [one for one in tried if one.outcome == "failed"]
        if not self.changed and not (tried and tried[0].outcome == "failed"):
            return False, f"nothing new in {len(self.looks)} source{'s' if len(self.looks) != 1 else ''}"
        if tried and tried[0].outcome == "succeeded":
            return False, f"refresh {tried[0].run_id} ran for this feedback, and what it read looks otherwise by now"
        if tried and tried[0].outcome == "cancelled":
            return False, f"refresh {tried[0].run_id} was cancelled; the next one comes with the next change"
        if len(failed) > settings.retries:
            return False, (
                f"{len(failed)} refreshes of this feedback failed, the last of them is {failed[0].run_id}: see what it "
                "says. The next one comes with the next change, or by hand"
            )
        if (until := self._paused_until(failed)) > self.now:
            return False, f"refresh {failed[0].run_id} failed; it is asked for again at {_at(until)}"
        last = max((one.ended for one in self.refreshes if one.ended is not None), default=0.0)
        if (until := last + settings.cool_down_minutes * 60) > self.now and not failed:
            return False, f"feedback waits: no refresh before {_at(until)} (refresh.cool_down_minutes)"
        if (until := self._spent_until()) > self.now:
            return False, f"feedback waits: no refresh before {_at(until)} (refresh.gpu_hours)"
        if failed:
            return True, f"refresh {failed[0].run_id} failed; attempt {len(failed) + 1} of {settings.retries + 1}"
        return self._enough(cursor)

    def _paused_until(self, failed: Sequence[Refresh]) -> float:
        if not failed:
            return 0.0
        return (failed[0].ended or failed[0].started) + RETRY_MINUTES * 60 * 2.0 ** (len(failed) - 1)

    def _used(self) -> list[GpuUse]:
        """What counts now, the oldest first."""
        period = self.settings.gpu_days * 86_400
        return sorted((use for use in self.gpu if use.ended > self.now - period), key=lambda use: use.ended)

    def _spent_until(self) -> float:
        """When enough of what was used has left the period for a refresh to be asked for; 0: it may be now."""
        budget, used = self.settings.gpu_hours, self._used()
        spent, until = sum(use.hours for use in used), 0.0
        for use in used:
            if budget is None or spent < budget:
                break
            spent, until = spent - use.hours, use.ended + self.settings.gpu_days * 86_400
        return until

    def _enough(self, cursor: Cursor) -> tuple[bool, str]:
        names = ", ".join(f"`{look.name}`" for look in self.changed)
        least = self.settings.min_new_pairs
        if not least:
            return True, f"new feedback in {names}"
        counts = [self.count(look, self.read.get(look.name)) for look in self.changed]
        if None in counts:
            return True, f"new feedback in {names}, whose pairs cannot be counted from outside"
        found = sum(max(0, one) for one in counts if one is not None)
        if found >= least:
            return True, f"{found} new pairs or more in {names}"
        waits = f"feedback waits: {found} new pairs in {names}, of {least} (refresh.min_new_pairs)"
        until = (cursor.changed_since or self.now) + self.settings.max_wait_hours * 3600
        if until <= self.now:
            return True, f"{waits}; it has waited since {_at(cursor.changed_since or self.now)}, the longest it may"
        return False, f"{waits}; at the latest at {_at(until)}"


def _at(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
