"""The worker's life: it never outlives its run, and what it leaves half-done is never taken for a result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import dagster as dg
import psutil
import pytest

import dpo_assets.assets.step as step_module
from dpo_assets.artifact import open_artifact
from dpo_assets.contract import TrainSpec, parse_progress
from dpo_assets.planning.precision import Device
from dpo_assets.resources.launcher import _worker_environment
from dpo_assets_tests.pipelines import DATA, failures, instance_after, materialize, metadata, short_recipe
from dpo_assets_tests.planning.cases import TINY, planned

TO_SFT = ["dpo_plan", "sft_checkpoint"]
PATIENCE = 60.0


def workers_of(pid: int) -> list[psutil.Process]:
    """Worker processes among the descendants of a process."""
    try:
        children = psutil.Process(pid).children(recursive=True)
        return [p for p in children if "dpo_assets.training" in p.cmdline()]
    except psutil.NoSuchProcess:
        return []


def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for a condition; time decides nothing but when to give up."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE:.0f} s for: {what}"
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries wait for the cluster to recover; here there is nothing to wait for."""
    monkeypatch.setattr(step_module, "RETRY_SECONDS", 0.1)


def endless() -> dict[str, object]:
    # Steps enough that a kill always comes before the end.
    return short_recipe(sft={"epochs": 50})


@pytest.fixture
def instance(homes: Path, tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """A real instance, in which the data stands that SFT trains on."""
    with instance_after(short_recipe(), DATA, homes, tmp_path / "dagster_home") as opened:
        yield opened


@dataclass
class Killer:
    """Kills SFT workers of this process as soon as they live, up to a limit."""

    limit: int = 0
    killed: list[int] = field(default_factory=list)

    def hunt(self, stop: threading.Event) -> None:
        while not stop.wait(0.05):
            for worker in workers_of(os.getpid()):
                if len(self.killed) < self.limit and worker.pid not in self.killed and "sft" in worker.cmdline():
                    self.killed.append(worker.pid)
                    worker.send_signal(signal.SIGKILL)


@contextmanager
def at_large(limit: int) -> Iterator[Killer]:
    hunter, stop = Killer(limit), threading.Event()
    thread = threading.Thread(target=hunter.hunt, args=(stop,))
    thread.start()
    try:
        yield hunter
    finally:
        stop.set()
        thread.join()


def artefacts(instance: dg.DagsterInstance, node: str) -> list[Path]:
    """Everything that lies under a node, but its lock files."""
    folder = Path(instance.storage_directory()) / "dpo_assets" / "demo" / node
    return [p for p in folder.iterdir() if p.suffix not in (".lock", ".json")]


def test_a_worker_that_keeps_dying_fails_the_run_and_leaves_earlier_artefacts_standing(
    instance: dg.DagsterInstance,
) -> None:
    with at_large(limit=10) as killer:
        result = materialize(endless(), instance, TO_SFT)
    assert not result.success
    assert len(killer.killed) == 1 + step_module.MAX_RETRIES
    assert "was ended by SIGKILL" in failures(result)[-1]
    assert "Given up after 3 attempts" in failures(result)[-1]
    assert artefacts(instance, "sft_checkpoint") == []
    for node in ("base_model", "raw_preferences", "dpo_dataset", "dpo_plan"):
        assert [open_artifact(folder) for folder in artefacts(instance, node)]


def test_the_attempt_after_a_killed_one_starts_clean_reuses_what_stands_and_reports_while_it_runs(
    instance: dg.DagsterInstance,
) -> None:
    with at_large(limit=1) as killer:
        result = materialize(short_recipe(sft={"epochs": 0.3}), instance, [*DATA, *TO_SFT])
    assert result.success
    assert len(killer.killed) == 1
    assert str(metadata(result, "dpo_dataset")["reused"]).startswith("yes")
    assert metadata(result, "sft_checkpoint")["reused"] == "no"
    (made,) = artefacts(instance, "sft_checkpoint")
    assert open_artifact(made).json("report.json")["finite"]

    lines = [(e.timestamp, e.user_message) for e in instance.all_logs(result.run_id) if e.dagster_event is None]
    steps = [(when, p) for when, text in lines if (p := parse_progress(text)) and p.stage == "sft"]
    assert steps, "no progress line of the worker is in the run's log"
    assert steps[-1][1].done == steps[-1][1].total
    done = max(
        e.timestamp for e in instance.all_logs(result.run_id) if e.dagster_event and e.dagster_event.is_step_success
    )
    assert steps[0][0] < done


RUN = """
import sys
import dagster as dg
from dpo_assets_tests.pipelines import materialize, short_recipe
with dg.DagsterInstance.from_config(sys.argv[1]) as instance:
    materialize(short_recipe(sft={"epochs": 50}), instance, ["sft_checkpoint"])
"""


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_ending_the_run_ends_the_worker(instance: dg.DagsterInstance, sign: signal.Signals) -> None:
    assert materialize(endless(), instance, ["dpo_plan"]).success
    home = instance.root_directory
    (Path(home) / "dagster.yaml").touch()
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(RUN), home], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until(lambda: bool(workers_of(run.pid)) or run.poll() is not None, "a worker")
        (worker,) = workers_of(run.pid)
        until(lambda: len(worker.open_files()) > 0 or worker.num_threads() > 1, "a worker at work")
        run.send_signal(sign)
        run.wait(timeout=PATIENCE)
        until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, "the worker's end")
    finally:
        run.kill()
        run.wait()


def test_a_stage_that_takes_too_long_is_ended(instance: dg.DagsterInstance) -> None:
    slow = endless() | {"hardware": {"timeout_minutes": 0.02}}
    result = materialize(slow, instance, TO_SFT)
    assert "ran longer than 0.0 minutes (hardware.timeout_minutes)" in failures(result)[-1]
    assert workers_of(os.getpid()) == []


def spec_on(device: Device) -> TrainSpec:
    here = Path("unused")
    return TrainSpec(
        output_dir=here, fingerprint="f" * 32, inputs={}, base_model=here, dataset=here, plan=planned(TINY, device)
    )


def test_the_worker_gets_no_secret_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecretsecret")
    assert "HF_TOKEN" not in _worker_environment(spec_on(Device("cpu", "CPU", 8.0)))


def test_the_worker_sees_the_gpu_that_was_planned_for_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers multiplies the batch by the number of GPUs in sight."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    second = spec_on(Device("cuda", "a card", 80.0, (9, 0), index=1))
    assert _worker_environment(second)["CUDA_VISIBLE_DEVICES"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in _worker_environment(spec_on(Device("cpu", "CPU", 8.0)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert _worker_environment(second)["CUDA_VISIBLE_DEVICES"] == "3", "whoever set it knows better"
