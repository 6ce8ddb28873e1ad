"""Preferences through the assets: pairing, cleaning, the quarantine over runs, and rows released by rule."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from dpo_assets.feedback import fitted
from dpo_assets.feedback.batches import PAIRS
from dpo_assets.feedback.dataset import SPLITS, parts_of, read_split
from dpo_assets_tests.pipelines import DATA, failures, materialize, metadata, trl_feedback, trl_recipe


def report(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    path = Path(str(metadata(result, "dpo_dataset")["path"])) / "report.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


NOTE = "a tutorial on chat templates, looked through"
RELEASE = [{"reason": "template_marks", "source": "votes*", "note": NOTE}]


@dataclass(frozen=True)
class History:
    """Three runs of one pipeline: before the second came a new file, and a rule that releases rows; before the third a
    batch that the dataset chose from was damaged, and another was gone."""

    first: dg.ExecuteInProcessResult
    second: dg.ExecuteInProcessResult
    log_of_second: list[str]
    third: dg.ExecuteInProcessResult
    whole: dict[Path, bytes]  # The tables of the batches that the second run fitted.


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    folder = tmp_path_factory.mktemp("feedback")
    votes = trl_feedback(folder / "votes.jsonl", pairs=150)
    marked = {
        "prompt": "How does a chat template end a turn?",
        "chosen": "With <|im_end|>.",
        "rejected": "It does not.",
    }
    rows = [
        marked,
        {"prompt": "Who?", "chosen": "Write to ann@example.com.", "rejected": "Nobody."},
        {"prompt": "thumbs", "completion": "a good answer", "label": True, "id": "up"},
        {"prompt": "thumbs", "completion": "a bad one", "label": False, "id": "down"},
        {"prompt": "alone", "completion": "only one", "label": True, "id": "alone"},
    ]
    with votes.open("a", encoding="utf-8") as handle:
        handle.write("".join(json.dumps(row) + "\n" for row in rows))
    source = folder / "*.jsonl"
    with dg.DagsterInstance.local_temp(str(tmp_path_factory.mktemp("home"))) as instance:
        first = materialize(trl_recipe(source), instance, DATA)
        row = {"prompt": "What is new?", "chosen": "One pair, on Tuesday.", "rejected": "Nothing at all."}
        (folder / "tuesday.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        second = materialize(trl_recipe(source, release=RELEASE), instance, DATA)
        log = [event.message for event in instance.all_logs(second.run_id)]
        dataset = Path(str(metadata(second, "dpo_dataset")["path"]))
        whole = {path: path.read_bytes() for part in parts_of(dataset) if (path := part.folder(dataset) / PAIRS)}
        damaged, gone, *_ = whole
        damaged.write_bytes(damaged.read_bytes()[:-9] + b"otherwise")
        shutil.rmtree(gone.parent)
        third = materialize(trl_recipe(source, release=RELEASE), instance, DATA)
        yield History(first, second, log, third, whole)


def test_the_first_run_counts_every_row_once(history: History) -> None:
    first = history.first
    assert first.success, failures(first)
    raw = metadata(first, "raw_preferences")
    assert (raw["rows_in"], raw["dagster/row_count"]) == (155, 153)
    assert "human_thumb" in raw["pairing"]
    assert "completion" in raw["shapes_of_rows"]
    quarantine = metadata(first, "quarantined_preferences")
    assert (quarantine["reason/template_marks"], quarantine["reason/unpaired"]) == (1, 1)
    said = report(first)
    assert said["rows_in"] == said["accepted"] + said["quarantined"] + said["duplicates"] == 154
    assert said["damaged"] == 1
    assert said["flagged"]["email"] == 1
    kinds = {row["name"]: row["pairs"] for row in said["sources"]["by_label_kind"]}
    assert kinds["human_thumb"] == 1


def test_the_quarantine_is_shown_over_runs_and_a_rule_takes_rows_out_of_it(history: History) -> None:
    second = history.second
    assert second.success, failures(second)
    assert metadata(second, "raw_preferences")["files_read_now"] == 1, "the file of the first run was read again"
    assert report(second)["released"] == [{**RELEASE[0], "rows": 1}]
    after = metadata(second, "quarantined_preferences")
    assert NOTE in after["released"]
    assert [line.split("|")[1].strip() for line in after["trend"].splitlines()[2:]] == [
        "unpaired",
        "template_marks",
        "all",
    ]
    assert after["trend"].splitlines()[0].count("|") == 4
    folder = Path(str(metadata(second, "dpo_dataset")["path"]))
    pairs = pl.concat([read_split(folder, side) for side in SPLITS])
    assert pairs.filter(pl.col("flags").str.contains("released:template_marks")).height == 1


def test_a_refresh_tokenizes_new_pairs_only(history: History) -> None:
    """Of the second run's pairs one is of the new file, and one was in quarantine before."""
    assert any("152 of 154 pairs were tokenized before" in message for message in history.log_of_second), (
        history.log_of_second
    )


def test_a_batch_of_the_dataset_that_is_damaged_or_gone_is_made_again_and_is_the_same(history: History) -> None:
    third = history.third
    assert third.success, failures(third)
    assert len(history.whole) > 2
    assert {path: path.read_bytes() for path in history.whole} == history.whole
    assert "was there" in metadata(third, "dpo_dataset")["reused"]
    assert metadata(third, "dpo_dataset")["digest"] == metadata(history.second, "dpo_dataset")["digest"]


def test_batches_that_are_made_again_with_other_bytes_make_the_dataset_anew_with_the_same_content(
    instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = trl_recipe(trl_feedback(tmp_path / "votes.jsonl", pairs=60), min_pairs=10)
    first = materialize(recipe, instance, DATA)
    old = metadata(first, "dpo_dataset")
    for part in parts_of(Path(str(old["path"]))):
        shutil.rmtree(part.folder(Path(str(old["path"]))))
    monkeypatch.setattr(fitted, "ROW_GROUP", 7)  # Stands for another pyarrow, which writes another footer.
    second = materialize(recipe, instance, DATA)
    assert second.success, failures(second)
    new = metadata(second, "dpo_dataset")
    assert new["digest"] == old["digest"], "nothing is trained again"
    assert read_split(Path(str(new["path"])), "train").height > 10


def test_an_evaluation_set_that_is_not_there_is_named(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    path = trl_feedback(tmp_path / "votes.jsonl", pairs=5)
    missing = str(tmp_path / "judged_by.jsonl")
    result = materialize(trl_recipe(path, cleaning={"evaluation_sets": [missing]}), instance, DATA)
    assert not result.success
    assert any(missing in str(event.event_specific_data) for event in result.all_events if event.is_failure)
