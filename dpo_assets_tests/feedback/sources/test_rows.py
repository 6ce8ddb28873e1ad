"""Rows: spans, column maps, JSON in columns, and any bytes under any name."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.feedback.readers import RowFault
from dpo_assets.feedback.sources import FileRefused, rows_of, spans_of, verify_unchanged
from dpo_assets.feedback.sources import files as files_module
from dpo_assets.feedback.sources.rows import _TextCheck
from dpo_assets_tests.feedback.sources.reading import ROWS, found, jsonl, outcome, read, row

NAMES = ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.csv.zst", "a.txt", "a"]


@settings(max_examples=150, deadline=None)
@given(
    content=st.binary(max_size=300)
    | st.lists(
        st.sampled_from(
            [row(), b"\n", b"{", b"[", b'"', b"]", b",", b"\xff", b"\0", b"\r", b"a,b", b"PAR1", b"\xfe\xff"]
        ),
        max_size=12,
    ).map(b"".join),
    name=st.sampled_from(NAMES),
    packed=st.booleans(),
)
def test_any_bytes_under_any_name_are_rows_or_a_refusal(content: bytes, name: str, packed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        result = read(Path(folder), gzip.compress(content, mtime=0) if packed else content, name)
        again = outcome(result.file)
        assert again == result or (again.refused, result.refused) != (None, None)
    if result.refused is not None:
        assert result.refused.reason
        return
    numbers = [one.number for one in result.rows]
    assert numbers == sorted(set(numbers))
    assert numbers[0] >= 1
    for one in result.rows:
        assert one.raw.strip()
        if isinstance(one.value, RowFault):
            assert one.value.reason
            assert one.value.message
        else:
            json.dumps(one.value, ensure_ascii=False, allow_nan=False).encode("utf-8")


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.sampled_from([row(1), row(2, chosen="x" * 90), b"", b"  ", b"{broken", b"\xff"]), max_size=30),
    size=st.integers(1, 400),
    end=st.sampled_from([b"", b"\n", b"\r\n"]),
)
def test_spans_give_the_rows_of_the_whole_file(lines: list[bytes], size: int, end: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(b"\n".join(lines) + end)
        file = found(path)
        if file.refused is not None:
            return
        spans = spans_of(file, size)
        assert spans is not None
        result = outcome(file)
        if result.refused is not None:
            assert result.reason in ("no_rows", "wrong_encoding")
            return
        whole = result.rows
        assert [one for span in spans for one in rows_of(file, span)] == whole
        assert [span.stop for span in spans[:-1]] == [span.start for span in spans[1:]]
        assert (spans[0].start, spans[-1].stop) == (0, file.size)
        verify_unchanged(file)


def test_spans_begin_behind_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl())
    file = found(tmp_path / "a.jsonl")
    spans = spans_of(file, 1)
    assert spans is not None
    assert [one.value for span in spans for one in rows_of(file, span)] == ROWS
    assert [span.line for span in spans] == [1, 2, 3]


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.jsonl.gz"])
def test_what_is_not_plain_lines_cannot_be_cut(tmp_path: Path, name: str) -> None:
    content = {
        "a.json": json.dumps(ROWS).encode(),
        "a.csv": b"prompt\nq\n",
        "a.jsonl.gz": gzip.compress(jsonl(), mtime=0),
    }[name]
    (tmp_path / name).write_bytes(content)
    assert spans_of(found(tmp_path / name)) is None


def test_cutting_refuses_a_file_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"chosen": "\xe9"}\n' * 20)
    with pytest.raises(FileRefused) as refused:
        spans_of(found(tmp_path / "a.jsonl"), 50)
    assert refused.value.reason == "wrong_encoding"


def test_who_reads_by_spans_sees_a_change_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    file = found(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(jsonl().replace(b"q", b"Q"))
    with pytest.raises(FileRefused) as refused:
        verify_unchanged(file)
    assert refused.value.reason == "changed_while_read"
    assert "rotate the file or copy it" in refused.value.message


@pytest.mark.parametrize("spans", [False, True])
def test_a_file_that_is_appended_to_is_read_as_it_was_found(tmp_path: Path, spans: bool) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl())
    file = found(path)
    with path.open("ab") as handle:
        handle.write(row(0) + b'\n{"half')
    if spans:
        cut = spans_of(file, 10) or []
        assert [one.value for span in cut for one in rows_of(file, span)] == ROWS
        verify_unchanged(file)
    else:
        assert (outcome(file).values, outcome(file).faults) == (ROWS, [])


def test_a_file_that_grows_while_it_is_hashed_is_found_to_the_end_of_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "a.jsonl", os.fstat
    path.write_bytes(jsonl() + b'{"half')

    def written_meanwhile(handle: int) -> os.stat_result:
        status = real(handle)
        with path.open("ab") as end:
            end.write(b" ")
        return status

    with monkeypatch.context() as patch:
        patch.setattr(files_module.os, "fstat", written_meanwhile)
        file = found(path)
    assert file.size == jsonl().rindex(b"\n") + 1
    assert file.sha256 == hashlib.sha256(jsonl()[: file.size]).hexdigest()
    assert outcome(file).faults == []


def test_files_spans_and_refusals_can_be_sent_to_another_process(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    file = found(tmp_path / "a.jsonl", columns={"prompt": "question"}, fields={"a": "b"})
    assert pickle.loads(pickle.dumps(file)) == file
    refused = pickle.loads(pickle.dumps(FileRefused("empty_file", "it holds no byte")))
    assert (refused.reason, refused.message, str(refused)) == ("empty_file", "it holds no byte", "it holds no byte")


def test_another_parser_can_be_given(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    rows = rows_of(found(tmp_path / "a.jsonl"), parse=lambda raw: {"length": len(raw)})
    assert [one.value for one in rows] == [{"length": len(row())}] * 3


# Column maps


def values(folder: Path, given: dict[str, Any], **source: Any) -> Any:
    return read(folder, json.dumps(given).encode(), **source).rows[0].value


def test_columns_are_renamed_and_the_others_stay(tmp_path: Path) -> None:
    given = {"question": "q", "best": "a", "worst": "b", "lang": "de"}
    columns = {"prompt": "question", "chosen": "best", "rejected": "worst"}
    assert values(tmp_path, given, columns=columns) == {"lang": "de", "prompt": "q", "chosen": "a", "rejected": "b"}


def test_a_path_leads_into_objects_and_lists(tmp_path: Path) -> None:
    given = {"input": {"text": "q"}, "answers": [{"t": "a"}, {"t": "b"}], "x.y": "z"}
    columns = {"prompt": "input.text", "chosen": "answers.0.t", "rejected": "answers.-1.t", "id": "x.y"}
    mapped = values(tmp_path, given, columns=columns)
    assert [mapped[name] for name in columns] == ["q", "a", "b", "z"]
    assert mapped["input"] == {"text": "q"}


def test_a_column_whose_name_is_taken_keeps_its_value(tmp_path: Path) -> None:
    given = {"prompt": "old", "question": "new"}
    assert values(tmp_path, given, columns={"prompt": "question"}) == {"prompt.original": "old", "prompt": "new"}
    assert values(tmp_path, {"a": 1, "b": 2}, columns={"a": "b", "b": "a"}) == {"a": 2, "b": 1}


@pytest.mark.parametrize("path", ["missing", "input.missing", "answers.7", "input.text.deeper", "answers.x"])
def test_a_column_that_is_not_there_costs_the_row_and_names_what_is(tmp_path: Path, path: str) -> None:
    fault = values(tmp_path, {"input": {"text": "q"}, "answers": [1]}, columns={"prompt": path})
    assert isinstance(fault, RowFault)
    assert fault.reason == "missing_field"
    assert path in fault.message


def test_json_in_a_column_is_parsed_strictly(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "h\u00e9"}]
    given = {"prompt": json.dumps(messages), "chosen": "", "rejected": None, "note": "[1]"}
    assert values(tmp_path, given, json_columns=["prompt", "chosen", "rejected"]) == {**given, "prompt": messages}
    for text in ("[1", "nope", '{"a": 1, "a": 2}', "1}, {", "NaN"):
        fault = values(tmp_path, {"prompt": text}, json_columns=["prompt"])
        assert isinstance(fault, RowFault)
        assert fault.reason == "invalid_json"
        assert fault.message.startswith("`prompt` is not JSON")
    assert values(tmp_path, {"prompt": '"a\\u0001b"'}, json_columns=["prompt"]) == {"prompt": "ab"}


def test_what_decides_the_rows_is_the_identity_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    file = found(tmp_path / "a.jsonl")
    changes = {"sha256": "0", "name": "b", "format": "auto", "columns": {"a": "b"}, "json_columns": ("a",)}
    changes |= {"fields": {"a": "b"}, "companion_sha256": "0"}
    prints = {json.dumps(replace(file, **{name: value}).identity()) for name, value in changes.items()}
    assert len(prints | {json.dumps(file.identity())}) == 8
    assert replace(file, path=Path("elsewhere"), origin="x", sniffed="y").identity() == file.identity()


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(st.one_of(st.binary(max_size=4), st.text(max_size=4).map(str.encode)), max_size=6),
    cuts=st.lists(st.integers(0, 30), max_size=4),
)
def test_bytes_are_text_where_python_reads_them_however_they_come(parts: list[bytes], cuts: list[int]) -> None:
    whole = b"".join(parts)
    check = _TextCheck()
    ends = sorted({0, len(whole), *(n for n in cuts if n < len(whole))})
    for start, end in pairwise(ends):
        check.feed(whole[start:end])
    check.feed(b"")
    try:
        whole.decode()
        expected = True
    except UnicodeDecodeError:
        expected = False
    assert check.sound == expected
