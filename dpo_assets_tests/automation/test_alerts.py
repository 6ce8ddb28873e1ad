"""What is told without anybody looking: real runs of an instance, a real webhook."""
# No `from __future__ import annotations` here: Dagster reads the annotation of an op's `context` as a class.

import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

import dpo_assets.automation.alerts as alerts_module
from dpo_assets import DpoPipeline
from dpo_assets.assets.pipeline import Pipeline
from dpo_assets.automation import alerts_sensor, new_feedback_sensor, refresh_job, to_webhook
from dpo_assets.automation.alerts import Ended, Found, Held, Told, Waiting, note_waiting, waiting_text
from dpo_assets.errors import ConfigError, InfrastructureError
from dpo_assets.publishing.secrets import name_secrets
from dpo_assets.recipe import parse_recipe
from dpo_assets.resources.artifacts import ArtifactStore
from dpo_assets_tests.pipelines import demo_recipe, trl_feedback, trl_recipe

HOUR = 3600.0
PIPELINE = Pipeline("demo", parse_recipe(demo_recipe()))


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral(str(tmp_path)) as opened:
        yield opened


class Webhook:
    """A server that takes alerts; `status` is its next answer."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if outer.status == 200:
                    outer.got.append(body)
                self.send_response(outer.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/services/T000/secret-part"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    server = Webhook()
    monkeypatch.setenv("OUR_CHANNEL", server.url)
    name_secrets("OUR_CHANNEL")
    yield server
    server.server.shutdown()
    server.server.server_close()


def run(instance: dg.DagsterInstance, check: str, level: str, name: str = "demo") -> str:
    """A run that materialises one asset of a pipeline with one check."""
    key = dg.AssetKey([name, "promotion"])
    severity = dg.AssetCheckSeverity.WARN if level == "warn" else dg.AssetCheckSeverity.ERROR
    said = "hold: it is no better than what is live. Collect 300 pairs."

    @dg.multi_asset(
        name=f"{name}__promotion", specs=[dg.AssetSpec(key)],
        check_specs=[dg.AssetCheckSpec(check, asset=key, blocking=True)],
    )  # fmt: skip
    def step():  # type: ignore[no-untyped-def]  # Dagster reads an annotation as that of several outputs.
        result = dg.AssetCheckResult(
            passed=level == "pass", check_name=check, asset_key=key, severity=severity, description=said
        )
        return dg.MaterializeResult(asset_key=key, check_results=[result])

    return dg.materialize([step], instance=instance, raise_on_error=False).run_id


def broken(instance: dg.DagsterInstance) -> str:
    @dg.asset(key=["demo", "dpo_plan"])
    def step() -> None:
        raise dg.Failure(f"no GPU is in sight; {'x' * 2000}")

    return dg.materialize([step], instance=instance, raise_on_error=False).run_id


def tick(instance: dg.DagsterInstance, send: Any, cursor: str | None) -> Any:
    with dg.build_sensor_context(instance, cursor, resources={"demo_artifacts": ArtifactStore()}) as context:
        return alerts_sensor(PIPELINE, send).evaluate_tick(context)


def test_gates_and_failures_of_runs_are_told_once_and_nothing_else_is(
    instance: dg.DagsterInstance, webhook: Webhook
) -> None:
    send = to_webhook("OUR_CHANNEL")
    run(instance, "promotion_verdict", "error")
    first = tick(instance, send, None)
    assert webhook.got == [], "what ended before the sensor began is no news"
    held = run(instance, "promotion_verdict", "warn")
    gate = run(instance, "collapse", "error")
    failed = broken(instance)
    run(instance, "length_bias", "warn")
    run(instance, "collapse", "pass")
    run(instance, "collapse", "error", name="demo_two")
    second = tick(instance, send, first.cursor)
    told = [one["text"] for one in webhook.got]
    assert [text.splitlines()[0].split(" (")[0] for text in told] == [
        f"`demo`: run {held}", f"`demo`: run {gate}", f"`demo`: run {failed}",
    ]  # fmt: skip
    assert "ended with a hold\n- `promotion_verdict` of demo/promotion warns: hold: it is no better" in told[0]
    assert "failed\n- `collapse` of demo/promotion holds: hold" in told[1]
    assert told[1].count("\n") == 1, "a step that fails for its gate is no second news"
    assert "failed\n- demo__dpo_plan: no GPU is in sight" in told[2]
    assert len(told[2]) < 800
    assert "promotion_verdict" in str(second.skip_message)
    third = tick(instance, send, second.cursor)
    assert (len(webhook.got), third.skip_message) == (3, "nothing to tell")


def test_an_alert_that_the_webhook_does_not_take_is_tried_again_and_its_address_stays_a_secret(
    instance: dg.DagsterInstance, webhook: Webhook
) -> None:
    send, begun = to_webhook("OUR_CHANNEL"), tick(instance, print, None)
    run(instance, "collapse", "error")
    webhook.status = 500
    with pytest.raises(Exception, match="OUR_CHANNEL took no alert") as refused:
        tick(instance, send, begun.cursor)
    for error in (refused.value, refused.value.__cause__):
        assert webhook.url not in repr(error)
    webhook.status = 200
    tick(instance, send, begun.cursor)
    assert len(webhook.got) == 1
    with pytest.raises(ConfigError, match="the environment variable NOT_THERE is not set"):
        to_webhook("NOT_THERE")(None, "text")  # type: ignore[arg-type]
    webhook.status = 404
    with pytest.raises(InfrastructureError, match="took no alert"):
        send(None, "text")  # type: ignore[arg-type]


def test_feedback_that_waits_for_long_is_told_once_with_what_it_waits_for(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    recipe = parse_recipe(trl_recipe(trl_feedback(tmp_path / "a.jsonl", pairs=5)) | {"refresh": {"min_new_pairs": 50}})
    pipeline, store, said = Pipeline("demo", recipe), ArtifactStore(), list[str]()

    def look(cursor: str | None) -> Any:
        with dg.build_sensor_context(instance, cursor, resources={"demo_artifacts": store}) as context:
            return new_feedback_sensor(pipeline, refresh_job(pipeline)).evaluate_tick(context)

    os.utime(tmp_path / "a.jsonl", (1_700_000_000, 1_700_000_000))
    first = look(None)
    tree = store.tree(instance, "demo")
    waiting = Waiting.at(tree)
    assert waiting is not None
    assert "5 new pairs" in waiting.reason
    begun = tick(instance, lambda _, text: said.append(text), None)
    assert said == [], "it waits for some seconds"
    # As if it had begun to wait two days ago: the note says since when.
    note_waiting(tree, waiting.model_copy(update={"since": time.time() - 48 * HOUR}))
    second = tick(instance, lambda _, text: said.append(text), begun.cursor)
    tick(instance, lambda _, text: said.append(text), second.cursor)
    [text] = said
    assert "feedback has waited since 20" in text
    assert "of 50 (refresh.min_new_pairs)" in text
    # Enough of it is there: nothing waits any more.
    trl_feedback(tmp_path / "a.jsonl", pairs=60)
    os.utime(tmp_path / "a.jsonl", (1_700_000_000, 1_700_000_000))
    assert look(first.cursor).run_requests
    assert Waiting.at(tree) is None


def test_feedback_that_a_run_has_read_since_the_sensor_looked_is_told_of_to_nobody(
    instance: dg.DagsterInstance,
) -> None:
    """The sensor is off, so its note stays."""
    tree, said = ArtifactStore().tree(instance, "demo"), list[str]()
    begun = tick(instance, print, None)
    note_waiting(tree, Waiting(since=time.time() - 48 * HOUR, seen=time.time() - HOUR, reason="it waits"))
    instance.report_runless_asset_event(dg.AssetMaterialization(dg.AssetKey(["demo", "raw_preferences"])))
    tick(instance, lambda _, text: said.append(text), begun.cursor)
    assert said == []
    note_waiting(tree, Waiting(since=time.time() - 48 * HOUR, seen=time.time() + 1, reason="it waits again"))
    tick(instance, lambda _, text: said.append(text), begun.cursor)
    assert len(said) == 1


def test_a_text_that_is_refused_repeats_no_other_and_hides_none(instance: dg.DagsterInstance) -> None:
    cursor = tick(instance, print, None).cursor
    first, bad, last = (run(instance, "collapse", "error") for _ in range(3))
    said: list[str] = []

    def send(_: object, text: str) -> None:
        if bad in text:
            raise RuntimeError("invalid_payload")
        said.append(text)

    partly = tick(instance, send, cursor)
    assert [one.split()[2] for one in said] == [first, last]
    assert "1 texts are left for the next tick" in partly.skip_message
    with pytest.raises(Exception, match="invalid_payload"):  # Nothing else is to be told: the tick says so in red.
        tick(instance, send, partly.cursor)
    newer = run(instance, "collapse", "error")
    later = tick(instance, send, partly.cursor)
    assert [one.split()[2] for one in said] == [first, last, newer]
    at_last: list[str] = []
    done = tick(instance, lambda _, text: at_last.append(text), later.cursor)
    assert [one.split()[2] for one in at_last] == [bad]
    assert tick(instance, send, done.cursor).skip_message == "nothing to tell"


def test_a_tick_has_an_end_also_where_each_text_takes_long(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dagster ends a tick that takes too long, and keeps no cursor of it."""
    monkeypatch.setattr(alerts_module, "SEND_SECONDS", 0.05)
    cursor = tick(instance, print, None).cursor
    runs, said = [run(instance, "collapse", "error") for _ in range(2)], list[str]()

    def send(_: object, text: str) -> None:
        time.sleep(0.1)
        said.append(text)

    cursor = tick(instance, send, cursor).cursor
    assert len(said) == 1
    tick(instance, send, cursor)
    assert [one.split()[2] for one in said] == runs


def crashed(instance: dg.DagsterInstance, status: dg.DagsterRunStatus = dg.DagsterRunStatus.FAILURE, **of: Any) -> str:
    """A run whose process ended before any of its steps did, as Dagster's implicit asset job and others have them."""
    names = of.pop("names", ("demo",))

    steps = [
        dg.multi_asset(name=f"{name}__dpo_plan", specs=[dg.AssetSpec([name, "dpo_plan"])])(lambda: None)
        for name in names
    ]
    job = dg.Definitions(assets=steps, jobs=[dg.define_asset_job("any_job", "*")]).resolve_job_def("any_job")
    made = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED, **of)
    if status == dg.DagsterRunStatus.FAILURE:
        instance.report_run_failed(made, "the run worker died")
    else:
        instance.report_run_canceled(made)
    return made.run_id


def test_a_run_of_the_pipeline_whose_process_is_gone_is_told_whatever_its_job_is_called(
    instance: dg.DagsterInstance,
) -> None:
    begun, said = tick(instance, print, None), list[str]()
    planned = crashed(instance)
    both = crashed(instance, names=("demo", "demo_two"))
    selected = crashed(instance, names=("demo",), asset_selection=frozenset({dg.AssetKey(["demo", "dpo_plan"])}))
    crashed(instance, names=("demo_two",))
    crashed(instance, dg.DagsterRunStatus.CANCELED)
    tick(instance, lambda _, text: said.append(text), begun.cursor)
    assert said == [f"`demo`: run {one} (any_job) failed\n- the run worker died" for one in (planned, both, selected)]


def test_each_run_is_told_once_however_many_there_are_and_a_tick_reads_so_many(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alerts_module, "PER_TICK", 3)
    cursor, said = tick(instance, print, None).cursor, list[str]()
    runs = [crashed(instance) for _ in range(8)]
    counts = []
    for _ in range(5):
        cursor = tick(instance, lambda _, text: said.append(text), cursor).cursor
        counts.append(len(said))
        instance.add_run_tags(runs[0], {"seen": str(len(said))})  # Changes a run that was told.
    assert counts == [3, 6, 8, 8, 8]
    assert [one.split()[2] for one in said] == runs


def test_runs_are_forgotten_only_where_they_cannot_be_found_again() -> None:
    told = Told(begun=0.0, looked=9000.0, runs={"old": 8000.0, "new": 8999.0})
    next_ = told.after(Found([], {"newer": 12000.0}, 12100.0, False), ["owed"], None)
    assert (next_.since, next_.runs, next_.owed) == (8500.0, {"new": 8999.0, "newer": 12000.0}, ("owed",))


def test_texts_say_what_holds_and_are_empty_where_nothing_does() -> None:
    held = Held("promotion_verdict", "demo/promotion", False, "hold")
    assert Ended("r", "job", False, [held], []).text("demo").endswith("warns: hold")
    assert Ended("r", "job", False, [Held("length_bias", "demo/dpo_dataset", False, "x")], []).text("demo") == ""
    assert Ended("r", "job", True, [], []).text("demo") == "`demo`: run r (job) failed"
    assert waiting_text("demo", Waiting(since=0.0, seen=0.0, reason="why"), 2 * HOUR, 2.1) == ""
    assert "1970-01-01 00:00 UTC. why" in waiting_text(
        "demo", Waiting(since=0.0, seen=0.0, reason="why"), 2 * HOUR, 2.0
    )


@pytest.mark.parametrize("text", [None, "", "{", '{"begun": "soon"}', '{"begun": 1.0, "looked": 1.0, "more": 1}'])
def test_a_damaged_cursor_begins_anew_from_now(text: str | None) -> None:
    assert Told.of(text, 5.0) == Told(begun=5.0, looked=5.0)


def test_a_subclass_sends_alerts_its_own_way_and_without_a_webhook_they_are_logged() -> None:
    said = []

    class Ours(DpoPipeline):
        def alert(self, context: dg.SensorEvaluationContext, text: str) -> None:
            said.append(text)

    Ours("demo", PIPELINE.recipe).alert(None, "text")  # type: ignore[arg-type]
    assert said == ["text"]
    with dg.build_sensor_context() as context:
        DpoPipeline("demo", PIPELINE.recipe).alert(context, "held")
    with pytest.raises(
        ConfigError, match=r"refresh\.alert_url_env: the name of an environment variable is meant"
    ) as no:
        parse_recipe(demo_recipe(refresh={"alert_url_env": "https://hooks.example.com/T0/secret-part"}))
    assert "secret-part" not in str(no.value)
