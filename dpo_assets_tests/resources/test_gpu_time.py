"""GPU hours of runs: counted by the launcher, kept with the run, also of one that was killed."""
# No `from __future__ import annotations` here: Dagster reads the annotation of an op's `context` as a class.

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

import dpo_assets.resources.launcher as launcher_module
from dpo_assets import LocalLauncher
from dpo_assets.contract import VerifySpec
from dpo_assets.resources.gpu_time import StepTime, gpu_runs, gpu_seconds, gpu_timed
from dpo_assets.resources.nvml import VISIBLE

GPU, TAG = "GPU-00000000-of-a-test", "dpo_assets/gpu_seconds.demo__dpo_adapter"


def run_of(instance: dg.DagsterInstance, body: Callable[[dg.AssetExecutionContext], None]) -> dg.DagsterRun:
    """The run of a step `demo__dpo_adapter` with this body."""

    @dg.multi_asset(name="demo__dpo_adapter", specs=[dg.AssetSpec("dpo_adapter")])
    def step(context: dg.AssetExecutionContext) -> Any:
        body(context)
        return dg.MaterializeResult()

    result = dg.materialize([step], instance=instance, raise_on_error=False)
    run = instance.get_run_by_id(result.run_id)
    assert run is not None
    return run


def test_a_step_adds_up_its_time_with_a_gpu_also_of_tries_that_failed_or_were_killed() -> None:
    seen: list[str] = []

    def body(context: dg.AssetExecutionContext) -> None:
        clock = itertools.count(1000.0, 10.0)
        with gpu_timed(context, GPU, lambda: next(clock)):
            pass  # 10 s.
        with pytest.raises(RuntimeError), gpu_timed(context, GPU, lambda: next(clock)):
            raise RuntimeError("out of memory")  # From 1020 to 1030.
        context.instance.add_run_tags(context.run_id, {TAG: "20.0 and since 1030.0"})  # Killed in its third try.
        with gpu_timed(context, GPU, lambda: next(clock)):  # From 1040 to 1050.
            seen.append(context.instance.get_run_by_id(context.run_id).tags[TAG])  # type: ignore[union-attr]
        with gpu_timed(context, ""):
            pass

    with dg.DagsterInstance.ephemeral() as instance:
        run = run_of(instance, body)
        assert seen == ["30.0 and since 1040.0"]
        assert run.tags[TAG] == "40.0"
        assert gpu_seconds(run.tags, "demo", 9e9) == 40.0
        assert [one.run_id for one in instance.get_runs(dg.RunsFilter(tags=gpu_runs("demo")))] == [run.run_id]


def test_what_a_killed_run_left_open_counts_until_its_end_and_a_tag_set_by_hand_is_nothing() -> None:
    tags = {TAG: "5.0 and since 1000.0", f"{TAG}_too": "7.5", "dpo_assets/gpu_seconds.odd": "a lot", "other": "9"}
    assert gpu_seconds(tags, "demo", 1060.0) == 5.0 + 60.0 + 7.5
    assert gpu_seconds(tags, "demo", 900.0) == 5.0 + 7.5  # A clock that was put back takes nothing away.
    assert StepTime.of(str(StepTime(3.25, 1e9))) == StepTime(3.2, 1e9)
    assert StepTime.of(None) == StepTime.of("-1") == StepTime()


def test_of_several_pipelines_in_one_run_each_counts_its_own_steps() -> None:
    """As of all assets of a location that are materialised at once."""

    def steps(name: str) -> dg.AssetsDefinition:
        @dg.multi_asset(name=f"{name}__dpo_adapter", specs=[dg.AssetSpec([name, "dpo_adapter"])])
        def step(context: dg.AssetExecutionContext) -> Any:
            clock = itertools.count(1000.0, 10.0 if name == "demo" else 7.0)
            with gpu_timed(context, GPU, lambda: next(clock)):
                return dg.MaterializeResult()

        return step

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([steps("demo"), steps("demo__b")], instance=instance)
        [run] = instance.get_runs(dg.RunsFilter(tags=gpu_runs("demo")))
        assert run.run_id == result.run_id
        assert instance.get_runs(dg.RunsFilter(tags=gpu_runs("demo__b"))) == [run]
        assert not instance.get_runs(dg.RunsFilter(tags=gpu_runs("idle")))
        assert [gpu_seconds(run.tags, name, 9e9) for name in ("demo", "demo__b", "idle")] == [10.0, 7.0, 0.0]


def test_the_launcher_counts_a_worker_with_a_gpu_and_none_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no GPU here: the worker is a program that sleeps, and only its environment names one."""
    worker = tmp_path / "python"
    worker.write_text("#!/bin/sh\nsleep 0.3\n", encoding="utf-8")
    worker.chmod(0o755)
    spec = VerifySpec(output_dir=tmp_path, fingerprint="f", inputs={}, base_model=tmp_path)

    def launched(gpu: str) -> dg.DagsterRun:
        monkeypatch.setattr(launcher_module, "worker_environment", lambda *_: {VISIBLE: gpu, "PATH": "/bin"})
        with dg.DagsterInstance.ephemeral() as instance:
            return run_of(
                instance, lambda context: LocalLauncher(python=str(worker)).run(context, "verify", spec, 60, 60)
            )

    counted = launched(GPU)
    assert counted.status == dg.DagsterRunStatus.SUCCESS
    assert 0.2 < gpu_seconds(counted.tags, "demo", 0.0) < 60
    assert not [tag for tag in launched("").tags if tag.startswith("dpo_assets/gpu")]
