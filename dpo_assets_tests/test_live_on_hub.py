"""What is live by the ledger and what the Hub hands out stay one thing, whoever stops, races or loses a file."""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path

import dagster as dg
import pytest

from dpo_assets import HubResource
from dpo_assets.assets.promotion import SNAPSHOT, read_ledger
from dpo_assets.checks.evidence.ledger import Ledger
from dpo_assets.checks.evidence.ledger_file import LedgerFile
from dpo_assets.errors import ConfigError
from dpo_assets.publishing.commit import CHAMPION
from dpo_assets_tests.hub_server import HubServer
from dpo_assets_tests.pipelines import demo_recipe, failed_checks, failures, metadata
from dpo_assets_tests.test_lineage import Shelf
from dpo_assets_tests.test_promotion import WHY, first_release, ledger_of, refresh, roll_back, two_releases
from dpo_assets_tests.test_published_model import REPO, checked, hub, release, sending, shelf

__all__ = ["hub", "shelf"]  # Fixtures.


def test_a_lost_ledger_is_put_back_from_its_copy_and_the_champion_is_kept(shelf: Shelf, hub: HubServer) -> None:
    """By the command in the message, and whether the head beside it was lost too or not."""
    two_releases(shelf, hub)
    file, before = LedgerFile.of(shelf.tree.root), ledger_of(shelf)
    file.path.unlink()
    [said] = failures(release(shelf, sending(hub)))
    command = f"cp {file.copy_path} {file.path}"
    assert command in said
    file.path.write_text(before.decisions[0].text + "\n")
    file.head_path.unlink()
    with pytest.raises(ConfigError, match=r"it holds 1, and promotions\.bak\.jsonl beside it names line 4") as lost:
        ledger_of(shelf)
    assert command in str(lost.value)
    subprocess.run(command.split(), check=True)
    assert ledger_of(shelf) == before
    refresh(shelf, "third one", right=0.9, frozen="equal")
    assert release(shelf, sending(hub)).success
    assert (ledger_of(shelf).lines[:4], ledger_of(shelf).live.release) == (before.lines, 3)  # type: ignore[union-attr]
    assert file.copy_path.read_bytes() == file.path.read_bytes()


def test_a_line_that_another_run_writes_meanwhile_is_not_told_as_a_lost_ledger(
    shelf: Shelf, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_release(shelf, hub)
    real, file = LedgerFile.read, LedgerFile.of(shelf.tree.root)

    def then_another_decides(self: LedgerFile) -> Ledger:
        before = real(self)
        live = before.champion
        changes = {"challenger": "another", "decision": "hold", "found": False, "level": None, "champion": live}
        follows = {"number": 3, "before": before.head, "primaries": {}, "saw": ()}
        line = before.decisions[0].model_copy(update=changes | follows)
        after = file.extend(lambda ledger: ledger.append(line))
        shelf.make("promotion", "another run", also=lambda folder: keep(folder, after))
        return before

    def keep(folder: Path, ledger: Ledger) -> None:
        (folder / SNAPSHOT).write_text(ledger.text)

    monkeypatch.setattr(LedgerFile, "read", then_another_decides)
    assert len(read_ledger(shelf.tree).lines) == 2
    monkeypatch.undo()
    assert len(read_ledger(shelf.tree).lines) == 3


@pytest.mark.parametrize(
    ("after", "where"),
    [(0, f"main of {REPO} is at "), (1, f"the tag `champion` of {REPO} is gone, and main at ")],
    ids=["before its tag", "while no champion is tagged"],
)
def test_a_release_that_stopped_for_good_is_red_until_what_is_live_is_sent_again(
    shelf: Shelf, hub: HubServer, after: int, where: str
) -> None:
    """The next refresh brings another challenger, which is held: nobody finishes the one before."""
    first = first_release(shelf, hub)
    second = refresh(shelf, "better", right=0.9, frozen="equal")
    for _ in range(after):
        hub.meanwhile("POST", "/tag/", lambda: None)
    hub.fail_next("POST", "/tag/", status=400)
    assert not release(shelf, sending(hub)).success
    refresh(shelf, "little new")
    stopped = release(shelf, sending(hub))
    assert where in str(failed_checks(stopped)["release_verified"]["value"])
    [said] = failures(stopped)
    assert 'run the job demo_rollback with `to: "1"` and a `reason`' in said
    assert second[:12] in metadata(stopped, "promotion")["never_released"]
    back = roll_back(shelf, sending(hub), "1")
    assert back.success, failures(back)
    ledger, repo = ledger_of(shelf), hub.repo(REPO)
    assert ledger.live is not None
    assert (ledger.champion, repo.tags[CHAMPION], ledger.live.kind) == (first, ledger.live.commit, "rollback")
    assert repo.resolve().files == repo.resolve(ledger.live.commit).files
    mended = release(shelf, sending(hub))
    assert mended.success, failures(mended)
    assert "never_released" not in metadata(mended, "promotion"), "it lapsed: somebody said what is to be live"
    assert checked(shelf, sending(hub)).passed


def test_a_hold_says_what_is_known_of_the_hub_and_a_silent_one_makes_no_run_red(shelf: Shelf, hub: HubServer) -> None:
    first_release(shelf, hub)
    refresh(shelf, "refreshed")
    hub.fail_next("GET", "/api/models", silent=True)
    silent = release(shelf, sending(hub), hub=HubResource(endpoint=hub.endpoint, timeout_seconds=0.2))
    assert silent.success, failures(silent)
    assert f"whether it is at {REPO} is not known" in failed_checks(silent)["release_verified"]["what to change"]
    repo = hub.repo(REPO)
    repo.commit("by hand", {path: file for path, file in repo.resolve().files.items() if path != "README.md"})
    touched = release(shelf, sending(hub))
    assert touched.success, failures(touched)
    assert f"README.md of it changed on main of {REPO}" in failed_checks(touched)["release_verified"]["what to change"]
    del hub.repos["models", REPO]
    moved = release(shelf, demo_recipe(publishing=sending(hub)["publishing"] | {"repo_id": "org/new-name"}))
    assert moved.success, failures(moved)
    told = failed_checks(moved)["release_verified"]["what to change"]
    assert f"released to {REPO}, and publishing.repo_id is org/new-name, which gets the next release; {REPO} is" in told


def test_the_check_executed_by_itself_is_green_after_a_rollback(shelf: Shelf, hub: HubServer) -> None:
    two_releases(shelf, hub)
    assert roll_back(shelf, sending(hub)).success
    found = checked(shelf, sending(hub))
    assert found.passed, found.description
    hub.repo(REPO).tags[CHAMPION] = ledger_of(shelf).release(2).commit
    assert "the ledger says release 1" in str(checked(shelf, sending(hub)).description)


@pytest.mark.parametrize("what", ["release", "rollback"])
def test_whoever_makes_a_release_live_waits_for_who_does_and_reads_the_ledger_afterwards(
    shelf: Shelf, hub: HubServer, what: str
) -> None:
    """In the meantime release 1 became live again: what was promoted before has lapsed, and there is none before it."""
    two_releases(shelf, hub)
    if what == "release":
        refresh(shelf, "third one", right=0.9, frozen="equal")
    hub.requests.clear()
    done: list[dg.ExecuteInProcessResult] = []
    start = release if what == "release" else roll_back
    file = LedgerFile.of(shelf.tree.root)
    thread = threading.Thread(target=lambda: done.append(start(shelf, sending(hub))))
    with file.going_live("the other run", print):
        thread.start()
        until = time.monotonic() + 60
        while not waits(shelf) and time.monotonic() < until and not done:
            time.sleep(0.05)
        assert not done
        assert "run the other run" in waits(shelf)
        file.extend(
            lambda now: now.rolled_back(
                now.release(1), at="now", repo_id=REPO, commit=now.release(1).commit, reason=WHY
            )
        )
    thread.join(60)
    [said] = failures(done[0])
    assert ("does not count any more" if what == "release" else "no release before release 1") in said
    assert hub.changes == []


def waits(shelf: Shelf) -> str:
    """What the newest run says of whom it waits for."""
    [run] = shelf.instance.get_runs(limit=1)
    logs = [record.event_log_entry.user_message for record in shelf.instance.get_records_for_run(run.run_id).records]
    return next((text for text in logs if "waits for" in text), "")
