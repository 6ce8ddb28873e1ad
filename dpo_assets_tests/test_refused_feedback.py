"""Feedback that drops out: a file that is refused, a source that shrinks, a row that is lost. None of it is green."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from dpo_assets import build_dpo_defs
from dpo_assets.feedback import batches, fitted, reading, splits
from dpo_assets.recipe import Severity
from dpo_assets_tests.feedback.exported import EXPORTS
from dpo_assets_tests.pipelines import (
    demo_recipe,
    failed_checks,
    failures,
    materialize,
    metadata,
    trl_feedback,
    trl_recipe,
)

RAW = ["raw_preferences"]
DATA = ["base_model", "raw_preferences", "quarantined_preferences", "dpo_dataset"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of feedback."""
    made = tmp_path / "feedback"
    made.mkdir()
    trl_feedback(made / "large.jsonl", pairs=77)
    trl_feedback(made / "small.jsonl", pairs=23)
    return made


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_assets.assets.step.RETRY_SECONDS", 0.0)


def severity(**checks: Severity) -> dict[str, Any]:
    return {"checks": {"severity": checks}}


def verdict_of(result: dg.ExecuteInProcessResult, check: str) -> dg.AssetCheckEvaluation:
    return next(one for one in result.get_asset_check_evaluations() if one.check_name == check)


def checked_again(recipe: dict[str, Any], instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    """The check `feedback_volume` executed by itself."""
    key = dg.AssetCheckKey(dg.AssetKey(["demo", "raw_preferences"]), "feedback_volume")
    job = dg.define_asset_job("only_checks", selection=dg.AssetSelection.checks(key))
    defs = dg.Definitions.merge(build_dpo_defs("demo", recipe), dg.Definitions(jobs=[job]))
    return defs.resolve_job_def("only_checks").execute_in_process(instance=instance)


def to_an_outside_link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere.jsonl")
    path.symlink_to(path.parent.parent / "elsewhere.jsonl")


def to_a_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.jsonl")


def to_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def to_no_byte(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("becomes", "reason"),
    [
        (to_an_outside_link, "outside_folder"),
        (to_a_dangling_link, "unreadable"),
        (to_a_pipe, "not_a_regular_file"),
        (to_no_byte, "empty_file"),
    ],
)
def test_a_file_that_is_refused_blocks_and_is_named(
    instance: dg.DagsterInstance, folder: Path, becomes: Callable[[Path], None], reason: str
) -> None:
    becomes(folder / "large.jsonl")
    result = materialize(trl_recipe(folder / "*.jsonl"), instance, RAW)
    assert not result.success
    gates = failed_checks(result)
    assert set(gates) == {"every_file_read"}
    assert gates["every_file_read"]["value"] == "1 of 2 files read"
    assert f"large.jsonl ({reason}: " in gates["every_file_read"]["what to change"]
    assert reason in metadata(result, "raw_preferences")["rejected_by_reason"]
    if becomes is not to_a_pipe:  # Once is enough for what follows.
        return
    # By hand neither: the gate holds until the file is read, or the recipe says that it may be missing.
    assert failures(materialize(trl_recipe(folder / "*.jsonl"), instance, ["base_model", *DATA[2:]])) == [
        "`demo/raw_preferences` did not pass every_file_read; mend it before going on from it."
    ]


def test_a_refused_file_that_the_recipe_may_do_without_is_warned_of(instance: dg.DagsterInstance, folder: Path) -> None:
    to_no_byte(folder / "small.jsonl")
    result = materialize(
        trl_recipe(folder / "*.jsonl") | severity(every_file_read="warn", feedback_volume="error"), instance, RAW
    )
    assert result.success, failures(result)
    assert verdict_of(result, "every_file_read").severity == dg.AssetCheckSeverity.WARN
    assert metadata(result, "raw_preferences")["rows_in"] == 77
    named = materialize(trl_recipe(folder / "large.jsonl"), instance, RAW)
    assert verdict_of(named, "every_file_read").passed


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch, no_wait: None) -> Iterator[Callable[[Path, int], None]]:
    """Somebody who writes another first row into a file while it is read, so many times."""
    left: list[Path] = []
    run = reading.run_jobs

    def while_it_is_read(jobs: Any) -> Any:
        if left and jobs and jobs[0].file.path == left[0]:
            path = left.pop()
            row = {"prompt": f"And {len(left)}?", "chosen": "yes", "rejected": "no"}
            path.write_bytes(f"{json.dumps(row)}\n".encode() + path.read_bytes())
        return run(jobs)

    monkeypatch.setattr("dpo_assets.feedback.library.run_jobs", while_it_is_read)
    return lambda path, times: left.extend([path] * times)


def test_a_file_that_is_written_while_it_is_read_is_tried_again_and_read_whole(
    instance: dg.DagsterInstance, folder: Path, writer: Callable[[Path, int], None]
) -> None:
    writer(folder / "large.jsonl", 1)
    result = materialize(trl_recipe(folder / "*.jsonl"), instance, RAW)
    assert result.success, failures(result)
    assert [event.event_type for event in result.all_events].count(dg.DagsterEventType.STEP_RESTARTED) == 1
    assert metadata(result, "raw_preferences")["rows_in"] == 101
    assert failed_checks(result) == {}


def test_a_file_that_is_written_all_the_time_stops_the_run_and_what_was_read_before_stays(
    instance: dg.DagsterInstance, folder: Path, writer: Callable[[Path, int], None]
) -> None:
    recipe = trl_recipe(folder / "*.jsonl")
    assert materialize(recipe, instance, RAW).success
    trl_feedback(folder / "large.jsonl", pairs=90)
    writer(folder / "large.jsonl", 3)
    result = materialize(recipe, instance, RAW)
    assert failures(result) == [
        "feedback file large.jsonl: it changed while it was read; run again once its writer is done, and where it "
        "never is, rotate the file or copy it and read the copy\nGiven up after 3 attempts."
    ]
    assert result.get_asset_materialization_events() == []


# Feedback that shrinks


def test_a_file_that_is_gone_is_warned_of_and_the_next_run_is_held_against_this_one(
    instance: dg.DagsterInstance, folder: Path
) -> None:
    recipe = trl_recipe(folder / "*.jsonl")
    first = materialize(recipe, instance, RAW)
    assert verdict_of(first, "feedback_volume").passed
    (folder / "small.jsonl").unlink()
    second = materialize(recipe, instance, RAW)
    assert second.success
    fallen = verdict_of(second, "feedback_volume")
    assert (fallen.passed, fallen.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert fallen.metadata["value"].value == "77 rows, 100 before"
    assert fallen.metadata["note"].value == "files that were there before: small.jsonl"
    # The check by itself is held against what was there before the artefact that it stands on.
    assert (
        verdict_of(checked_again(recipe, instance), "feedback_volume").metadata["value"].value == "77 rows, 100 before"
    )
    assert verdict_of(materialize(recipe, instance, RAW), "feedback_volume").passed


def test_a_fall_that_the_recipe_calls_an_error_blocks_until_the_rows_are_back_or_the_bound_is_raised(
    instance: dg.DagsterInstance, folder: Path
) -> None:
    recipe = trl_recipe(folder / "*.jsonl") | severity(feedback_volume="error")
    assert materialize(recipe, instance, RAW).success
    trl_feedback(folder / "large.jsonl", pairs=60)
    for _ in range(2):  # What was stopped is no measure for the next run.
        stopped = materialize(recipe, instance, RAW)
        assert set(failed_checks(stopped)) == {"feedback_volume"}
        assert "100 rows in 2 files before, 83 in 2 now" in failed_checks(stopped)["feedback_volume"]["what to change"]
    raised = trl_recipe(folder / "*.jsonl", max_row_fall=0.2) | severity(feedback_volume="error")
    assert materialize(raised, instance, RAW).success


def test_files_of_the_launchpad_are_held_against_nothing_and_are_no_measure(
    instance: dg.DagsterInstance, folder: Path
) -> None:
    recipe = trl_recipe(folder / "*.jsonl") | severity(feedback_volume="error")
    config = {"ops": {"demo__raw_preferences": {"config": {"paths": [str(folder / "small.jsonl")]}}}}
    assert materialize(recipe, instance, RAW).success
    once = materialize(recipe, instance, RAW, run_config=config)
    assert once.success, failures(once)
    assert verdict_of(once, "feedback_volume").metadata["value"].value == "23 rows"
    again = checked_again(recipe, instance)
    assert verdict_of(again, "feedback_volume").metadata["value"].value == "23 rows"
    (folder / "small.jsonl").unlink()
    assert "100 rows in 2 files before" in str(failed_checks(materialize(recipe, instance, RAW)))


def test_a_table_that_is_read_anew_is_no_file_that_is_gone(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    path = tmp_path / "votes.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE votes (id integer, prompt, chosen, rejected)")
        connection.executemany("INSERT INTO votes VALUES (?, ?, 'yes', 'no')", [(n, f"q {n}") for n in range(9)])
    sources = [{"sql": {"database": str(path), "table": "votes", "id": "id"}}]
    recipe = demo_recipe(feedback={"sources": sources})
    assert materialize(recipe, instance, RAW).success
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("INSERT INTO votes VALUES (9, 'q', 'yes', 'no')")
    assert verdict_of(materialize(recipe, instance, RAW), "feedback_volume").passed


# A format that is not the file's


def test_a_file_of_another_format_blocks_and_is_told_which_it_is(instance: dg.DagsterInstance, folder: Path) -> None:
    shutil.copy(EXPORTS / "openai.jsonl", folder / "votes.jsonl")
    result = materialize(trl_recipe(folder / "*.jsonl"), instance, RAW)
    assert not result.success
    gate = failed_checks(result)["every_file_read"]
    assert gate["value"] == "2 of 3 files read"
    assert "votes.jsonl (none of its 4 rows is of use as `trl`, and it looks like `openai`" in gate["what to change"]


# Rows


def test_a_row_that_does_not_reach_its_table_turns_the_account_red(
    instance: dg.DagsterInstance, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (folder / "small.jsonl").open("a", encoding="utf-8") as handle:
        handle.write('{"prompt": "thumbs", "completion": "good", "label": true}\n{"broken\n')
    real = batches.quarantine_frame
    monkeypatch.setattr(batches, "quarantine_frame", lambda rejected: real(rejected[:-1]))
    result = materialize(trl_recipe(folder / "*.jsonl"), instance, RAW)
    assert not result.success
    gate = failed_checks(result)["every_row_accounted_for"]
    assert "small.jsonl: 25 rows were seen, 24 lie in its tables" in gate["what to change"]


def test_a_pair_that_is_lost_before_the_split_and_a_prompt_on_both_sides_turn_the_dataset_red(
    instance: dg.DagsterInstance, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "Which one?", "chosen": f"The one with {n}.", "rejected": "None."} for n in range(9)]
    (folder / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fit = fitted.fit_to_model

    def losing(*given: Any) -> Any:
        fitting, faults = fit(*given)
        return fitting[:-2], faults

    def leaking(drawn: pl.Series, together: pl.Series) -> pl.Series:
        return pl.Series([n % 2 == 0 for n in range(drawn.len())])

    monkeypatch.setattr(fitted, "fit_to_model", losing)
    monkeypatch.setattr(splits, "held_out", leaking)
    result = materialize(trl_recipe(folder / "*.jsonl"), instance, DATA)
    gates = failed_checks(result)
    # Two pairs of each file are lost.
    assert gates["every_pair_accounted_for"]["what to change"].endswith("109 rows came in, 103 are accounted for")
    assert gates["split_leak"]["value"] == 1


# Secrets


def test_a_url_of_the_launchpad_is_told_without_its_password(instance: dg.DagsterInstance, folder: Path) -> None:
    paths = ["https://me:hunter2@host/a.jsonl"]
    config = {"ops": {"demo__raw_preferences": {"config": {"paths": paths}}}}
    said = failures(materialize(trl_recipe(folder / "*.jsonl"), instance, RAW, run_config=config))
    assert "paths of the launchpad: path: `path` holds credentials" in said[0]
    assert "hunter2" not in said[0]
