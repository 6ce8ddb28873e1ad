"""What becomes of an asset's errors and events: which are tried again, and that none shows a secret."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

import dpo_assets.assets.step as step_module
from dpo_assets import DpoPipeline, HubResource, build_dpo_defs
from dpo_assets.assets.node import Node
from dpo_assets.assets.step import Events, Step, guarded
from dpo_assets.errors import (
    ConfigError,
    DiskFull,
    FeedbackError,
    GateError,
    InfrastructureError,
    OutOfMemory,
    Preempted,
    StageSilent,
    StageTimeout,
)
from dpo_assets.recipe import Recipe, parse_recipe
from dpo_assets.resources.artifacts import ArtifactStore
from dpo_assets.resources.launcher import WorkerDied
from dpo_assets_tests.pipelines import STORIES, demo_recipe, failed_checks, failures, materialize

SECRET = "correct-horse-battery"
POLICY = dg.RetryPolicy(max_retries=3)
Body = Callable[[Step], Events]
GATE = GateError("licence_known", f"none, {SECRET}", value=SECRET, band="any", source="", fix=f"ask {SECRET}")


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dg.DagsterInstance]:
    """One in memory for all runs here: what is asked is asked of a run."""
    with dg.DagsterInstance.ephemeral(str(tmp_path_factory.mktemp("instance"))) as opened:
        yield opened


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "RETRY_SECONDS", 0.01)
    monkeypatch.setenv("FEEDBACK_PASSWORD", SECRET)


def run(
    body: Body,
    instance: dg.DagsterInstance,
    recipe: Recipe | None = None,
    resources: Mapping[str, dg.ConfigurableResource[Any]] | None = None,
) -> dg.ExecuteInProcessResult:
    """One asset with another body, in a job that brings a retry policy of its own."""

    class Pipeline(DpoPipeline):
        def execute(self, step: Step, nodes: tuple[Node, ...]) -> Events:
            yield from guarded(step, "base_model", body(step))

    defs = Pipeline("bot", recipe or parse_recipe(demo_recipe()), resources).build_defs()
    job = dg.define_asset_job("one", selection=[dg.AssetKey(["bot", "base_model"])], op_retry_policy=POLICY)
    resolved = dg.Definitions.merge(defs, dg.Definitions(jobs=[job])).resolve_job_def("one")
    return resolved.execute_in_process(instance=instance, raise_on_error=False)


def raising(error: Exception) -> Body:
    def body(step: Step) -> Iterator[Any]:
        raise error
        yield

    return body


def attempts(result: dg.ExecuteInProcessResult) -> int:
    kinds = [event.event_type for event in result.all_events]
    return 1 + kinds.count(dg.DagsterEventType.STEP_UP_FOR_RETRY)


def everything(instance: dg.DagsterInstance, result: dg.ExecuteInProcessResult) -> str:
    """All that the event log holds of a run."""
    return "".join(str(entry) for entry in instance.all_logs(result.run_id))


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (ConfigError("no such model"), 1),
        (FeedbackError("no such file"), 1),
        (OutOfMemory("too large"), 1),
        (StageTimeout("too long"), 1),
        (DiskFull("no room"), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (GATE, 1),
        (InfrastructureError("the Hub is down"), 1 + step_module.MAX_RETRIES),
        (WorkerDied("was ended by SIGKILL"), 1 + step_module.MAX_RETRIES),
        (Preempted("was told to end"), 1 + step_module.MAX_RETRIES),
        (StageSilent("hangs"), 1 + step_module.SILENT_RETRIES),
        # What nobody foresaw is the job's own affair.
        (KeyError("a bug"), 1 + POLICY.max_retries),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_only_what_may_go_better_is_tried_again_whatever_policy_the_job_has(
    instance: dg.DagsterInstance, error: Exception, tries: int
) -> None:
    result = run(raising(error), instance)
    assert not result.success
    assert attempts(result) == tries


def test_a_maximal_length_above_the_context_is_not_retried_under_a_policy(instance: dg.DagsterInstance) -> None:
    nodes = ["base_model", "raw_preferences", "quarantined_preferences", "dpo_dataset"]
    recipe = demo_recipe(feedback={"max_length": 1024})
    result = materialize(recipe, instance, nodes, op_retry_policy=POLICY)
    assert "context of 512 tokens" in failures(result)[-1]
    assert attempts(result) == 1


def test_a_base_that_fails_its_gate_is_not_retried_under_a_policy(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    shutil.copytree(STORIES, tmp_path / "unlicensed")
    recipe = demo_recipe(base_model={"source": str(tmp_path / "unlicensed")})
    result = materialize(recipe, instance, ["base_model"], op_retry_policy=POLICY)
    assert list(failed_checks(result)) == ["licence_known"]
    assert attempts(result) == 1


@pytest.mark.parametrize(
    "error",
    [
        ConfigError(f"cannot reach mysql://me:{SECRET}@db"),
        InfrastructureError(f"cannot reach mysql://me:{SECRET}@db"),
        StageTimeout(SECRET),
        GATE,
        ValueError(f"input_value={SECRET!r}"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_error_of_an_asset_brings_a_secret_into_the_event_log(
    instance: dg.DagsterInstance, error: Exception
) -> None:
    def body(step: Step) -> Iterator[Any]:
        try:
            raise RuntimeError(f"the cause: {SECRET}")
        except RuntimeError as cause:
            raise error from cause
        yield

    result = run(body, instance)
    assert not result.success
    assert "[secret]" in failures(result)[-1]
    assert SECRET not in everything(instance, result)


def test_no_metadata_of_an_asset_or_a_check_brings_a_secret_into_the_event_log(instance: dg.DagsterInstance) -> None:
    def body(step: Step) -> Iterator[Any]:
        yield dg.MaterializeResult(
            asset_key=step.pipeline.key("base_model"),
            metadata={
                "text": SECRET,
                "list": [SECRET],
                "markdown": dg.MetadataValue.md(f"| {SECRET} |"),
                "json": dg.MetadataValue.json({"rows": [{SECRET: SECRET}]}),
                "url": dg.MetadataValue.url(f"https://me:{SECRET}@host/"),
                "rows": 3,
                "path": dg.MetadataValue.path("/data"),
            },
            check_results=[
                dg.AssetCheckResult(
                    asset_key=step.pipeline.key("base_model"),
                    check_name=name,
                    passed=True,
                    description=f"seen: {SECRET}",
                    metadata={"value": SECRET},
                )
                for name in ("revision_pinned", "safetensors_only", "licence_known")
            ],
        )

    result = run(body, instance)
    assert result.success, failures(result)
    (event,) = result.get_asset_materialization_events()
    shown = event.step_materialization_data.materialization.metadata
    assert {
        name: value.value for name, value in shown.items() if name in ("text", "list", "markdown", "json", "url")
    } == {
        "text": "[secret]",
        "list": ["[secret]"],
        "markdown": "| [secret] |",
        "json": {"rows": [{"[secret]": "[secret]"}]},
        "url": "https://me:[secret]@host/",
    }
    assert (shown["rows"].value, shown["path"].value) == (3, "/data")
    assert SECRET not in everything(instance, result)


def test_a_gate_that_fails_in_the_worker_shows_as_its_check(instance: dg.DagsterInstance) -> None:
    said = failed_checks(run(raising(GATE), instance))["licence_known"]
    assert (said["value"], said["what to change"]) == ("[secret]", "ask [secret]")


def test_what_recipe_and_resources_name_as_secret_is_masked(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither variable's name says what it holds."""
    monkeypatch.setattr("dpo_assets.publishing.secrets._NAMED", set())
    monkeypatch.setenv("WHERE_THE_VOTES_ARE", "sqlite:///votes-of-march.db")
    monkeypatch.setenv("HUB_LOGIN", "a-login-of-the-hub")
    sql = {"url_env": "WHERE_THE_VOTES_ARE", "table": "votes", "id": "id"}
    recipe = parse_recipe(demo_recipe(feedback={"sources": [{"sql": sql}]}))
    assert recipe.secret_variables == {"WHERE_THE_VOTES_ARE"}

    def body(step: Step) -> Iterator[Any]:
        raise ConfigError("neither sqlite:///votes-of-march.db nor a-login-of-the-hub")
        yield

    result = run(body, instance, recipe, {"hub": HubResource(token_variable="HUB_LOGIN")})
    assert failures(result) == ["neither [secret] nor [secret]"]


def test_a_sensor_that_cannot_read_says_so_without_a_secret(instance: dg.DagsterInstance) -> None:
    recipe = demo_recipe(feedback={"sources": [{"path": f"memory://{SECRET}/votes.jsonl", "format": "trl"}]})
    sensor = build_dpo_defs("bot", recipe).resolve_sensor_def("bot_new_feedback")
    with dg.build_sensor_context(instance, resources={"bot_artifacts": ArtifactStore()}) as context:
        said = sensor.evaluate_tick(context)
    assert "[secret]/votes.jsonl` matches no file" in str(said.skip_message)
    assert SECRET not in str(said.skip_message)
