"""Who sends a release, and when: never a check, never a policy that is held, and not twice for what says the same.

The artefacts are small and made by hand; the step, the Hub's client and the Hub that it speaks to are real.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dpo_assets import build_dpo_defs
from dpo_assets.artifact import seal, write_json
from dpo_assets.assets.base_model import FACTS, read_facts, refuse_adapter_alone
from dpo_assets.assets.dpo_plan import PLAN, read_plan
from dpo_assets.checks.reports import EvaluationReport
from dpo_assets.errors import ConfigError
from dpo_assets.planning.licence import front_matter
from dpo_assets.recipe import PublishingSection
from dpo_assets_tests.hub_server import HubServer
from dpo_assets_tests.pipelines import demo_recipe, failed_checks, failures, materialize, metadata
from dpo_assets_tests.samples import dataset_report, dpo_report, evaluation_report, merge_report, score
from dpo_assets_tests.test_lineage import ORDER, Shelf, gates_of

REPO = "org/bot"
HELD = evaluation_report(implicit_reward_accuracy=score(0.55, 0.46, 0.64))
DESCRIBED = {
    "parameters": 1, "layers": 1, "hidden": 1, "intermediate": 1, "vocabulary": 1, "context": 64, "architecture": "x",
    "licence": {"identifier": "mit", "stated_by": "package"}, "template_arguments": {}, "template_date": "2024-07-26",
    "source": "builtin:stories260k", "revision": None, "left_out": [],
}  # fmt: skip


def fill(shelf: Shelf, scores: EvaluationReport, licensed: bool = True, **of_plan: Any) -> None:
    """What a release is made of."""

    def write(node: str, folder: Path) -> None:
        reports = {
            "dpo_dataset": dataset_report(),
            "dpo_adapter": dpo_report().model_dump(mode="json"),
            "merged_model": merge_report().model_dump(mode="json"),
            "eval_scores": scores.model_dump(mode="json"),
        }
        if node == "base_model":
            (folder / "model").mkdir()
            write_json(folder / "model" / "config.json", {"model_type": "llama"})
            write_json(folder / FACTS, DESCRIBED if licensed else DESCRIBED | {"licence": None})
        if node in reports:
            write_json(folder / "report.json", reports[node])
        if node == "merged_model":
            (folder / "model").mkdir()
            (folder / "model" / "model.safetensors").write_bytes(bytes(range(256)))

    for node in ORDER[:-1]:
        plan = of_plan if node == "dpo_plan" else {}
        shelf.make(node, str(scores), also=lambda folder, node=node: write(node, folder), **plan)


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    with dg.DagsterInstance.ephemeral(tempdir=str(tmp_path)) as opened:
        yield Shelf(opened)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


def sending(hub: HubServer) -> dict[str, Any]:
    return demo_recipe(publishing={"dry_run": False, "repo_id": REPO, "endpoint": hub.endpoint})


def release(shelf: Shelf, recipe: dict[str, Any]) -> dg.ExecuteInProcessResult:
    return materialize(recipe, shelf.instance, ["published_model"])


def test_executing_the_check_of_a_release_sends_nothing(shelf: Shelf, hub: HubServer) -> None:
    fill(shelf, evaluation_report())
    assert release(shelf, demo_recipe(publishing={"dry_run": True, "repo_id": REPO})).success
    check = dg.AssetCheckKey(dg.AssetKey(["demo", "published_model"]), "release_verified")
    job = dg.define_asset_job("check", selection=dg.AssetSelection.checks(check))
    defs = dg.Definitions.merge(build_dpo_defs("demo", sending(hub)), dg.Definitions(jobs=[job]))
    result = defs.resolve_job_def("check").execute_in_process(instance=shelf.instance, raise_on_error=False)
    assert [found.passed for found in result.get_asset_check_evaluations()] == [True]
    assert hub.repos == {}
    assert release(shelf, sending(hub)).success
    assert len(hub.repo(REPO).history()) == 2


def test_a_policy_that_a_dry_run_only_warned_of_is_not_sent(shelf: Shelf, hub: HubServer) -> None:
    fill(shelf, HELD)
    assert release(shelf, demo_recipe(publishing={"dry_run": True, "repo_id": REPO})).success
    [said] = failures(release(shelf, sending(hub)))
    assert "the scores do not carry a release: promotion_verdict: hold" in said
    assert "collect more pairs" in said
    assert hub.repos == {}
    allowed = sending(hub) | {"checks": {"severity": {"promotion_verdict": "warn"}}}
    assert release(shelf, allowed).success


def test_plans_that_differ_in_memory_and_device_give_the_same_release(shelf: Shelf) -> None:
    first, *others = [
        {"memory_available_gib": 22.5, "device_uuid": "GPU-a"},
        {"memory_available_gib": 20.25, "device_uuid": "GPU-a"},
        {"memory_available_gib": 22.5, "device_uuid": "GPU-b", "precision_reason": "bf16: another card"},
    ]
    fill(shelf, evaluation_report(), **first)
    made = metadata(release(shelf, demo_recipe()), "published_model")
    for other in others:
        fill(shelf, evaluation_report(), **other)
        again = metadata(release(shelf, demo_recipe()), "published_model")
        assert (again["operations"], again["digest"]) == (made["operations"], made["digest"])
    fill(shelf, evaluation_report(), dpo={"beta": 0.2})
    assert metadata(release(shelf, demo_recipe()), "published_model")["digest"] != made["digest"]


@pytest.mark.parametrize(("node", "name"), [("base_model", FACTS), ("dpo_plan", PLAN)])
def test_an_artefact_of_an_earlier_version_is_told_by_name(shelf: Shelf, node: str, name: str) -> None:
    """Not by a traceback, which the retry policy of a job would try again."""
    fill(shelf, evaluation_report())
    written = shelf.now[node].json(name)
    del written["template_arguments" if node == "base_model" else "max_length"]
    made = shelf.make(node, "earlier", also=lambda folder: write_json(folder / name, written))
    read = {"base_model": read_facts, "dpo_plan": read_plan}[node]
    with pytest.raises(ConfigError, match=rf"{name} is of an earlier version; materialise `{node}` again"):
        read(made)


def test_a_hub_that_holds_something_else_fails_the_check_and_is_not_tried_again(shelf: Shelf, hub: HubServer) -> None:
    fill(shelf, evaluation_report())
    sent = metadata(release(shelf, sending(hub)), "published_model")
    repo = hub.repo(REPO)
    repo.tags[sent["tag"]] = repo.history()[-1].oid
    result = release(shelf, sending(hub))
    assert f"tag {sent['tag']} of {REPO} points at" in failed_checks(result)["release_verified"]["value"]
    events = [event.event_type for event in result.all_events]
    assert dg.DagsterEventType.STEP_UP_FOR_RETRY not in events
    assert f"delete the tag {sent['tag']}" in failures(result)[0]


TOWER = {"text_config": {"model_type": "gemma3_text"}, "vision_config": {}, "model_type": "gemma3"}


@pytest.mark.parametrize(
    ("revision", "config", "said"),
    [
        (None, {}, "needs a base from the Hub"),
        ("0" * 40, TOWER, r"needs a base of text alone\. x holds more .* Release `merged` instead"),
        ("0" * 40, {"model_type": "llama"}, None),
    ],
    ids=["a folder", "more than text", "text from the Hub"],
)
def test_an_adapter_that_would_change_nothing_where_it_is_loaded_is_refused(
    revision: str | None, config: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    """PEFT only warns of names that a base does not have, and puts fresh weights on a tower's layers in their place."""
    (tmp_path / "model").mkdir()
    write_json(tmp_path / "model" / "config.json", config)
    write_json(tmp_path / FACTS, DESCRIBED | {"revision": revision})
    base = seal(tmp_path, kind="base_model", fingerprint="f" * 32, inputs={})
    refuse_adapter_alone(PublishingSection(artifact="merged"), base)
    if said is None:
        refuse_adapter_alone(PublishingSection(artifact="adapter"), base)
        return
    with pytest.raises(ConfigError, match=said):
        refuse_adapter_alone(PublishingSection(artifact="adapter"), base)


def test_an_adapter_that_cannot_be_released_is_refused_before_anything_is_trained_for_it(shelf: Shelf) -> None:
    fill(shelf, HELD)
    recipe = demo_recipe(publishing={"artifact": "adapter"})
    result = materialize(recipe, shelf.instance, ["dpo_plan"])
    assert "publishing.artifact `adapter` needs a base from the Hub" in failures(result)[0]


def test_a_base_of_unknown_licence_is_not_sent_and_not_trained_for_it(shelf: Shelf, hub: HubServer) -> None:
    """Also where its check only warned, when nothing was to be sent yet."""
    fill(shelf, evaluation_report(), licensed=False)
    dry = release(shelf, demo_recipe(publishing={"dry_run": True, "repo_id": REPO}))
    assert dry.success
    card = Path(str(metadata(dry, "published_model")["release"])) / "README.md"
    assert "license" not in front_matter(card.read_text())
    assert "No licence of the base is known" in card.read_text()
    for result in (release(shelf, sending(hub)), materialize(sending(hub), shelf.instance, ["dpo_plan"])):
        [said] = failures(result)
        assert "no licence is known of the base: set base_model.licence" in said
    assert hub.repos == {}


def test_the_card_tells_how_the_checks_came_out_but_for_what_another_card_would_change(shelf: Shelf) -> None:
    """An outcome under another severity makes another card; whether the plan fitted makes none."""
    fill(shelf, evaluation_report())

    def released(**levels: str) -> dict[str, Any]:
        write_json(gates_of(shelf.now["dpo_plan"]), levels)
        return metadata(release(shelf, demo_recipe()), "published_model")

    first, fitted, warned = (
        released(memory_fits="pass", learning_rate_band="pass"),
        released(memory_fits="warn", learning_rate_band="pass"),
        released(memory_fits="pass", learning_rate_band="warn"),
    )
    assert fitted["digest"] == first["digest"]
    assert "| dpo_plan | learning_rate_band | passed |" in first["card"]
    assert "| dpo_plan | learning_rate_band | warned |" in warned["card"]
    assert "memory_fits" not in first["card"]
