"""DPO that goes on from an earlier release: the policy starts there, and is measured against SFT all the same."""

from __future__ import annotations

import math
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dpo_assets.checks.bands import default_bands
from dpo_assets.contract import GuardSpec, TrainSpec
from dpo_assets.errors import ConfigError, GateError
from dpo_assets.feedback.trained import write_training_set
from dpo_assets.planning.refresh import Refresh
from dpo_assets.recipe import ChecksSection
from dpo_assets.training.batches.data import dpo_group, load_split
from dpo_assets.training.guard.collapse import CollapseGuard
from dpo_assets.training.models.loading import attach_adapter, load_base
from dpo_assets.training.scoring.cache import ScoreCache
from dpo_assets.training.scoring.generation import generation_health
from dpo_assets.training.snapshot import Snapshot
from dpo_assets.training.stages import dpo
from dpo_assets_tests.training.conftest import PlanMaker, SpecMaker
from dpo_assets_tests.training.dense import summed_logps
from dpo_assets_tests.training.dpo_runs import (
    PAIRS,
    ROW,
    Run,
    largest_difference,
    run_dpo,
    short_plan,
    without_dropout,
    write_pairs,
)

NEW = 4  # Of the pairs, those that the release is trained on further.


@pytest.fixture(scope="module")
def pairs(prepared: tuple[pl.DataFrame, pl.DataFrame], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(prepared[0], tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def start(sft_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without_dropout(sft_adapter, tmp_path_factory.mktemp("start") / "adapter")


@pytest.fixture(scope="module")
def release(
    pairs: Path, start: Path, plan_for: PlanMaker, train_spec: SpecMaker, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    plan = short_plan(plan_for, {}, steps=3)
    return run_dpo(train_spec(plan, tmp_path_factory.mktemp("release"), dataset=pairs, start_adapter=start))


def going_on(train_spec: SpecMaker, plan_for: PlanMaker, folder: Path, dpo: dict[str, Any], **more: Any) -> TrainSpec:
    plan = short_plan(plan_for, {"batch_size": NEW, **dpo}, steps=2, refresh=Refresh(policy="continue", generation=2))
    values = {"inputs": {"sft_checkpoint": "s" * 64}, "reference_cache": folder / "reference.sqlite"}
    return train_spec(plan, folder / "out", **(values | more))


@pytest.mark.parametrize("strategy", ["cached", "adapter", "model"])
def test_the_first_step_is_the_releases_and_the_reference_is_sft(
    strategy: str, pairs: Path, start: Path, release: Run, plan_for: PlanMaker, train_spec: SpecMaker, tmp_path: Path
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    write_training_set(pairs, pl.read_parquet(pairs / "train.parquet")["pair_id"].tail(NEW), few)
    spec = going_on(
        train_spec, plan_for, tmp_path, {"reference_strategy": strategy}, dataset=pairs, start_adapter=start,
        goes_on_from=release.folder / "adapter", training_set=few,
    )  # fmt: skip
    run = run_dpo(spec)
    groups = [dpo_group(row, ROW) for row in load_split(few, "train")]
    assert len(groups) == NEW < PAIRS

    def logps(adapter: Path) -> list[float]:
        model = attach_adapter(load_base(spec.base_model, spec.plan), spec.plan, adapter, seed=0, dropout=0.0)
        return summed_logps(model.eval(), groups)

    by_sft, by_release = logps(start), logps(release.folder / "adapter")
    assert run.rows[0]["logps/chosen"] == pytest.approx(sum(by_release[::2]) / NEW, abs=1e-3)
    gained = [now - before for now, before in zip(by_release, by_sft, strict=True)]
    margin = spec.plan.dpo.beta * (sum(gained[::2]) - sum(gained[1::2])) / NEW
    assert abs(margin) > 0.01
    assert run.rows[0]["rewards/margins"] == pytest.approx(margin, abs=1e-4)
    assert run.report["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert run.report["expected_first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert run.losses[0] != pytest.approx(math.log(2), abs=1e-3), "what is trained is not at its reference"
    assert 0 < largest_difference(run.adapter, release.adapter) < 0.1


def test_a_reference_that_is_not_sft_stops_the_run_before_its_first_update(
    pairs: Path, start: Path, release: Run, plan_for: PlanMaker, train_spec: SpecMaker, tmp_path: Path
) -> None:
    adapter = release.folder / "adapter"
    more: dict[str, Any] = {"dataset": pairs, "start_adapter": start, "goes_on_from": adapter}
    run_dpo(going_on(train_spec, plan_for, tmp_path, {}, **more))
    file = tmp_path / "reference.sqlite"
    with closing(sqlite3.connect(file)) as db:
        [[key]] = db.execute("select distinct key from scores").fetchall()
        scores = db.execute("select pair, chosen, rejected from scores").fetchall()
    ScoreCache(file, key).put({pair: (chosen - 1.0, rejected) for pair, chosen, rejected in scores})
    with pytest.raises(GateError, match="the reference is not the start of training") as stopped:
        run_dpo(going_on(train_spec, plan_for, tmp_path / "again", {}, **more, reference_cache=file))
    assert stopped.value.check == "reference_is_start"


def test_an_adapter_of_another_rank_is_not_gone_on_from(
    pairs: Path, start: Path, plan_for: PlanMaker, train_spec: SpecMaker, tmp_path: Path
) -> None:
    wide = short_plan(plan_for, {}, steps=1).model_copy(update={"lora": plan_for(lora={"rank": 6}).lora})
    other = run_dpo(train_spec(wide, tmp_path / "wide", dataset=pairs))
    spec = going_on(
        train_spec, plan_for, tmp_path, {}, dataset=pairs, start_adapter=start, goes_on_from=other.folder / "adapter"
    )
    with pytest.raises(ConfigError, match="another rank than this run trains"):
        run_dpo(spec)


def test_a_run_that_is_stopped_before_it_was_probed_leaves_the_release_and_its_reference_is_sft(
    pairs: Path,
    start: Path,
    release: Run,
    plan_for: PlanMaker,
    train_spec: SpecMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[CollapseGuard] = []

    class Seen(CollapseGuard):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(dpo, "CollapseGuard", Seen)
    checks = ChecksSection(probe_prompts=4, probe_every=1.0, probe_tokens=32, held_out_pairs=0, sampled_answers=0)
    spec = going_on(
        train_spec, plan_for, tmp_path, {"learning_rate": 0.1}, dataset=pairs, start_adapter=start,
        goes_on_from=release.folder / "adapter",
    )  # fmt: skip
    plan = spec.plan.model_copy(update={"dpo_steps": 12})
    run = run_dpo(spec.model_copy(update={"plan": plan, "guard": GuardSpec.of(plan, default_bands(), checks)}))
    assert run.report["stopped"]["kept_step"] == 0
    assert largest_difference(run.adapter, release.adapter) == 0.0
    [guard] = made
    watched = guard.watched
    by_sft, by_release = (
        generation_health(answers(guard.prompts, 32, plan.dpo.seed))
        for answers in (watched.reference_answers, watched.answers)
    )
    assert by_sft != by_release
    assert guard.snapshot().values["reference"] == by_sft
    # A try that goes on with it finds the factors of the checkpoint on the model, and has the release all the same.
    values = guard.snapshot().values
    guard.take_up(Snapshot({}, values))
    assert guard.kept is guard.begun
