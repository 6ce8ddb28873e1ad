"""Sources in a pipeline: what a table has that is new is all that a run reads, and a sensor asks for that run."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dpo_assets import build_dpo_defs
from dpo_assets.errors import ConfigError
from dpo_assets_tests.automation.test_sensor import asked, said, tick
from dpo_assets_tests.pipelines import demo_recipe, failures, materialize, metadata

TO_DATASET = ["base_model", "raw_preferences", "quarantined_preferences", "dpo_dataset"]


def add(path: Path, numbers: range, at: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE IF NOT EXISTS votes (id integer, prompt, chosen, rejected, at)")
        rows = [(n, f"question {n}", f"answer {n}", "no", at) for n in numbers]
        connection.executemany("INSERT INTO votes VALUES (?, ?, ?, ?, ?)", rows)


def sql_recipe(path: Path, **changes: Any) -> dict[str, Any]:
    sql = {"database": str(path), "table": "votes", "id": "id", "watermark": "at", **changes}
    return demo_recipe(feedback={"sources": [{"sql": sql, "format": "auto"}]})


def test_a_run_reads_the_new_rows_of_a_table_and_keeps_the_earlier_ones(tmp_path: Path) -> None:
    path = tmp_path / "feedback.db"
    recipe = sql_recipe(path)
    (tmp_path / "home").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "home")) as instance:
        seen = []
        for numbers, at in ((range(10), "2026-01-01"), (range(0), ""), (range(10, 13), "2026-01-02")):
            add(path, numbers, at)
            result = materialize(recipe, instance, ["raw_preferences"])
            assert failures(result) == []
            told = metadata(result, "raw_preferences")
            seen.append((told["rows_in"], told["dagster/row_count"]))
        assert seen == [(10, 10), (10, 10), (13, 13)]


def test_a_vote_that_was_turned_round_in_its_table_replaces_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "feedback.db"
    recipe = sql_recipe(path)
    (tmp_path / "home").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "home")) as instance:
        add(path, range(60), "2026-01-01")
        assert failures(materialize(recipe, instance, ["raw_preferences"])) == []
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE votes SET chosen = rejected, rejected = chosen, at = '2026-01-02' WHERE id = 7")
        result = materialize(recipe, instance, TO_DATASET)
    report = metadata(result, "dpo_dataset")
    assert report
    reasons = metadata(result, "quarantined_preferences")
    assert reasons["reason/superseded"] == 1
    assert "reason/conflict" not in reasons


def test_the_sensor_sees_new_rows_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "feedback.db"
    recipe = sql_recipe(path)
    with dg.DagsterInstance.ephemeral(str(tmp_path)) as instance:
        missing = tick(instance, recipe)
        assert not asked(missing)
        assert "there is no SQLite file" in said(missing)
        add(path, range(3), "2026-01-01")
        first = tick(instance, recipe)
        add(path, range(3, 4), "2026-01-01")
        second = tick(instance, recipe, first.cursor)
        keys = [[request.run_key for request in asked(found)] for found in (first, second)]
        assert [len(found) for found in keys] == [1, 1]
        assert keys[0] != keys[1]


def test_a_format_that_does_not_exist_is_refused_when_the_pipeline_is_loaded(tmp_path: Path) -> None:
    recipe = demo_recipe(feedback={"sources": [{"path": "a.jsonl", "format": "hh"}]})
    with pytest.raises(ConfigError, match=r"there is no feedback format `hh`; there are: .*hh_rlhf"):
        build_dpo_defs("bot", recipe)
