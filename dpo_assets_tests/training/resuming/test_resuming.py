"""A training that was ended goes on where it was and makes what it would have made: every file, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from dpo_assets.checks.bands import default_bands
from dpo_assets.contract import PREEMPTED_EXIT, CheckpointSpec, GuardSpec, TrainSpec
from dpo_assets.errors import GateError, Preempted
from dpo_assets.recipe import ChecksSection
from dpo_assets.training.guard.collapse import CollapseGuard
from dpo_assets.training.resuming.callback import Checkpoints
from dpo_assets.training.resuming.folder import REJECTED, CheckpointFolder
from dpo_assets.training.snapshot import Snapshot
from dpo_assets.training.stages import dpo, sft
from dpo_assets.training.trainers import packed
from dpo_assets_tests.training.conftest import Log, PlanMaker, SpecMaker
from dpo_assets_tests.training.dpo_runs import ROW, write_pairs
from dpo_assets_tests.training.resuming.workers import Workers

STEPS, PAIRS = 9, 6  # Three steps an epoch.
CHECKS = ChecksSection(probe_prompts=2, probe_every=0.25, probe_tokens=8, held_out_pairs=2, sampled_answers=2)
STAGES = {"sft": sft.run, "dpo": dpo.run}


@pytest.fixture(scope="module")
def pairs(prepared: tuple[pl.DataFrame, pl.DataFrame], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six short pairs to train on, and as many held out."""
    folder = write_pairs(prepared[0], tmp_path_factory.mktemp("pairs"), PAIRS)
    held_out = write_pairs(prepared[1], tmp_path_factory.mktemp("held"), PAIRS)
    (held_out / "train.parquet").rename(folder / "eval.parquet")
    return folder


@pytest.fixture
def spec_of(
    plan_for: PlanMaker, train_spec: SpecMaker, pairs: Path, sft_adapter: Path, tmp_path: Path
) -> Callable[..., TrainSpec]:
    """A spec of nine steps with dropout in `sft` and a guard in `dpo`; `name` is its output folder's."""

    def make(stage: str, name: str, *, checkpoints: str = "", often: bool = False, **plan: Any) -> TrainSpec:
        planned = plan_for(
            lora={"dropout": 0.1},
            sft={"batch_size": 2},
            dpo={"batch_size": 2, **plan.pop("dpo", {})},
            max_length=ROW,
            train_pairs=PAIRS,
            sft_steps=STEPS,
            dpo_steps=STEPS,
            **plan,
        )
        more: dict[str, Any] = {}
        if stage == "dpo":
            guard = GuardSpec.of(planned, default_bands(), CHECKS)
            more = {"start_adapter": sft_adapter, "reference_cache": tmp_path / "reference.sqlite", "guard": guard}
        if checkpoints:
            more["checkpoints"] = CheckpointSpec(
                folder=tmp_path / checkpoints, share=0.5, least_seconds=0.0 if often else 1e9
            )
        return train_spec(planned, tmp_path / name, dataset=pairs, **more)

    return make


def made(out: Path) -> dict[str, bytes]:
    """The files that an artefact's digest is of."""
    files = (p for p in out.rglob("*") if p.is_file() and p.relative_to(out).parts[0] not in NOT_OF_THE_DIGEST)
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


NOT_OF_THE_DIGEST = ("timings.json", "manifest.json", "trainer")


def asked_to_end_at(step: int) -> Callable[..., None]:
    """`Checkpoints.on_step_end` of a process that gets SIGTERM during a step."""
    own = Checkpoints.on_step_end

    def on_step_end(self: Checkpoints, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        own(self, args, state, control, **kwargs)

    return on_step_end


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_is_ended_between_two_logs_and_between_two_epochs_ends_up_bit_equal(
    stage: str, spec_of: Callable[..., TrainSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, a shuffled order, means that are summed over several steps, and the guard's own rows."""
    monkeypatch.setattr(packed, "LOGGED_STEPS", 3)
    judged: list[list[dict[str, float]]] = []  # The rows of the guard of every run that came to its end.
    record = CollapseGuard.record
    monkeypatch.setattr(CollapseGuard, "record", lambda self, rows: (judged.append(self.rows), record(self, rows))[1])
    run = STAGES[stage]
    run(spec_of(stage, "whole"), Log())
    for step in (3, 7):  # The first is the end of an epoch, after neither is a log due.
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "on_step_end", asked_to_end_at(step))
            with pytest.raises(Preempted, match=rf"told to end \(SIGTERM\) and did so after step {step} of 9"):
                run(spec_of(stage, f"ended-{step}", checkpoints="kept"), Log())
    log = Log()
    run(spec_of(stage, "resumed", checkpoints="kept"), log)
    assert made(tmp_path / "resumed") == made(tmp_path / "whole")
    assert judged[:1] == judged[1:], "the guard judges a row by those before it"
    assert f"{stage}: goes on after step 7 of 9 (times resumed: 2, steps done twice: 0)" in log.messages
    told = json.loads((tmp_path / "resumed" / "timings.json").read_text(encoding="utf-8"))
    assert (told["times_resumed"], told["steps_done_twice"], told["checkpoints_failed"]) == (2, 0, 0)


def test_a_retry_with_smaller_forwards_goes_on_and_one_with_another_beta_does_not(
    spec_of: Callable[..., TrainSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "on_step_end", asked_to_end_at(4))
        with pytest.raises(Preempted):
            dpo.run(spec_of("dpo", "ended", checkpoints="kept", token_budget=400), Log())
    shutil.copytree(tmp_path / "kept", tmp_path / "other")
    smaller, other = Log(), Log()
    dpo.run(spec_of("dpo", "smaller", checkpoints="kept", token_budget=200), smaller)
    assert any("goes on after step 4 of 9" in line for line in smaller.messages)
    dpo.run(spec_of("dpo", "changed", checkpoints="other", token_budget=400, dpo={"beta": 0.3}), other)
    assert not any("goes on" in line for line in other.messages)
    assert any("it is of another run (training settings differ)" in line for line in other.messages)
    dpo.run(spec_of("dpo", "anew", token_budget=400, dpo={"beta": 0.3}), Log())
    assert made(tmp_path / "changed") == made(tmp_path / "anew")


def test_nothing_that_is_not_finite_is_kept_to_go_on_from(
    spec_of: Callable[..., TrainSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run does not log every step, so its log is not what tells."""
    monkeypatch.setattr(packed, "LOGGED_STEPS", 1)
    own = asked_to_end_at(5)

    @torch.no_grad()
    def spoiled(self: Checkpoints, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            next(p for p in self.trainer.model.parameters() if p.requires_grad).view(-1)[0] = float("nan")
        own(self, args, state, control, **kwargs)

    monkeypatch.setattr(Checkpoints, "on_step_end", spoiled)
    with pytest.raises(GateError, match="the run diverged"):
        sft.run(spec_of("sft", "spoiled", checkpoints="kept"), Log())
    assert max(path.name for path in (tmp_path / "kept").glob("step-*")) < "step-000000005"


@pytest.mark.parametrize(("share", "waits"), [(0.5, True), (1e-6, False)])
def test_no_step_begins_that_a_kill_would_cost_beside_another_as_long_as_the_share_pays_for_the_wait(
    spec_of: Callable[..., TrainSpec], monkeypatch: pytest.MonkeyPatch, share: float, waits: bool
) -> None:
    """Nine steps, so a kill may cost one; a disk that takes its time."""
    at_risk: list[int] = []
    written, begins = CheckpointFolder.write, Checkpoints.on_step_begin

    def slowly(self: CheckpointFolder, *told: Any) -> Any:
        time.sleep(0.03)
        return written(self, *told)

    def on_step_begin(self: Checkpoints, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        at_risk.append(state.global_step - self._kept_step)
        begins(self, args, state, control, **kwargs)

    monkeypatch.setattr(CheckpointFolder, "write", slowly)
    monkeypatch.setattr(Checkpoints, "on_step_begin", on_step_begin)
    spec = spec_of("sft", "made", checkpoints="kept")
    assert spec.checkpoints is not None
    sft.run(spec.model_copy(update={"checkpoints": spec.checkpoints.model_copy(update={"share": share})}), Log())
    assert (at_risk == [0] * STEPS) is waits, at_risk


def test_a_disk_that_is_full_costs_the_checkpoints_and_not_the_training(
    spec_of: Callable[..., TrainSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Snapshot, "write", lambda self, folder: full(folder))
    log = Log()
    sft.run(spec_of("sft", "made", checkpoints="kept", often=True), log)
    told = json.loads((tmp_path / "made" / "timings.json").read_text(encoding="utf-8"))
    assert told["checkpoints"] == 0
    assert told["checkpoints_failed"] == len([line for line in log.messages if "No space left on device" in line]) > 0
    assert not list((tmp_path / "kept").glob("step-*"))


# ---- real workers, really killed

ENDS_ITSELF = """
import os, signal
from dpo_assets.training.guard.collapse import CollapseGuard
from dpo_assets.training.resuming.callback import Checkpoints
own = Checkpoints.on_step_end
def on_step_end(self, args, state, control, **kwargs):
    if state.global_step == 4:
        self.settle()
        os.kill(os.getpid(), signal.SIGKILL)
    own(self, args, state, control, **kwargs)
Checkpoints.on_step_end = on_step_end
"""
DIES_BETWEEN_FILES = """
import os, signal
from dpo_assets.training import snapshot
own, written = snapshot.save_file, []
def save_file(tensors, path):
    own(tensors, path)
    written.append(path)
    if len(written) == 1:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
snapshot.save_file = save_file
"""
SLOW = """
import time
from dpo_assets.training.guard.collapse import CollapseGuard
from dpo_assets.training.resuming.callback import Checkpoints
own = Checkpoints.on_step_begin
def on_step_begin(self, args, state, control, **kwargs):
    time.sleep(0.3)
    own(self, args, state, control, **kwargs)
Checkpoints.on_step_begin = on_step_begin
"""


def test_a_worker_killed_again_and_again_and_told_to_end_makes_what_an_undisturbed_one_makes(
    spec_of: Callable[..., TrainSpec], worker: Workers, tmp_path: Path
) -> None:
    """In the reference pass, between two checkpoints, inside one, by SIGTERM; and with the newest one damaged."""
    spec, work, kept = spec_of("dpo", "out", checkpoints="kept", often=True), tmp_path / "work", tmp_path / "kept"
    in_reference = worker.run("dpo", spec, work, until="[progress] reference 2/6", sign=signal.SIGKILL)
    assert in_reference.status == -signal.SIGKILL
    between = worker.run("dpo", spec, work, fault=ENDS_ITSELF)
    assert between.status == -signal.SIGKILL, between.said
    assert "dpo: reference log-probabilities of 6 pairs, 0 from the cache" not in between.said
    assert list(kept.glob("step-*"))
    inside = worker.run("dpo", spec, work, fault=DIES_BETWEEN_FILES)
    assert inside.status == -signal.SIGKILL, inside.said
    (half,) = kept.glob("step-*.tmp-*")
    told = worker.run("dpo", spec, work, fault=SLOW, until="[progress] dpo ", sign=signal.SIGTERM)
    assert told.status == PREEMPTED_EXIT, told.said
    assert f"{half.name} was never finished and is removed" in told.said
    assert "was told to end (SIGTERM) and did so after step" in told.said
    newest = sorted(kept.glob("step-*"))[-1]
    data = bytearray((newest / "state.safetensors").read_bytes())
    data[-8] ^= 1
    (newest / "state.safetensors").write_bytes(data)
    last = worker.run("dpo", spec, work)
    assert last.status == 0, last.said
    assert f"checkpoint {newest.name} is not gone on from: state.safetensors is not what was written" in last.said
    assert len(list((tmp_path / REJECTED).iterdir())) == 1
    resumed, _ = made(tmp_path / "out"), shutil.move(tmp_path / "out", tmp_path / "resumed")
    whole = worker.run("dpo", spec_of("dpo", "out"), work)
    assert whole.status == 0, whole.said
    assert resumed == made(tmp_path / "out")
    timings = json.loads((tmp_path / "resumed" / "timings.json").read_text(encoding="utf-8"))
    assert timings["times_resumed"] == 3
    assert timings["steps_done_twice"] >= 1
