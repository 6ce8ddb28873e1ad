"""A pipeline's life through Dagster: what is decided, what goes live, and what stays live when a run ends too early.

The artefacts of training are small and made by hand; decisions, releases and the Hub's client are the real ones.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from huggingface_hub import HfApi, hf_hub_download

from dpo_assets import HubResource, build_dpo_defs
from dpo_assets.artifact import ArtifactTree, write_json
from dpo_assets.assets.promotion import SNAPSHOT
from dpo_assets.assets.rollback import withdrawn_since
from dpo_assets.checks.evidence.ledger import Ledger
from dpo_assets.checks.evidence.ledger_file import LedgerFile
from dpo_assets.publishing.commit import CHAMPION
from dpo_assets.secret_shapes import MASK
from dpo_assets_tests.hub_server import HubServer
from dpo_assets_tests.pipelines import demo_recipe, failed_checks, failures, metadata
from dpo_assets_tests.samples import evaluation_report, scored_pairs
from dpo_assets_tests.test_lineage import Shelf
from dpo_assets_tests.test_published_model import REPO, SCORES, fill, hub, release, sending, shelf, trying

__all__ = ["hub", "shelf"]  # Fixtures.
WISH = {"override": "promote", "reason": "the owners want this one"}


def ledger_of(shelf: Shelf) -> Ledger:
    return LedgerFile.of(shelf.tree.root).read()


def refresh(shelf: Shelf, content: str, *, right: float = 0.6, frozen: str = "differs", behind: str = "") -> str:
    """Another challenger on the shelf, scored beside the champion on known conversations and 300 new ones; its name.

    `behind`: digest of the adapter that it went on from.
    """
    champion = ledger_of(shelf).champion

    def weights(folder: Path) -> None:
        write_json(folder / "report.json", shelf_report)
        (folder / "model").mkdir()
        (folder / "model" / "model.safetensors").write_bytes(content.encode() * 40)

    def scored(folder: Path) -> None:
        known = scored_pairs(0.6, champion=0.6)
        if frozen == "equal":
            known = known.with_columns(champion_chosen="policy_chosen")
        new = scored_pairs(right, champion=0.6, prompts=300, first=1000 * len(content), seed=2)
        pl.concat([known, new]).write_parquet(folder / SCORES)
        report = evaluation_report(champion=champion)
        write_json(folder / "report.json", report.model_dump(mode="json"))

    shelf_report = shelf.now["merged_model"].json("report.json")
    adapter = shelf.now["dpo_adapter"].json("report.json")
    shelf.make(
        "dpo_adapter", content, also=lambda folder: write_json(folder / "report.json", adapter), goes_on_from=behind
    )
    shelf.make("merged_model", content, also=weights)
    shelf.make("eval_scores", f"{content} {champion}", also=scored)
    return shelf.now["merged_model"].digest


def first_release(shelf: Shelf, hub: HubServer) -> str:
    fill(shelf, evaluation_report(implicit_reward_accuracy={"value": 0.9, "low": 0.8, "high": 0.95, "n": 60}))
    result = release(shelf, sending(hub))
    assert result.success, failures(result)
    return shelf.now["merged_model"].digest


def test_a_first_release_is_a_decision_a_commit_a_tag_and_a_line(shelf: Shelf, hub: HubServer) -> None:
    name = first_release(shelf, hub)
    ledger, repo = ledger_of(shelf), hub.repo(REPO)
    [decided, released] = ledger.lines
    assert (decided.kind, released.kind, ledger.champion) == ("decision", "release", name)
    assert ledger.live is not None
    assert repo.tags[CHAMPION] == ledger.live.commit == repo.resolve().oid
    assert set(ledger.live.known) == {f"conversation {n}" for n in range(60)}
    hub.requests.clear()
    again = release(shelf, sending(hub))
    assert again.success
    assert str(metadata(again, "promotion")["reused"]).startswith("yes")
    assert hub.changes == [], "an identical second release writes nothing"
    assert ledger_of(shelf) == ledger
    shown = metadata(again, "promotion")
    assert (shown["verdict"], shown["error_spent"], shown["fresh_prompts"]) == ("first_publication", 0.0, 60)
    assert "release 1, live" in shown["history"]
    assert (Path(shown["path"]) / SNAPSHOT).read_text() == Ledger(lines=ledger.lines[:1]).text


def test_a_dry_run_decides_as_a_preview_and_appends_nothing(shelf: Shelf, hub: HubServer) -> None:
    fill(shelf, evaluation_report())
    result = release(shelf, trying(hub))
    assert result.success
    assert (metadata(result, "promotion")["verdict"], metadata(result, "promotion")["preview"]) == (
        "first_publication", True
    )  # fmt: skip
    assert not LedgerFile.of(shelf.tree.root).path.exists()
    assert str(metadata(release(shelf, trying(hub)), "promotion")["reused"]).startswith("yes")


def test_dry_runs_are_looks_that_the_release_after_them_pays_for(shelf: Shelf, hub: HubServer) -> None:
    whole = Ledger().budget().level
    fill(shelf, evaluation_report())
    levels = [metadata(release(shelf, trying(hub)), "promotion")["level"] for _ in range(2)]
    assert levels == [pytest.approx(whole / 2)] * 2, "a preview repeated is the same look"
    refresh(shelf, "another", right=0.9)
    looked = metadata(release(shelf, trying(hub)), "promotion")
    assert (looked["preview"], looked["level"]) == (True, pytest.approx(whole / 6))
    assert "this one, look 2" in looked["outlook"]
    result = release(shelf, sending(hub))
    assert result.success, failures(result)
    assert ledger_of(shelf).decisions[-1].level == pytest.approx(whole / 6), "what was previewed has its own look"


def test_a_hold_with_a_champion_leaves_it_live_and_the_run_green(shelf: Shelf, hub: HubServer) -> None:
    """What reads the release is skipped, and neither check is lost."""
    first = first_release(shelf, hub)
    refresh(shelf, "refreshed")
    hub.requests.clear()

    @dg.asset(deps=[["demo", "published_model"]])
    def announcement() -> None:
        raise AssertionError("there is nothing to announce")

    assets = dg.AssetSelection.assets(["demo", "promotion"], ["demo", "published_model"], "announcement")
    job = dg.define_asset_job("refresh", selection=assets)
    defs = dg.Definitions.merge(build_dpo_defs("demo", sending(hub)), dg.Definitions(assets=[announcement], jobs=[job]))
    result = defs.resolve_job_def("refresh").execute_in_process(instance=shelf.instance, raise_on_error=False)
    assert result.success, failures(result)
    made = [event.step_materialization_data.materialization for event in result.get_asset_materialization_events()]
    assert [one.asset_key.path[-1] for one in made] == ["promotion"]
    checks = {one.check_name: one for one in result.get_asset_check_evaluations()}
    assert {name: (one.passed, one.severity.value) for name, one in checks.items()} == {
        "promotion_verdict": (False, "WARN"), "release_verified": (False, "WARN")
    }  # fmt: skip
    assert "release 1 stays live" in str(checks["release_verified"].description)
    skipped = [event.step_key for event in result.all_events if event.event_type == dg.DagsterEventType.STEP_SKIPPED]
    assert skipped == ["announcement"]
    assert hub.changes == []
    assert ledger_of(shelf).champion == first


def test_a_better_challenger_is_promoted_and_takes_the_tag(shelf: Shelf, hub: HubServer) -> None:
    first = first_release(shelf, hub)
    before = hub.repo(REPO).tags[CHAMPION]
    second = refresh(shelf, "better", right=0.9, frozen="equal")
    result = release(shelf, sending(hub))
    assert result.success, failures(result)
    ledger, repo = ledger_of(shelf), hub.repo(REPO)
    assert [line.kind for line in ledger.lines] == ["decision", "release"] * 2
    assert ledger.decisions[-1].decision == "promote"
    assert (ledger.champion, ledger.lines[-1].champion) == (second, first)
    assert repo.tags[CHAMPION] == repo.resolve().oid != before
    assert metadata(result, "published_model")["release_number"] == 2


def test_a_worse_challenger_makes_the_run_red_and_leaves_the_champion(shelf: Shelf, hub: HubServer) -> None:
    first = first_release(shelf, hub)
    refresh(shelf, "worse", right=0.2)
    result = release(shelf, sending(hub))
    assert not result.success
    assert failed_checks(result)["promotion_verdict"]["value"] == "reject"
    assert ledger_of(shelf).champion == first


def test_an_override_is_on_record_with_its_reason(shelf: Shelf, hub: HubServer) -> None:
    first_release(shelf, hub)
    second = refresh(shelf, "refreshed")
    assert release(shelf, sending(hub)).success
    [said] = failures(release(shelf, sending(hub), override={"override": "promote", "reason": "why not"}))
    assert "at least 10 characters" in said
    token = "hf_" + "AbCdEfGhIj" * 3 + "KlMn"
    pasted = {**WISH, "reason": f"{WISH['reason']}, says {token}"}
    assert release(shelf, sending(hub), override=pasted).success
    ledger = ledger_of(shelf)
    assert ledger.champion == second
    override = ledger.decisions[-1].override
    assert override is not None
    assert (override.decision, override.reason) == ("promote", f"{WISH['reason']}, says {MASK}")
    kept = [path for path in shelf.tree.root.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert kept == []


def test_executing_the_check_of_a_decision_decides_nothing(shelf: Shelf, hub: HubServer) -> None:
    first_release(shelf, hub)
    refresh(shelf, "refreshed")
    assert release(shelf, sending(hub)).success
    refresh(shelf, "not decided on yet")
    before = ledger_of(shelf)
    check = dg.AssetCheckKey(dg.AssetKey(["demo", "promotion"]), "promotion_verdict")
    job = dg.define_asset_job("check", selection=dg.AssetSelection.checks(check))
    defs = dg.Definitions.merge(build_dpo_defs("demo", sending(hub)), dg.Definitions(jobs=[job]))
    result = defs.resolve_job_def("check").execute_in_process(instance=shelf.instance, raise_on_error=False)
    [found] = result.get_asset_check_evaluations()
    assert found.metadata["value"].value == "hold"
    assert ledger_of(shelf) == before


# --------------------------------------------------------------------------------------------- what ends in between


@pytest.mark.parametrize(
    ("method", "path", "after"),
    [("POST", "/commit/", 0), ("POST", "/tag/", 0), ("DELETE", "/tag/champion", 0), ("POST", "/tag/", 1)],
    ids=["commit", "content tag", "champion taken away", "champion set"],
)
def test_a_release_that_stops_at_any_write_leaves_the_old_champion_and_is_finished_by_the_next_run(
    shelf: Shelf, hub: HubServer, method: str, path: str, after: int
) -> None:
    first = first_release(shelf, hub)
    second = refresh(shelf, "better", right=0.9, frozen="equal")
    for _ in range(after):
        hub.meanwhile(method, path, lambda: None)
    hub.fail_next(method, path, status=400)
    assert not release(shelf, sending(hub)).success
    assert ledger_of(shelf).champion == first
    assert release(shelf, sending(hub)).success
    repo, ledger = hub.repo(REPO), ledger_of(shelf)
    assert ledger.champion == second
    assert [one.kind for one in ledger.lines] == ["decision", "release"] * 2
    assert len(repo.history()) == 3
    assert repo.tags[CHAMPION] == repo.resolve().oid


KILLED = """
    import sys
    import dagster as dg
    from dpo_assets import HubResource, build_dpo_defs
    from dpo_assets_tests.pipelines import materialize
    from dpo_assets_tests.test_published_model import demo_recipe

    recipe = demo_recipe(publishing={"dry_run": False, "repo_id": sys.argv[2], "endpoint": sys.argv[3]})
    with dg.DagsterInstance.local_temp(sys.argv[1]) as instance:
        materialize(recipe, instance, ["promotion", "published_model"])
"""


@pytest.mark.parametrize(
    ("method", "path", "after", "tagged"),
    [("POST", "/tag/", 1, False), ("GET", "/refs", 3, True)],
    ids=["while no champion is tagged", "before the ledger says so"],
)
def test_a_process_that_is_killed_between_the_commit_and_the_ledger_is_made_good_without_a_second_commit(
    tmp_path: Path, hub: HubServer, method: str, path: str, after: int, tagged: bool
) -> None:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        shelf = Shelf(instance)
        first = first_release(shelf, hub)
        second = refresh(shelf, "better", right=0.9, frozen="equal")
        command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), REPO, hub.endpoint]
        started: list[subprocess.Popen[bytes]] = []
        for _ in range(after):
            hub.meanwhile(method, path, lambda: None)
        hub.fail_next(method, path, silent=True, then=lambda: started[0].kill())
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "0"}
        started.append(subprocess.Popen(command, env=environment))
        assert started[0].wait(60) == -signal.SIGKILL
        repo = hub.repo(REPO)
        assert len(repo.history()) == 3
        assert (CHAMPION in repo.tags) is tagged
        assert ledger_of(shelf).champion == first
        assert release(shelf, sending(hub)).success
        assert len(repo.history()) == 3
        assert repo.tags[CHAMPION] == repo.resolve().oid
        assert ledger_of(shelf).champion == second


def test_a_ledger_that_lost_a_release_is_refused_by_what_the_hub_holds(shelf: Shelf, hub: HubServer) -> None:
    """Everything beside it was lost too, as with a store that was put back from a backup."""
    first_release(shelf, hub)
    file = LedgerFile.of(shelf.tree.root)
    for lost in (file.path, file.head_path, file.copy_path):
        lost.unlink()
    [said] = failures(release(shelf, sending(hub)))
    assert "the ledger of promotions has lost lines: it holds 0" in said
    shutil.rmtree(shelf.tree.root / "promotion")
    [said] = failures(release(shelf, sending(hub), override=WISH))
    assert f"when {REPO} at " in said
    assert "Nothing was sent" in said


# ----------------------------------------------------------------------------------------------------------- rollback

WHY = "the second one answers in the wrong language"


def roll_back(
    shelf: Shelf, recipe: dict[str, Any], to: str = "", reason: str = WHY, **resources: Any
) -> dg.ExecuteInProcessResult:
    job = build_dpo_defs("demo", recipe, resources=resources).resolve_job_def("demo_rollback")
    config = {"ops": {"demo__rollback": {"config": {"to": to, "reason": reason}}}}
    return job.execute_in_process(instance=shelf.instance, run_config=config, raise_on_error=False)


def two_releases(shelf: Shelf, hub: HubServer) -> tuple[str, str]:
    first = first_release(shelf, hub)
    second = refresh(shelf, "better", right=0.9, frozen="equal")
    assert release(shelf, sending(hub)).success
    return first, second


def test_a_rollback_makes_the_release_before_live_and_the_next_refresh_is_judged_against_it(
    shelf: Shelf, hub: HubServer
) -> None:
    first, second = two_releases(shelf, hub)
    repo = hub.repo(REPO)
    old = repo.tags[CHAMPION]
    released = next(one for one in repo.history() if one.oid == ledger_of(shelf).release(1).commit)
    hub.requests.clear()
    result = roll_back(shelf, sending(hub))
    assert result.success, failures(result)
    ledger = ledger_of(shelf)
    assert (ledger.champion, ledger.lines[-1].champion) == (first, second)
    assert repo.resolve().files == released.files
    assert repo.resolve().parent == old, "one commit on main; nothing is rewritten"
    assert repo.tags[CHAMPION] == repo.resolve().oid == ledger.live.commit  # type: ignore[union-attr]
    assert not [one for one in hub.requests if one.method == "PUT"], "what is in the store is not uploaded again"
    seen = [event for event in result.all_events if event.event_type == dg.DagsterEventType.ASSET_OBSERVATION]
    assert [event.asset_key.path[-1] for event in seen if event.asset_key] == ["promotion", "published_model"]
    [told] = {str(event.asset_observation_data.asset_observation.metadata["withdrawn_since"].value) for event in seen}
    assert told == "not known", "the shelf keeps no feedback"

    # The next refresh with nothing new does not undo it, and one with something new meets the release of now.
    again = release(shelf, sending(hub))
    assert again.success, failures(again)
    assert failed_checks(again)["promotion_verdict"]["value"] == "hold"
    assert WHY in failed_checks(again)["promotion_verdict"]["note"]
    assert ledger_of(shelf).champion == first
    third = refresh(shelf, "third, and better", right=0.9, frozen="equal")
    assert release(shelf, sending(hub)).success
    ledger = ledger_of(shelf)
    assert (ledger.champion, ledger.lines[-1].champion) == (third, first)
    assert [line.kind for line in ledger.lines] == [
        "decision", "release", "decision", "release", "rollback", "decision", "decision", "release"
    ]  # fmt: skip
    assert ledger.releases[-1].release == 3


@pytest.mark.parametrize("between", [False, True], ids=["straight", "with one between"])
def test_a_challenger_that_went_on_from_a_release_that_was_taken_back_is_rejected(
    shelf: Shelf, hub: HubServer, between: bool
) -> None:
    """Scored well, and better than what is live now: what the release was taken back for may be in it too."""
    first, second = two_releases(shelf, hub)
    behind = shelf.now["dpo_adapter"].digest
    if between:
        refresh(shelf, "between", behind=behind)
        behind = shelf.now["dpo_adapter"].digest
    assert roll_back(shelf, sending(hub)).success
    refresh(shelf, "third, and better", right=0.9, frozen="equal", behind=behind)
    result = release(shelf, sending(hub))
    assert not result.success
    said = failed_checks(result)["promotion_verdict"]
    assert said["value"] == "reject"
    assert f"it went on from the release {second[:12]}" in said["note"]
    assert WHY in said["note"]
    assert ledger_of(shelf).champion == first

    # Live again, it is nothing to reject what went on from it for.
    assert roll_back(shelf, sending(hub), to="2", reason="it was the prompt, and not the model").success
    refresh(shelf, "third, and better", right=0.9, frozen="equal", behind=behind)
    assert release(shelf, sending(hub)).success
    assert ledger_of(shelf).champion == shelf.now["merged_model"].digest


def test_who_loads_the_champion_gets_what_is_live_through_a_rollback_whatever_else_is_on_main(
    shelf: Shelf, hub: HubServer, tmp_path: Path
) -> None:
    """One client with one cache, as whoever serves the model has it."""
    repo, weights = hub.repo, "model.safetensors"

    def loaded() -> bytes:
        found = hf_hub_download(
            REPO, weights, revision=CHAMPION, cache_dir=tmp_path / "cache", endpoint=hub.endpoint, token=hub.token
        )
        return Path(found).read_bytes()

    first_release(shelf, hub)
    released = repo(REPO).files(CHAMPION)[weights]
    assert loaded() == released
    refresh(shelf, "better", right=0.9, frozen="equal")
    assert release(shelf, sending(hub)).success
    assert loaded() == repo(REPO).files(CHAMPION)[weights] != released
    assert roll_back(shelf, sending(hub)).success
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.upload_file(repo_id=REPO, path_or_fileobj=b"a colleague's", path_in_repo=weights)
    assert repo(REPO).files("main")[weights] == b"a colleague's"
    assert loaded() == released


def test_a_count_of_withdrawn_rows_that_fails_is_told_and_no_fault_of_a_rollback_that_is_done(tmp_path: Path) -> None:
    """A dataset of the release is no table any more."""
    tree = ArtifactTree(tmp_path)

    def fill(folder: Path) -> None:
        (folder / "train.parquet").write_bytes(b"no table")

    dataset, _ = tree.find_or_build("dpo_dataset", "a" * 32, fill, {})
    staged, _ = tree.find_or_build("published_model", "b" * 32, fill, {"dpo_dataset": dataset.digest})
    told: list[str] = []
    assert withdrawn_since(tree, staged.fingerprint, told.append) is None
    [said] = told
    assert said.startswith("how many rows behind it were withdrawn since cannot be told: ")
    assert "not all are kept" not in said


def test_a_rollback_that_is_stopped_is_finished_without_a_second_commit(shelf: Shelf, hub: HubServer) -> None:
    first, second = two_releases(shelf, hub)
    hub.fail_next("DELETE", "/tag/champion", status=400)
    assert not roll_back(shelf, sending(hub)).success
    assert ledger_of(shelf).champion == second
    assert len(hub.repo(REPO).history()) == 4
    assert roll_back(shelf, sending(hub)).success
    assert len(hub.repo(REPO).history()) == 4
    assert ledger_of(shelf).champion == first
    assert hub.repo(REPO).tags[CHAMPION] == hub.repo(REPO).resolve().oid


@pytest.mark.parametrize("by", ["number", "tag", "commit"])
def test_a_rollback_goes_to_a_release_by_its_number_tag_or_commit(shelf: Shelf, hub: HubServer, by: str) -> None:
    first, _ = two_releases(shelf, hub)
    target = ledger_of(shelf).release(1)
    to = {"number": "1", "tag": target.tag, "commit": target.commit[:12]}[by]
    assert roll_back(shelf, sending(hub), to).success
    assert ledger_of(shelf).champion == first


def test_a_rollback_that_cannot_be_leaves_the_champion_and_says_why(shelf: Shelf, hub: HubServer) -> None:
    def refused(to: str = "", reason: str = WHY, recipe: dict[str, Any] | None = None, **resources: Any) -> str:
        before, tags = ledger_of(shelf), dict(hub.repo(REPO).tags) if hub.repos else {}
        [said] = failures(roll_back(shelf, recipe or sending(hub), to, reason, **resources))
        assert ledger_of(shelf) == before
        assert tags == (hub.repo(REPO).tags if hub.repos else {})
        return said

    assert "nothing of this pipeline is live" in refused()
    first_release(shelf, hub)
    assert "there is no release before release 1, which is live" in refused()
    refresh(shelf, "better", right=0.9, frozen="equal")
    assert release(shelf, sending(hub)).success
    unknown = refused("7")
    assert "`to: 7` is no release of this pipeline. To send again, by number, tag or commit: 1: content-" in unknown
    assert ", live" in unknown
    elsewhere = refused(recipe=demo_recipe(publishing=sending(hub)["publishing"] | {"repo_id": "org/new-name"}))
    assert f"release 1 was made for {REPO}, which its card names, and publishing.repo_id is org/new-name" in elsewhere
    assert f"set publishing.repo_id to {REPO}" in elsewhere
    assert list(hub.repos) == [("models", REPO)]
    assert "at least 10 characters" in refused(reason="oops")
    assert "publishing.dry_run is true" in refused(recipe=trying(hub))
    hub.fail_next("GET", "/api/models", silent=True, times=9)
    impatient = {"hub": HubResource(endpoint=hub.endpoint, timeout_seconds=0.1)}
    silent = refused(**impatient)
    assert f"{hub.endpoint} did not answer within 0.1 s" in silent
    assert "run the job demo_rollback again" in silent
    hub.faults.pending.clear()
    staged = shelf.tree.directory("published_model", ledger_of(shelf).release(1).artefact)
    staged.rename(staged.parent.parent / "elsewhere")
    assert f"release 1 was staged in {staged}, which is missing from" in refused()
