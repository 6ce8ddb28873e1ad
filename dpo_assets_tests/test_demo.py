"""The whole pipeline as a user runs it: `dpo-assets demo`, again, published to a Hub, broken on purpose, and again.

One home is shared by the tests of this file, in the order in which a user would do these things.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dpo_assets.artifact import open_artifact
from dpo_assets.assets.graph import NODES, OPTIONAL
from dpo_assets.checks.catalog import CHECKS
from dpo_assets_tests.hub_server import HubServer
from dpo_assets_tests.pipelines import demo_recipe, failures, materialize, metadata

DECIDED = ["promotion", "published_model"]


def cli(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DAGSTER_HOME": str(home)}
    command = [sys.executable, "-m", "dpo_assets.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dagster_home")


@pytest.fixture(scope="module")
def first(home: Path) -> dict[str, Any]:
    """The summary of the first demo run."""
    result = cli(home, "demo", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    summary: dict[str, Any] = json.loads(result.stdout)
    return summary


@pytest.fixture
def demo_instance(home: Path, first: dict[str, Any]) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.from_config(str(home)) as opened:
        yield opened


def test_the_demo_materialises_every_asset_and_holds(first: dict[str, Any]) -> None:
    assert first["holds"]
    assert sorted(first["materialised"]) == sorted(node.name for node in NODES)
    assert first["reused"] == []
    assert [c for c in first["failed_checks"] if c["blocked"]] == []


def test_the_demo_accounts_for_every_row(first: dict[str, Any]) -> None:
    pairs = first["pairs"]
    assert pairs["rows_in"] == 212
    assert pairs["rows_in"] == pairs["accepted"] + pairs["quarantined"] + pairs["duplicates"]
    assert sum(pairs["reasons"].values()) == pairs["quarantined"]
    assert pairs["accepted"] == pairs["train_pairs"] + pairs["eval_pairs"]


def test_the_first_loss_is_ln_2(first: dict[str, Any]) -> None:
    assert abs(first["dpo"]["first_loss"] - math.log(2)) <= 5e-4


def test_dpo_moves_the_policy_towards_the_preferences_it_saw(first: dict[str, Any]) -> None:
    assert first["dpo"]["last_loss"] < first["dpo"]["first_loss"]
    assert first["scores"]["implicit_reward_accuracy"]["value"] > 0.5


def test_scores_come_with_intervals_and_a_length_baseline(first: dict[str, Any]) -> None:
    for key in ("implicit_reward_accuracy", "logp_accuracy_sft", "logp_accuracy_policy", "pick_the_longer"):
        score = first["scores"][key]
        assert score["low"] <= score["value"] <= score["high"]
        assert score["n"] == first["pairs"]["eval_pairs"]
    assert first["verdict"]["decision"] in ("first_publication", "hold")


def test_the_precision_comes_with_its_reason(first: dict[str, Any]) -> None:
    assert first["plan"]["precision"] == "fp32"
    assert "CPU" in first["plan"]["precision_reason"]


def test_every_check_of_the_catalogue_was_evaluated(demo_instance: dg.DagsterInstance, first: dict[str, Any]) -> None:
    evaluated = {
        (
            e.dagster_event.asset_check_evaluation_data.asset_key.path[-1],
            e.dagster_event.asset_check_evaluation_data.check_name,
        )
        for e in demo_instance.all_logs(first["run_id"])
        if e.dagster_event and e.dagster_event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION
    }
    optional = {node.name for node in OPTIONAL}
    assert evaluated == {(check.asset, check.name) for check in CHECKS if check.asset not in optional}


def test_what_the_ui_shows_is_in_the_metadata(demo_instance: dg.DagsterInstance) -> None:
    def shown(asset: str) -> dict[str, Any]:
        event = demo_instance.get_latest_materialization_event(dg.AssetKey(["demo", asset]))
        assert event is not None
        assert event.asset_materialization is not None
        return {k: v.value for k, v in event.asset_materialization.metadata.items()}

    adapter = shown("dpo_adapter")
    assert all(
        str(adapter[plot]).startswith("![") and "data:image/png;base64," in adapter[plot]
        for plot in ("loss", "margins")
    )
    assert len(adapter["loss"]) < 64_000, "an image in the event log stays there for ever"
    assert shown("dpo_dataset")["dagster/row_count"] == 142
    assert "| prompt" in shown("dpo_dataset")["sample"]
    assert shown("quarantined_preferences")["dagster/row_count"] == 70
    assert "fp32" in shown("dpo_plan")["precision_reason"]
    assert "policy" in shown("eval_scores")["answers"]


def test_the_dry_run_release_is_complete_and_loads_with_plain_transformers(first: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    release = Path(first["release"])
    names = {p.name for p in release.iterdir()}
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json", "provenance.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    card = (release / "README.md").read_text(encoding="utf-8")
    assert "license: mit" in card
    assert "142 accepted" in card
    listed = release.parent.with_name(f"{release.parent.name}.operations.json")
    operations = json.loads(listed.read_text(encoding="utf-8"))
    assert {o["path"] for o in operations} == names
    tokenizer = AutoTokenizer.from_pretrained(release)
    model = AutoModelForCausalLM.from_pretrained(release)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model.generate(**ids, max_new_tokens=4).shape[1] > 4


def test_a_second_run_with_unchanged_inputs_trains_nothing(home: Path, first: dict[str, Any]) -> None:
    result = cli(home, "demo", "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["reused"] == summary["materialised"]
    assert summary["worker_stages"] == []
    assert summary["scores"] == first["scores"]


def test_a_release_is_published_verified_and_not_sent_twice(
    first: dict[str, Any], demo_instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer() as hub:
        monkeypatch.setenv("HF_TOKEN", hub.token)
        publishing = {"dry_run": False, "repo_id": "tester/bot", "endpoint": hub.endpoint}
        if first["verdict"]["decision"] != "first_publication":
            pytest.fail("the demo's policy was held, so there is nothing to publish")
        result = materialize(demo_recipe(publishing=publishing), demo_instance, DECIDED)
        assert failures(result) == []
        shown = metadata(result, "published_model")
        sent = hub.repo("tester/bot").files(shown["commit"])
        release = Path(shown["release"])
        assert {p.name: p.read_bytes() for p in release.iterdir()}.items() <= sent.items()
        assert hub.repo("tester/bot").tags == dict.fromkeys([shown["tag"], "champion"], shown["commit"])
        before = len(hub.repo("tester/bot").history())
        again = materialize(demo_recipe(publishing=publishing), demo_instance, DECIDED)
        assert again.success
        assert len(hub.repo("tester/bot").history()) == before
        log = "\n".join(e.user_message for e in demo_instance.all_logs(result.run_id))
        assert hub.token not in log


def test_publishing_without_a_token_names_the_variable(demo_instance: dg.DagsterInstance) -> None:
    publishing = {"dry_run": False, "repo_id": "tester/bot"}
    result = materialize(demo_recipe(publishing=publishing), demo_instance, DECIDED)
    assert "HF_TOKEN is not set in the environment" in failures(result)[0]


def test_every_artefact_records_all_that_its_asset_declares_to_read(
    demo_instance: dg.DagsterInstance, first: dict[str, Any]
) -> None:
    for node in NODES:
        event = demo_instance.get_latest_materialization_event(dg.AssetKey(["demo", node.name]))
        assert event is not None
        assert event.asset_materialization is not None
        materialisation = event.asset_materialization
        declared = {read.node for read in node.reads}
        assert set(open_artifact(Path(str(materialisation.metadata["path"].value))).manifest.inputs) == declared
        # Dagster keeps the data version of each, which is what it tells stale assets by.
        versions = [tag for tag in materialisation.tags or {} if tag.startswith("dagster/input_data_version/")]
        assert {tag.rsplit("/", 1)[-1] for tag in versions} == declared


def test_scores_and_a_card_of_another_split_are_refused_until_the_model_is_made_from_it(
    demo_instance: dg.DagsterInstance, first: dict[str, Any]
) -> None:
    other = demo_recipe(feedback={"seed": 1})
    dataset = materialize(other, demo_instance, ["dpo_dataset"])
    shown = metadata(dataset, "dpo_dataset")
    kept = int(shown["kept_in_train"].split()[0])
    assert kept > 0, "pairs that the model of the demo was trained on are not held out under another seed"
    assert shown["eval_pairs"] + shown["train_pairs"] == 142
    again = ["dpo_plan", "sft_checkpoint", "dpo_adapter", "merged_model"]
    for asset, named in {"eval_scores": again, "published_model": [*again, "eval_scores", "promotion"]}.items():
        [said] = failures(materialize(other, demo_instance, [asset]))
        assert f"Materialise again, in this order: {', '.join(f'demo/{name}' for name in named)}. " in said
    back = materialize(demo_recipe(), demo_instance, ["dpo_dataset", "eval_scores", "published_model"])
    assert failures(back) == []
    assert all(str(metadata(back, asset)["reused"]).startswith("yes") for asset in ("dpo_dataset", "eval_scores"))


@pytest.mark.parametrize(
    ("fault", "check", "value", "stages"),
    [
        ("learning-rate", "learning_rate_band", "0.001", []),
        ("beta", "beta_for_loss", "0.1", []),
        ("data", "quarantine_rate", "0.3", []),
        ("reference", "reference_is_start", "2.", ["dpo"]),
    ],
)
def test_a_run_broken_on_purpose_goes_red_and_says_why(
    home: Path, first: dict[str, Any], fault: str, check: str, value: str, stages: list[str]
) -> None:
    result = cli(home, "demo", "--break", fault)
    assert result.returncode == 1, result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if "━" not in line]
    said = {label: line.removeprefix(label).strip() for line in lines for label in _LABELS if line.startswith(label)}
    assert said["stopped by"].startswith(f"{check} on ")
    assert said["value"].startswith(value)
    assert said["band"]
    assert said["source"]
    assert said["what to change"]
    assert said["run"].startswith("FAILURE")
    assert said["training processes started"] == (", ".join(stages) or "none")


_LABELS = ("stopped by", "value", "band", "source", "what to change", "run", "training processes started")


def test_earlier_artefacts_stand_after_red_runs(home: Path, first: dict[str, Any]) -> None:
    tree = home / "storage" / "dpo_assets" / "demo"
    for node in ("base_model", "dpo_dataset", "sft_checkpoint", "dpo_adapter", "merged_model", "eval_scores"):
        folders = [p for p in (tree / node).iterdir() if p.is_dir()]
        assert folders
        assert all(open_artifact(folder) for folder in folders)


def test_a_run_after_red_ones_is_green_trains_nothing_and_says_so(home: Path, first: dict[str, Any]) -> None:
    result = cli(home, "demo")
    assert result.returncode == 0, result.stdout + result.stderr
    reused, unchanged, _ = " ".join(result.stdout.split()).partition(": inputs unchanged, nothing trained again")
    assert unchanged
    assert all(node.name in reused.rpartition("reused ")[2] for node in NODES)


def test_recipe_prints_every_field_with_its_meaning(home: Path) -> None:
    import yaml

    result = cli(home, "recipe")
    assert result.returncode == 0
    shown = yaml.safe_load(result.stdout)["attributes"]
    assert shown["dpo"]["beta"] == 0.1
    assert shown["base_model"]["source"] == "..."
    assert all("#" in line for line in result.stdout.splitlines()[5:])
