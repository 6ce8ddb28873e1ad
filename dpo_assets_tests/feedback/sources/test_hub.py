"""Datasets of the Hub at a pinned revision, from a real client against the in-test Hub."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi

from dpo_assets.errors import ConfigError, FeedbackError, InfrastructureError
from dpo_assets.feedback.sources import FeedbackFile, files_of
from dpo_assets.feedback.sources.hub import choose
from dpo_assets.recipe import FeedbackSource
from dpo_assets_tests.feedback.sources.reading import ROWS, jsonl, outcome
from dpo_assets_tests.hub_server import HubServer

REPO = "org/preferences"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(token="hf_test") as server:
        yield server


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo(REPO, repo_type="dataset")
    return api


def commit(api: HfApi, files: dict[str, bytes]) -> str:
    from huggingface_hub import CommitOperationAdd

    adds = [CommitOperationAdd(path, content) for path, content in files.items()]
    return str(api.create_commit(REPO, adds, commit_message="data", repo_type="dataset").oid)


def parquet(rows: list[dict[str, Any]] = ROWS) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def read(api: HfApi, landing: Path, revision: str, *files: str, repo: str = REPO) -> list[FeedbackFile]:
    return files_of([FeedbackSource(hub=repo, revision=revision, files=list(files))], landing, hub=lambda: api)


def test_parquet_and_jsonl_of_a_revision_are_read_by_pattern(tmp_path: Path, hub: HubServer, api: HfApi) -> None:
    revision = commit(
        api,
        {
            "data/train-00000-of-00002.parquet": parquet(),
            "data/train-00001-of-00002.parquet": parquet(ROWS[:1]),
            "data/test-00000-of-00001.parquet": parquet(ROWS[:2]),
            "raw/train.jsonl": jsonl(),
            "README.md": b"---\nlicense: mit\n---\n",
        },
    )
    commit(api, {"data/train-00000-of-00002.parquet": parquet(ROWS[:2])})  # The branch moves on.
    files = read(api, tmp_path, revision, "data/train-*.parquet", "raw/*.jsonl")
    assert [file.name for file in files] == [
        f"{REPO}/data/train-00000-of-00002.parquet",
        f"{REPO}/data/train-00001-of-00002.parquet",
        f"{REPO}/raw/train.jsonl",
    ]
    assert [outcome(file).values for file in files] == [ROWS, ROWS[:1], ROWS]
    assert files[0].facts == {"revision": revision}
    assert not (
        tmp_path / "hub" / "org--preferences" / revision / "files" / "data" / "test-00000-of-00001.parquet"
    ).exists()


def test_what_was_fetched_once_is_not_asked_for_again(tmp_path: Path, hub: HubServer, api: HfApi) -> None:
    revision = commit(api, {"train.jsonl": jsonl()})
    first = read(api, tmp_path, revision)
    asked = len(hub.requests)
    assert read(api, tmp_path, revision) == first
    assert len(hub.requests) == asked
    first[0].path.unlink()
    assert read(api, tmp_path, revision) == first
    assert len(hub.requests) > asked


def test_several_splits_are_refused_with_what_there_is(tmp_path: Path, api: HfApi) -> None:
    revision = commit(api, {"train.jsonl": jsonl(), "test.jsonl": jsonl()})
    with pytest.raises(FeedbackError, match=r"choose with `files`.* It has: test.jsonl, train.jsonl"):
        read(api, tmp_path, revision)
    with pytest.raises(FeedbackError, match=r"has no data file `dev\*`; it has: test.jsonl, train.jsonl"):
        read(api, tmp_path, revision, "train.jsonl", "dev*")


def test_a_repository_or_revision_that_is_not_there_is_told_apart_from_a_hub_that_fails(
    tmp_path: Path, hub: HubServer, api: HfApi
) -> None:
    revision = commit(api, {"train.jsonl": jsonl()})
    with pytest.raises(ConfigError, match="has no revision 0000"):
        read(api, tmp_path, "0" * 40)
    with pytest.raises(ConfigError, match="the Hub has no dataset org/other"):
        read(api, tmp_path, revision, repo="org/other")
    hub.fail_next("GET", "/resolve/", status=403, times=50)
    with pytest.raises((InfrastructureError, ConfigError)):
        read(api, tmp_path, revision)


@pytest.mark.parametrize(
    ("listed", "chosen"),
    [
        (
            ["data/train-00000-of-00001.parquet", "README.md", "dataset_infos.json"],
            ["data/train-00000-of-00001.parquet"],
        ),
        (["a.jsonl", "b.jsonl", "code.py"], ["a.jsonl", "b.jsonl"]),
        (["x.csv.gz"], ["x.csv.gz"]),
        (["contest.jsonl", "latest.jsonl"], ["contest.jsonl", "latest.jsonl"]),
    ],
)
def test_without_patterns_all_data_files_of_one_split_are_taken(listed: list[str], chosen: list[str]) -> None:
    assert choose(REPO, listed, []) == chosen


@pytest.mark.parametrize(
    "listed",
    [
        ["train.jsonl", "test.jsonl"],
        ["data/train-0.parquet", "data/validation-0.parquet"],
        ["en/train.jsonl", "de/train.jsonl"],
        ["all.jsonl", "all.parquet"],
        ["all.jsonl", "all_test.jsonl"],
    ],
)
def test_without_patterns_several_splits_configs_or_kinds_are_refused(listed: list[str]) -> None:
    with pytest.raises(FeedbackError, match="choose with `files`"):
        choose(REPO, listed, [])


def test_a_dataset_without_data_files_is_refused_with_the_kinds_it_has() -> None:
    with pytest.raises(FeedbackError, match=r"no JSON, CSV or Parquet file \(its files end in: \.json, \.md, \.tar\)"):
        choose(REPO, ["README.md", "data.tar", "state.json"], [])


def test_a_note_of_which_half_was_written_costs_a_look_and_two_runs_wait_for_each_other(
    tmp_path: Path, hub: HubServer, api: HfApi
) -> None:
    from concurrent.futures import ThreadPoolExecutor
    from concurrent.futures import TimeoutError as StillWaiting

    from filelock import FileLock

    revision = commit(api, {"a.jsonl": jsonl()})
    [first] = read(api, tmp_path, revision)
    folder = first.path.parent.parent
    (folder / "files.json").write_text('{"[]": {"a.js')
    assert read(api, tmp_path, revision) == [first]
    with ThreadPoolExecutor(1) as other:
        with FileLock(folder / "lock"):
            waiting = other.submit(read, api, tmp_path, revision)
            with pytest.raises(StillWaiting):
                waiting.result(timeout=0.2)
        assert waiting.result(timeout=10) == [first]
