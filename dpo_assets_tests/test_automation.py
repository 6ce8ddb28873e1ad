"""The new-feedback sensor: once per content, and never on a file that is being written."""

from __future__ import annotations

import os
from pathlib import Path

import dagster as dg
import pytest

import dpo_assets.automation as automation
from dpo_assets import build_dpo_defs
from dpo_assets_tests.pipelines import trl_feedback, trl_recipe


def tick(path: Path, cursor: str | None) -> dg.SensorResult | dg.SkipReason:
    defs = build_dpo_defs("bot", trl_recipe(path))
    sensor = defs.get_repository_def().get_sensor_def("bot_new_feedback")
    result = sensor(dg.build_sensor_context(cursor=cursor))
    assert isinstance(result, dg.SensorResult | dg.SkipReason)
    return result


def settled(path: Path) -> Path:
    """The file with a time outside the settling window."""
    os.utime(path, (1_700_000_000, 1_700_000_000 + path.stat().st_size))
    return path


def test_new_feedback_requests_one_run_keyed_by_content(tmp_path: Path) -> None:
    path = settled(trl_feedback(tmp_path / "a.jsonl"))
    first = tick(path, None)
    assert isinstance(first, dg.SensorResult)
    assert first.run_requests is not None
    assert [bool(request.run_key) for request in first.run_requests] == [True]
    assert isinstance(tick(path, first.cursor), dg.SkipReason)


def test_more_feedback_requests_another_run(tmp_path: Path) -> None:
    path = settled(trl_feedback(tmp_path / "a.jsonl", pairs=5))
    first = tick(path, None)
    settled(trl_feedback(path, pairs=6))
    second = tick(path, first.cursor if isinstance(first, dg.SensorResult) else None)
    assert isinstance(first, dg.SensorResult)
    assert isinstance(second, dg.SensorResult)
    assert first.run_requests is not None
    assert second.run_requests is not None
    assert first.run_requests[0].run_key != second.run_requests[0].run_key


def test_a_file_that_was_only_touched_requests_nothing(tmp_path: Path) -> None:
    path = settled(trl_feedback(tmp_path / "a.jsonl"))
    first = tick(path, None)
    assert isinstance(first, dg.SensorResult)
    os.utime(path, (1_600_000_000, 1_600_000_000))
    second = tick(path, first.cursor)
    assert isinstance(second, dg.SensorResult)
    assert second.run_requests == []


def test_a_file_still_being_written_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trl_feedback(tmp_path / "a.jsonl")
    monkeypatch.setattr(automation, "SETTLE_SECONDS", 3600.0)
    result = tick(path, None)
    assert isinstance(result, dg.SkipReason)
    assert "still being written" in str(result.skip_message)


def test_missing_feedback_is_a_skip_with_the_reason_not_an_error(tmp_path: Path) -> None:
    result = tick(tmp_path / "none.jsonl", None)
    assert isinstance(result, dg.SkipReason)
    assert "matches no file" in str(result.skip_message)
