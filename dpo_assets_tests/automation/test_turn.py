"""One run of a pipeline at a time, without a line in a dagster.yaml: real runs at once, one of them really killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest

import dpo_assets.assets.step as step_module
from dpo_assets import DpoPipeline
from dpo_assets.assets import published_model
from dpo_assets.assets.materialisations import FINGERPRINT
from dpo_assets.assets.node import Node
from dpo_assets.assets.step import Events, Step, guarded
from dpo_assets.assets.turn import WAITS, Holder, end_lost
from dpo_assets.errors import InfrastructureError
from dpo_assets.recipe import parse_recipe
from dpo_assets.resources.artifacts import ArtifactStore
from dpo_assets_tests.pipelines import demo_recipe, failures, trl_feedback, trl_recipe

HELD = "raw_preferences"


class Home:
    """A Dagster home whose dagster.yaml says nothing of concurrency, and runs in processes of their own."""

    def __init__(self, folder: Path, executor: str) -> None:
        self.folder, self.go, self.notes = folder, folder / "go", folder / "notes"
        recipe = folder / "recipe.json"
        values = trl_recipe(trl_feedback(folder / "a.jsonl", pairs=60)) | {"refresh": {"executor": executor}}
        recipe.write_text(json.dumps(values), encoding="utf-8")
        (folder / "dagster.yaml").write_text("telemetry: {enabled: false}\n", encoding="utf-8")
        self.environment = os.environ | {
            "DAGSTER_HOME": str(folder),
            "RECIPE": str(recipe),
            "NOTES": str(self.notes),
            "HOLD_UNTIL": str(self.go),
        }
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, assets: str, hold: str = "") -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dagster", "asset", "materialize"]
        command += ["-m", "dpo_assets_tests.automation.location"]
        with (self.folder / f"out{len(self.processes)}").open("wb") as out:
            process = subprocess.Popen(
                [*command, "--select", assets],
                env=self.environment | {"HOLD": hold},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def output(self, process: subprocess.Popen[bytes]) -> str:
        return (self.folder / f"out{self.processes.index(process)}").read_text(encoding="utf-8", errors="replace")

    def noted(self) -> list[tuple[str, str, str]]:
        """(run, asset, begins or ends), in the order in which it happened."""
        if not self.notes.exists():
            return []
        lines = [line.split() for line in self.notes.read_text(encoding="utf-8").splitlines()]
        return [(run, asset, what) for run, asset, what, _ in lines]

    def until(self, process: subprocess.Popen[bytes], said: str) -> None:
        """Waits until a process has said something."""
        deadline = time.monotonic() + 120
        while said not in self.output(process):
            assert time.monotonic() < deadline, self.output(process)
            assert process.poll() is None, self.output(process)
            time.sleep(0.2)

    def until_held(self) -> str:
        """The run whose body is held."""
        deadline = time.monotonic() + 120
        while not (held := [run for run, asset, what in self.noted() if (asset, what) == (HELD, "begins")]):
            assert time.monotonic() < deadline, self.output(self.processes[0])
            time.sleep(0.2)
        return held[0]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    made = Home(tmp_path, "location")
    yield made
    for process in made.processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_two_runs_at_once_take_turns_and_a_killed_one_leaves_none_behind(home: Home) -> None:
    """Steps of each are processes of their own: the turn outlasts them, and goes with the run."""
    first = home.start("demo/base_model,demo/raw_preferences", hold=HELD)
    killed = home.until_held()
    second = home.start("demo/raw_preferences")
    home.until(second, f"waits for run {killed} of this pipeline")
    assert {run for run, _, _ in home.noted()} == {killed}
    # Nobody of that run is left to say that it ended: the one that takes its turn does.
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert second.wait(120) == 0, home.output(second)
    [other] = {run for run, _, _ in home.noted()} - {killed}
    with dg.DagsterInstance.from_config(str(home.folder)) as instance:
        runs = {run.run_id: run.status for run in instance.get_runs()}
    assert runs == {killed: dg.DagsterRunStatus.FAILURE, other: dg.DagsterRunStatus.SUCCESS}


def made(step: Step, print_: str) -> dg.MaterializeResult[Any]:
    return dg.MaterializeResult(asset_key=step.pipeline.key(step.node), metadata={FINGERPRINT: print_})


def run_bodies(bodies: dict[str, Callable[[Step], Events]], instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    """Some assets of a pipeline, with other bodies."""

    class Pipeline(DpoPipeline):
        def execute(self, step: Step, nodes: tuple[Node, ...]) -> Events:
            yield from guarded(step, step.node, bodies[step.node](step))

    defs = Pipeline("demo", parse_recipe(demo_recipe())).build_defs()
    job = dg.define_asset_job("some", selection=[dg.AssetKey(["demo", name]) for name in bodies])
    resolved = dg.Definitions.merge(defs, dg.Definitions(jobs=[job])).resolve_job_def("some")
    return resolved.execute_in_process(instance=instance, raise_on_error=False)


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral(str(tmp_path)) as opened:
        yield opened


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "100"])
    yield process
    process.kill()
    process.wait()


def other_turn(instance: dg.DagsterInstance, process: int, name: str = "other_refresh") -> dg.DagsterRun:
    """A run that has the turn and lives in another process."""
    run = instance.create_run_for_job(dg.GraphDefinition(name).to_job(), status=dg.DagsterRunStatus.STARTED)
    note = ArtifactStore().tree(instance, "demo").root / "turn.json"
    note.parent.mkdir(parents=True, exist_ok=True)
    mine = Holder.of_this_process(run.run_id, "", 0)
    told = mine.model_copy(update={"process": process, "born": psutil.Process(process).create_time()})
    note.write_text(told.model_dump_json(), encoding="utf-8")
    return run


def test_a_step_gives_its_slot_of_a_pool_back_while_it_waits_and_waiting_is_no_failed_attempt(
    instance: dg.DagsterInstance, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run whose turn it is may need that very slot to come to its end."""
    monkeypatch.setattr(step_module, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(step_module, "RETRY_SECONDS", 0.01)
    other = other_turn(instance, sleeper.pid)
    threading.Timer(1.5, sleeper.kill).start()

    def fails(step: Step) -> Iterator[Any]:
        raise InfrastructureError("the worker died")
        yield

    result = run_bodies({"sft_checkpoint": fails}, instance)
    retries = [event for event in result.all_events if event.event_type == dg.DagsterEventType.STEP_UP_FOR_RETRY]
    assert len(retries) > 3
    [said] = failures(result)
    assert "the worker died" in said
    assert "Given up after 3 attempts" in said
    assert f"waits for run {other.run_id}" in "".join(str(entry) for entry in instance.all_logs(result.run_id))


def test_a_turn_ends_with_its_run_although_the_process_goes_on(
    instance: dg.DagsterInstance, sleeper: subprocess.Popen[bytes]
) -> None:
    """A code server outlives the runs that it starts."""
    instance.report_run_failed(other_turn(instance, sleeper.pid))
    assert run_bodies({"base_model": lambda step: iter([made(step, "a" * 32)])}, instance).success


def status_of(instance: dg.DagsterInstance, run: dg.DagsterRun) -> dg.DagsterRunStatus:
    found = instance.get_run_by_id(run.run_id)
    assert found is not None
    return found.status


def test_a_process_with_the_number_of_one_that_is_gone_is_another_one(
    instance: dg.DagsterInstance, sleeper: subprocess.Popen[bytes]
) -> None:
    run = other_turn(instance, sleeper.pid)
    tree = ArtifactStore().tree(instance, "demo")
    end_lost(instance, tree)
    assert status_of(instance, run) == dg.DagsterRunStatus.STARTED
    note = tree.root / "turn.json"
    told = Holder.model_validate_json(note.read_bytes())
    note.write_text(told.model_copy(update={"born": told.born - 1000}).model_dump_json(), encoding="utf-8")
    end_lost(instance, tree)
    assert status_of(instance, run) == dg.DagsterRunStatus.FAILURE
    note.write_text("{", encoding="utf-8")
    end_lost(instance, tree)
    assert run_bodies({"base_model": lambda step: iter([made(step, "a" * 32)])}, instance).success


def test_a_lost_run_whose_turn_is_taken_is_told_to_dagster_as_failed_and_never_twice(
    instance: dg.DagsterInstance, sleeper: subprocess.Popen[bytes]
) -> None:
    """Dagster would take it for under way for ever: no refresh would be asked for, and its GPU time would go on."""
    lost = other_turn(instance, sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    assert run_bodies({"base_model": lambda step: iter([made(step, "a" * 32)])}, instance).success
    assert status_of(instance, lost) == dg.DagsterRunStatus.FAILURE
    end_lost(instance, ArtifactStore().tree(instance, "demo"))
    ends = instance.get_records_for_run(lost.run_id, of_type=dg.DagsterEventType.RUN_FAILURE).records
    [event] = [record.event_log_entry.dagster_event for record in ends]
    assert event is not None
    assert f"the process of this run ({sleeper.pid} on " in (event.message or "")


def test_a_run_that_outlives_the_code_server_that_started_it_keeps_its_turn(sleeper: subprocess.Popen[bytes]) -> None:
    """In one process the run is a child of that server: reported as failed, it would train beside the next one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        child = pool.submit(Holder.of_this_process, "run", "step", 0).result()
        assert child.process == os.getpid()
        assert psutil.Process(child.step).create_time() == child.step_born
    orphan = child.model_copy(
        update={"born": 1.0, "step": sleeper.pid, "step_born": psutil.Process(sleeper.pid).create_time()}
    )
    assert not orphan.process_is_gone
    sleeper.kill()
    sleeper.wait()
    assert orphan.process_is_gone
    assert not child.process_is_gone, "a step of several ends before its run does"


@pytest.mark.parametrize(
    ("status", "end"),
    [
        (dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.FAILURE),
        (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED),
        (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.SUCCESS),
    ],
)
def test_a_run_that_is_lost_while_it_waits_for_its_turn_ends_as_well(
    instance: dg.DagsterInstance,
    sleeper: subprocess.Popen[bytes],
    status: dg.DagsterRunStatus,
    end: dg.DagsterRunStatus,
) -> None:
    """A reboot takes both, and the note of the turn names one."""
    run = instance.create_run_for_job(dg.GraphDefinition("demo_refresh").to_job(), status=status)
    tree = ArtifactStore().tree(instance, "demo")
    tree.root.mkdir(parents=True, exist_ok=True)
    note = tree.root / f"{WAITS}{run.run_id}.json"
    mine = Holder.of_this_process(run.run_id, "", 0)
    born = psutil.Process(sleeper.pid).create_time()
    note.write_text(mine.model_copy(update={"process": sleeper.pid, "born": born}).model_dump_json(), encoding="utf-8")
    end_lost(instance, tree)
    assert status_of(instance, run) == status
    sleeper.kill()
    sleeper.wait()
    end_lost(instance, tree)
    assert status_of(instance, run) == end
    assert not note.exists()


def test_a_run_that_waits_for_its_turn_leaves_a_note_while_it_waits(
    instance: dg.DagsterInstance, sleeper: subprocess.Popen[bytes]
) -> None:
    other_turn(instance, sleeper.pid)
    root, seen = ArtifactStore().tree(instance, "demo").root, list[Path]()

    def look() -> None:
        seen.extend(root.glob(f"{WAITS}*.json"))
        sleeper.kill()

    threading.Timer(1.5, look).start()
    result = run_bodies({"base_model": lambda step: iter([made(step, "a" * 32)])}, instance)
    assert result.success
    assert [note.name for note in seen] == [f"{WAITS}{result.run_id}.json"]
    assert not list(root.glob(f"{WAITS}*"))


def test_a_run_that_was_overtaken_releases_nothing(instance: dg.DagsterInstance) -> None:
    def overtaken(step: Step) -> Events:
        newer = dg.AssetMaterialization(step.pipeline.key("promotion"), metadata={FINGERPRINT: "b" * 32})
        instance.report_runless_asset_event(newer)
        yield from published_model.materialise(step)

    result = run_bodies(
        {"promotion": lambda step: iter([made(step, "a" * 32)]), "published_model": overtaken}, instance
    )
    [said] = failures(result)
    assert "this run was overtaken" in said
    assert "Nothing was released" in said


def test_a_run_that_reads_what_was_made_before_it_is_not_overtaken(instance: dg.DagsterInstance) -> None:
    for print_ in ("a" * 32, "b" * 32):
        assert run_bodies({"promotion": lambda step, p=print_: iter([made(step, p)])}, instance).success
    seen: list[str | None] = []

    def body(step: Step) -> Events:
        seen.append(step.overtaken_by("promotion"))
        yield made(step, "c" * 32)

    assert run_bodies({"published_model": body}, instance).success
    assert seen == [None]
