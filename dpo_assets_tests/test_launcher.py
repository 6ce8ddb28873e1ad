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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import dagster as dg
import psutil
import pytest

import dpo_assets.assets.step as step_module
from dpo_assets import LocalLauncher
from dpo_assets.artifact import open_artifact
from dpo_assets.contract import (
    EXPLAINED_EXIT,
    FAILURE_FILE,
    PREEMPTED_EXIT,
    Failure,
    TokenizeSpec,
    TrainSpec,
    parse_progress,
)
from dpo_assets.errors import ConfigError, DiskFull, GateError, OutOfMemory, Preempted, StageSilent, StageTimeout
from dpo_assets.planning.precision import Device
from dpo_assets.resources.environment import OFFLINE, worker_environment
from dpo_assets.resources.launcher import WorkerDied, _out_of_host_memory
from dpo_assets.training.models.devices import refuse_other_devices
from dpo_assets_tests.machines import memory_of
from dpo_assets_tests.pipelines import DATA, failures, instance_after, materialize, metadata, short_recipe
from dpo_assets_tests.planning.cases import TINY, planned
from dpo_assets_tests.samples import plan

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
def with_data(homes: Path, tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """A real instance, in which the data stands that SFT trains on."""
    with instance_after(short_recipe(), DATA, homes, tmp_path / "with_data") as opened:
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
    with_data: dg.DagsterInstance,
) -> None:
    with at_large(limit=10) as killer:
        result = materialize(endless(), with_data, TO_SFT)
    assert not result.success
    assert len(killer.killed) == 1 + step_module.MAX_RETRIES
    assert "was ended by SIGKILL" in failures(result)[-1]
    assert "Given up after 3 attempts" in failures(result)[-1]
    assert artefacts(with_data, "sft_checkpoint") == []
    for node in ("base_model", "raw_preferences", "dpo_dataset", "dpo_plan"):
        assert [open_artifact(folder) for folder in artefacts(with_data, node)]


def test_the_attempt_after_a_killed_one_starts_clean_reuses_what_stands_and_reports_while_it_runs(
    with_data: dg.DagsterInstance,
) -> None:
    with at_large(limit=1) as killer:
        result = materialize(short_recipe(sft={"epochs": 0.3}), with_data, [*DATA, *TO_SFT])
    assert result.success
    assert len(killer.killed) == 1
    assert str(metadata(result, "dpo_dataset")["reused"]).startswith("yes")
    told = metadata(result, "sft_checkpoint")
    assert (told["reused"], told["times_resumed"], told["steps_done_twice"]) == ("no", 0, 0)
    # Of what is sealed nothing is gone on with.
    kept = Path(with_data.storage_directory()) / "dpo_assets" / "demo" / "checkpoints" / "sft_checkpoint"
    assert list(kept.iterdir()) == []
    (made,) = artefacts(with_data, "sft_checkpoint")
    assert open_artifact(made).json("report.json")["finite"]

    lines = [(e.timestamp, e.user_message) for e in with_data.all_logs(result.run_id) if e.dagster_event is None]
    steps = [(when, p) for when, text in lines if (p := parse_progress(text)) and p.stage == "sft"]
    assert steps, "no progress line of the worker is in the run's log"
    assert steps[-1][1].done == steps[-1][1].total
    done = max(
        e.timestamp for e in with_data.all_logs(result.run_id) if e.dagster_event and e.dagster_event.is_step_success
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
def test_ending_the_run_ends_the_worker(with_data: dg.DagsterInstance, sign: signal.Signals) -> None:
    assert materialize(endless(), with_data, ["dpo_plan"]).success
    home = with_data.root_directory
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
    (last,) = with_data.get_runs(limit=1)
    kinds = [entry.dagster_event.event_type for entry in with_data.all_logs(last.run_id) if entry.dagster_event]
    assert dg.DagsterEventType.STEP_UP_FOR_RETRY not in kinds, "nobody starts again what someone stopped"


def spec_on(device: Device) -> TrainSpec:
    here = Path("unused")
    return TrainSpec(
        output_dir=here, fingerprint="f" * 32, inputs={}, base_model=here, dataset=here, plan=planned(TINY, device)
    )


CPU, SECOND = Device("cpu", "CPU", 8.0), Device("cuda", "a card", 80.0, (9, 0), index=1, uuid="GPU-2b3c")
KEPT = {
    "PATH": "/usr/bin", "HOME": "/home/me", "LC_ALL": "C.UTF-8", "PYTHONPATH": "/code", "LD_LIBRARY_PATH": "/lib",
    "CUDA_HOME": "/usr/local/cuda", "NCCL_DEBUG": "INFO", "HF_HOME": "/models", "TRANSFORMERS_OFFLINE": "1",
    "TORCH_LOGS": "dynamo", "TOKENIZERS_PARALLELISM": "false", "XDG_CACHE_HOME": "/cache", "MKL_NUM_THREADS": "2",
}  # fmt: skip
WITHHELD = [
    "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "FEEDBACK_DATABASE_URL", "MY_HUB_LOGIN",
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "WANDB_API_KEY", "PGPASSWORD", "CUDA_SECRET",
    "TORCH_HUB_TOKEN", "HTTPS_PROXY", "SOMETHING_ELSE",
]  # fmt: skip


def test_a_worker_gets_what_it_computes_with_and_nothing_that_may_be_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEPT.items():
        monkeypatch.setenv(name, value)
    for name in WITHHELD:
        monkeypatch.setenv(name, "correct horse battery")
    environment = worker_environment(spec_on(CPU))
    assert {name: environment[name] for name in KEPT} == KEPT
    assert not set(WITHHELD) & set(environment)
    assert "correct horse battery" not in environment.values()


@pytest.mark.parametrize(
    "value", ["postgresql://me:hunter2222@db/x", "jdbc:mysql://me:hunter2222@db/x", "host=db password=hunter2222"]
)
def test_a_variable_of_a_harmless_name_that_holds_a_password_stays_here(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("TORCH_STORE", value)
    monkeypatch.setenv("ASKED_FOR", value)
    assert not {"TORCH_STORE", "ASKED_FOR"} & set(worker_environment(spec_on(CPU), ["ASKED_FOR"]))


def test_a_worker_is_offline_whatever_this_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OFFLINE:
        monkeypatch.setenv(name, "0")
    environment = worker_environment(spec_on(CPU))
    assert {name: environment[name] for name in OFFLINE} == dict.fromkeys(
        ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"
    )


def test_a_variable_that_is_asked_for_is_passed_on_unless_it_is_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_assets.publishing.secrets._NAMED", {"WHERE_THE_VOTES_ARE"})
    for name in ("SOMETHING_ELSE", "WHERE_THE_VOTES_ARE"):
        monkeypatch.setenv(name, "correct horse battery")
    asked = worker_environment(spec_on(CPU), ["SOMETHING_ELSE", "WHERE_THE_VOTES_ARE", "NOT_SET"])
    assert asked["SOMETHING_ELSE"] == "correct horse battery"
    assert not {"WHERE_THE_VOTES_ARE", "NOT_SET"} & set(asked)
    with pytest.raises(ValueError, match="AWS_SECRET_ACCESS_KEY: a worker is offline"):
        LocalLauncher(environment=["LANG", "AWS_SECRET_ACCESS_KEY"])


@pytest.mark.parametrize("already", [None, "0,1,2,3", "3", "", "-1", "GPU-1a2b"])
def test_the_worker_sees_the_device_that_was_planned_for_and_no_other(
    monkeypatch: pytest.MonkeyPatch, already: str | None
) -> None:
    """Transformers multiplies the batch by the number of GPUs in sight."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if already is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", already)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    planned_for = worker_environment(spec_on(SECOND))
    assert (planned_for["CUDA_VISIBLE_DEVICES"], planned_for["CUDA_DEVICE_ORDER"]) == ("GPU-2b3c", "PCI_BUS_ID")
    assert worker_environment(spec_on(replace(SECOND, uuid="")))["CUDA_VISIBLE_DEVICES"] == "1"
    assert worker_environment(spec_on(CPU))["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("device", "gpus", "said"),
    [
        (CPU, 0, ""),
        (CPU, 4, ""),
        (SECOND, 1, ""),
        (SECOND, 0, "PyTorch sees no GPU here"),
        (SECOND, 4, "CUDA_VISIBLE_DEVICES=GPU-2b3c"),
    ],
)
def test_the_worker_refuses_other_devices_than_the_planned_one(device: Device, gpus: int, said: str) -> None:
    plan = planned(TINY, device)
    if not said:
        refuse_other_devices(plan, gpus)
        return
    with pytest.raises(ConfigError, match=said):
        refuse_other_devices(plan, gpus)


def test_a_plan_for_a_gpu_ends_at_once_in_a_worker_that_sees_none(tmp_path: Path) -> None:
    """Also where no launcher took care of it."""
    (tmp_path / "out").mkdir()
    spec = spec_on(SECOND).model_copy(update={"output_dir": tmp_path / "out"})
    (tmp_path / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "dpo_assets.training", "sft", "--spec", str(tmp_path / "spec.json")]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, env=hidden, capture_output=True, text=True)
    assert ended.returncode == EXPLAINED_EXIT, ended.stderr
    told = Failure.model_validate_json((tmp_path / FAILURE_FILE).read_bytes())
    assert (told.kind, "PyTorch sees no GPU here" in told.message) == ("config", True)


def test_a_worker_that_is_told_to_end_writes_down_what_it_was_doing(tmp_path: Path) -> None:
    """It waits for its spec here, which nobody writes."""
    spec = tmp_path / "spec.json"
    os.mkfifo(spec)
    command = [sys.executable, "-m", "dpo_assets.training", "sft", "--spec", str(spec), "--follow-parent"]
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # A parent that ignores it has workers that begin so.
    try:
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    writer: list[int] = []

    def waits() -> bool:
        with suppress(OSError):  # Until somebody reads.
            writer.append(os.open(spec, os.O_WRONLY | os.O_NONBLOCK))
        return bool(writer) or worker.poll() is not None

    try:
        until(waits, "a worker that reads its spec")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(PATIENCE) == -signal.SIGTERM
        assert worker.stderr is not None
        assert b"read_bytes" in worker.stderr.read()
    finally:
        worker.kill()
        worker.communicate()
        os.close(writer[0])


# A worker of a few lines in the place of the real one: what it says and how it ends is all that the launcher sees.

WORKER = """#!{python}
import json, os, sys, time
from dagster_pipes import open_dagster_pipes
spec = sys.argv[sys.argv.index("--spec") + 1]
{body}
"""


@dataclass
class Ran:
    """A launched stage: what the run's log and the step's compute log hold of it, and the error it ended with."""

    messages: list[str]
    compute_log: str
    error: Exception | None


def launch(
    instance: dg.DagsterInstance,
    folder: Path,
    body: str,
    *,
    seconds: float = PATIENCE,
    silent: float = PATIENCE,
    python: str = "",
) -> Ran:
    script = folder / "python"
    script.write_text(WORKER.format(python=sys.executable, body=textwrap.dedent(body)), encoding="utf-8")
    script.chmod(0o755)
    launcher = LocalLauncher(python=python or str(script), grace_seconds=1.0)
    spec = TokenizeSpec(
        output_dir=folder, fingerprint="f" * 32, inputs={}, base_model=folder, pairs=folder / "pairs.parquet"
    )
    raised: list[Exception] = []

    @dg.asset
    def stage(context):  # type: ignore[no-untyped-def]  # Dagster reads an annotation as a class.
        try:
            launcher.run(context, "tokenize", spec, seconds, silent)
        except Exception as error:
            raised.append(error)
        yield dg.MaterializeResult()

    result = dg.materialize([stage], instance=instance)
    logs = instance.all_logs(result.run_id)
    events = [entry.dagster_event for entry in logs if entry.dagster_event]
    (captured,) = [e.logs_captured_data for e in events if e.event_type == dg.DagsterEventType.LOGS_CAPTURED]
    data = instance.compute_log_manager.get_log_data([result.run_id, "compute_logs", captured.file_key])
    said = [str(entry.dagster_event or "") + entry.user_message for entry in logs]
    return Ran(said, (data.stdout or b"").decode(), raised[0] if raised else None)


SPEAKS = """
secret = "correct/horse+battery"
with open_dagster_pipes() as pipes:
    pipes.log.info(f"live: {secret}, " + os.environ.get("AWS_SECRET_ACCESS_KEY", "not passed on"))
    print(f"printed: {secret}")
    with open(os.path.join(os.path.dirname(spec), "failure.json"), "w") as told:
        json.dump({"kind": "gate", "message": f"explained: {secret}", "check": "nothing", "fix": secret}, told)
"""


def test_no_secret_of_the_parent_passes_through_what_a_worker_says(
    instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not live, not in the compute log, not in its exception, not in its explanation."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "correct/horse+battery")
    explained = launch(instance, tmp_path, SPEAKS + "    sys.exit(65)\n")
    assert any("live: [secret], not passed on" in message for message in explained.messages)
    assert "printed: [secret]" in explained.compute_log
    assert isinstance(explained.error, GateError)
    assert (str(explained.error), explained.error.fix) == ("explained: [secret]", "[secret]")
    crashed = launch(instance, tmp_path, SPEAKS + "    raise RuntimeError('raised: ' + secret)\n")
    assert "raised: [secret]" in str(crashed.error)
    assert any("raised: [secret]" in message for message in crashed.messages)
    for ran in (explained, crashed):
        assert "correct/horse" not in "".join([*ran.messages, ran.compute_log, str(ran.error)])


def test_a_stage_that_takes_too_long_is_ended_and_its_log_is_kept(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    body = """
    print(os.getpid(), flush=True)
    for n in range(100):
        print(f"line {n}.", flush=True)
    time.sleep(600)
    """
    ran = launch(instance, tmp_path, body, seconds=3.0)
    assert isinstance(ran.error, StageTimeout)
    assert "ran longer than 0.05 minutes (hardware.timeout_minutes)" in str(ran.error)
    assert "line 99." in str(ran.error)
    assert "line 9." not in str(ran.error), "the error holds the end of the log only"
    pid, *lines = ran.compute_log.split("\n")[:101]
    assert lines == [f"line {n}." for n in range(100)]
    assert not psutil.pid_exists(int(pid))


def test_a_worker_that_found_the_disk_full_is_told_with_where_and_how_much_is_free(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    ran = launch(instance, tmp_path, "sys.exit(74)")
    assert isinstance(ran.error, DiskFull)
    assert str(ran.error).startswith(f"the disk is full: stage `tokenize`; {tmp_path} has ")
    assert "It is not tried again." in str(ran.error)


SHOWS_LIFE = """
from pathlib import Path
from dpo_assets.training import alive
alive.EVERY_SECONDS = 0.1
alive.show(Path(spec).parent / "heartbeat")
"""
HANGS = {
    "is stopped": "import signal\nos.kill(os.getpid(), signal.SIGSTOP)\n",
    "waits for what never comes": "os.read(os.pipe()[0], 1)\n",
    "never shows any": None,
}


@pytest.mark.parametrize("how", HANGS)
def test_a_stage_that_shows_no_sign_of_progress_is_ended(
    how: str, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    ran = launch(instance, tmp_path, (SHOWS_LIFE + HANGS[how]) if HANGS[how] else "time.sleep(600)\n", silent=1.5)
    assert isinstance(ran.error, StageSilent), ran.error
    assert "showed no sign of progress for 0.025 minutes (hardware.silent_minutes)" in str(ran.error)


def test_a_stage_that_works_longer_than_it_may_be_silent_is_let_be(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    body = SHOWS_LIFE + "end = time.monotonic() + 5\nwhile time.monotonic() < end:\n    sum(range(99))\n"
    ran = launch(instance, tmp_path, body, silent=4.0)
    assert ran.error is None, ran.error


def test_a_worker_that_somebody_else_told_to_end_is_no_fault_of_the_stage(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    ran = launch(instance, tmp_path, f"print('after step 7 of 9')\nsys.exit({PREEMPTED_EXIT})\n")
    assert isinstance(ran.error, Preempted)
    assert "was told to end (SIGTERM), not by this run" in str(ran.error)
    assert "after step 7 of 9" in str(ran.error)


def test_a_worker_that_the_kernel_kills_for_want_of_memory_is_told_from_one_that_somebody_killed(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    """By a real kill of a real control group."""
    with memory_of(100) as group:
        enters = f"open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\ntime.sleep(0.5)\n"
        ran = launch(instance, tmp_path, enters + "print('begun', flush=True)\nbytearray(300 * 2**20)\n")
    assert isinstance(ran.error, WorkerDied), ran.error
    assert "stage `tokenize`: the kernel killed it, because no more than" in str(ran.error)
    assert "begun" in str(ran.error)
    other = launch(instance, tmp_path, "import signal\ntime.sleep(0.5)\nos.kill(os.getpid(), signal.SIGKILL)\n")
    assert "was ended by SIGKILL" in str(other.error)


def test_a_stage_on_the_cpu_that_the_kernel_kills_for_want_of_memory_is_tried_with_smaller_forwards(
    tmp_path: Path,
) -> None:
    """On a GPU they are computed in another memory."""
    values = {
        "output_dir": tmp_path,
        "fingerprint": "f" * 32,
        "inputs": {},
        "base_model": tmp_path,
        "dataset": tmp_path,
    }
    errors = [
        _out_of_host_memory("sft", TrainSpec(**values, plan=plan().model_copy(update={"device": device})), "")
        for device in ("cpu", "cuda")
    ]
    assert [type(error) for error in errors] == [OutOfMemory, WorkerDied]
    assert all("the kernel killed it" in str(error) for error in errors)


def test_an_interpreter_that_is_not_there_is_a_fault_of_configuration(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    ran = launch(instance, tmp_path, "", python=str(tmp_path / "nowhere"))
    assert isinstance(ran.error, ConfigError)
    assert "nowhere` cannot be started (No such file or directory)" in str(ran.error)
