"""Which files sources name, and what they are called; URLs through fsspec."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest

from dpo_assets.errors import ConfigError, FeedbackError, InfrastructureError
from dpo_assets.feedback.sources import DEFAULT_LIMITS, FeedbackFile, Limits, files_of
from dpo_assets.feedback.sources.finding import glance, local_files
from dpo_assets.recipe import FeedbackSource
from dpo_assets_tests.feedback.sources.reading import ROWS, found, jsonl, outcome, row


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b.jsonl", "a.jsonl", "deep/er/c.jsonl", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jsonl())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*patterns: str) -> list[str]:
    return [file.name for file in files_of([FeedbackSource(path=pattern) for pattern in patterns])]


def test_a_pattern_finds_files_in_order_of_their_names_and_no_folders(folder: Path) -> None:
    assert names("*") == ["a.jsonl", "b.jsonl", "notes.txt"]
    assert names("*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names("**/*.jsonl") == ["a.jsonl", "b.jsonl", "c.jsonl"]


@pytest.mark.parametrize("linked", [False, True], ids=["a folder", "a link to one"])
def test_a_folder_that_is_called_like_a_file_is_refused_unless_its_files_are_found(folder: Path, linked: bool) -> None:
    (folder / "elsewhere").mkdir()
    if linked:
        (folder / "d.jsonl").symlink_to("elsewhere")
    else:
        (folder / "elsewhere").rename(folder / "d.jsonl")
    (folder / "d.jsonl" / "part-0.jsonl").write_bytes(jsonl())
    assert names("*.jsonl") == ["a.jsonl", "b.jsonl", "d.jsonl"]
    refused = files_of([FeedbackSource(path="*.jsonl")])[-1]
    assert outcome(refused).reason == "not_a_regular_file"
    assert "it is a folder, not a file; name the files in it" in str(outcome(refused).refused)
    assert names("*.jsonl/*") == ["part-0.jsonl"]
    if not linked:
        assert names("**/*.jsonl") == ["a.jsonl", "b.jsonl", "part-0.jsonl", "c.jsonl"]


def test_a_folder_on_the_way_that_may_not_be_listed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may list everything, so the answer of the system is put in.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "er")
    for pattern in ("**/*.jsonl", "deep/*/c.jsonl"):
        with pytest.raises(FeedbackError, match=r"leads through folders that may not be listed: .*er$"):
            names(pattern)
    assert names("*.jsonl") == ["a.jsonl", "b.jsonl"]


def test_files_come_in_the_order_of_the_sources_each_once(folder: Path) -> None:
    assert names("b.jsonl", "*.jsonl", "./a.jsonl") == ["b.jsonl", "a.jsonl"]
    two = [FeedbackSource(path="a.jsonl", format="hh_rlhf"), FeedbackSource(path="*.jsonl")]
    assert [file.format for file in files_of(two)] == ["hh_rlhf", "trl"]


@pytest.mark.parametrize("pattern", ["missing.jsonl", "*.csv", "d.jsonl", "deep"])
def test_a_source_that_matches_no_file_is_named(folder: Path, pattern: str) -> None:
    (folder / "d.jsonl").mkdir()
    with pytest.raises(FeedbackError, match="matches no file") as refused:
        names("a.jsonl", pattern)
    assert f"`{pattern}`" in str(refused.value)
    assert ("it is a folder" in str(refused.value)) == (pattern in ("d.jsonl", "deep"))


def test_an_unknown_builtin_or_format_is_told_those_that_exist() -> None:
    with pytest.raises(FeedbackError, match="there is no `builtin:oast`; built in are: oasst"):
        names("builtin:oast")
    with pytest.raises(ConfigError, match=r"there is no feedback format `csv`; there are: .*trl"):
        files_of([FeedbackSource(path="builtin:oasst", format="csv")])


def test_the_builtin_sample_is_read_wherever_the_package_lies() -> None:
    result = outcome(found("builtin:oasst", format="oasst_tree"))
    assert len(result.values) == 100
    assert result.file.root is None


@pytest.mark.parametrize("name", ["run[1]/a.jsonl", "feedback [final].jsonl", "*.jsonl"])
def test_a_file_whose_path_holds_wildcards_is_found(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(jsonl())
    assert found(path).path == path


def test_files_of_one_name_are_named_apart_and_free_of_where_the_project_lies(tmp_path: Path) -> None:
    seen = []
    for project in ("here", "there"):
        for part in ("monday", "tuesday"):
            (tmp_path / project / part).mkdir(parents=True)
            (tmp_path / project / part / "export.jsonl").write_bytes(jsonl())
        seen.append(names(str(tmp_path / project / "*" / "export.jsonl")))
    assert seen[0] == seen[1] == ["monday/export.jsonl", "tuesday/export.jsonl"]


def test_a_file_says_where_it_is_from_and_what_it_weighs(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    (tmp_path / "runs.jsonl").write_bytes(b"{}")
    source: dict[str, Any] = {"columns": {"prompt": "question"}, "fields": {"winner": "best"}, "json_columns": ["x"]}
    file = found(tmp_path / "a.jsonl", companion=str(tmp_path / "runs.jsonl"), **source)
    assert (file.size, len(file.sha256), file.root) == (len(jsonl()), 64, tmp_path)
    assert (dict(file.columns), dict(file.fields), file.json_columns) == (source["columns"], source["fields"], ("x",))
    assert file.companion == tmp_path / "runs.jsonl"
    assert len(file.companion_sha256) == 64
    assert file.origin == str(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="there is no companion file"):
        found(tmp_path / "a.jsonl", companion=str(tmp_path / "missing.jsonl"))


def test_a_link_to_nowhere_is_among_the_files_of_a_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    (tmp_path / "b.jsonl").symlink_to("nowhere")
    assert [path.name for path, _ in local_files(str(tmp_path / "*.jsonl"))] == ["a.jsonl", "b.jsonl"]
    assert [root for _, root in local_files("builtin:oasst")] == [None]


# URLs


@pytest.fixture
def bucket() -> Iterator[Any]:
    """A file system that fsspec has in memory, as a bucket is one far away."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    yield memory
    memory.store.clear()


def fetched(landing: Path, url: str, limits: Limits = DEFAULT_LIMITS, **source: Any) -> list[FeedbackFile]:
    return files_of([FeedbackSource(path=url, **source)], landing, limits=limits)


def test_a_pattern_of_a_url_is_copied_and_read_like_local_files(tmp_path: Path, bucket: Any) -> None:
    bucket.pipe("/exports/a.jsonl", jsonl())
    bucket.pipe("/exports/b.jsonl.gz", gzip.compress(jsonl(), mtime=0))
    bucket.pipe("/exports/readme.md", b"hello")
    files = fetched(tmp_path, "memory://exports/*.jsonl*")
    assert [file.name for file in files] == ["a.jsonl", "b.jsonl.gz"]
    assert [outcome(file).values for file in files] == [ROWS, ROWS]
    assert all(file.path.is_relative_to(tmp_path) for file in files)
    assert files[0].facts == {"url": "/exports/a.jsonl"}


def test_a_file_of_a_url_is_copied_again_only_when_it_changed(
    tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.pipe("/a.jsonl", jsonl())
    opened = []
    real = type(bucket).open
    monkeypatch.setattr(
        type(bucket), "open", lambda self, path, *a, **k: opened.append(path) or real(self, path, *a, **k)
    )
    first, again = fetched(tmp_path, "memory://a.jsonl"), fetched(tmp_path, "memory://a.jsonl")
    assert first == again
    assert len(opened) == 1
    bucket.pipe("/a.jsonl", row(7))
    [changed] = fetched(tmp_path, "memory://a.jsonl")
    assert changed.sha256 != first[0].sha256
    assert outcome(changed).values[0]["prompt"] == "q7"


def test_what_a_url_cannot_give_is_told_apart(tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FeedbackError, match=r"`memory://none/\*.jsonl` matches no file"):
        fetched(tmp_path, "memory://none/*.jsonl")
    with pytest.raises(ConfigError, match="gs:// needs a package: pip install gcsfs"):
        fetched(tmp_path, "gs://bucket/a.jsonl")
    with pytest.raises(ConfigError, match="nosuch"):
        fetched(tmp_path, "nosuch://bucket/a.jsonl")
    with pytest.raises(ConfigError, match="needs a folder"):
        files_of([FeedbackSource(path="memory://a.jsonl")])
    bucket.pipe("/a.jsonl", jsonl())

    def fail(*_: Any, **__: Any) -> None:
        raise TimeoutError("the other side is silent")

    monkeypatch.setattr(type(bucket), "open", fail)
    with pytest.raises(InfrastructureError, match="TimeoutError: the other side is silent"):
        fetched(tmp_path, "memory://a.jsonl")


def test_a_file_of_a_url_that_is_too_large_or_changes_is_refused_and_the_others_go_on(
    tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.pipe("/a.jsonl", b"x" * 1_000)
    bucket.pipe("/b.jsonl", jsonl())
    large, small = fetched(tmp_path, "memory://*.jsonl", Limits(file_bytes=500))
    assert (outcome(large).reason, outcome(small).values) == ("file_too_large", ROWS)
    states = iter(range(100))
    real = type(bucket).info
    monkeypatch.setattr(type(bucket), "info", lambda self, path, **k: {**real(self, path, **k), "ETag": next(states)})
    assert {outcome(file).reason for file in fetched(tmp_path / "other", "memory://*.jsonl")} == {"changed_while_read"}


def test_a_glance_at_a_url_sees_changes(tmp_path: Path, bucket: Any) -> None:
    bucket.pipe("/a.jsonl", jsonl())
    source = FeedbackSource(path="memory://*.jsonl")
    before = glance(source)
    assert before == glance(source)
    bucket.pipe("/a.jsonl", jsonl() + b"\n")
    assert glance(source) != before


@pytest.fixture
def website(tmp_path: Path) -> Iterator[str]:
    """The address of a real server of the folder `www`, which refuses `/busy/...` as one that is overloaded."""
    import threading
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    pytest.importorskip("aiohttp")

    class Site(SimpleHTTPRequestHandler):
        def send_head(self) -> Any:
            return self.send_error(503) if self.path.startswith("/busy/") else super().send_head()

        def log_message(self, format: str, *args: Any) -> None:
            """Stay silent."""

    (tmp_path / "www").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Site, directory=str(tmp_path / "www"))) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_real_http_server_is_read(tmp_path: Path, website: str) -> None:
    (tmp_path / "www" / "a.json").write_text(json.dumps(ROWS))
    [file] = fetched(tmp_path / "landing", f"{website}/a.json")
    assert outcome(file).values == ROWS


def test_of_a_presigned_url_only_the_path_is_told(tmp_path: Path, website: str) -> None:
    (tmp_path / "www" / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(), mtime=0))
    signed = f"{website}/a.jsonl.gz?X-Amz-Date=20261127T000000Z&X-Amz-Signature=hunter2.x"
    [file] = fetched(tmp_path / "landing", signed)
    assert outcome(file).values == ROWS
    assert (file.name, file.origin) == ("a.jsonl.gz", f"{website}/a.jsonl.gz?[secret]")
    assert "hunter2" not in repr(file)
    assert "hunter2" not in repr(glance(FeedbackSource(path=signed)))
    assert not [path for path in (tmp_path / "landing").rglob("*") if "hunter2" in path.name]
    assert not [path for path in (tmp_path / "landing").rglob("*.json") if "hunter2" in path.read_text()]


def test_a_url_that_fails_is_told_without_its_signature_and_a_busy_server_is_tried_again(
    tmp_path: Path, website: str
) -> None:
    with pytest.raises(FeedbackError, match=r"/gone\.jsonl\?\[secret\]` matches no file") as gone:
        fetched(tmp_path, f"{website}/gone.jsonl?sig=hunter2")
    with pytest.raises(InfrastructureError, match=r"/busy/a\.jsonl\?\[secret\]` cannot be read.*503") as busy:
        fetched(tmp_path, f"{website}/busy/a.jsonl?sig=hunter2")
    assert "hunter2" not in f"{gone.value} {busy.value}"


def test_a_path_that_was_to_be_a_url_is_told_without_its_password(tmp_path: Path) -> None:
    from dpo_assets.feedback.sources.files import matches

    with pytest.raises(FeedbackError, match="matches no file") as refused:
        matches(f"{tmp_path}/https:/me:hunter2@host/a.jsonl")
    assert "hunter2" not in str(refused.value)


# Copies


def test_two_runs_that_fetch_one_url_at_once_leave_a_whole_copy(
    tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one starts, and dies, while the first has written half of the file."""
    import threading

    bucket.pipe("/a.jsonl", jsonl())
    monkeypatch.setattr("dpo_assets.feedback.sources.remote._BLOCK", 20)
    real, second = type(bucket).open, threading.Event()

    class Half(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                other.start()
                second.wait(0.3)
                monkeypatch.setattr(Half, "read", io.BytesIO.read)
            return super().read(size)

    class Dead(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            second.set()
            raise OSError("the line is dead")

    def die() -> None:
        with suppress(InfrastructureError):
            fetched(tmp_path, "memory://a.jsonl")

    other = threading.Thread(target=die)
    openers: Iterator[Any] = iter([Half, Dead])

    def opened(self: Any, path: str, *a: Any, **k: Any) -> Any:
        kind = next(openers, None)
        content = real(self, path, *a, **k)
        return kind(content.read()) if kind else content

    monkeypatch.setattr(type(bucket), "open", opened)
    [file] = fetched(tmp_path, "memory://a.jsonl")
    other.join()
    [again] = fetched(tmp_path, "memory://a.jsonl")
    assert file.sha256 == again.sha256 == hashlib.sha256(jsonl()).hexdigest()


@pytest.mark.parametrize("damage", ["the copy", "its note", "the last writer died"])
def test_a_copy_that_is_not_what_came_over_the_line_is_fetched_again(tmp_path: Path, bucket: Any, damage: str) -> None:
    bucket.pipe("/a.jsonl", jsonl())
    [first] = fetched(tmp_path, "memory://a.jsonl")
    if damage == "the copy":
        first.path.write_bytes(b"\0" * first.size)
    elif damage == "its note":
        (first.path.parent / "source.json").write_text('{"stamp')
    else:
        first.path.rename(first.path.with_name("content.jsonl.00.part"))
    [again] = fetched(tmp_path, "memory://a.jsonl")
    assert again == first
    assert not list(first.path.parent.glob("*.part"))


def test_a_file_of_a_pattern_that_does_not_answer_is_no_missing_file(
    tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.pipe("/a.jsonl", jsonl())
    bucket.pipe("/b.jsonl", jsonl())
    real = type(bucket).info

    def info(self: Any, path: str, **k: Any) -> Any:
        if path.endswith("b.jsonl"):
            raise TimeoutError("the other side is silent")
        return real(self, path, **k)

    monkeypatch.setattr(type(bucket), "info", info)
    with pytest.raises(InfrastructureError, match="TimeoutError"):
        fetched(tmp_path, "memory://*.jsonl")


def test_two_patterns_that_read_one_file_in_two_ways_are_refused_and_in_one_way_read_it_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    one, other = (FeedbackSource(path=str(tmp_path / name), format="trl") for name in ("a*.jsonl", "*.jsonl"))
    assert len(files_of([one, other])) == 1
    for change in ({"format": "openai"}, {"columns": {"prompt": "question"}}):
        with pytest.raises(ConfigError, match=r"both name a\.jsonl and read it in two ways"):
            files_of([one, other.model_copy(update=change)])
