"""What people should hear of without looking: gates that hold, runs that failed, feedback that waits.

The sensor reads the event log of runs that ended, makes a text of what is amiss in each, and hands it on: to the
webhook of the recipe, or to what a subclass of the component does with it. A text that could not be handed on is tried
again at the next tick.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
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
KEPT = 200  # Runs that are known to have been told.
LOOK_BACK = 3600.0  # Seconds: the end of a run may be recorded late.
POST_SECONDS = 20.0
LONGEST = 600  # Characters of what one check or step said.


class Waiting(BaseModel):
    """What the new-feedback sensor holds back: since when (seconds since the epoch), and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    since: float
    reason: str

    @classmethod
    def at(cls, tree: ArtifactTree) -> Self | None:
        """The note of a pipeline; None where nothing waits, or it cannot be read."""
        with suppress(OSError, ValidationError):
            return cls.model_validate_json(_note(tree).read_bytes())
        return None


def note_waiting(tree: ArtifactTree, waiting: Waiting | None) -> None:
    """Keeps what waits, or that nothing does."""
    if waiting == Waiting.at(tree):
        return
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
        looked: when it looked last.
        runs: the latest that were looked at.
        waiting: since when what waited that was told last.
    """

    model_config = ConfigDict(extra="forbid")
    begun: float
    looked: float
    runs: tuple[str, ...] = ()
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
        runs = list(_ended_since(context.instance, told))
        said = [_ended(context.instance, run, pipeline).text(pipeline.name) for run in runs]
        waiting, since = Waiting.at(store.tree(context.instance, pipeline.name)), told.waiting
        if waiting is not None and waiting.since != since:
            hours = pipeline.recipe.refresh.alert_wait_hours
            if text := waiting_text(pipeline.name, waiting, now, hours):
                said.append(text)
                since = waiting.since
        texts = [scrub(text) for text in said if text]
        for text in texts:
            send(context, text)
        seen = (*told.runs, *(run.run_id for run in runs))[-KEPT:]
        cursor = Told(begun=told.begun, looked=now, runs=seen, waiting=since)
        return dg.SensorResult(skip_reason="; ".join(texts) or "nothing to tell", cursor=cursor.model_dump_json())

    return alert


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


def _ended_since(instance: dg.DagsterInstance, told: Told) -> Iterator[dg.DagsterRun]:
    """Runs that ended and were not looked at, the earliest first. Not those that a person cancelled."""
    ended = dg.RunsFilter(
        statuses=[dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE],
        updated_after=datetime.fromtimestamp(told.since, UTC),
    )
    for record in reversed(instance.get_run_records(ended)):
        at = record.end_time or record.update_timestamp.timestamp()
        if at >= told.since and record.dagster_run.run_id not in told.runs:
            yield record.dagster_run


def _ended(instance: dg.DagsterInstance, run: dg.DagsterRun, pipeline: Pipeline) -> Ended:
    """What the event log has of the pipeline's steps in a run; of a check that was evaluated several times the last.

    By its events, for a run of single assets can be of a job of any name, and of assets of several pipelines.
    """
    checks: dict[tuple[str, str], Held | None] = {}
    faults: list[str] = []
    kinds = {dg.DagsterEventType.ASSET_CHECK_EVALUATION, dg.DagsterEventType.STEP_FAILURE}
    for record in instance.get_records_for_run(run.run_id, of_type=kinds).records:
        event = record.event_log_entry.dagster_event
        if event is None or (event.step_key or "").rpartition("__")[0] != pipeline.name:
            continue
        if event.event_type == dg.DagsterEventType.STEP_FAILURE:
            data = event.step_failure_data
            said = data.user_failure_data.description if data.user_failure_data else None
            faults.append(f"{event.step_key}: {said or (data.error.message if data.error else 'no reason is known')}")
            continue
        found = event.asset_check_evaluation_data
        asset, blocks = found.asset_key.to_user_string(), found.severity == dg.AssetCheckSeverity.ERROR
        held = None if found.passed else Held(found.check_name, asset, blocks, found.description or "")
        checks[asset, found.check_name] = held
    held_checks = [held for held in checks.values() if held is not None]
    jobs = {refresh_name(pipeline), f"{pipeline.name}_rollback", f"{pipeline.name}_retention"}
    failed = run.status == dg.DagsterRunStatus.FAILURE and (bool(faults) or run.job_name in jobs)
    return Ended(run.run_id, run.job_name, failed, held_checks, faults)
