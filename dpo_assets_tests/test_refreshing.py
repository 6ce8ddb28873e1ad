"""A refresh through Dagster, with the real stages: what is taken up, what is trained on, and from where."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import dagster as dg
import polars as pl

from dpo_assets.artifact import VOLATILE, ArtifactTree
from dpo_assets.assets.dpo_plan import read_plan
from dpo_assets.checks.evidence.ledger import Decided, Ledger, Primary
from dpo_assets.checks.evidence.ledger_file import LedgerFile
from dpo_assets.contract import Spec, Stage
from dpo_assets.feedback.dataset import Split, read_split
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.resources.launcher import TrainingLauncher
from dpo_assets_tests.pipelines import failures, materialize, metadata, trl_feedback, trl_recipe

AT = "2026-11-27T00:00:00+00:00"
PLANNED = ("base_model", "raw_preferences", "quarantined_preferences", "dpo_dataset", "dpo_plan")
SCORED = (*PLANNED, "sft_checkpoint", "dpo_adapter", "merged_model", "eval_scores")


class InThisProcess(TrainingLauncher):
    """The worker's own main, without a process for each of ten stages, which would import torch ten times."""

    def run(
        self, context: dg.AssetExecutionContext, stage: Stage, spec: Spec, timeout_seconds: float, silent_seconds: float
    ) -> None:
        # It puts its process off line as it is imported, which this one must not stay for the tests behind this one.
        with TemporaryDirectory() as folder, patch.dict(os.environ):
            import huggingface_hub.constants  # noqa: F401  # It looks once, and before that.

            from dpo_assets.training.__main__ import main

            path = Path(folder) / "spec.json"
            path.write_text(spec.model_dump_json(), encoding="utf-8")
            assert main([stage, "--spec", str(path)]) == 0, list(Path(folder).iterdir())


class Pipeline:
    """A small pipeline with feedback that changes from run to run."""

    def __init__(self, instance: dg.DagsterInstance, feedback: Path) -> None:
        self.instance, self.feedback = instance, feedback
        self.tree = ArtifactTree(Path(instance.storage_directory()) / "dpo_assets" / "demo")
        self.recipe = trl_recipe(feedback, max_length=64, min_pairs=10, cleaning={"near_duplicates": "keep"}) | {
            "sft": {"learning_rate": 1e-3, "batch_size": 16},
            "dpo": {"learning_rate": 5e-5, "batch_size": 8},
            "evaluation": {"generations": 0, "sampled_answers": 0},
            "checks": {"probe_prompts": 0, "sampled_answers": 0, "held_out_pairs": 4},
        }

    def run(self, assets: tuple[str, ...], **refresh: Any) -> dict[str, dict[str, Any]]:
        """What each asset showed."""
        recipe = {**self.recipe, "refresh": refresh}
        result = materialize(recipe, self.instance, assets, resources={"launcher": InThisProcess()})
        assert result.success, failures(result)
        return {asset: metadata(result, asset) for asset in assets}

    def go_live(self, shown: Mapping[str, Mapping[str, Any]]) -> None:
        """The lines of a release; what is sent to a Hub is tested elsewhere."""

        better = Primary(difference=0.2, low=0.1, high=0.3, p_better=0.001, adjusted=0.001, pairs=99, prompts=99)

        def released(ledger: Ledger) -> Ledger:
            number = len(ledger.lines) + 1
            decided = Decided(
                number=number, before=ledger.head, at=AT, champion=ledger.champion, reason="better", found=True,
                challenger=str(shown["merged_model"]["digest"]), inputs={}, primaries={"reward": better},
                level=0.01, saw=(f"p{number}",),
                decision="first_publication" if ledger.champion is None else "promote",
            )  # fmt: skip
            return ledger.append(decided).released(
                decided, at=AT, repo_id="org/bot", commit="c" * 40, tag="t", artefact="f", known=[]
            )

        LedgerFile.of(self.tree.root).extend(released)

    def plan(self, shown: Mapping[str, Mapping[str, Any]]) -> TrainingPlan:
        [made] = [told for told in self.tree.listed("dpo_plan") if told.digest == shown["dpo_plan"]["digest"]]
        return read_plan(made)


def ids(shown: Mapping[str, Mapping[str, Any]], side: Split) -> set[str]:
    return set(read_split(Path(shown["dpo_dataset"]["path"]), side)["pair_id"])


def timings(shown: Mapping[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((Path(shown["path"]) / VOLATILE).read_text())
    return told


def test_a_refresh_costs_what_is_new_and_goes_on_from_the_release_while_that_keeps_what_was_promised(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    rows = trl_feedback(tmp_path / "all.jsonl", pairs=70).read_text().splitlines(keepends=True)
    feedback = tmp_path / "votes.jsonl"
    feedback.write_text("".join(rows[:60]))
    pipeline = Pipeline(instance, feedback)
    first = pipeline.run(SCORED, policy="replay")
    plan = pipeline.plan(first)
    assert (plan.refresh.policy, plan.refresh.generation) == ("full", 1)
    assert "no release is live" in first["dpo_plan"]["trains_from"]
    pipeline.go_live(first)

    feedback.write_text("".join(rows))
    second = pipeline.run(SCORED, policy="replay")
    new, held = (ids(second, side) - ids(first, side) for side in ("train", "eval"))
    assert len(new) + len(held) == 10
    assert min(len(new), len(held)) > 1
    tokens = timings({"path": next(pipeline.tree.listed("tokens")).path})
    assert tokens["pairs"] - tokens["pairs_from_cache"] == 10
    assert second["sft_checkpoint"]["reused"] != "no"
    assert second["sft_checkpoint"]["digest"] == first["sft_checkpoint"]["digest"]
    assert second["sft_checkpoint"]["pairs_newer_than_it"] == len(new)
    plan = pipeline.plan(second)
    assert plan.refresh.model_dump(exclude={"sft"}) == {
        "policy": "replay", "generation": 2, "adapter": first["dpo_adapter"]["digest"],
        "since": first["dpo_dataset"]["digest"], "new": len(new), "sampled": len(new),
    }  # fmt: skip
    adapter = second["dpo_adapter"]
    assert adapter["trained_on_pairs"] == 2 * len(new)
    assert adapter["reference_pairs_from_cache"] == len(new), "those that were drawn; the others were scored"
    [trained] = pipeline.tree.listed("training_set")
    trained_on = set(pl.read_parquet(trained.path / "train.parquet")["pair_id"])
    assert new < trained_on < ids(second, "train")
    known = len(ids(first, "eval"))
    kept = {name: count for name, count in timings(second["eval_scores"]).items() if name.endswith("_from_cache")}
    assert kept == {"sft_pairs_from_cache": known, "policy_pairs_from_cache": 0, "champion_pairs_from_cache": known,
                    "champion_start_pairs_from_cache": known}  # fmt: skip
    assert second["eval_scores"]["champion_pairs_from_cache"] == known

    # Once that is live, a run in which nothing changed makes nothing.
    pipeline.go_live(second)
    again = pipeline.run(SCORED, policy="replay")
    assert {node: again[node]["digest"] for node in SCORED} == {node: second[node]["digest"] for node in SCORED}
    assert all(again[node]["reused"] != "no" for node in SCORED)

    # A pair that was trained on is withdrawn: neither SFT nor the release may be gone on with.
    gone = next(n for n, row in enumerate(rows) if json.loads(row)["prompt"] in trained_prompts(first))
    feedback.write_text("".join(rows[:gone] + rows[gone + 1 :]))
    third = pipeline.run(PLANNED, policy="continue")
    assert pipeline.plan(third).refresh.policy == "full"
    assert pipeline.plan(third).refresh.sft.dataset == third["dpo_dataset"]["digest"]
    assert "and 1 gone" in third["dpo_plan"]["sft_start"]


def trained_prompts(shown: Mapping[str, Mapping[str, Any]]) -> set[str]:
    table = read_split(Path(shown["dpo_dataset"]["path"]), "train")
    return {prompt[-1]["content"] for prompt in table["prompt"]}
