"""Who sends a release, and when: never a check, never a policy that is held, and not twice for what says the same.

The artefacts are small and made by hand; the step, the Hub's client and the Hub that it speaks to are real.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from dpo_assets import HubResource, build_dpo_defs
from dpo_assets.artifact import seal, write_json
from dpo_assets.assets.base_model import FACTS, read_facts, refuse_adapter_alone
from dpo_assets.assets.dpo_plan import PLAN, read_plan
from dpo_assets.assets.eval_scores import SCORES
from dpo_assets.checks.reports import EvaluationReport
from dpo_assets.errors import ConfigError
from dpo_assets.planning.model_card import front_matter
from dpo_assets.publishing.trace import COLUMNS, USES
from dpo_assets.recipe import PublishingSection
from dpo_assets.report.tables import table
from dpo_assets.resources.artifacts import ArtifactStore
from dpo_assets_tests.hub.repository import Blob, HubError, Repo
from dpo_assets_tests.hub_server import HubServer
from dpo_assets_tests.pipelines import demo_recipe, failed_checks, failures, materialize, metadata
from dpo_assets_tests.samples import dataset_report, dpo_report, evaluation_report, merge_report, score, scored_pairs
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

        if node == "dpo_dataset":
            for split in USES.values():
                pl.DataFrame(schema=dict.fromkeys(COLUMNS, pl.String)).write_parquet(folder / f"{split}.parquet")
        if node == "eval_scores":
            scored_pairs(scores.implicit_reward_accuracy.value).write_parquet(folder / SCORES)

    for node in ORDER[: ORDER.index("promotion")]:
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


def trying(hub: HubServer, **publishing: Any) -> dict[str, Any]:
    return demo_recipe(publishing={"dry_run": True, "repo_id": REPO, "endpoint": hub.endpoint, **publishing})


def release(
    shelf: Shelf, recipe: dict[str, Any], override: dict[str, str] | None = None, **resources: Any
) -> dg.ExecuteInProcessResult:
    """Decides, and publishes what that carries."""
    config = {"ops": {"demo__promotion": {"config": override}}} if override else None
    assets = ["promotion", "published_model"]
    return materialize(recipe, shelf.instance, assets, resources=resources, run_config=config)


def operations(shown: dict[str, Any]) -> dict[str, str]:
    """Path and action of every operation in the file that a materialisation names."""
    listed = json.loads(Path(shown["operations_file"]).read_text(encoding="utf-8"))
    rows = [[one["action"], one["path"], one["size"], one["sha256"][:12]] for one in listed]
    assert shown["operations"] == table(["action", "file", "bytes", "sha256"], rows)
    return {one["path"]: one["action"] for one in listed}


def test_executing_the_check_of_a_release_sends_nothing(shelf: Shelf, hub: HubServer) -> None:
    fill(shelf, evaluation_report())
    assert release(shelf, trying(hub)).success
    assert checked(shelf, sending(hub)).passed
    assert hub.repos == {}
    assert release(shelf, sending(hub)).success
    assert len(hub.repo(REPO).history()) == 2


def checked(shelf: Shelf, recipe: dict[str, Any]) -> dg.AssetCheckEvaluation:
    """The check of a release, executed by itself as the UI offers."""
    check = dg.AssetCheckKey(dg.AssetKey(["demo", "published_model"]), "release_verified")
    job = dg.define_asset_job("check", selection=dg.AssetSelection.checks(check))
    defs = dg.Definitions.merge(build_dpo_defs("demo", recipe), dg.Definitions(jobs=[job]))
    result = defs.resolve_job_def("check").execute_in_process(instance=shelf.instance, raise_on_error=False)
    [found] = result.get_asset_check_evaluations()
    return found


@pytest.mark.parametrize("node", ["dpo_plan", "published_model"])
@pytest.mark.parametrize("home", ["of no home", "of the command line"])
def test_nothing_is_trained_for_or_released_from_a_store_that_goes_away(
    node: str, home: str, hub: HubServer, tmp_path: Path
) -> None:
    """Without DAGSTER_HOME: what `dg.materialize` uses then, and what `dagster dev` makes in the working directory."""
    passing = str(tmp_path / ".tmp_dagster_home_ab12") if home == "of the command line" else None
    with dg.DagsterInstance.ephemeral(tempdir=passing) as opened:
        shelf = Shelf(opened)
        fill(shelf, evaluation_report())
        assert release(shelf, trying(hub)).success
        assert materialize(sending(hub), opened, ["promotion"]).success
        [said] = failures(materialize(sending(hub), opened, [node]))
        assert "DAGSTER_HOME is not set" in said
        assert 'export DAGSTER_HOME="$HOME/dagster_home"' in said
        kept = {"artifacts": ArtifactStore(root=str(tmp_path / "elsewhere"))}
        [other] = failures(materialize(sending(hub), opened, [node], resources=kept))
        assert "DAGSTER_HOME" not in other
    assert hub.repos == {}


def test_the_check_of_a_release_executed_by_itself_asks_the_hub_before_it_turns_green(
    shelf: Shelf, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked at the local folder alone, and found nothing wrong with a release that would be refused."""
    fill(shelf, evaluation_report())
    hub.repos["models", REPO] = Repo(REPO, private=False)
    dry = release(shelf, trying(hub)).get_asset_check_evaluations()
    assert [found.passed for found in dry if found.check_name == "release_verified"] == [False]
    again = checked(shelf, trying(hub))
    assert (again.passed, again.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert f"{REPO} is public" in str(again.description)
    monkeypatch.delenv("HF_TOKEN")
    unasked = checked(shelf, trying(hub))
    assert not unasked.passed
    assert f"HF_TOKEN is not set, so {REPO} was not asked" in str(unasked.description)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.repos["models", REPO].private = True
    mended = checked(shelf, trying(hub))
    assert mended.passed
    assert hub.changes == []


def test_the_check_of_a_release_executed_by_itself_sees_what_became_of_it_on_the_hub(
    shelf: Shelf, hub: HubServer
) -> None:
    fill(shelf, evaluation_report())
    sent = metadata(release(shelf, sending(hub)), "published_model")
    whole = checked(shelf, sending(hub))
    assert (whole.passed, f"{REPO} holds them" in str(whole.metadata["value"].value)) == (True, True)
    repo = hub.repo(REPO)
    files = repo.resolve().files
    repo.commit("by hand", {path: file for path, file in files.items() if path != "README.md"})
    gone = checked(shelf, sending(hub))
    assert (gone.passed, gone.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert f"{REPO} does not hold what was released as {sent['commit']}: README.md" in str(gone.description)
    repo.commit("by hand", files | {"model.safetensors": Blob.large(b"other weights")})
    changed = checked(shelf, sending(hub))
    assert (changed.passed, changed.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert "model.safetensors" in str(changed.description)
    assert len(repo.history()) == 4


def test_a_policy_that_a_dry_run_only_warned_of_is_not_sent(shelf: Shelf, hub: HubServer) -> None:
    fill(shelf, HELD)
    assert release(shelf, trying(hub)).success
    [said] = failures(materialize(sending(hub), shelf.instance, ["published_model"]))
    assert "the decision is the preview of a dry run; materialise `promotion` again" in said
    red = release(shelf, sending(hub))
    assert not red.success
    assert failed_checks(red)["promotion_verdict"]["value"] == "hold"
    lowered = sending(hub) | {"checks": {"severity": {"promotion_verdict": "warn"}}}
    [said] = failures(release(shelf, lowered))
    assert "nothing carries a release: hold: this may be chance" in said
    assert "with `override` and a `reason` in the launchpad of `promotion`" in said
    assert hub.repos == {}
    wish = {"override": "promote", "reason": "the owners want this one"}
    assert release(shelf, sending(hub), override=wish).success
    assert hub.repo(REPO).tags


def test_a_dry_run_lists_what_a_release_would_do_to_the_repository_as_it_is_now(shelf: Shelf, hub: HubServer) -> None:
    fill(shelf, evaluation_report())
    first = metadata(release(shelf, trying(hub)), "published_model")
    assert set(operations(first).values()) == {"add"}
    assert first["planned_on"] == f"{REPO} does not exist yet; it would be made, private"
    assert hub.repos == {}
    sent = metadata(release(shelf, sending(hub)), "published_model")
    assert operations(sent) == operations(first)
    assert set(operations(metadata(release(shelf, sending(hub)), "published_model")).values()) == {"unchanged"}
    repo = hub.repo(REPO)
    images = {f"images/{number}.png": Blob.regular(b"png") for number in range(60)}
    files = repo.resolve().files | {"bot.gguf": Blob.large(b"GGUF")} | images
    del files["README.md"]
    repo.commit("by hand", files)
    hub.requests.clear()
    again = metadata(release(shelf, trying(hub)), "published_model")
    # Nothing was made again: what lies on the Hub is no part of what a release is.
    assert (again["digest"], str(again["reused"])[:3]) == (sent["digest"], "yes")
    assert operations(again) == {
        "README.md": "add", "model.safetensors": "unchanged", "provenance.json": "unchanged"
    }  # fmt: skip
    assert (again["planned_on"], "bot.gguf" in again["files_of_others"]) == (repo.resolve().oid, True)
    assert "| and 11 more |" in again["files_of_others"]
    assert hub.changes == []


@pytest.mark.parametrize(
    ("repo_id", "token", "said"),
    [
        (None, True, "publishing.repo_id names no repository"),
        (REPO, False, f"HF_TOKEN is not set, so {REPO} was not asked"),
        (REPO, True, f"{REPO} was not asked: publishing {REPO} failed: http://127"),
    ],
    ids=["no repository", "no token", "no answer"],
)
def test_a_dry_run_that_cannot_ask_the_hub_lists_a_first_release_and_says_so(
    shelf: Shelf, hub: HubServer, monkeypatch: pytest.MonkeyPatch, repo_id: str | None, token: bool, said: str
) -> None:
    if not token:
        monkeypatch.delenv("HF_TOKEN")
    hub.fail_next("GET", "/api/models", silent=True, times=9)
    fill(shelf, evaluation_report())
    impatient = {"hub": HubResource(endpoint=hub.endpoint, timeout_seconds=0.1)}
    shown = metadata(release(shelf, trying(hub, repo_id=repo_id), **impatient), "published_model")
    assert set(operations(shown).values()) == {"add"}
    assert shown["planned_on"].startswith(f"as for an empty repository: {said}")


def test_a_dry_run_warns_of_what_would_refuse_the_release(shelf: Shelf, hub: HubServer) -> None:
    fill(shelf, evaluation_report())
    hub.repos["models", REPO] = Repo(REPO, private=False)
    result = release(shelf, trying(hub))
    assert result.success
    [check] = [one for one in result.get_asset_check_evaluations() if one.check_name == "release_verified"]
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert f"{REPO} is public, and publishing.private is true" in str(check.description)
    [said] = failures(release(shelf, sending(hub)))
    assert f"{REPO} is public, and publishing.private is true" in said
    assert hub.changes == []


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no token", "HF_TOKEN is not set in the environment"),
        ("read-only", "the token in HF_TOKEN may only read"),
        ("expired", "the token in HF_TOKEN must be valid"),
        ("public", f"{REPO} is public"),
    ],
)
def test_a_release_that_would_be_refused_ends_the_run_before_training_and_is_tried_once(
    shelf: Shelf, hub: HubServer, monkeypatch: pytest.MonkeyPatch, fault: str, said: str
) -> None:
    fill(shelf, evaluation_report())
    if fault == "no token":
        monkeypatch.delenv("HF_TOKEN")
    if fault == "read-only":
        hub.role = "read"
    if fault == "expired":
        monkeypatch.setenv("HF_TOKEN", "hf_of_last_year")
    if fault == "public":
        hub.repos["models", REPO] = Repo(REPO, private=False)
    policy = dg.RetryPolicy(max_retries=2)
    for assets in (["dpo_plan"], ["promotion", "published_model"]):
        result = materialize(sending(hub), shelf.instance, assets, op_retry_policy=policy)
        [message] = failures(result)
        if (assets, fault) != (["promotion", "published_model"], "read-only"):
            assert said in message
        assert dg.DagsterEventType.STEP_UP_FOR_RETRY not in [event.event_type for event in result.all_events]
    assert len([request for request in hub.requests if "whoami" in request.path]) == (fault != "no token")
    assert all(not repo.tags for repo in hub.repos.values())


def test_a_hub_that_does_not_answer_before_training_stops_none_and_is_told(shelf: Shelf, hub: HubServer) -> None:
    fill(shelf, evaluation_report())
    hub.fail_next("GET", "whoami", silent=True)
    impatient = {"hub": HubResource(endpoint=hub.endpoint, timeout_seconds=0.1)}
    result = materialize(sending(hub), shelf.instance, ["dpo_plan"], resources=impatient)
    log = [event.user_message for event in shelf.instance.all_logs(result.run_id)]
    [told] = [line for line in log if line.startswith(f"whether {REPO} can be published is not known")]
    assert f"{hub.endpoint} did not answer within 0.1 s" in told
    # The plan itself fails here later, for the base on this shelf is none.
    assert not any(hub.endpoint in said for said in failures(result))


@pytest.mark.parametrize(("times", "commits"), [(2, 2), (3, 1)])
def test_a_hub_that_is_silent_is_tried_again_by_dagster_and_named_when_it_is_given_up(
    shelf: Shelf, hub: HubServer, monkeypatch: pytest.MonkeyPatch, times: int, commits: int
) -> None:
    monkeypatch.setattr("dpo_assets.assets.step.RETRY_SECONDS", 0.0)
    fill(shelf, evaluation_report())
    hub.fail_next("POST", "/commit/", silent=True, times=times)
    impatient = {"hub": HubResource(endpoint=hub.endpoint, timeout_seconds=0.3)}
    result = release(shelf, sending(hub), **impatient)
    assert len(hub.repo(REPO).history()) == commits
    assert result.success is (commits == 2)
    said = [f"publishing {REPO} failed: {hub.endpoint} did not answer within 0.3 s" in one for one in failures(result)]
    assert said == ([] if result.success else [True])
    assert len(hub.repo(REPO).tags) == 2 * (commits - 1)


def test_the_token_is_nowhere_in_what_a_run_leaves(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whole: event log, compute logs, artefacts; after a release that fails, one that succeeds, and a dry run."""
    token = "correct-horse-battery-staple"
    shelf = Shelf(instance)
    fill(shelf, evaluation_report())
    with HubServer(token=token) as hub:
        monkeypatch.setenv("HF_TOKEN", token)

        def tell_it() -> None:
            raise HubError(400, f"no such parent; your request had Authorization: Bearer {token}")

        hub.meanwhile("POST", "/commit/", tell_it)
        [said] = failures(release(shelf, sending(hub)))
        assert "no such parent" in said
        hub.fail_next("PUT", "/lfs-storage/")
        assert metadata(release(shelf, sending(hub)), "published_model")["sent"]
        assert release(shelf, trying(hub)).success
    out, err = capfd.readouterr()
    assert token not in out + err + said
    home = Path(instance.root_directory)
    files = [path for path in home.rglob("*") if path.is_file()]
    assert {"operations.json", "db", "safetensors"} <= {path.name.rsplit(".", 1)[-1] for path in files} | {
        path.name.split(".", 1)[-1] for path in files
    }
    assert [path for path in files if token.encode() in path.read_bytes()] == []


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
    tried = release(shelf, trying(hub))
    [check] = [one for one in tried.get_asset_check_evaluations() if one.check_name == "release_verified"]
    assert (tried.success, check.severity) == (True, dg.AssetCheckSeverity.WARN)
    assert f"delete the tag {sent['tag']}" in str(check.description)
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


def test_a_licence_that_the_recipe_names_later_changes_the_card_and_nothing_that_was_trained(
    shelf: Shelf, hub: HubServer
) -> None:
    fill(shelf, evaluation_report(), licensed=False)
    without = metadata(release(shelf, trying(hub)), "published_model")
    base = demo_recipe()["base_model"]
    named = sending(hub) | {"base_model": base | {"licence": "Apache-2.0"}}
    sent = metadata(release(shelf, named), "published_model")
    assert sent["digest"] != without["digest"]
    assert front_matter(hub.repo(REPO).resolve().files["README.md"].data.decode())["license"] == "apache-2.0"
    again = sending(hub) | {"base_model": base | {"licence": "other", "licence_name": "ours"}}
    assert metadata(release(shelf, again), "published_model")["commit"] != sent["commit"]


def test_a_licence_that_no_hub_lists_ends_the_run_before_training(shelf: Shelf, hub: HubServer) -> None:
    fill(shelf, evaluation_report())
    misspelt = sending(hub) | {"base_model": demo_recipe()["base_model"] | {"licence": "apache2"}}
    [said] = failures(materialize(misspelt, shelf.instance, ["dpo_plan"]))
    assert "The licence `apache2` is stated by the recipe" in said
    assert hub.changes == []


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
