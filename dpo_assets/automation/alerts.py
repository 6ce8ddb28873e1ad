"""What people should hear of without looking: gates that hold, runs that failed, feedback that waits.

The sensor reads the event log of runs that ended, makes a text of what is amiss in each, and hands it on: to the
webhook of the recipe, or to what a subclass of the component does with it. A text that could not be handed on is tried
again at the next tick, and holds no other up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import dagster as dg
from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_assets.artifact import ArtifactTree
from dpo_assets.assets.pipeline import Pipeline
from dpo_assets.automation.jobs import refresh_name
from dpo_assets.errors import ConfigError, InfrastructureError
from dpo_assets.publishing.secrets import scrub
from dpo_assets.resources.artifacts import ArtifactStore

Send = Callable[[dg.SensorEvaluationContext, str], None]
NAMED = ("promotion_verdict", "release_verified")  # Checks that are told also where they are yellow: a hold is.
PER_TICK = 200  # Runs whose events a tick reads: after months off there are many.
SEND_SECONDS = 30.0  # After which a tick begins to send no further text: Dagster ends a tick after 60 s.
LOOK_BACK = 3600.0  # Seconds: the end of a run may be recorded late.
WAITS = "feedback"  # What is told of no run.
POST_SECONDS = 20.0
TELLING = {  # Events of a run that say whose it was and what became of it.
    dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED,
    dg.DagsterEventType.STEP_START,
    dg.DagsterEventType.ASSET_CHECK_EVALUATION,
    dg.DagsterEventType.STEP_FAILURE,
    dg.DagsterEventType.RUN_FAILURE,
}
LONGEST = 600  # Characters of what one check or step said.


class Waiting(BaseModel):
    """What the new-feedback sensor holds back: since when, when it saw so last (seconds since the epoch), and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    since: float
    seen: float
    reason: str

    @classmethod
    def at(cls, tree: ArtifactTree) -> Self | None:
        """The note of a pipeline; None where nothing waits, or it cannot be read."""
        with suppress(OSError, ValidationError):
            return cls.model_validate_json(_note(tree).read_bytes())
        return None


def note_waiting(tree: ArtifactTree, waiting: Waiting | None) -> None:
    """Keeps what waits, or that nothing does."""
    note = _note(tree)
    if waiting is None:
        note.unlink(missing_ok=True)
        return
    note.parent.mkdir(parents=True, exist_ok=True)
    partial = note.with_suffix(".tmp")
    partial.write_text(waiting.model_dump_json(), encoding="utf-8")
    partial.replace(note)


def _note(tree: ArtifactTree) -> Path:
    return tree.root / "waiting.json"


@dataclass(frozen=True)
class Held:
    """A check that did not pass: on which asset, whether it stops what comes behind it, what it said."""

    check: str
    asset: str
    blocks: bool
    said: str


@dataclass(frozen=True)
class Ended:
    """What a run that ended has to tell.

    Args:
        failed: whether it failed, in a step of the pipeline or as a whole.
        checks: those that did not pass.
        faults: what steps that failed said.
    """

    run_id: str
    job: str
    failed: bool
    checks: Sequence[Held]
    faults: Sequence[str]

    def text(self, pipeline: str) -> str:
        """For people; empty where all went as it should. A run that a person cancelled is no news."""
        told = [one for one in self.checks if one.blocks or one.check in NAMED]
        lines = [
            f"- `{one.check}` of {one.asset} {'holds' if one.blocks else 'warns'}: {_cut(one.said)}" for one in told
        ]
        # A step behind a red gate fails because of it, which needs no second line.
        lines += [f"- {_cut(fault)}" for fault in self.faults] if not any(one.blocks for one in told) else []
        if not lines and not self.failed:
            return ""
        verb = "failed" if self.failed else "ended with a hold"
        return "\n".join([f"`{pipeline}`: run {self.run_id} ({self.job}) {verb}", *lines])


def waiting_text(pipeline: str, waiting: Waiting, now: float, hours: float) -> str:
    """For people; empty while it waits no longer than `hours`."""
    if now - waiting.since < hours * 3600:
        return ""
    since = f"{datetime.fromtimestamp(waiting.since, UTC):%Y-%m-%d %H:%M} UTC"
    return f"`{pipeline}`: feedback has waited since {since}. {_cut(waiting.reason)}"


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


class Told(BaseModel):
    """The sensor's cursor, with times in seconds since the epoch.

    Args:
        begun: what ended before it is no news.
        looked: up to when runs were looked at.
        runs: those that were looked at and may be found again, with the time of their last change.
        owed: those whose text was not taken.
        waiting: since when what waited that was told last.
    """

    model_config = ConfigDict(extra="forbid")
    begun: float
    looked: float
    runs: dict[str, float] = {}
    owed: tuple[str, ...] = ()
    waiting: float | None = None

    @classmethod
    def of(cls, text: str | None, now: float) -> Self:
        """As it was kept; a new one in place of a damaged one or none."""
        with suppress(ValidationError):
            return cls.model_validate_json(text or "")
        return cls(begun=now, looked=now)

    @property
    def since(self) -> float:
        """Runs that ended before it are not looked at: they were, or are no news."""
        return max(self.begun, self.looked - LOOK_BACK)

    def after(self, found: Found, owed: Sequence[str], waiting: float | None) -> Told:
        """The cursor behind a tick: of the runs that were looked at, those that the next tick could find again."""
        told = Told(begun=self.begun, looked=found.looked, owed=tuple(owed), waiting=waiting)
        runs = {run: at for run, at in {**self.runs, **found.seen}.items() if at >= told.since}
        return told.model_copy(update={"runs": runs})


@dataclass(frozen=True)
class Found:
    """What a tick finds of runs.

    Args:
        runs: that ended and were not told, the earliest first. Not those that a person cancelled.
        seen: all that were looked at, with the time of their last change (seconds since the epoch).
        looked: up to when.
        more: whether there are further ones, for the next tick.
    """

    runs: Sequence[dg.DagsterRun]
    seen: Mapping[str, float]
    looked: float
    more: bool


def alerts_sensor(pipeline: Pipeline, send: Send) -> dg.SensorDefinition:
    """Hands on what is amiss in runs of the pipeline that ended, and feedback that waits for long; each once."""
    store_key = pipeline.resource_key("artifacts")

    @dg.sensor(
        name=f"{pipeline.name}_alerts",
        minimum_interval_seconds=pipeline.recipe.refresh.sensor_interval_seconds,
        default_status=dg.DefaultSensorStatus.STOPPED,
        required_resource_keys={store_key},
        description="Tells of gates that hold, runs that failed and feedback that waits, once each.",
    )
    def alert(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        store, now = getattr(context.resources, store_key), time.time()
        assert isinstance(store, ArtifactStore)
        told = Told.of(context.cursor, now)
        found = _ended_since(context.instance, told, now)
        texts = {run.run_id: _ended(context.instance, run, pipeline).text(pipeline.name) for run in found.runs}
        waiting = Waiting.at(store.tree(context.instance, pipeline.name))
        if waiting is not None and (waiting.since == told.waiting or _was_read(context.instance, pipeline, waiting)):
            waiting = None
        if waiting is not None:
            texts[WAITS] = waiting_text(pipeline.name, waiting, now, pipeline.recipe.refresh.alert_wait_hours)
        texts = {of: scrub(text) for of, text in texts.items() if text}
        refused = _send(context, send, texts)
        sent = [text for of, text in texts.items() if of not in refused]
        errors = [error for error in refused.values() if error is not None]
        # A tick that fails keeps no cursor, so it may fail only where there is nothing to keep.
        if errors and not sent and not found.more:
            raise errors[0]
        for error in errors:
            context.log.error(scrub(f"a text was not taken, and is tried again: {error}"))
        since = waiting.since if waiting is not None and WAITS in texts and WAITS not in refused else told.waiting
        cursor = told.after(found, [run for run in refused if run != WAITS], since)
        sent += [f"{len(refused)} texts are left for the next tick"] if refused else []
        return dg.SensorResult(skip_reason="; ".join(sent) or "nothing to tell", cursor=cursor.model_dump_json())

    return alert


def _send(context: dg.SensorEvaluationContext, send: Send, texts: Mapping[str, str]) -> dict[str, Exception | None]:
    """Sends each; those that were not taken with the error, or with None where there was no time to try."""
    refused: dict[str, Exception | None] = {}
    began = time.monotonic()
    for of, text in texts.items():
        if time.monotonic() - began > SEND_SECONDS:
            refused[of] = None
            continue
        try:
            send(context, text)
        except Exception as error:  # Whatever a subclass of the component does: the others are told all the same.
            refused[of] = error
    return refused


def _was_read(instance: dg.DagsterInstance, pipeline: Pipeline, waiting: Waiting) -> bool:
    """Whether feedback was read since the sensor looked last: it is off, and a run that somebody started came first."""
    newest = instance.fetch_materializations(pipeline.key("raw_preferences"), limit=1).records
    return bool(newest) and newest[0].timestamp > waiting.seen


def to_webhook(variable: str) -> Send:
    """Hands texts to the webhook whose address an environment variable holds, as `{"text": ...}`.

    That is the form of incoming webhooks of Slack, Mattermost, Rocket.Chat and others.
    """

    def send(context: dg.SensorEvaluationContext, text: str) -> None:
        import httpx

        address = os.environ.get(variable)
        if not address:
            raise ConfigError(f"refresh.alert_url_env: the environment variable {variable} is not set.")
        try:
            httpx.post(address, json={"text": text}, timeout=POST_SECONDS).raise_for_status()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            # Only what kind of error: the address is a secret, and texts of errors name it.
            status = f" {error.response.status_code}" if isinstance(error, httpx.HTTPStatusError) else ""
            raise InfrastructureError(
                f"the webhook in {variable} took no alert ({type(error).__name__}{status}); it is tried again"
            ) from None

    return send


def _ended_since(instance: dg.DagsterInstance, told: Told, now: float) -> Found:
    statuses = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE]
    ended = dg.RunsFilter(statuses=statuses, updated_after=datetime.fromtimestamp(told.since, UTC))
    limit = PER_TICK + len(told.runs)  # All of those may be among them.
    records = instance.get_run_records(ended, limit=limit, order_by="update_timestamp", ascending=True)
    owed = instance.get_run_records(dg.RunsFilter(run_ids=list(told.owed))) if told.owed else []
    runs, seen = [record.dagster_run for record in reversed(owed)], dict[str, float]()
    fresh, changed = 0, now
    for record in records:
        run, changed = record.dagster_run, record.update_timestamp.timestamp()
        # A tag that is set later changes a run as well: one that ended long ago is no news.
        if run.run_id not in told.runs and (record.end_time or changed) >= told.since:
            runs.append(run)
            fresh += 1
        seen[run.run_id] = changed
        if fresh == PER_TICK:
            break
    more = len(seen) == limit or fresh == PER_TICK
    # Never back: what was forgotten by then would be news again.
    looked = max(told.looked, changed if more else now)
    return Found(runs, seen, looked, more)


def _ended(instance: dg.DagsterInstance, run: dg.DagsterRun, pipeline: Pipeline) -> Ended:
    """What the event log has of the pipeline's steps in a run; of a check that was evaluated several times the last.

    By its events, for a run of single assets can be of a job of any name, and of assets of several pipelines.
    """
    checks: dict[tuple[str, str], Held | None] = {}
    faults, ends, stopped = list[str](), list[str](), False
    jobs = {refresh_name(pipeline), f"{pipeline.name}_rollback", f"{pipeline.name}_retention"}
    selected = (run.asset_selection or set()) | {check.asset_key for check in run.asset_check_selection or ()}
    ours = run.job_name in jobs or any(key.path[0] == pipeline.name for key in selected)
    for record in instance.get_records_for_run(run.run_id, of_type=TELLING).records:
        event = record.event_log_entry.dagster_event
        if event is None:
            continue
        stopped |= event.event_type == dg.DagsterEventType.STEP_FAILURE
        if event.event_type == dg.DagsterEventType.RUN_FAILURE:
            ends.append(event.message or "no reason is known")
        if run.job_name not in jobs and (event.step_key or "").rpartition("__")[0] != pipeline.name:
            continue
        ours = True
        if event.event_type == dg.DagsterEventType.STEP_FAILURE:
            faults.append(_fault(event))
        elif event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
            found = event.asset_check_evaluation_data
            asset, blocks = found.asset_key.to_user_string(), found.severity == dg.AssetCheckSeverity.ERROR
            held = None if found.passed else Held(found.check_name, asset, blocks, found.description or "")
            checks[asset, found.check_name] = held
    held_checks = [held for held in checks.values() if held is not None]
    if run.status != dg.DagsterRunStatus.FAILURE:
        return Ended(run.run_id, run.job_name, False, held_checks, faults)
    # Where no step of anybody failed, the run's process was killed, or never came up.
    faults += ends[-1:] if ours and not stopped else []
    return Ended(run.run_id, run.job_name, bool(faults), held_checks, faults)


def _fault(event: dg.DagsterEvent) -> str:
    """What a step that failed said."""
    data = event.step_failure_data
    said = data.user_failure_data.description if data.user_failure_data else None
    return f"{event.step_key}: {said or (data.error.message if data.error else 'no reason is known')}"
