"""What the Hub holds after every way a publication can go: one commit or none, and nothing of others touched."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import get_session
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.artifact import seal
from dpo_assets.assets.published_model import verify
from dpo_assets.errors import ConfigError, GateError, InfrastructureError
from dpo_assets.planning.licence import Licence
from dpo_assets.publishing.access import check_access
from dpo_assets.publishing.card import render_card
from dpo_assets.publishing.commit import CHAMPION, Release, content_tag, preview, publish, staged_files
from dpo_assets.publishing.errors import HubFailure, HubOffline, PublishRefused
from dpo_assets.publishing.hub import HubRepository, Patience, limited
from dpo_assets.publishing.plan import (
    HUB_OWNED,
    FileRecord,
    Head,
    HeldFile,
    ReleasePlan,
    ReleaseRecord,
    plan_release,
)
from dpo_assets.secret_shapes import MASK
from dpo_assets_tests.hub.repository import Blob
from dpo_assets_tests.hub.routes import SIGNATURE
from dpo_assets_tests.hub_server import HubServer, Repo
from dpo_assets_tests.publishing.test_card import facts
from dpo_assets_tests.publishing.test_release import MODEL, STAGED, TOKEN, staged

REPO = "org/bot"
PATIENCE = Patience(seconds=5.0, waits=(0.0, 0.0, 0.0))
Staged = tuple[Path, dict[str, FileRecord]]
OWNERS = {
    "LICENSE": b"my licence text",
    "bot-q4_k_m.gguf": b"GGUF" * 10,
    "images/plot.png": b"png",
    "USE_POLICY.md": b"policy",
}
CONFIG_2 = {"config.json": b'{"model_type": "llama", "v": 2}'}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(token="hf_test") as server:
        yield server


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=hub.token)


def send(api: HfApi, release: Staged, **options: Any) -> Release:
    return publish(api, REPO, *release, **{"private": True, "patience": PATIENCE, **options})


def look(api: HfApi, release: Staged, **options: Any) -> ReleasePlan:
    """The plan of a dry run."""
    repository = HubRepository(api, REPO, "HF_TOKEN", PATIENCE)
    return preview(repository, release[1], **{"private": True, "adopt": None, **options})


def by_hand(repo: Repo, files: dict[str, bytes], *, without: tuple[str, ...] = ()) -> None:
    """A commit of somebody else, on the server."""
    blobs = {path: Blob.large(data) if path.endswith(".gguf") else Blob.regular(data) for path, data in files.items()}
    kept = {path: blob for path, blob in repo.resolve().files.items() if path not in without}
    repo.commit("by hand", {**kept, **blobs})


def made(hub: HubServer, files: dict[str, bytes] | None = None, *, private: bool = True) -> Repo:
    """A repository that somebody made, with files of theirs."""
    hub.repos["models", REPO] = Repo(REPO, private=private)
    if files:
        by_hand(hub.repo(REPO), files)
    return hub.repo(REPO)


def summaries(repo: Repo) -> list[str]:
    return [commit.summary for commit in repo.history()]


def actions(plan: ReleasePlan) -> dict[str, str]:
    return {operation.path: operation.action for operation in plan.operations}


def is_released_once(hub: HubServer, release: Release, names: Set[str] = frozenset(STAGED)) -> bool:
    """One commit on a new repository, tagged, with every file."""
    repo = hub.repo(REPO)
    assert summaries(repo) == [f"Release {release.tag}", "initial commit"]
    assert repo.tags == dict.fromkeys([release.tag, CHAMPION], repo.resolve().oid)
    return set(repo.files()) == names | HUB_OWNED


# The way it should go


def test_a_release_is_one_commit_with_a_tag_and_reads_back_equal(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    inside = "additional_chat_templates/tool_use.jinja"
    folder, files = staged(tmp_path, {inside: b"{{ tools }}"})
    release = send(api, (folder, files))
    repo = hub.repo(REPO)
    assert is_released_once(hub, release, {*STAGED, inside})
    assert repo.files() == {name: (folder / name).read_bytes() for name in staged_files(folder)} | {
        ".gitattributes": repo.files()[".gitattributes"]
    }
    assert release.url == f"{hub.endpoint}/{REPO}"
    assert (release.commit, release.tag) == (repo.resolve().oid, content_tag(files))
    assert (release.sent, release.read_back) == (True, True)
    assert actions(release.plan) == dict.fromkeys(sorted({*STAGED, inside}), "add")
    assert repo.private


def test_a_champion_of_somebody_else_is_refused_before_anything_is_sent(
    hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    send(api, staged(tmp_path))
    repo = hub.repo(REPO)
    theirs = repo.history()[-1].oid
    repo.tags[CHAMPION] = theirs
    hub.requests.clear()
    new = staged(tmp_path, CONFIG_2)
    told = f"the tag `champion` of {REPO} points at {theirs}"
    for ask in (send, look):
        with pytest.raises(PublishRefused, match=told):
            ask(api, new)
    with pytest.raises(PublishRefused, match=told):  # Before anything is trained for it.
        check_access(HubRepository(api, REPO, "HF_TOKEN", PATIENCE), private=True, adopt=None, licence=None)
    assert hub.changes == []
    adopted = send(api, new, adopt=REPO)
    assert repo.tags[CHAMPION] == adopted.commit == adopted.champion


def test_the_champion_stays_where_it_is_when_others_commit_beside_it(
    hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    first = send(api, staged(tmp_path))
    by_hand(hub.repo(REPO), {"images/plot.png": b"png"})
    hub.requests.clear()
    again = send(api, staged(tmp_path))
    assert (again.sent, again.champion) == (False, first.commit)
    assert again.commit == hub.repo(REPO).resolve().oid != first.commit
    assert hub.repo(REPO).tags[CHAMPION] == first.commit
    assert hub.changes == []


def test_going_back_to_an_older_release_moves_the_champion_to_a_new_commit(
    hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    """Its content tag lies at the older commit, which does not stop it; and the next call reads nothing back."""
    first, second = send(api, staged(tmp_path)), send(api, staged(tmp_path, CONFIG_2))
    repo = hub.repo(REPO)
    back = send(api, staged(tmp_path))
    assert repo.tags == {first.tag: first.commit, second.tag: second.commit, CHAMPION: back.commit}
    assert back.commit == repo.resolve().oid != first.commit
    hub.requests.clear()
    again = send(api, staged(tmp_path))
    assert (again.commit, again.read_back, hub.changes) == (back.commit, False, [])
    assert not [one for one in hub.requests if "safetensors" in one.path]


def test_a_repository_is_made_public_where_the_recipe_says_so(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    send(api, staged(tmp_path), private=False)
    assert hub.repo(REPO).private is False


def test_the_same_release_again_writes_nothing_and_downloads_no_weights(
    hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    first = send(api, staged(tmp_path))
    hub.requests.clear()
    again = send(api, staged(tmp_path))
    assert (again.commit, again.tag, again.sent, again.read_back) == (first.commit, first.tag, False, False)
    assert set(actions(again.plan).values()) == {"unchanged"}
    assert hub.changes == []
    assert not [r for r in hub.requests if "safetensors" in r.path or "lfs" in r.path]


def test_a_new_release_replaces_the_old_one_and_removes_what_it_no_longer_holds(
    hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    first = send(api, staged(tmp_path, {"tokenizer.model": b"old", "config.json": b'{"v": 1}'}))
    second = send(api, staged(tmp_path, CONFIG_2))
    repo = hub.repo(REPO)
    assert set(repo.files()) == STAGED | HUB_OWNED
    assert repo.files()["config.json"] == CONFIG_2["config.json"]
    # The release before stays where its tag is.
    assert repo.tags == {first.tag: first.commit, second.tag: second.commit, CHAMPION: second.commit}
    assert repo.files(first.tag)["tokenizer.model"] == b"old"
    changed = {o.path: o.action for o in second.plan.changes}
    assert changed == {"config.json": "update", "provenance.json": "update", "tokenizer.model": "delete"}


def test_going_back_to_an_older_release_works_and_its_tag_stays(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    first = send(api, staged(tmp_path))
    send(api, staged(tmp_path, CONFIG_2))
    back = send(api, staged(tmp_path))
    assert (back.tag, hub.repo(REPO).tags[back.tag]) == (first.tag, first.commit)
    assert hub.repo(REPO).files(back.commit) == hub.repo(REPO).files(first.commit)
    assert hub.repo(REPO).files()["config.json"] == MODEL["config.json"]


def test_the_hub_takes_the_card(api: HfApi, tmp_path: Path) -> None:
    send(api, staged(tmp_path, card=render_card(facts())))
    info = api.model_info(REPO)
    assert (info.library_name, info.pipeline_tag) == ("transformers", "text-generation")
    assert info.card_data is not None
    assert info.card_data.base_model == "org/base"


def test_a_card_that_the_hub_cannot_read_is_refused_before_anything_is_sent(
    hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    with pytest.raises(PublishRefused, match="Invalid metadata"):
        send(api, staged(tmp_path, card="---\ntags: [dpo\n---\n"))
    assert summaries(hub.repo(REPO)) == ["initial commit"]
    assert hub.lfs == {}


# Public where it must not be


def test_a_public_repository_gets_nothing_of_a_release_that_is_to_be_private(
    hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    repo = made(hub, private=False)
    said = rf"{REPO} is public, and publishing.private is true. Nothing was sent. .*set publishing.private: false"
    for ask in (send, look):
        with pytest.raises(PublishRefused, match=said):
            ask(api, staged(tmp_path))
    assert (hub.changes, hub.lfs, repo.private, summaries(repo)) == ([], {}, False, ["initial commit"])
    assert send(api, staged(tmp_path), private=False).sent


def test_a_repository_that_somebody_makes_public_before_ours_is_made_gets_nothing(
    hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    """The Hub answers that it exists, which is no answer to how private it is."""
    hub.meanwhile("POST", "/repos/create", lambda: made(hub, private=False) and None)
    with pytest.raises(PublishRefused, match="is public"):
        send(api, staged(tmp_path))
    assert summaries(hub.repo(REPO)) == ["initial commit"]


def test_a_private_repository_stays_private_whatever_the_recipe_says(
    hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    repo = made(hub, private=True)
    assert send(api, staged(tmp_path), private=False).sent
    assert repo.private


# Files of others


@pytest.mark.parametrize("path", OWNERS)
def test_a_repository_of_somebody_else_is_refused_until_the_recipe_adopts_it_by_name(
    hub: HubServer, api: HfApi, tmp_path: Path, path: str
) -> None:
    repo = made(hub, {path: OWNERS[path]})
    for adopt in (None, "org/other"):
        for ask in (send, look):
            with pytest.raises(PublishRefused, match=rf"holds files that no release .*{path}.*adopt: {REPO}"):
                ask(api, staged(tmp_path), adopt=adopt)
    assert hub.changes == []
    release = send(api, staged(tmp_path), adopt=REPO)
    assert release.plan.kept == (path,)
    assert repo.files()[path] == OWNERS[path]


def test_an_adopted_repository_keeps_its_files_but_for_the_names_that_the_release_needs(
    hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    theirs = {"README.md": b"---\nlicense: mit\n---\nhand written\n", "config.json": MODEL["config.json"]}
    repo = made(hub, OWNERS | theirs)
    plan = look(api, staged(tmp_path), adopt=REPO)
    release = send(api, staged(tmp_path), adopt=REPO)
    assert release.plan == plan
    assert {p: a for p, a in actions(plan).items() if a != "add"} == {
        "README.md": "replace",
        "config.json": "unchanged",
    }
    assert plan.kept == tuple(sorted(OWNERS))
    assert {path: repo.files()[path] for path in OWNERS} == OWNERS
    # From then on it is known what is whose, and the adoption has said all that it had to.
    second = send(api, staged(tmp_path, CONFIG_2))
    assert "delete" not in actions(second.plan).values()
    assert {path: repo.files()[path] for path in OWNERS} == OWNERS


def test_what_the_hub_puts_into_a_new_repository_is_nobodys(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    repo = made(hub, {"README.md": b"---\nlicense: apache-2.0\n---\n"})
    release = send(api, staged(tmp_path))
    assert actions(release.plan)["README.md"] == "update"
    assert set(repo.files()) == STAGED | HUB_OWNED


def test_what_others_put_beside_a_release_stays_with_the_next_one(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    send(api, staged(tmp_path))
    repo = hub.repo(REPO)
    by_hand(repo, OWNERS)
    release = send(api, staged(tmp_path, CONFIG_2))
    assert release.plan.kept == tuple(sorted(OWNERS))
    assert set(repo.files()) == STAGED | HUB_OWNED | set(OWNERS)


def test_a_file_of_ours_that_somebody_changed_is_theirs(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    send(api, staged(tmp_path, {"tokenizer.model": b"ours"}))
    repo = hub.repo(REPO)
    by_hand(repo, {"README.md": b"# Corrected by hand\n", "tokenizer.model": b"theirs"})
    with pytest.raises(PublishRefused, match=rf"`README\.md` of {REPO} is not as a release left it.*adopt: {REPO}"):
        send(api, staged(tmp_path, CONFIG_2))
    assert repo.files()["README.md"] == b"# Corrected by hand\n"
    plan = send(api, staged(tmp_path, CONFIG_2), adopt=REPO).plan
    assert (actions(plan)["README.md"], plan.kept) == ("replace", ("tokenizer.model",))
    assert repo.files()["tokenizer.model"] == b"theirs"


def test_a_release_of_a_version_that_listed_nothing_is_not_taken_for_ours(
    hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    made(hub, {"provenance.json": b'{"inputs": {}, "versions": {}}', "pytorch_model.bin": b"x"})
    with pytest.raises(PublishRefused, match=r"holds files that no release .* as that of early versions"):
        send(api, staged(tmp_path))


def test_a_commit_in_between_makes_the_plan_anew_and_a_colleagues_file_stays(
    hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    first = send(api, staged(tmp_path, {"tokenizer.model": b"old"}))
    repo = hub.repo(REPO)
    hub.meanwhile("POST", "/commit/", lambda: by_hand(repo, {"bot.gguf": b"GGUF"}))
    plans: list[ReleasePlan] = []
    second = send(api, staged(tmp_path), planned=plans.append)
    assert summaries(repo)[:2] == [f"Release {second.tag}", "by hand"]
    assert set(repo.files()) == STAGED | HUB_OWNED | {"bot.gguf"}
    assert [plan.kept for plan in plans] == [(), ("bot.gguf",)]
    assert second.plan == plans[-1]
    assert first.tag in repo.tags


def test_a_writer_who_is_always_faster_ends_the_attempt_and_loses_nothing(
    hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    send(api, staged(tmp_path))
    repo = hub.repo(REPO)
    for name in ("a.gguf", "b.gguf"):
        hub.meanwhile("POST", "/commit/", lambda name=name: by_hand(repo, {name: b"GGUF"}))  # type: ignore[misc]
    with pytest.raises(HubFailure, match=r"another writer was faster .*412"):
        send(api, staged(tmp_path, CONFIG_2))
    assert {"a.gguf", "b.gguf"} < set(repo.files())
    assert summaries(repo)[:2] == ["by hand", "by hand"]
    assert send(api, staged(tmp_path, CONFIG_2)).plan.kept == ("a.gguf", "b.gguf")


def test_a_stranger_who_fills_a_new_repository_first_is_not_overwritten(
    hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    hub.meanwhile("POST", "/commit/", lambda: by_hand(hub.repo(REPO), OWNERS))
    with pytest.raises(PublishRefused, match="holds files that no release"):
        send(api, staged(tmp_path))
    assert summaries(hub.repo(REPO)) == ["by hand", "initial commit"]


# The plan


@pytest.mark.parametrize("before", ["nothing", "an empty repository", "a release", "a release and a colleague's file"])
def test_what_a_dry_run_lists_is_what_is_sent(hub: HubServer, api: HfApi, tmp_path: Path, before: str) -> None:
    if before == "an empty repository":
        made(hub)
    if "a release" in before:
        send(api, staged(tmp_path, {"tokenizer.model": b"old", "config.json": b'{"v": 1}'}))
    if "colleague" in before:
        by_hand(hub.repo(REPO), {"bot.gguf": b"GGUF"})
    release = staged(tmp_path)
    hub.requests.clear()
    plan = look(api, release)
    assert hub.changes == []
    state = dict(hub.repo(REPO).resolve().files) if before != "nothing" else {}
    sent = send(api, release)
    assert plan.operations == sent.plan.operations
    after = hub.repo(REPO).resolve().files
    differ = {path for path in {*state, *after} if state.get(path) != after.get(path)} - HUB_OWNED
    assert differ == {operation.path for operation in plan.changes}
    assert (plan.head is None) == (before == "nothing")


CONTENT = st.sampled_from([b"a", b"b", b"c"])
NAMES = st.sampled_from(["README.md", "config.json", "model.safetensors", "x.gguf", "LICENSE"])


def held(data: bytes, *, large: bool) -> HeldFile:
    blob = Blob.large(data) if large else Blob.regular(data)
    return HeldFile(blob.size, sha256=blob.content_id) if large else HeldFile(blob.size, git_blob=blob.content_id)


@settings(max_examples=150, deadline=None)
@given(
    new=st.dictionaries(NAMES, CONTENT, min_size=1),
    lies=st.dictionaries(NAMES, CONTENT),
    listed=st.none() | st.dictionaries(NAMES, CONTENT),
    adopt=st.sampled_from([None, REPO]),
    large=st.booleans(),
)
def test_no_plan_touches_what_no_release_of_ours_listed(
    tmp_path_factory: pytest.TempPathFactory,
    new: dict[str, bytes],
    lies: dict[str, bytes],
    listed: dict[str, bytes] | None,
    adopt: str | None,
    large: bool,
) -> None:
    scratch = tmp_path_factory.getbasetemp() / "content"

    def record(data: bytes) -> FileRecord:
        scratch.write_bytes(data)
        return FileRecord.of(scratch)

    earlier = listed and {path: record(data) for path, data in listed.items()}
    record_of_head = None if listed is None else ReleaseRecord(made_by="dpo_assets", files=earlier or {})
    there = {path: held(data, large=large) for path, data in lies.items()}
    head = Head("c" * 40, True, there, record_of_head)
    try:
        plan = plan_release({path: record(data) for path, data in sorted(new.items())}, head, REPO, adopt)
    except PublishRefused:
        assert adopt is None
        return
    after = dict(lies)
    for operation in plan.operations:
        ours = lies.get(operation.path) == (listed or {}).get(operation.path)
        if operation.action == "delete":
            assert ours
            del after[operation.path]
        else:
            assert operation.action != "update" or ours
            assert operation.action != "replace" or (adopt == REPO and not ours)
            assert (operation.action == "add") == (operation.path not in lies)
            assert (operation.action == "unchanged") == (lies.get(operation.path) == new[operation.path])
            after[operation.path] = new[operation.path]
    assert after.items() >= new.items()
    assert set(plan.kept) == set(after) - set(new)
    assert all(after[path] == lies[path] for path in plan.kept)


# Faults of the Hub

STEPS = [
    ("GET", "/api/models/org/bot$"),
    ("POST", "/repos/create"),
    ("GET", "/refs$"),
    ("POST", "/validate-yaml"),
    ("POST", "/preupload/"),
    ("POST", "/objects/batch"),
    ("PUT", "/lfs-storage/"),
    ("POST", "/commit/"),
    ("GET", "/revision/"),
    ("GET", "/resolve/.*config"),
    ("GET", "/lfs-storage/"),
    ("POST", "/tag/"),
]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own retries wait a second and more between two tries; what they do does not depend on it.

    It is the clock of the whole process that stands still.
    """
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)


@pytest.mark.parametrize(("method", "path"), STEPS)
@pytest.mark.parametrize("status", [503, 429])
def test_a_hub_that_is_down_for_a_moment_at_any_step_gets_one_commit(
    hub: HubServer, api: HfApi, tmp_path: Path, at_once: None, method: str, path: str, status: int
) -> None:
    hub.fail_next(method, path, status=status, times=2)
    release = send(api, staged(tmp_path))
    assert hub.faults.pending == []
    assert is_released_once(hub, release)
    assert (release.sent, release.read_back) == (True, True)


@pytest.mark.parametrize(("method", "path"), STEPS)
def test_a_hub_that_stays_down_at_any_step_leaves_no_tag_and_a_later_run_completes(
    hub: HubServer, api: HfApi, tmp_path: Path, at_once: None, method: str, path: str
) -> None:
    hub.fail_next(method, path, times=100)
    with pytest.raises(InfrastructureError, match=rf"publishing {REPO} failed") as failed:
        send(api, staged(tmp_path))
    assert hub.endpoint in str(failed.value)
    assert REPO not in [repo.id for repo in hub.repos.values() if repo.tags]
    hub.faults.pending.clear()
    assert is_released_once(hub, send(api, staged(tmp_path)))


@pytest.mark.parametrize(("method", "path"), [step for step in STEPS if step[0] != "PUT"])
def test_an_answer_that_is_lost_at_any_step_leads_to_one_commit(
    hub: HubServer, api: HfApi, tmp_path: Path, at_once: None, method: str, path: str
) -> None:
    hub.fail_next(method, path, lost_response=True)
    release = send(api, staged(tmp_path))
    assert hub.faults.pending == []
    assert is_released_once(hub, release)
    assert (release.sent, release.read_back) == (True, True)
    assert set(actions(release.plan).values()) == {"add"}


def test_a_commit_that_an_earlier_run_made_and_did_not_tag_is_read_back_tagged_and_not_made_again(
    hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    hub.fail_next("POST", "/commit/", lost_response=True)
    with pytest.raises(HubFailure):
        send(api, staged(tmp_path), patience=replace(PATIENCE, waits=()))
    assert hub.repo(REPO).tags == {}
    release = send(api, staged(tmp_path))
    assert is_released_once(hub, release)
    assert (release.sent, release.read_back) == (False, True)


@pytest.mark.parametrize(("method", "path"), STEPS)
def test_a_hub_that_never_answers_is_named_after_the_time_it_is_given(
    hub: HubServer, api: HfApi, tmp_path: Path, at_once: None, method: str, path: str
) -> None:
    """Also where the session's limit is all there is: most calls of the client have none of their own."""
    hub.fail_next(method, path, silent=True, times=100)
    began = time.monotonic()
    with pytest.raises(HubFailure) as failed:
        send(api, staged(tmp_path), patience=replace(PATIENCE, seconds=0.05))
    assert time.monotonic() - began < 5
    assert f"{hub.endpoint} did not answer within 0.05 s" in str(failed.value)
    assert "publishing.endpoint" in str(failed.value)
    assert all(not repo.tags for repo in hub.repos.values())
    # Whoever else uses the client waits as before.
    assert get_session().timeout.read is None


@pytest.mark.parametrize(
    ("header", "value", "seconds"),
    [("Retry-After", "7", 7.0), ("Retry-After", "9000", 300.0), ("RateLimit", '"api";r=0;t=55', 56.0), ("X", "7", 2.0)],
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/refs$"), ("POST", "/commit/")])
def test_a_hub_that_says_when_to_come_back_is_waited_for_within_bounds(
    hub: HubServer, api: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    method: str, path: str, header: str, value: str, seconds: float,
) -> None:  # fmt: skip
    waited: list[float] = []
    monkeypatch.setattr("dpo_assets.publishing.hub.time.sleep", waited.append)
    hub.fail_next(method, path, status=429, headers={header: value})
    assert send(api, staged(tmp_path), patience=Patience(5.0, (2.0,))).sent
    assert waited == [seconds]


def test_a_hub_that_cannot_be_reached_is_a_failure_worth_another_try(tmp_path: Path) -> None:
    with HubServer() as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
    with pytest.raises(HubFailure, match=hub.endpoint):
        send(api, staged(tmp_path))


def test_the_clients_session_keeps_its_limit_until_the_last_of_several_publishers_is_done() -> None:
    before = get_session().timeout
    with limited(7.0):
        with limited(5.0):
            assert get_session().timeout.read == 5.0
        assert get_session().timeout.read is not None
    assert get_session().timeout == before


def test_a_client_that_may_not_ask_says_which_variable_forbids_it(
    hub: HubServer, api: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubOffline, match="HF_HUB_OFFLINE is set; unset it"):
        send(api, staged(tmp_path))


def test_a_store_that_refuses_an_address_says_nothing_of_the_token(
    hub: HubServer, api: HfApi, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.fail_next("PUT", "/lfs-storage/", status=403)
    with pytest.raises(HubFailure, match=r"model\.safetensors") as failed:
        send(api, staged(tmp_path))
    assert "token" not in str(failed.value)
    assert summaries(hub.repo(REPO)) == ["initial commit"]


def test_a_release_of_another_pipeline_is_not_ours_to_replace(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    """A copied recipe with the repository of its model: the two would replace each other for ever."""

    def sent_by(pipeline: str, adopt: str | None = None, more: dict[str, bytes] | None = None) -> Release:
        folder, files = staged(tmp_path, {"config.json": pipeline.encode(), **(more or {})}, pipeline=pipeline)
        options: dict[str, Any] = {"private": True, "patience": PATIENCE, "pipeline": pipeline, "adopt": adopt}
        return publish(api, REPO, folder, files, **options)

    first = sent_by("one")
    assert sent_by("one").commit == first.commit
    before = summaries(hub.repo(REPO))
    with pytest.raises(PublishRefused, match="holds a release of another pipeline, `one`"):
        sent_by("two")
    assert summaries(hub.repo(REPO)) == before
    adopted = sent_by("two", adopt=REPO)
    assert "delete" not in {operation.action for operation in adopted.plan.operations}
    assert "replace" in {operation.action for operation in adopted.plan.operations}
    assert sent_by("two", more={"generation_config.json": b"{}"}).sent
    with pytest.raises(PublishRefused, match="another pipeline, `two`"):
        sent_by("one")


KILLED = """
    import sys
    from pathlib import Path
    from huggingface_hub import HfApi
    from dpo_assets.publishing.commit import publish
    from dpo_assets.publishing.plan import ReleaseRecord
    endpoint, folder = sys.argv[1], Path(sys.argv[2])
    files = ReleaseRecord.read((folder.parent / "files.json").read_bytes()).files
    publish(HfApi(endpoint=endpoint, token="hf_test"), "org/bot", folder, files, private=True)
"""


def test_a_publisher_that_is_killed_between_upload_and_commit_leaves_the_head_and_a_second_run_finishes(
    hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    folder, files = staged(tmp_path)
    (tmp_path / "files.json").write_text(ReleaseRecord(made_by="dpo_assets", files=files).model_dump_json())
    script = [sys.executable, "-c", textwrap.dedent(KILLED), hub.endpoint, str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "0"}
    started: list[subprocess.Popen[bytes]] = []
    hub.fail_next("POST", "/commit/", silent=True, then=lambda: started[0].send_signal(signal.SIGKILL))
    started.append(subprocess.Popen(script, env=environment))
    assert started[0].wait(60) == -signal.SIGKILL
    assert summaries(hub.repo(REPO)) == ["initial commit"]
    assert len(hub.lfs) == 1
    hub.requests.clear()
    assert is_released_once(hub, send(api, (folder, files)))
    assert not [request for request in hub.requests if request.method == "PUT"], "what was uploaded is used"


# What lies there


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_bytes_that_the_hub_damages_fail_the_check_get_no_tag_and_leave_the_old_release_tagged(
    hub: HubServer, api: HfApi, tmp_path: Path, path: str
) -> None:
    first = send(api, staged(tmp_path))
    new = staged(tmp_path, {path: b'{"other": 1}'})
    hub.meanwhile("GET", "/revision/", lambda: hub.repo(REPO).flip_byte(path))
    for _ in range(2):  # Nor is it a success on the next try.
        with pytest.raises(GateError, match=rf"{path} at {REPO}@[0-9a-f]{{40}} is not what was sent") as red:
            send(api, new)
        assert red.value.check == "release_verified"
    assert hub.repo(REPO).tags == dict.fromkeys([first.tag, CHAMPION], first.commit)


def test_a_tag_at_the_head_is_not_believed(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    """A branch that was reset, or a tag that somebody set: what lies there is compared."""
    folder, files = staged(tmp_path)
    first = send(api, (folder, files))
    repo = hub.repo(REPO)
    by_hand(repo, {"config.json": b"{}"})
    repo.tags[first.tag] = repo.resolve().oid
    hub.requests.clear()
    for ask in (send, look):
        with pytest.raises(GateError, match=f"tag {first.tag} of {REPO} points at .* which holds something else"):
            ask(api, (folder, files))
    assert hub.changes == []


def test_a_tag_of_this_content_on_another_commit_is_a_failure_and_is_not_moved(
    hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    folder, files = staged(tmp_path)
    repo = made(hub)
    elsewhere = repo.resolve().oid
    repo.tags[content_tag(files)] = elsewhere
    by_hand(repo, {})
    with pytest.raises(GateError, match=f"points at {elsewhere}"):
        send(api, (folder, files))
    assert repo.tags == {content_tag(files): elsewhere}
    assert hub.changes == []


def test_a_tag_that_somebody_sets_in_between_is_noticed(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    folder, files = staged(tmp_path)
    repo = made(hub)
    hub.meanwhile("POST", "/tag/", lambda: repo.tags.update({content_tag(files): repo.history()[-1].oid}))
    with pytest.raises(GateError, match="and the release is"):
        send(api, (folder, files))


# Tokens


def access(api: HfApi, **options: Any) -> str:
    repository = HubRepository(api, REPO, "HF_TOKEN", PATIENCE)
    licence = Licence(identifier="mit", stated_by="recipe")
    return check_access(repository, **{"private": True, "adopt": None, "licence": licence, **options})


def test_a_token_that_may_write_is_told_before_training_and_nothing_is_written(hub: HubServer, api: HfApi) -> None:
    assert access(api) == f"tester makes {REPO}, which does not exist yet"
    made(hub)
    assert access(api) == f"tester may write to {REPO}, which is private"
    assert hub.changes == []


def read_only(hub: HubServer) -> str:
    hub.role = "read"
    return r"the token in HF_TOKEN may only read"


def fine_grained(hub: HubServer) -> str:
    made(hub)
    hub.role = "fineGrained"
    hub.fail_next("GET", "/auth-check/write", status=403)
    return r"the token in HF_TOKEN may not write there.*repo_id"


def expired(hub: HubServer) -> str:
    hub.token = "hf_another"
    return r"the token in HF_TOKEN must be valid for .*expired"


def public(hub: HubServer) -> str:
    made(hub, private=False)
    return "is public, and publishing.private is true"


def foreign(hub: HubServer) -> str:
    made(hub, OWNERS)
    return "holds files that no release"


def another_organisation(hub: HubServer) -> str:
    hub.orgs = ()
    return r"org/bot does not exist, and tester, .*can make repositories of tester only"


@pytest.mark.parametrize("fault", [read_only, fine_grained, expired, public, foreign, another_organisation])
def test_what_would_refuse_a_release_is_told_before_training(hub: HubServer, api: HfApi, fault: Any) -> None:
    with pytest.raises(PublishRefused, match=fault(hub)):
        access(api)
    assert hub.changes == []


def test_a_licence_that_the_hub_does_not_list_is_refused_before_training(hub: HubServer, api: HfApi) -> None:
    said = r'"license" must be one of .*The licence `apache2` is stated by the recipe: name one .* base_model.licence'
    with pytest.raises(PublishRefused, match=said):
        access(api, licence=Licence(identifier="apache2", stated_by="recipe"))
    assert access(api, licence=Licence(identifier="openmdw-2.0", stated_by="model card")), "newer than our own list"
    assert hub.changes == []


def test_a_hub_without_the_question_of_access_is_asked_no_more(hub: HubServer, api: HfApi) -> None:
    made(hub)
    hub.fail_next("GET", "/auth-check/write", status=404)
    assert access(api).startswith("tester may write")


@pytest.mark.parametrize(("fault", "asked"), [(read_only, "create"), (expired, "/api/models/org/bot")])
def test_a_token_that_is_refused_is_asked_once(
    hub: HubServer, api: HfApi, tmp_path: Path, fault: Any, asked: str
) -> None:
    said = fault(hub).replace("may only read", "may not write there")
    with pytest.raises(ConfigError, match=said):
        send(api, staged(tmp_path))
    assert len([request for request in hub.requests if asked in request.path]) == 1
    assert hub.repos == {}


def test_a_repository_that_an_expired_token_does_not_see_is_not_taken_for_none(
    hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    """The Hub says the same of a repository that is not there, but with another status."""
    for ask in (look, send):
        hub.fail_next("GET", "/api/models/org/bot$", status=401, headers={"X-Error-Code": "RepoNotFound"})
        with pytest.raises(PublishRefused, match="the token in HF_TOKEN must be valid"):
            ask(api, staged(tmp_path))
    assert hub.changes == []


@pytest.mark.parametrize(("method", "path"), [step for step in STEPS if "lfs" not in step[1]])
@pytest.mark.parametrize(("status", "said"), [(401, "must be valid"), (403, "may not write")])
def test_a_refusal_at_any_step_is_told_by_the_tokens_variable_and_a_later_run_completes(
    hub: HubServer, api: HfApi, tmp_path: Path, method: str, path: str, status: int, said: str
) -> None:
    """As when the token expires while the release is sent."""
    hub.fail_next(method, path, status=status)
    with pytest.raises(PublishRefused, match=f"publishing {REPO} is refused: the token in HF_TOKEN {said}"):
        send(api, staged(tmp_path))
    assert hub.faults.pending == []
    assert is_released_once(hub, send(api, staged(tmp_path)))


def test_a_refused_token_is_in_no_text(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(PublishRefused) as refused:
        send(HfApi(endpoint=hub.endpoint, token=TOKEN), staged(tmp_path))
    error: BaseException | None = refused.value
    while error is not None:
        assert TOKEN not in f"{error!s} {error!r}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_a_secret_in_a_refusal_of_the_hub_is_masked(
    api: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "plain-words-as-token")

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(f"{TOKEN} and plain-words-as-token were refused")

    monkeypatch.setattr(HfApi, "create_commit", refuse)  # No Hub says a token; a proxy between might.
    with pytest.raises(HubFailure) as refused:
        send(api, staged(tmp_path))
    assert str(refused.value) == f"publishing {REPO} failed: {MASK} and {MASK} were refused"


def test_the_clients_log_does_not_tell_the_signed_address_of_a_store(
    hub: HubServer, api: HfApi, tmp_path: Path, at_once: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """It logs the address of everything that it tries again."""
    [own] = [one for one in logging.getLogger("huggingface_hub").handlers if type(one) is logging.StreamHandler]
    written = own.setStream(sys.stderr)
    try:
        hub.fail_next("PUT", "/lfs-storage/")
        send(api, staged(tmp_path))
    finally:
        own.setStream(written or sys.__stderr__)
    said = capsys.readouterr().err
    assert "thrown while requesting PUT" in said
    assert SIGNATURE not in said


# The check


@pytest.mark.parametrize(
    ("sent", "read_back", "said"),
    [
        (True, True, "7 files, commit 0123456789ab, sent, read back and equal"),
        (False, True, "7 files, commit 0123456789ab was there already, nothing sent, read back and equal"),
        (
            False,
            False,
            "7 files, commit 0123456789ab was there already, nothing sent, equal by the Hub's digests, read back when "
            "it was tagged",
        ),
        (None, None, "7 files, nothing sent"),
    ],
)
def test_the_check_of_a_release_says_what_this_run_did(
    tmp_path: Path, sent: bool | None, read_back: bool | None, said: str
) -> None:
    (tmp_path / "work").mkdir()
    target, files = staged(tmp_path / "work")
    target.rename(tmp_path / "release")
    artifact = seal(tmp_path, kind="published_model", fingerprint="f" * 32, inputs={})
    plan = ReleasePlan(None, ())
    release = (
        None if sent is None else Release("u", "0123456789abcdef", "0123456789abcdef", "t", sent, bool(read_back), plan)
    )
    verdict = verify(artifact, files, release)
    assert (verdict.level, verdict.value) == ("pass", said)
    assert verify(artifact, files, None, "it is public").level == "warn"
    (tmp_path / "release" / "config.json").write_text("{}")
    assert verify(artifact, files, release).level == "error"
