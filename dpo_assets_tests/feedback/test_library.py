"""Batches in a store: what was read before is found, a file that grew costs its end, processes change nothing."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dpo_assets.artifact import ArtifactTree
from dpo_assets.errors import InfrastructureError
from dpo_assets.feedback import batches as batches_module
from dpo_assets.feedback import library, reading
from dpo_assets.feedback.accounting import Held, held, held_paired
from dpo_assets.feedback.batches import COUNTS, PAIRS, QUARANTINE
from dpo_assets.feedback.ingest import BatchSize, read_batches
from dpo_assets.feedback.library import FileBatches, pair_into, read_into
from dpo_assets.feedback.pair import JudgedAnswer
from dpo_assets.feedback.readers import READERS, Format, Place, ReadOptions, Row, RowFault
from dpo_assets.feedback.sniff import looked_at_again
from dpo_assets.feedback.sources import FeedbackFile, FileRefused, Span, files_of
from dpo_assets.recipe import FeedbackSource
from dpo_assets_tests.feedback.exported import COMPANIONS, EXPORTS
from dpo_assets_tests.samples import assistant, user


def line(number: int) -> bytes:
    return json.dumps({"prompt": f"question {number}?", "chosen": "yes " * 20, "rejected": f"no {number}"}).encode()


def write(path: Path, numbers: range) -> Path:
    path.write_bytes(b"".join(line(n) + b"\n" for n in numbers))
    return path


@pytest.fixture
def small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_assets.feedback.library.cut", lambda file: reading.cut(file, BatchSize(2**15, 2_000)))


@pytest.fixture
def tree(tmp_path: Path) -> ArtifactTree:
    return ArtifactTree(tmp_path / "store")


def found(path: Path, format: str = "trl") -> FeedbackFile:
    [file] = files_of([FeedbackSource(path=str(path), format=format)])
    return file


def ingest(tree: ArtifactTree, path: Path) -> FileBatches:
    return read_into(tree, found(path), ReadOptions())


def lines(read: FileBatches) -> list[int]:
    return sorted(n for batch in read.batches for n in pl.read_parquet(batch.path / PAIRS)["line"])


def test_the_same_file_is_read_once(tree: ArtifactTree, tmp_path: Path, small_spans: None) -> None:
    path = write(tmp_path / "a.jsonl", range(100))
    first, second = ingest(tree, path), ingest(tree, path)
    assert len(first.batches) > 3
    assert (first.new, second.new) == (len(first.batches), 0)
    assert [b.digest for b in second.batches] == [b.digest for b in first.batches]
    assert lines(first) == list(range(1, 101))


def test_of_a_file_that_grew_only_the_end_is_read(tree: ArtifactTree, tmp_path: Path, small_spans: None) -> None:
    path = write(tmp_path / "a.jsonl", range(100))
    first = ingest(tree, path)
    with path.open("ab") as handle:
        handle.write(line(100) + b"\n")
    second = ingest(tree, path)
    assert second.new == 1
    assert [b.digest for b in second.batches[:-1]] == [b.digest for b in first.batches[:-1]]
    assert lines(second) == list(range(1, 102))


def test_of_a_file_whose_row_was_given_again_since_only_the_part_that_holds_it_is_read(
    tree: ArtifactTree, tmp_path: Path, small_spans: None
) -> None:
    path = write(tmp_path / "a.jsonl", range(100))
    first = ingest(tree, path)
    for number in (1, 50, 100):
        now = read_into(tree, replace(found(path), superseded=(number,)), ReadOptions())
        assert now.new == 1
        assert lines(now) == sorted({*range(1, 101)} - {number})
        assert now.row()["rejected"] == 1
    assert len(first.batches) > 3


def test_a_file_that_is_cut_or_not_holds_the_same_pairs(
    tree: ArtifactTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", range(60))
    whole = ingest(tree, path)
    monkeypatch.setattr("dpo_assets.feedback.library.cut", lambda file: reading.cut(file, BatchSize(2**15, 2_000)))
    parts = ingest(ArtifactTree(tmp_path / "other"), path)
    tables = [
        pl.concat([pl.read_parquet(b.path / PAIRS) for b in read.batches]).sort("pair_id") for read in (whole, parts)
    ]
    assert len(parts.batches) > len(whole.batches) == 1
    assert tables[0].equals(tables[1])


def packed(folder: Path, kind: str, rows: Sequence[bytes]) -> Path:
    """A file that cannot be cut, of these rows."""
    path = folder / f"a.{kind}"
    if kind == "parquet":
        pl.DataFrame([json.loads(row) for row in rows]).write_parquet(path)
    elif kind == "csv":
        pl.DataFrame([json.loads(row) for row in rows]).write_csv(path)
    elif kind == "json":
        path.write_bytes(b"[" + b", ".join(rows) + b"]")
    else:
        path.write_bytes(gzip.compress(b"\n".join(rows), mtime=0))
    return path


@pytest.mark.parametrize("kind", ["jsonl.gz", "json", "csv", "parquet"])
def test_a_file_that_cannot_be_cut_is_read_in_one_pass_as_batches_of_bounded_size(
    tree: ArtifactTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = packed(tmp_path, kind, [line(n) for n in range(100)])
    whole = ingest(ArtifactTree(tmp_path / "other"), path)
    for most, count in ((BatchSize(30, 10**9), 4), (BatchSize(10**9, 5_000), 2 if kind == "csv" else 3)):
        monkeypatch.setattr(reading, "read_batches", partial(read_batches, most=most))
        tree = ArtifactTree(tmp_path / f"store {count}")
        parts = ingest(tree, path)
        assert (len(parts.batches), len(whole.batches)) == (count, 1)
        assert parts.row()["pairs"] == parts.row()["rows"] == 100
        tables = [
            pl.concat([pl.read_parquet(b.path / PAIRS) for b in read.batches]).sort("pair_id")
            for read in (whole, parts)
        ]
        assert tables[0].equals(tables[1])
        again = ingest(tree, path)
        assert (again.new, [b.digest for b in again.batches]) == (0, [b.digest for b in parts.batches])


def test_a_file_that_is_refused_behind_its_first_batch_leaves_none(
    tree: ArtifactTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "read_batches", partial(read_batches, most=BatchSize(30, 10**9)))
    path = packed(tmp_path, "jsonl.gz", [line(n) for n in range(100)])
    path.write_bytes(path.read_bytes()[:-6])  # Its checksum is at its end.
    [batch] = ingest(tree, path).batches
    assert pl.read_parquet(batch.path / QUARANTINE)["reason"].to_list() == ["truncated_file"]
    assert len(list((tree.root / "raw_batches").glob("*/"))) == 1
    assert not [one for one in (tree.root / "_reading").iterdir() if one.is_dir()]


def test_a_file_that_grows_row_by_row_is_read_a_few_times_over_and_not_once_for_each_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_assets.feedback.sources.rows.FINEST", 200)  # Spans of 12,800, 1,600 and 200 bytes.
    path, most = write(tmp_path / "a.jsonl", range(200)), BatchSize(2**15, 12_800)
    known: set[Span] = set()
    read = 0
    for rows in range(201, 401):
        with path.open("ab") as handle:
            handle.write(line(rows) + b"\n")
        spans = reading.cut(found(path), most) or []
        read += sum(span.stop - span.start for span in spans if span not in known) if known else 0
        known.update(spans)
        assert (spans[0].start, spans[-1].stop) == (0, path.stat().st_size)
        assert all(a.stop == b.start and a.end == b.line for a, b in pairwise(spans))
        assert len(spans) <= path.stat().st_size // 12_800 + 16
    # Each byte once for each size, and the rows of the tail.
    assert read < 6 * path.stat().st_size / 2


def test_a_span_holds_no_more_rows_than_a_batch_may(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" * 100 + line(0) * 3 + b"\n" + b"{}\n" * 5)
    spans = reading.cut(found(path), BatchSize(40, 300))
    assert spans is not None
    assert [span.end - span.line for span in spans[:-1]] == [40, 40, 21]
    assert [span.stop for span in spans[:-1]] == [span.start for span in spans[1:]]


def test_two_processes_read_what_one_reads(
    tree: ArtifactTree, tmp_path: Path, small_spans: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", range(100))
    alone = ingest(tree, path)
    monkeypatch.setattr(reading, "WORTH_A_PROCESS", 0)
    started = []
    start = reading._Process.__enter__
    monkeypatch.setattr(reading._Process, "__enter__", lambda self: (started.append(1), start(self))[1])
    both = ingest(ArtifactTree(tmp_path / "other"), path)
    assert len(started) == 2
    assert [b.digest for b in both.batches] == [b.digest for b in alone.batches]


def test_a_process_that_dies_is_named_and_worth_another_try(
    tree: ArtifactTree, tmp_path: Path, small_spans: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "WORTH_A_PROCESS", 0)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(InfrastructureError, match=r"the process that read a\.jsonl died"):
        ingest(tree, write(tmp_path / "a.jsonl", range(100)))
    assert not [path for path in (tree.root / "_reading").iterdir() if path.is_dir()]


def test_what_a_worker_prints_does_not_disturb_its_outcomes() -> None:
    jobs, outcomes = io.BytesIO(), io.BytesIO()
    file = FeedbackFile(Path("a.jsonl"), "a.jsonl", "trl")
    for name in ("one", "two"):
        pickle.dump(reading.Job(file, None, ReadOptions(), Path(name)), jobs)
    jobs.seek(0)

    def do(job: reading.Job) -> dict[str, str]:
        if job.folder.name == "two":
            raise ZeroDivisionError("a bug")
        return {"job": job.folder.name}

    reading.serve(jobs, outcomes, do)
    outcomes.seek(0)
    assert pickle.load(outcomes) == {"job": "one"}
    assert isinstance(pickle.load(outcomes), ZeroDivisionError)


def test_a_file_that_changes_while_it_is_read_is_worth_another_try_and_nothing_of_it_is_kept(
    tree: ArtifactTree, tmp_path: Path, small_spans: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", range(100))
    file = found(path)
    run = reading.run_job

    def touched(job: reading.Job) -> reading.Outcome:
        path.write_bytes(path.read_bytes().replace(b"question 3?", b"question 4?"))
        return run(job)

    monkeypatch.setattr(reading, "run_job", touched)
    with pytest.raises(InfrastructureError, match=r"feedback file a\.jsonl: it changed while it was read"):
        read_into(tree, file, ReadOptions())
    assert not (tree.root / "raw_batches").exists()


def test_a_companion_that_changes_while_its_file_is_read_is_worth_another_try(
    tree: ArtifactTree, tmp_path: Path
) -> None:
    write(tmp_path / "a.jsonl", range(3))
    (tmp_path / "runs.jsonl").write_text("{}")
    source = FeedbackSource(path=str(tmp_path / "a.jsonl"), companion=str(tmp_path / "runs.jsonl"))
    [file] = files_of([source])
    (tmp_path / "runs.jsonl").write_text('{"id": 1}')
    with pytest.raises(InfrastructureError, match=r"its companion runs\.jsonl changed while it was read"):
        read_into(tree, file, ReadOptions())
    (tmp_path / "runs.jsonl").rename(tmp_path.parent / f"{tmp_path.name}.jsonl")
    (tmp_path / "runs.jsonl").symlink_to(tmp_path.parent / f"{tmp_path.name}.jsonl")
    [file] = files_of([source])
    assert read_into(tree, file, ReadOptions()).row()["unread"].startswith("outside_folder: its companion runs.jsonl")


def test_a_span_of_a_file_that_became_a_pipe_is_refused_and_not_waited_for(
    tree: ArtifactTree, tmp_path: Path, small_spans: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", range(100))
    file = found(path)
    spans = library.cut(file)
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr("dpo_assets.feedback.library.cut", lambda file: spans)
    assert read_into(tree, file, ReadOptions()).row()["unread"].startswith("not_a_regular_file: it is a pipe")


def test_who_reads_the_same_file_meanwhile_waits_and_finds_its_batches(
    tree: ArtifactTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = found(write(tmp_path / "a.jsonl", range(3)))
    run, others = reading.run_job, []

    def slow(job: reading.Job) -> reading.Outcome:
        if not others:
            others.append(pool.submit(read_into, tree, file, ReadOptions()))
            time.sleep(0.2)  # Time for the other one to come in between, and to sweep this one's folder away.
        return run(job)

    monkeypatch.setattr(reading, "run_job", slow)
    with ThreadPoolExecutor(1) as pool:
        first = read_into(tree, file, ReadOptions())
    assert (first.new, others[0].result().new) == (1, 0)
    assert not [path for path in (tree.root / "_reading").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("format", "said"),
    [
        ("trl", "none of its 4 rows is of use as `trl`, and it looks like `openai`, 100% sure"),
        ("open_webui", "write `format: openai` for its source"),
        ("openai", ""),
    ],
)
def test_a_file_that_gave_nothing_is_looked_at_again(tree: ArtifactTree, format: str, said: str) -> None:
    unread = ingest_as(tree, EXPORTS / "openai.jsonl", format)
    assert said in unread
    assert bool(unread) == bool(said)


def test_of_a_file_that_no_format_fits_its_keys_are_told(tree: ArtifactTree, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "q", "best": "a", "worst": "b"}\n' * 3)
    assert "no format fits 3 rows with the keys: best, question, worst" in ingest_as(tree, tmp_path / "a.jsonl", "trl")
    (tmp_path / "b.jsonl").write_text('{"question": "q"\n' * 3)
    assert "invalid_json 3" in ingest_as(tree, tmp_path / "b.jsonl", "trl")


def test_a_column_map_that_hides_what_a_file_is_is_told(tree: ArtifactTree, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", range(3))
    columns = {"prompt": "question", "chosen": "best", "rejected": "worst"}
    [file] = files_of([FeedbackSource(path=str(tmp_path / "a.jsonl"), format="openai", columns=columns)])
    assert "write `format: trl` without `columns`" in read_into(tree, file, ReadOptions()).row()["unread"]


def test_a_file_of_its_own_format_with_rows_that_cannot_be_used_is_left_to_the_quarantine_rate(
    tree: ArtifactTree, tmp_path: Path
) -> None:
    """A small file may hold nothing else: one export an hour."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "chosen": "yes", "rejected": ["no"]}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "q", "chosen": "same", "rejected": "same"}\n{"prompt": "q", "cho')
    for name, reason in (("a.jsonl", "wrong_type"), ("b.jsonl", "no_preference")):
        batch = read_into(tree, found(tmp_path / name), ReadOptions()).batches[0]
        assert reason in pl.read_parquet(batch.path / QUARANTINE)["reason"].to_list()
        assert ingest_as(tree, tmp_path / name, "trl") == ""


def test_rows_that_hold_no_preference_do_not_blame_the_format_that_another_one_looks_like(
    tree: ArtifactTree, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"conversation_id": "1", "prompt": "q", "chosen": "same", "rejected": "same"}\n')
    file = replace(found(tmp_path / "a.jsonl"), format="openai")
    assert looked_at_again(file, {"no_preference": 3, "missing_field": 1}) == ""
    assert "looks like `trl`" in looked_at_again(file, {"no_preference": 1, "missing_field": 3})


def test_a_whole_export_of_nothing_is_counted_and_blocks_nothing(tree: ArtifactTree, tmp_path: Path) -> None:
    for name, content in (("a.json", b"[]"), ("b.csv", b"prompt,chosen,rejected\n"), ("c.jsonl", b"")):
        (tmp_path / name).write_bytes(content)
    rows = [read_into(tree, found(tmp_path / n), ReadOptions()).row() for n in ("a.json", "b.csv", "c.jsonl")]
    assert [row["empty"] for row in rows] == [True, True, False]
    assert [row["unread"][:10] for row in rows] == ["", "", "empty_file"]


def test_rows_that_were_understood_and_hold_no_preference_are_no_fault_of_the_format(
    tree: ArtifactTree, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "chosen": "same", "rejected": "same"}\n')
    assert ingest_as(tree, tmp_path / "a.jsonl", "trl") == ""


@pytest.mark.parametrize("writer", ["write_pairs", "answers_frame", "quarantine_frame"])
def test_a_row_that_does_not_reach_its_table_is_missed(
    tree: ArtifactTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    answer = {"prompt": "thumbs", "completion": "good", "label": True}
    (tmp_path / "a.jsonl").write_bytes(line(1) + b"\n" + json.dumps(answer).encode() + b"\n{broken\n")
    real = getattr(batches_module, writer)

    def lossy(rows: Any, *more: Any, **named: Any) -> Any:
        return real(rows[:-1], *more, **{name: value[:-1] for name, value in named.items()})

    monkeypatch.setattr(batches_module, writer, lossy)
    read = ingest(tree, tmp_path / "a.jsonl")
    tables = held([batch.path for batch in read.batches], "a.jsonl")
    assert (read.row()["lines"], tables.lines) == (3, 2)


def ingest_as(tree: ArtifactTree, path: Path, format: str) -> str:
    """What `raw_preferences` keeps of why a file gave nothing."""
    unread: str = read_into(tree, found(path, format), ReadOptions()).row()["unread"]
    return unread


def test_the_order_of_keys_makes_no_other_shape(tree: ArtifactTree, tmp_path: Path) -> None:
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"rejected": "b", "prompt": "q2", "chosen": "a"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ingest(tree, tmp_path / "a.jsonl").row()["shapes"] == {"chosen,prompt,rejected": 2}


@pytest.mark.parametrize(
    "path", [path for path in sorted(EXPORTS.glob("*.jsonl")) if path.stem in READERS], ids=lambda path: path.stem
)
def test_every_row_of_every_export_lies_in_the_tables(tree: ArtifactTree, path: Path) -> None:
    companion = str(COMPANIONS[path.stem]) if path.stem in COMPANIONS else None
    [file] = files_of([FeedbackSource(path=str(path), format=path.stem, companion=companion)])
    read = read_into(tree, file, ReadOptions())
    row, tables = read.row(), held([batch.path for batch in read.batches], file.name)
    assert tables == Held(row["pairs"], row["answers"], row["rejected"], row["lines"], 0)
    assert row["lines"] == row["rows"] > 0


def test_what_is_kept_of_a_file_does_not_say_where_the_project_lies(tree: ArtifactTree, tmp_path: Path) -> None:
    """What is trained on it would be trained again when the project moves."""
    kept = []
    for project in ("here", "there"):
        (tmp_path / project).mkdir()
        kept.append(ingest(tree, write(tmp_path / project / "a.jsonl", range(3))).row())
    assert kept[0] == kept[1]
    assert str(tmp_path) not in json.dumps(kept)


def test_a_refused_file_is_a_batch_that_says_why(tree: ArtifactTree, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    read = ingest(tree, tmp_path / "a.jsonl")
    [row] = pl.read_parquet(read.batches[0].path / QUARANTINE).to_dicts()
    assert (row["reason"], row["line"], row["source"]) == ("empty_file", 0, "a.jsonl")
    assert read.row()["rows_in"] == 0
    assert ingest(tree, tmp_path / "a.jsonl").new == 0


def test_options_that_change_rows_read_again(tree: ArtifactTree, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", range(3))
    assert ingest(tree, path).new == 1
    assert read_into(tree, found(path), ReadOptions(pairing="adjacent")).new == 1
    assert read_into(tree, replace(found(path), columns={"prompt": "q"}), ReadOptions()).new == 1


# Judged answers


def votes(row: Row, place: Place, options: ReadOptions) -> Iterator[JudgedAnswer | RowFault]:
    yield JudgedAnswer(
        [user(row["q"])], [assistant(row["a"])], row["vote"], place.source, place.row_id(None), place.line,
        label_kind="human_thumb",
    )  # fmt: skip


def test_answers_of_two_files_are_paired_and_those_left_are_quarantined_with_their_bytes(
    tree: ArtifactTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Format("votes", "votes", "{}", "here", lambda row: 0.0, read=votes)
    monkeypatch.setattr("dpo_assets.feedback.readers.formats", lambda: {"votes": made})
    rows = {
        "monday": [{"q": "one", "a": "good", "vote": 1}, {"q": "two", "a": "alone", "vote": 1}],
        "tuesday": [{"q": "one", "a": "bad", "vote": -1}],
    }
    for name, values in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(v) + "\n" for v in values))
    batches = [
        batch
        for name in rows
        for batch in read_into(tree, found(tmp_path / f"{name}.jsonl", "votes"), ReadOptions()).batches
    ]
    paired = pair_into(tree, batches, ReadOptions())
    assert paired is not None
    [pair] = pl.read_parquet(paired.path / PAIRS).to_dicts()
    assert (pair["chosen"], pair["rejected"]) == ([assistant("good")], [assistant("bad")])
    [left] = pl.read_parquet(paired.path / QUARANTINE).to_dicts()
    assert (left["reason"], left["source"], left["line"]) == ("unpaired", "monday.jsonl", 2)
    counts = paired.json(COUNTS)
    assert (counts["used"], counts["left"], counts["rejected"], counts["pairs"]) == (2, 1, 1, 1)
    tables = held_paired([batch.path for batch in batches], paired.path)
    assert (tables.pairs, tables.rejected, tables.left) == (1, 1, 1)
    again = pair_into(tree, batches[::-1], ReadOptions())
    assert again is not None
    assert again.digest == paired.digest
    assert pair_into(tree, [], ReadOptions()) is None


def test_the_worker_needs_no_main_module_and_ends_with_its_parent(tmp_path: Path) -> None:
    with reading._Process() as process:
        file = found(write(tmp_path / "a.jsonl", range(2)))
        (tmp_path / "out").mkdir()
        outcome = process.run(reading.Job(file, None, ReadOptions(), tmp_path / "out"))
        assert isinstance(outcome, list)
        assert [counts["pairs"] for counts in outcome] == [2]
        refused = process.run(
            reading.Job(replace(file, refused=FileRefused("x", "y")), None, ReadOptions(), tmp_path / "out")
        )
        assert isinstance(refused, FileRefused)
        number = process._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_the_worker_does_not_get_what_its_name_or_its_value_says_is_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE_THE_VOTES_ARE", "postgresql://reader:hunter22@db/votes")
    monkeypatch.setenv("VOTES_TOKEN", "a1b2c3d4e5")
    monkeypatch.setenv("HARMLESS", "postgresql://db:5432/votes")
    given: list[dict[str, str]] = []

    class Started(Exception):
        pass

    def start(command: list[str], *, env: dict[str, str], **_: Any) -> None:
        given.append(env)
        raise Started

    monkeypatch.setattr(reading.subprocess, "Popen", start)
    with pytest.raises(Started), reading._Process():
        pass
    assert "HARMLESS" in given[0]
    assert not {"WHERE_THE_VOTES_ARE", "VOTES_TOKEN"} & given[0].keys()
