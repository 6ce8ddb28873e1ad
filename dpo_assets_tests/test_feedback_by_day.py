"""Days of dated sources as partitions: read by themselves, read again, and all of them in the feedback either way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dpo_assets import build_dpo_defs
from dpo_assets.errors import ConfigError
from dpo_assets.feedback.sources import files_of
from dpo_assets.recipe import FeedbackSource, parse_recipe
from dpo_assets.recipe.dated import from_the_day_on, of_day, of_every_day
from dpo_assets_tests.pipelines import demo_recipe, failures, materialize, metadata

KEY, RAW = dg.AssetKey(["demo", "feedback_by_day"]), dg.AssetKey(["demo", "raw_preferences"])


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral(str(tmp_path / "home")) as opened:
        yield opened


def votes(path: Path, *numbers: int) -> Path:
    rows = [{"prompt": f"What of {n}?", "chosen": f"It is {n}.", "rejected": "No."} for n in numbers]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def dated_recipe(folder: Path, **more: Any) -> dict[str, Any]:
    sources = [{"path": f"{folder}/{{day}}/*.jsonl", "format": "trl"}]
    return demo_recipe(feedback={"sources": sources, "days": {"start": "2026-01-01"}}, **more)


def read_day(recipe: dict[str, Any], instance: dg.DagsterInstance, day: str) -> dg.ExecuteInProcessResult:
    job = dg.define_asset_job("days", selection=dg.AssetSelection.assets(KEY))
    defs = dg.Definitions.merge(build_dpo_defs("demo", recipe), dg.Definitions(jobs=[job]))
    result = defs.resolve_job_def("days").execute_in_process(instance=instance, partition_key=day, raise_on_error=False)
    assert result.success, failures(result)
    return result


def version(instance: dg.DagsterInstance, day: str) -> str:
    record = instance.fetch_materializations(dg.AssetRecordsFilter(KEY, asset_partitions=[day]), limit=1).records[0]
    assert record.asset_materialization is not None
    return str((record.asset_materialization.tags or {})["dagster/data_version"])


def test_a_day_is_read_by_itself_and_again_and_the_feedback_takes_up_what_days_read(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    recipe = dated_recipe(tmp_path)
    votes(tmp_path / "2026-01-05" / "votes.jsonl", 1, 2)
    votes(tmp_path / "2026-01-06" / "votes.jsonl", 3)
    shown = metadata(read_day(recipe, instance, "2026-01-05"), "feedback_by_day")
    assert (shown["pairs"], shown["dagster/partition_row_count"], shown["batches_read_now"]) == (2, 2, 1)
    assert "2026-01-05/votes.jsonl" in shown["files"]
    nothing = metadata(read_day(recipe, instance, "2026-01-07"), "feedback_by_day")
    assert (nothing["rows"], nothing["files"]) == (0, "no file of 2026-01-07")
    assert instance.get_materialized_partitions(KEY) == {"2026-01-05", "2026-01-07"}

    # Both days are in the feedback; the one that was read is not read again, though another file is called like it.
    raw = materialize(recipe, instance, ["raw_preferences"])
    assert raw.success, failures(raw)
    told = metadata(raw, "raw_preferences")
    assert (told["dagster/row_count"], told["batches_read_now"]) == (3, 1)

    # Feedback that came late: the day has other content, another day has not.
    before = version(instance, "2026-01-05")
    votes(tmp_path / "2026-01-05" / "late.jsonl", 4)
    late = metadata(read_day(recipe, instance, "2026-01-05"), "feedback_by_day")
    assert (late["pairs"], late["batches_read_now"]) == (3, 1)
    assert version(instance, "2026-01-05") != before
    again = metadata(materialize(recipe, instance, ["raw_preferences"]), "raw_preferences")
    assert (again["dagster/row_count"], again["batches_read_now"]) == (4, 0)
    read_day(recipe, instance, "2026-01-05")
    assert version(instance, "2026-01-05") != before
    assert str(metadata(read_day(recipe, instance, "2026-01-07"), "feedback_by_day")["reused"]).startswith("yes")


def test_eager_automation_follows_a_day_that_was_read_again_and_asks_for_a_day_that_is_over(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    recipe = dated_recipe(tmp_path, refresh={"automation": "eager"})
    day = str((datetime.now(UTC) - timedelta(days=9)).date())
    votes(tmp_path / day / "votes.jsonl", 1, 2)
    recipe["feedback"]["days"]["start"] = day
    defs = build_dpo_defs("demo", recipe)
    read_day(recipe, instance, day)
    assert materialize(recipe, instance, ["raw_preferences"]).success
    first = dg.evaluate_automation_conditions(defs, instance)
    assert first.get_num_requested(RAW) == 0
    votes(tmp_path / day / "late.jsonl", 3)
    read_day(recipe, instance, day)
    second = dg.evaluate_automation_conditions(defs, instance, cursor=first.cursor)
    # Eight days were never read by themselves.
    assert second.get_num_requested(RAW) == 1
    assert first.get_num_requested(KEY) == second.get_num_requested(KEY) == 0
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    third = dg.evaluate_automation_conditions(defs, instance, cursor=second.cursor, evaluation_time=tomorrow)
    assert third.get_requested_partitions(KEY) == {str(datetime.now(UTC).date())}


def test_cron_automation_reads_the_feedback_though_a_day_was_never_read_by_itself(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    """As where its partition failed, or its day is not over."""
    recipe = dated_recipe(tmp_path, refresh={"automation": "cron", "schedule": "0 3 * * *"})
    recipe["feedback"]["days"]["start"] = str((datetime.now(UTC) - timedelta(days=2)).date())
    defs = build_dpo_defs("demo", recipe)
    first = dg.evaluate_automation_conditions(defs, instance)
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    second = dg.evaluate_automation_conditions(defs, instance, cursor=first.cursor, evaluation_time=tomorrow)
    assert (first.get_num_requested(RAW), second.get_num_requested(RAW)) == (0, 1)
    assert second.get_num_requested(dg.AssetKey(["demo", "dpo_dataset"])) == 0, "what is read is waited for"


def test_the_graph_has_days_only_where_the_recipe_asks_and_the_refresh_needs_no_partition(tmp_path: Path) -> None:
    defs = build_dpo_defs("demo", dated_recipe(tmp_path))
    specs = {spec.key: spec for spec in defs.resolve_all_asset_specs()}
    assert isinstance(specs[KEY].partitions_def, dg.DailyPartitionsDefinition)
    [dep] = specs[RAW].deps
    assert (dep.asset_key, type(dep.partition_mapping)) == (KEY, dg.AllPartitionMapping)
    job = defs.resolve_job_def("demo_refresh")
    assert job.partitions_def is None
    assert KEY not in job.asset_layer.executable_asset_keys
    without = build_dpo_defs("demo", demo_recipe())
    assert KEY not in {spec.key for spec in without.resolve_all_asset_specs()}


@pytest.mark.parametrize(
    ("path", "days", "said"),
    [
        ("feedback/*.jsonl", {"start": "2026-01-01"}, "`days` needs a source whose path names the day"),
        ("feedback/{day:%Y-%m}/*.jsonl", None, "cannot be told apart without %d"),
        ("feedback/{day:%Y%j}/*.jsonl", None, "a day is written with %Y, %m and %d"),
        ("https://example.com/{day}.jsonl", None, "days of a web address cannot be listed"),
        ("feedback/{day}/*.jsonl", {"start": "soon"}, r"feedback\.days\.start"),
        ("feedback/{day}/*.jsonl", {"start": "2026-01-01", "time_zone": "Mars"}, "there is no time zone `Mars`"),
    ],
)
def test_days_that_cannot_be_are_refused_with_what_would_pass(path: str, days: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_recipe(demo_recipe(feedback={"sources": [{"path": path}], **({"days": days} if days else {})}))


def test_a_path_gives_its_days_its_pattern_and_names_that_begin_with_the_day() -> None:
    day, path = date(2026, 1, 31), "/data/../in/{day:%Y/%m}/{day:%d}-votes*.jsonl"
    assert of_day(path, day) == "/data/../in/2026/01/31-votes*.jsonl"
    assert of_every_day(path) == "/data/../in/[0-9][0-9][0-9][0-9]/[0-9][0-9]/[0-9][0-9]-votes*.jsonl"
    assert from_the_day_on(path, "/in/2026/01/31-votes-a.jsonl") == "2026/01/31-votes-a.jsonl"
    assert (
        from_the_day_on("s3://bucket/in/{day}/**/*.jsonl", "bucket/in/2026-01-31/a/b.jsonl") == "2026-01-31/a/b.jsonl"
    )


def test_a_url_has_days_too_and_a_folder_that_may_not_be_listed_is_no_day_without_files(tmp_path: Path) -> None:
    import fsspec

    files = fsspec.filesystem("memory")
    for day in ("2026-01-05", "2026-01-06"):
        with files.open(f"/of-days/{day}/votes.jsonl", "wb") as file:
            file.write(votes(tmp_path / "votes.jsonl", 1).read_bytes())
    source = FeedbackSource(path="memory://of-days/{day}/*.jsonl")
    found = files_of([source], tmp_path / "landing")
    assert [one.name for one in found] == ["2026-01-05/votes.jsonl", "2026-01-06/votes.jsonl"]
    one_day = files_of([source], tmp_path / "landing", day=date(2026, 1, 6))
    assert [one.identity() for one in one_day] == [found[1].identity()]
    assert files_of([source], tmp_path / "landing", day=date(2026, 1, 7)) == []
    climbing = FeedbackSource(path=f"{tmp_path}/*/../{{day}}.jsonl")
    with pytest.raises(ConfigError, match="climbs out of its folder"):
        files_of([climbing], day=date(2026, 1, 6))
