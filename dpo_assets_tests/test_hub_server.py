"""The in-test Hub, as the real ``huggingface_hub`` client sees it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Read by huggingface_hub when it is imported: this Hub has no Xet, and tests do not phone home.
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import httpx
import pytest
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dpo_assets_tests.hub_server import HubServer

REPO = "org/model"
WEIGHTS = bytes(range(256)) * 8
CONFIG = b'{"r": 16}'


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(token="hf_test") as server:
        yield server


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    """A client of this Hub, with the repository already made."""
    client = HfApi(endpoint=hub.endpoint, token=hub.token)
    client.create_repo(REPO, private=True)
    return client


def publish(api: HfApi, files: dict[str, bytes], parent: str | None = None) -> CommitInfo:
    """One commit that adds ``files``, from fresh operations: the client refuses to reuse committed ones."""
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(REPO, operations=operations, commit_message="publish", parent_commit=parent)


def head(api: HfApi) -> str:
    return str(api.model_info(REPO).sha)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_one_commit_adds_a_file_an_lfs_file_and_deletes_another(hub: HubServer, api: HfApi) -> None:
    first = publish(api, {"old.json": b"{}", "README.md": b"---\nlicense: mit\n---\n# model\n"})
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd("adapter/config.json", CONFIG),
        CommitOperationAdd("adapter/model.safetensors", WEIGHTS),
        CommitOperationDelete("old.json"),
    ]
    second = api.create_commit(REPO, operations=operations, commit_message="second", parent_commit=first.oid)

    repo = hub.repo(REPO)
    assert [commit.oid for commit in repo.history()][:2] == [second.oid, first.oid]
    assert set(repo.files()) == {
        ".gitattributes",
        "README.md",
        "adapter/config.json",
        "adapter/model.safetensors",
    }
    assert repo.files()["adapter/config.json"] == CONFIG
    assert repo.files()["adapter/model.safetensors"] == WEIGHTS
    assert repo.files(first.oid)["old.json"] == b"{}"
    # The weights took the LFS way: they are in the object store and not in the commit's own bytes.
    assert list(hub.lfs) == [sha256(WEIGHTS)]
    commit_request = next(r for r in reversed(hub.requests) if "/commit/" in r.path)
    assert commit_request.size < len(WEIGHTS)


def test_a_file_over_ten_megabytes_goes_to_lfs_whatever_its_name(hub: HubServer, api: HfApi) -> None:
    content = bytes(10 * 1024 * 1024 + 1)
    publish(api, {"tokenizer.json": content})
    assert list(hub.lfs) == [sha256(content)]


def test_deleting_a_folder_deletes_what_is_in_it_only(hub: HubServer, api: HfApi) -> None:
    publish(api, {"a/x": b"x", "a/b/y": b"y", "ab": b"z"})
    api.create_commit(REPO, operations=[CommitOperationDelete("a/")], commit_message="clear")
    assert set(hub.repo(REPO).files()) == {".gitattributes", "ab"}


def test_a_commit_with_one_bad_operation_leaves_nothing_behind(hub: HubServer, api: HfApi) -> None:
    before = head(api)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd("new.json", CONFIG),
        CommitOperationDelete("missing.json"),
    ]
    with pytest.raises(RemoteEntryNotFoundError):
        api.create_commit(REPO, operations=operations, commit_message="half")
    assert hub.repo(REPO).resolve().oid == before


def test_a_stale_parent_is_refused_with_412(hub: HubServer, api: HfApi) -> None:
    stale = head(api)
    current = publish(api, {"config.json": CONFIG})
    with pytest.raises(HfHubHTTPError) as refused:
        publish(api, {"config.json": b"other"}, parent=stale)
    assert refused.value.response.status_code == 412
    assert hub.repo(REPO).resolve().oid == current.oid


def test_a_commit_made_on_the_server_makes_the_clients_parent_stale(hub: HubServer, api: HfApi) -> None:
    parent = head(api)
    repo = hub.repo(REPO)
    repo.commit("another writer", repo.resolve().files)
    with pytest.raises(HfHubHTTPError, match="412"):
        publish(api, {"config.json": CONFIG}, parent=parent)


def test_sending_the_same_content_again_makes_no_new_commit(hub: HubServer, api: HfApi) -> None:
    files = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "empty.safetensors": b""}
    first = publish(api, files)
    hub.requests.clear()
    assert publish(api, files).oid == first.oid
    assert len(hub.repo(REPO).history()) == 2
    assert hub.changes == []


def test_a_lost_response_leaves_the_commit_applied_once(hub: HubServer, api: HfApi) -> None:
    hub.fail_next("POST", "/commit/", lost_response=True)
    with pytest.raises(httpx.RemoteProtocolError):
        publish(api, {"config.json": CONFIG})
    assert hub.repo(REPO).files()["config.json"] == CONFIG
    assert publish(api, {"config.json": CONFIG}).oid == hub.repo(REPO).resolve().oid
    assert len(hub.repo(REPO).history()) == 2


def test_a_tag_names_its_commit_and_is_not_moved_by_exist_ok(hub: HubServer, api: HfApi) -> None:
    first = publish(api, {"config.json": CONFIG})
    api.create_tag(REPO, tag="v1", revision=first.oid)
    second = publish(api, {"config.json": b"other"})
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(REPO, tag="v1", revision=second.oid)
    api.create_tag(REPO, tag="v1", revision=second.oid, exist_ok=True)

    refs = api.list_repo_refs(REPO)
    assert {tag.name: tag.target_commit for tag in refs.tags} == {"v1": first.oid}
    assert {branch.name: branch.target_commit for branch in refs.branches} == {"main": second.oid}
    assert api.model_info(REPO, revision="v1").sha == first.oid
    assert hub.repo(REPO).files("v1")["config.json"] == CONFIG

    api.delete_tag(REPO, tag="v1")
    assert api.list_repo_refs(REPO).tags == []


def test_model_info_gives_the_sha256_of_lfs_files_and_reads_the_card(api: HfApi) -> None:
    card = b"---\nlicense: mit\nlibrary_name: peft\ntags: [dpo]\n---\n# model\n"
    commit = publish(api, {"README.md": card, "model.safetensors": WEIGHTS})
    info = api.model_info(REPO, files_metadata=True)
    siblings = {file.rfilename: file for file in info.siblings or []}

    weights = siblings["model.safetensors"]
    assert weights.lfs is not None
    assert (weights.lfs.sha256, weights.lfs.size, weights.size) == (
        sha256(WEIGHTS),
        len(WEIGHTS),
        len(WEIGHTS),
    )
    assert (siblings["README.md"].lfs, siblings["README.md"].size) == (None, len(card))
    assert (info.sha, info.private, info.library_name, info.tags) == (commit.oid, True, "peft", ["dpo"])
    assert info.card_data is not None
    assert info.card_data.license == "mit"


def test_a_card_with_broken_metadata_is_refused_before_the_commit(hub: HubServer, api: HfApi) -> None:
    with pytest.raises(ValueError, match="Invalid metadata"):
        publish(api, {"README.md": b"---\ntags: [dpo\n---\n"})
    assert len(hub.repo(REPO).history()) == 1


def test_snapshot_download_is_byte_equal(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    files = {"README.md": b"# model\n", "adapter/config.json": CONFIG, "adapter/model.safetensors": WEIGHTS}
    commit = publish(api, files)
    publish(api, {"later.json": b"{}"})
    folder = Path(api.snapshot_download(REPO, revision=commit.oid, cache_dir=tmp_path))

    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == hub.repo(REPO).files(commit.oid)
    assert found.items() >= files.items()


def test_the_token_is_not_sent_to_the_storage_host(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    publish(api, {"model.safetensors": WEIGHTS})
    api.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)
    stored = [request for request in hub.requests if request.path.startswith("/lfs-storage/")]
    assert [request.method for request in stored] == ["PUT", "GET"]
    assert not any(request.token_sent for request in stored)


def test_a_flipped_byte_in_the_store_shows_as_another_sha256(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    publish(api, {"model.safetensors": WEIGHTS})
    hub.repo(REPO).flip_byte("model.safetensors", offset=100)

    downloaded = Path(api.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)).read_bytes()
    siblings = api.model_info(REPO, files_metadata=True).siblings or []
    announced = next(file.lfs for file in siblings if file.rfilename == "model.safetensors")
    assert announced is not None
    assert announced.sha256 == sha256(WEIGHTS)
    assert len(downloaded) == len(WEIGHTS)
    assert sha256(downloaded) != announced.sha256


def test_an_upload_with_another_sha256_than_announced_is_refused(hub: HubServer, api: HfApi) -> None:
    operation = CommitOperationAdd("model.safetensors", WEIGHTS)
    operation.upload_info.sha256 = hashlib.sha256(b"something else").digest()
    with pytest.raises(RuntimeError, match=r"model\.safetensors"):
        api.create_commit(REPO, operations=[operation], commit_message="corrupted on the way")
    assert hub.lfs == {}
    assert len(hub.repo(REPO).history()) == 1


BAD_TOKEN_CALLS: dict[str, Callable[[HfApi], object]] = {
    "whoami": lambda client: client.whoami(),
    "create_repo": lambda client: client.create_repo("org/other"),
    "model_info": lambda client: client.model_info(REPO),
    "create_commit": lambda client: publish(client, {"config.json": CONFIG}),
}


@pytest.mark.parametrize("call", BAD_TOKEN_CALLS.values(), ids=BAD_TOKEN_CALLS.keys())
def test_a_bad_token_is_refused_and_is_in_no_error_text(
    hub: HubServer, api: HfApi, call: Callable[[HfApi], object]
) -> None:
    bad = "hf_bad_token"
    with pytest.raises(HfHubHTTPError) as refused:
        call(HfApi(endpoint=hub.endpoint, token=bad))
    assert refused.value.response.status_code == 401
    error: BaseException | None = refused.value
    while error is not None:
        assert bad not in f"{error!s} {error!r}"
        error = error.__cause__ or error.__context__
    assert bad not in refused.value.response.text
    assert bad not in repr(hub.requests)
    assert len(hub.repo(REPO).history()) == 1


def test_a_stranger_may_read_public_repositories_only(hub: HubServer, api: HfApi) -> None:
    api.create_repo("org/public", private=False)
    stranger = HfApi(endpoint=hub.endpoint, token=False)
    assert stranger.model_info("org/public").private is False
    with pytest.raises(RepositoryNotFoundError):
        stranger.model_info(REPO)
    with pytest.raises(HfHubHTTPError, match="401"):
        stranger.create_tag("org/public", tag="v1")


def test_503_on_commit_surfaces_and_changes_nothing(hub: HubServer, api: HfApi) -> None:
    hub.fail_next("POST", "/commit/", status=503)
    before = head(api)
    with pytest.raises(HfHubHTTPError) as failed:
        publish(api, {"config.json": CONFIG})
    assert failed.value.response.status_code == 503
    assert hub.repo(REPO).resolve().oid == before
    assert hub.faults.pending == []
    assert publish(api, {"config.json": CONFIG}).oid == hub.repo(REPO).resolve().oid


def test_503_on_an_lfs_upload_is_retried_by_the_client(hub: HubServer, api: HfApi) -> None:
    hub.fail_next("PUT", "/lfs-storage/", status=503)
    publish(api, {"model.safetensors": WEIGHTS})
    assert [r.size for r in hub.requests if r.method == "PUT"] == [len(WEIGHTS)] * 2
    assert hub.repo(REPO).files()["model.safetensors"] == WEIGHTS


def test_a_fault_hits_as_often_as_planned_and_nothing_else(hub: HubServer, api: HfApi) -> None:
    hub.fail_next("GET", r"/refs$", status=418, times=2)
    head(api)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="418"):
            api.list_repo_refs(REPO)
    assert api.list_repo_refs(REPO).tags == []


def test_a_read_only_token_reads_and_changes_nothing(hub: HubServer, api: HfApi) -> None:
    api.auth_check(REPO, write=True)
    hub.role = "read"
    before = head(api)
    api.auth_check(REPO)
    calls: list[Callable[[], object]] = [
        lambda: api.auth_check(REPO, write=True),
        lambda: publish(api, {"config.json": CONFIG}),
        lambda: api.create_tag(REPO, tag="v1"),
        lambda: api.create_repo("org/other"),
    ]
    for call in calls:
        with pytest.raises(HfHubHTTPError, match="403"):
            call()
    assert (head(api), hub.repo(REPO).tags, len(hub.repos)) == (before, {}, 1)
    assert api.whoami()["auth"]["accessToken"]["role"] == "read"


def test_a_silent_hub_applies_nothing_and_ends_with_the_server(hub: HubServer, api: HfApi) -> None:
    hub.fail_next("GET", "/api/models/org/model$", silent=True)
    with pytest.raises(httpx.ReadTimeout):
        api.model_info(REPO, timeout=0.05)
    assert head(api)
    assert hub.faults.pending == []


def test_something_happens_as_a_request_arrives_which_is_then_answered(hub: HubServer, api: HfApi) -> None:
    repo = hub.repo(REPO)
    hub.meanwhile("GET", r"/refs$", lambda: repo.tags.update(v1=repo.resolve().oid))
    assert [tag.name for tag in api.list_repo_refs(REPO).tags] == ["v1"]
    hub.fail_next("GET", r"/refs$", status=429, headers={"Retry-After": "7"})
    with pytest.raises(HfHubHTTPError) as refused:
        api.list_repo_refs(REPO)
    assert refused.value.response.headers["Retry-After"] == "7"


def test_what_is_unknown_has_its_own_error(api: HfApi, tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/nobody")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="v9")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(REPO, "missing.json", cache_dir=tmp_path)
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(REPO, "missing"))


def test_creating_a_repository_again_needs_exist_ok(hub: HubServer, api: HfApi) -> None:
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    assert api.create_repo("mine").repo_id == f"{hub.user}/mine"
    assert api.whoami()["name"] == hub.user


def test_a_dataset_and_a_model_of_one_name_are_two_repositories(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    api.create_repo(REPO, repo_type="dataset")
    content = {"train.parquet": b"rows", "README.md": b"# data\n"}
    operations = [CommitOperationAdd(path, data) for path, data in content.items()]
    api.create_commit(REPO, operations=operations, commit_message="data", repo_type="dataset")
    assert hub.repo(REPO, "dataset").files().items() >= content.items()
    assert "train.parquet" not in hub.repo(REPO).files()
    path = api.hf_hub_download(REPO, "train.parquet", repo_type="dataset", cache_dir=tmp_path)
    assert Path(path).read_bytes() == b"rows"


def test_tree_and_paths_list_files_and_folders(api: HfApi) -> None:
    publish(api, {"a/b/model.safetensors": WEIGHTS, "a/config.json": CONFIG, "ä b.txt": b"x"})
    top = {entry.path for entry in api.list_repo_tree(REPO)}
    assert top == {".gitattributes", "a", "ä b.txt"}
    assert {entry.path for entry in api.list_repo_tree(REPO, "a")} == {"a/b", "a/config.json"}
    everything = {entry.path for entry in api.list_repo_tree(REPO, recursive=True)}
    assert everything == top | {"a/b", "a/config.json", "a/b/model.safetensors"}
    found = {entry.path for entry in api.get_paths_info(REPO, ["a", "a/config.json", "missing"])}
    assert found == {"a", "a/config.json"}
    assert api.file_exists(REPO, "ä b.txt")
    assert not api.file_exists(REPO, "missing")


def test_reading_is_recorded_and_makes_no_changes(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    publish(api, {"model.safetensors": WEIGHTS})
    assert [(r.method, r.path.split("/")[1]) for r in hub.changes] == [
        ("POST", "api"),
        ("PUT", "lfs-storage"),
        ("POST", "api"),
    ]
    hub.requests.clear()
    api.snapshot_download(REPO, cache_dir=tmp_path)
    api.get_paths_info(REPO, ["model.safetensors"])
    assert {request.method for request in hub.requests} == {"GET", "HEAD", "POST"}
    assert hub.changes == []


def test_a_route_that_is_not_served_is_named_in_the_error(api: HfApi) -> None:
    with pytest.raises(HfHubHTTPError, match="no route for POST /api/models/org/model/branch/dev"):
        api.create_branch(REPO, branch="dev")


def test_after_the_with_block_nobody_answers() -> None:
    with HubServer() as hub:
        client = HfApi(endpoint=hub.endpoint, token=hub.token)
        client.whoami()
    with pytest.raises(httpx.TransportError):
        client.whoami()
