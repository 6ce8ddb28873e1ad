"""Days of feedback through the assets: a window of them, and drift between two."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import dagster as dg
import polars as pl
import pytest

from dpo_assets.feedback.batches import QUARANTINE
from dpo_assets.feedback.dataset import read_split
from dpo_assets_tests.pipelines import DATA, failed_checks, failures, materialize, metadata, trl_recipe

DAYS = 90


def votes(path: Path) -> Path:
    """Three rows a day; in the last 28 days the rejected answer is the long one. Two rows have no date, one is none."""
    now, rows = datetime.now(UTC), list[dict[str, Any]]()
    for n in range(3 * DAYS):
        long = "A long answer that goes on and on." if n // 3 < 28 else "Short."
        rows.append(
            {
                "prompt": f"What of {n}?",
                "chosen": f"It is number {n}.",
                "rejected": long,
                "created_at": str(now - timedelta(days=n // 3)),
            }
        )
    rows += [{"prompt": f"When {n}?", "chosen": "On a day.", "rejected": "Never."} for n in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "half"}]), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Runs:
    """The same feedback without a window, in a window of 30 days, in it once more, and with other days compared."""

    whole: dg.ExecuteInProcessResult
    window: dg.ExecuteInProcessResult
    again: dg.ExecuteInProcessResult
    compared: dg.ExecuteInProcessResult


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    path = votes(tmp_path_factory.mktemp("feedback") / "votes.jsonl")
    window: dict[str, Any] = {"min_pairs": 10, "window": {"days": 30}}
    recipes = [
        trl_recipe(path, min_pairs=10),
        *[trl_recipe(path, **window)] * 2,
        trl_recipe(path, **window, drift_days=7),
    ]
    with dg.DagsterInstance.local_temp(str(tmp_path_factory.mktemp("home"))) as instance:
        first = materialize(recipes[0], instance, DATA)
        made = [first, *(materialize(recipe, instance, DATA[1:]) for recipe in recipes[1:])]
        assert all(run.success for run in made), [failures(run) for run in made]
        yield Runs(*made)


def folder(run: dg.ExecuteInProcessResult) -> Path:
    return Path(str(metadata(run, "dpo_dataset")["path"]))


def split(run: dg.ExecuteInProcessResult, side: Literal["train", "eval"]) -> pl.DataFrame:
    return read_split(folder(run), side, ["pair_id", "created_at"])


def test_training_takes_the_window_and_what_is_held_out_stays(runs: Runs) -> None:
    whole, window = (split(run, "eval")["pair_id"].to_list() for run in (runs.whole, runs.window))
    assert whole == window
    before, after = (split(run, "train") for run in (runs.whole, runs.window))
    first = str((datetime.now(UTC) - timedelta(days=29)).date())
    kept = before.filter((pl.col("created_at") >= first) | pl.col("created_at").is_null())
    assert after["pair_id"].to_list() == kept["pair_id"].to_list()
    assert 0 < after.height < before.height


def test_every_row_outside_of_the_window_is_counted_and_quarantine_is_as_it_was(runs: Runs) -> None:
    shown, whole = metadata(runs.window, "dpo_dataset"), metadata(runs.whole, "dpo_dataset")
    left = whole["train_pairs"] - shown["train_pairs"]
    assert shown["outside_window"] == left > 0
    assert f"{left} older pairs were left out" in shown["window"]
    assert "2 pairs have no date (votes.jsonl 2), they are trained on" in shown["window"]
    assert shown["rows_in"] == shown["accepted"] + shown["quarantined"] + shown["duplicates"] + left
    assert "every_pair_accounted_for" not in failed_checks(runs.window)
    quarantined = [pl.read_parquet(folder(run) / QUARANTINE) for run in (runs.window, runs.whole)]
    assert quarantined[0].equals(quarantined[1])
    assert "outside_window" not in whole


def test_the_same_feedback_has_the_same_window_and_is_reused(runs: Runs) -> None:
    assert str(metadata(runs.again, "dpo_dataset")["reused"]).startswith("yes")


def test_drift_of_the_newest_days_is_yellow_with_numbers_and_a_plot_whatever_the_window_takes(runs: Runs) -> None:
    for run in (runs.whole, runs.window):
        told = failed_checks(run)["feedback_drift"]
        assert "all, longer won: -" in told["what to change"]
        assert "2 pairs without a date" in told["note"]
        assert metadata(run, "dpo_dataset")["feedback by window"].startswith("![feedback by window](data:image/png")
    assert metadata(runs.whole, "dpo_dataset")["newest window against the one before"]


def test_what_days_are_compared_changes_what_is_told_and_nothing_that_is_trained_on(runs: Runs) -> None:
    before, after = (metadata(run, "dpo_dataset") for run in (runs.again, runs.compared))
    assert after["digest"] == before["digest"]
    assert after["path"] != before["path"]
    assert "feedback_drift" in failed_checks(runs.again)
    assert "feedback_drift" not in failed_checks(runs.compared), "the last 7 days are like the 7 before them"
