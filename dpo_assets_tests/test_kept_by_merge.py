"""What `eval_scores` holds the merged weights against: the adapter's own margins, pair by pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dpo_assets.artifact import Artifact, seal, write_json
from dpo_assets.assets.eval_scores import SCORES, _dpo_report, _learned
from dpo_assets.checks.promotion import Margins
from dpo_assets.checks.reports import NotMeasured
from dpo_assets_tests.samples import aftermath_report, dpo_report


def adapter_with(folder: Path, held_out: dict[str, Any]) -> Artifact:
    folder.mkdir()
    report = dpo_report(**aftermath_report() | {"held_out": held_out})
    write_json(folder / "report.json", report.model_dump(mode="json"))
    return seal(folder, kind="dpo_adapter", fingerprint="a" * 32, inputs={})


@pytest.fixture
def scores(tmp_path: Path) -> Artifact:
    folder = tmp_path / "scores"
    folder.mkdir()
    pl.DataFrame(
        {
            "pair_id": ["a", "b"],
            "sft_chosen": [-10.0, -20.0],
            "sft_rejected": [-12.0, -18.0],
            "policy_chosen": [-9.0, -20.0],
            "policy_rejected": [-14.0, -17.0],
        }
    ).write_parquet(folder / SCORES)
    return seal(folder, kind="eval_scores", fingerprint="b" * 32, inputs={})


def test_the_margin_of_a_scored_pair_is_what_the_policy_prefers_the_chosen_answer_by_more_than_its_start(
    tmp_path: Path, scores: Artifact
) -> None:
    held_out = aftermath_report()["held_out"] | {"margins": {"a": 3.5, "another": 1.0}}
    found = _learned(_dpo_report(adapter_with(tmp_path / "adapter", held_out)), scores)
    assert isinstance(found, Margins)
    assert found.merged == {"a": 3.0, "b": -1.0}
    assert found.means() == (3.5, 3.0, 1)


def test_an_adapter_without_margins_is_one_of_an_earlier_version(tmp_path: Path, scores: Artifact) -> None:
    held_out = {name: value for name, value in aftermath_report()["held_out"].items() if name != "margins"}
    assert _learned(_dpo_report(adapter_with(tmp_path / "adapter", held_out)), scores) is None
    unread = adapter_with(tmp_path / "unread", held_out)
    (unread.path / "report.json").write_text(json.dumps({"said": "other things"}))
    assert _learned(_dpo_report(unread), scores) is None


def test_an_adapter_that_was_not_measured_says_why(tmp_path: Path, scores: Artifact) -> None:
    adapter = adapter_with(tmp_path / "adapter", {"not_measured": "no pairs"})
    assert _learned(_dpo_report(adapter), scores) == NotMeasured(not_measured="no pairs")
