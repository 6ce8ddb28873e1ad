"""A collapse as a user meets it: a pipeline whose DPO run is stopped, with the reason on the screen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dpo_assets import build_dpo_defs
from dpo_assets.artifact import Artifact, seal
from dpo_assets.assets.dpo_adapter import _would_go_on
from dpo_assets.checks.bands import default_bands
from dpo_assets.checks.reports import Stop
from dpo_assets.contract import GuardSpec
from dpo_assets.recipe import BandOverride, ChecksSection
from dpo_assets_tests.pipelines import failed_checks, failures, materialize, metadata, trl_feedback, trl_recipe
from dpo_assets_tests.samples import dpo_report, plan

UP_TO_MERGE = (
    "base_model", "raw_preferences", "quarantined_preferences", "dpo_dataset", "dpo_plan", "sft_checkpoint",
    "dpo_adapter", "merged_model",
)  # fmt: skip
# The lint of the rate is lowered, as whoever is sure of it would; what it warned of then happens.
CHECKS: dict[str, Any] = {
    "severity": {"learning_rate_band": "warn", "training_dose": "warn"},
    "probe_prompts": 2, "probe_every": 0.2, "probe_tokens": 8, "sampled_answers": 4, "held_out_pairs": 8,
}  # fmt: skip


@pytest.fixture
def ruinous(tmp_path: Path) -> dict[str, Any]:
    recipe = trl_recipe(trl_feedback(tmp_path / "pairs.jsonl"), min_pairs=20, eval_fraction=0.5)
    return recipe | {
        "sft": {"strategy": "adopt"},
        "dpo": {"learning_rate": 0.1, "batch_size": 4, "epochs": 3.0, "schedule": "constant"},
        "checks": CHECKS,
    }


def test_a_collapsing_run_is_stopped_shown_and_blocks_what_follows(
    ruinous: dict[str, Any], instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    result = materialize(ruinous, instance, UP_TO_MERGE)
    assert not result.success
    # The stage did not fail: the asset is there, and its check blocks.
    assert "demo/dpo_adapter: collapse" in failures(result)[0]
    shown = metadata(result, "dpo_adapter")
    assert shown["steps"] < 20
    check = failed_checks(result)["collapse"]
    assert "at step" in check["value"]
    assert check["band"]
    assert "arXiv" in check["source"]
    assert check["what to change"].startswith("lower dpo.learning_rate from 0.1")
    assert check["curve"].startswith("![")
    assert len(check["curve"]) < 64_000
    made = {e.asset_key.path[-1] for e in result.get_asset_materialization_events() if e.asset_key}
    assert made == set(UP_TO_MERGE) - {"merged_model"}

    # Asked again by itself, with no worker to train: it still fails, and the artefact is still refused.
    key = dg.AssetCheckKey(dg.AssetKey(["demo", "dpo_adapter"]), "collapse")
    job = dg.define_asset_job("only_checks", selection=dg.AssetSelection.checks(key))
    defs = dg.Definitions.merge(build_dpo_defs("demo", ruinous), dg.Definitions(jobs=[job]))
    again = defs.resolve_job_def("only_checks").execute_in_process(instance=instance, raise_on_error=False)
    [evaluation] = again.get_asset_check_evaluations()
    assert (evaluation.passed, evaluation.severity) == (False, dg.AssetCheckSeverity.ERROR)
    merge = materialize(ruinous, instance, ["merged_model"])
    assert "did not pass collapse" in failures(merge)[0]

    # A damaged probe file ends the next run before it trains.
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    probe = {**CHECKS, "capability_probe": str(tmp_path / "tasks.jsonl")}
    refused = materialize(ruinous | {"checks": probe}, instance, ["dpo_adapter"])
    assert "tasks.jsonl, line 1" in failures(refused)[0]


# What a change of limits costs


ROWS = [{"step": n + 1.0, "loss": 0.5, "nll_ratio": 1.0 + 0.3 * n, "chosen_nats_per_token": -0.3 * n} for n in range(9)]


STOPPED = Stop(
    rule="likelihood", metric="nll_ratio", step=7, value=2.8, limit=2.0, band="at most 2", source="a paper",
    fix="lower the rate", kept_step=3, steps_saved=2, of_steps=9,
)  # fmt: skip


def adapter(folder: Path, stopped: Stop | None) -> Artifact:
    dpo_report(stopped=stopped).write(folder)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return seal(folder, kind="dpo_adapter", fingerprint="f" * 32, inputs={})


def guard(stops: bool = True, **numbers: float) -> GuardSpec:
    bands = default_bands()
    if numbers:
        bands = bands.with_overrides({"collapse": BandOverride(numbers=numbers, reason="measured on our own runs")})
    checks = ChecksSection(severity={} if stops else {"collapse": "warn"})
    return GuardSpec.of(plan(), bands, checks)


def test_a_stopped_run_is_trained_again_only_where_it_would_now_go_on(tmp_path: Path) -> None:
    stopped = adapter(tmp_path, STOPPED)
    assert not _would_go_on(stopped, guard())
    assert not _would_go_on(stopped, guard(nll_ratio=1.9))
    assert _would_go_on(stopped, guard(nll_ratio=50.0))
    assert _would_go_on(stopped, guard(stops=False))


def test_a_run_that_was_not_stopped_is_the_same_under_any_limits(tmp_path: Path) -> None:
    assert not _would_go_on(adapter(tmp_path, None), guard(nll_ratio=1.01))
    assert not _would_go_on(None, guard(stops=False))
    assert guard().identity() == guard(nll_ratio=1.01).identity() == guard(stops=False).identity()
    more = GuardSpec.of(plan(), default_bands(), ChecksSection(sampled_answers=64))
    assert more.identity() != guard().identity()
