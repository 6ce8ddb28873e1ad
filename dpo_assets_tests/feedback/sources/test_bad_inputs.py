"""The table of bad inputs, cases 1 to 25 and 43 to 45: each treated as listed, by its number and name."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import socket
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_assets.errors import FeedbackError
from dpo_assets.feedback.ingest import read_file
from dpo_assets.feedback.pair import as_json
from dpo_assets.feedback.readers import ReadOptions, RowFault
from dpo_assets.feedback.sources import FileRefused, Limits, files_of, rows_of, spans_of
from dpo_assets.feedback.sources import parquet_rows as parquet_module
from dpo_assets.recipe import FeedbackSection, FeedbackSource
from dpo_assets_tests.feedback.sources.reading import ROWS, found, jsonl, outcome, read, row

posix = pytest.mark.skipif(os.name == "nt", reason="links, pipes and devices of POSIX")


def test_case_01_an_empty_file_is_refused_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(jsonl())
    empty, full = files_of([FeedbackSource(path=str(tmp_path / "*.jsonl"))])
    assert empty.refused is not None
    assert (empty.refused.reason, empty.name, len(empty.sha256)) == ("empty_file", "a.jsonl", 64)
    assert outcome(empty).reason == "empty_file"
    assert outcome(full).values == ROWS


@pytest.mark.parametrize("content", [b"\n\n", b" \t\r\n", codecs.BOM_UTF8, b"\r\r"], ids=repr)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_case_02_a_file_of_blank_lines_has_no_rows(tmp_path: Path, content: bytes, name: str) -> None:
    assert read(tmp_path, content, name).reason == "no_rows"


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", b"prompt,chosen,rejected\n"), ("a.json", b"[]"), ("a.json", b'{"data": [], "page": {"n": 0}}\n')],
)
def test_a_whole_export_of_nothing_is_told_from_a_file_that_was_cut(tmp_path: Path, name: str, content: bytes) -> None:
    assert read(tmp_path, content, name).reason == "empty_export"
    assert read(tmp_path, b"[" if name == "a.json" else b"\n", name).reason == "no_rows"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_case_03_a_byte_order_mark_is_stripped(tmp_path: Path, name: str) -> None:
    result = read(tmp_path, codecs.BOM_UTF8 + jsonl(), name)
    assert result.values == ROWS
    assert result.flags["byte_order_mark"] == 1


def test_case_04_windows_line_ends_change_no_row_and_in_texts_become_line_feeds(tmp_path: Path) -> None:
    result = read(tmp_path, b"\r\n".join([row(0), row(1, chosen="a\r\nb\rc\nd"), b""]))
    assert [value["chosen"] for value in result.values] == ["yes", "a\nb\nc\nd"]
    assert [one.flags for one in result.rows] == [(), ("line_ends_in_text",)]
    assert result.flags == {"windows_line_ends": 1, "line_ends_in_text": 1}


def test_case_04_lone_carriage_returns_are_line_ends(tmp_path: Path) -> None:
    assert read(tmp_path, jsonl().replace(b"\n", b"\r")).values == ROWS
    assert read(tmp_path, b"prompt,chosen,rejected\rq0,yes,no\r", "a.csv").values == ROWS[:1]


def test_case_05_a_truncated_last_line_costs_itself_and_flags_the_file(tmp_path: Path) -> None:
    result = read(tmp_path, jsonl()[:-8])
    assert result.values == ROWS[:2]
    assert result.faults == [(3, "invalid_json")]
    assert result.rows[2].raw == row(2)[:-7]
    assert result.flags == {"truncated_tail": 1}


@pytest.mark.parametrize("indent", [None, 2])
def test_case_05_a_truncated_array_costs_its_last_row_and_flags_the_file(tmp_path: Path, indent: int | None) -> None:
    result = read(tmp_path, json.dumps(ROWS, indent=indent).encode()[:-12], "a.json")
    assert result.values == ROWS[:2]
    assert result.faults == [(3, "invalid_json")]
    assert result.flags == {"truncated_tail": 1}


def test_case_05_a_truncated_csv_file_costs_its_last_row_and_flags_the_file(tmp_path: Path) -> None:
    result = read(tmp_path, b"prompt,chosen,rejected\nq0,yes,no\nq1,y", "a.csv")
    assert (result.values, result.faults) == (ROWS[:1], [(3, "wrong_cells")])
    assert result.flags == {"truncated_tail": 1}


def test_case_06_no_final_newline_is_accepted(tmp_path: Path) -> None:
    result = read(tmp_path, jsonl().rstrip())
    assert (result.values, result.flags) == (ROWS, {})


@pytest.mark.parametrize(
    ("case", "line", "reason"),
    [
        ("07 duplicate keys", b'{"prompt": "q", "chosen": "a", "chosen": "b"}', "duplicate_key"),
        ("08 NaN", b'{"score": NaN}', "invalid_json"),
        ("08 Infinity", b'{"score": -Infinity}', "invalid_json"),
        ("08 1e999", b'{"score": 1e999}', "invalid_json"),
        ("09 lone surrogate", b'{"chosen": "\\ud83d"}', "invalid_utf8"),
        ("10 invalid UTF-8", b'{"chosen": "caf\xe9"}', "invalid_utf8"),
        ("14 NUL escaped", b'{"chosen": "a\\u0000b"}', "nul_character"),
        ("14 NUL in a key", b'{"a\\u0000": "b"}', "nul_character"),
        ("14 NUL raw", b'{"chosen": "a\x00b"}', "invalid_json"),
        ("17 scalar", b"42", "not_an_object"),
        ("17 list", b'["a", "b"]', "not_an_object"),
        ("18 65 levels", b'{"a":' * 65 + b"1" + b"}" * 65, "too_deep"),
        ("18 5,000 brackets", b"[" * 5000, "too_deep"),
        ("18 5,000 brackets in a row", b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "too_deep"),
        ("19 an integer of 5,000 digits", b'{"margin": ' + b"1" * 5000 + b"}", "invalid_json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_cases_07_to_19_cost_their_line_and_nothing_else(tmp_path: Path, case: str, line: bytes, reason: str) -> None:
    result = read(tmp_path, b"\n".join([row(0), line, row(2)]))
    assert result.values == [ROWS[0], ROWS[2]]
    assert result.faults == [(2, reason)]
    assert result.rows[1].raw == line
    in_array = read(tmp_path, b"[\n" + b",\n".join([row(0), line, row(2)]) + b"\n]", "a.json")
    # A line that leaves brackets open is told from the next only by where that begins.
    assert [value["prompt"] for value in in_array.values] == ["q0", "q2"]
    assert len(in_array.faults) == 1


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_case_11_utf_16_and_32_with_a_mark_are_transcoded_and_flagged(
    tmp_path: Path, mark: bytes, encoding: str, name: str
) -> None:
    rows = [{"prompt": "q\U0001f600é", "chosen": "é" * 70_000, "rejected": "no"}] * 3
    text = jsonl(rows).decode() if name == "a.jsonl" else _csv(rows)
    result = read(tmp_path, mark + text.encode(encoding), name)
    assert result.values == rows
    assert result.flags[f"transcoded_from_{encoding.replace('-', '_')}"] == 1


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_case_11_utf_16_and_32_without_a_mark_are_refused(tmp_path: Path, encoding: str) -> None:
    result = read(tmp_path, jsonl().decode().encode(encoding))
    assert result.reason == "unmarked_encoding"
    assert "iconv -f UTF-" in str(result.refused)


def test_case_11_a_lone_surrogate_of_utf_16_costs_its_row(tmp_path: Path) -> None:
    lines = jsonl().decode().split("\n")
    broken = lines[1].replace("yes", "\ud83d")
    content = "\n".join([lines[0], broken, lines[2]]).encode("utf-16-le", "surrogatepass")
    result = read(tmp_path, codecs.BOM_UTF16_LE + content)
    assert (result.values, result.faults) == ([ROWS[0], ROWS[2]], [(2, "invalid_utf8")])
    half = read(tmp_path, codecs.BOM_UTF16_LE + content[:-1])
    assert half.faults == [(2, "invalid_utf8"), (3, "invalid_utf8")]


def test_case_12_lines_of_latin_1_are_faults_and_a_file_of_them_is_refused_with_a_hint(tmp_path: Path) -> None:
    few = b"\n".join([row(n) for n in range(50)] + ['{"chosen": "é"}'.encode("latin-1")] * 9)
    result = read(tmp_path, few)
    assert (len(result.values), len(result.faults)) == (50, 9)
    many = b"\n".join([row(n) for n in range(30)] + ['{"chosen": "é"}'.encode("latin-1")] * 10)
    refused = read(tmp_path, many)
    assert refused.reason == "wrong_encoding"
    assert "iconv -f WINDOWS-1252 -t UTF-8" in str(refused.refused)


def test_case_13_unicode_line_separators_in_texts_cut_no_row(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\u0085four\x1f"
    content = row(0, chosen=text.rstrip("\x1f"))
    assert read(tmp_path, content).values[0]["chosen"] == "one\u2028two\u2029three\u0085four"
    assert read(tmp_path, _csv([{"a": "one\u2028two\x85"}]).encode(), "a.csv").values == [{"a": "one\u2028two\x85"}]


@pytest.mark.parametrize("control", ["\x01", "\x08", "\x0b", "\x0c", "\x1b", "\x1f", "\x7f"])
def test_case_14_controls_but_tab_and_line_feed_are_removed_and_flagged(tmp_path: Path, control: str) -> None:
    content = json.dumps({"prompt": f"a{control}b\t\n", "chosen": [{"content": f"{control}x"}]}).encode()
    result = read(tmp_path, content)
    assert result.values == [{"prompt": "ab\t\n", "chosen": [{"content": "x"}]}]
    assert result.rows[0].flags == ("controls_removed",)
    assert result.flags == {"controls_removed": 1}
    assert read(tmp_path, f"prompt\na{control}b\n".encode(), "a.csv").values == [{"prompt": "ab"}]


def test_case_14_a_nul_in_a_csv_cell_costs_its_row(tmp_path: Path) -> None:
    result = read(tmp_path, b"prompt,chosen\na,b\n\x00,c\nd,e\n", "a.csv")
    assert (len(result.values), result.faults) == (2, [(3, "nul_character")])


@pytest.mark.parametrize("indent", [None, 0, 1, 2, 4, "\t"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
def test_case_15_a_json_array_becomes_rows(tmp_path: Path, indent: Any, name: str) -> None:
    rows = [*ROWS, {"prompt": [{"role": "user", "content": 'a "]}[{" \\ \n b'}], "meta": {"x": [{}, []]}}]
    content = json.dumps(rows, indent=indent).encode()
    result = read(tmp_path, gzip.compress(content, mtime=0) if name.endswith("gz") else content, name)
    assert result.values == rows
    assert [one.number for one in result.rows] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(("indent", "between"), [(2, "\n"), (2, ""), (None, " "), (None, ""), (None, ",\n")])
def test_case_16_pretty_printed_and_concatenated_objects_become_rows(
    tmp_path: Path, name: str, indent: int | None, between: str
) -> None:
    content = between.join(json.dumps(one, indent=indent) for one in ROWS)
    if between == ",\n" and name == "a.jsonl":
        content = content.replace(",\n{", "\n{")
    assert read(tmp_path, content.encode(), name).values == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.txt"])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS[:2]) + json.dumps(ROWS[2:]),
        json.dumps(ROWS[:2]) + "\n" + json.dumps(ROWS[2:]) + "\n",
        json.dumps(ROWS[:2], indent=2) + "\n" + json.dumps(ROWS[2:], indent=2) + "\n",
        json.dumps([ROWS[:1], ROWS[1:]]),
        json.dumps({"data": ROWS}),
        json.dumps({"version": 1, "rows": ROWS, "next": None}, indent=2),
        "\r".join([json.dumps(ROWS[:2]), json.dumps(ROWS[2:])]),
    ],
    ids=["arrays", "an array a line", "pretty arrays", "an array of arrays", "a wrapper", "a pretty wrapper", "CR"],
)
def test_rows_inside_arrays_and_wrappers_are_read(tmp_path: Path, name: str, content: str) -> None:
    packed = gzip.compress(content.encode(), mtime=0) if name.endswith("gz") else content.encode()
    result = read(tmp_path, packed, name)
    if content.startswith('{"data"') and "jsonl" in name:  # A line that is JSON by itself is a row.
        assert [json.loads(fault.row or "{}") for _, fault in result.faults] == []
        assert result.values == [{"data": ROWS}]
        return
    assert (result.values, result.faults) == (ROWS, [])
    assert result.flags["rows_in_a_wrapper"] == ("data" in content or "version" in content)


def test_a_line_that_holds_several_rows_says_how_to_take_them_out(tmp_path: Path) -> None:
    together = row(2) + row(1)  # Two files were put together, and the first had no line break at its end.
    result = read(tmp_path, b"\n".join([row(0), json.dumps(ROWS[1:]).encode(), together, b"[1]"]))
    assert (result.values, [n for n, _ in result.faults]) == (ROWS[:1], [2, 3, 4])
    array, values, plain = [one.value.message for one in result.rows if isinstance(one.value, RowFault)]
    assert "jq -c 'if type == \"array\" then .[] else . end'" in array
    assert "put a line break between them" in values
    assert "jq" not in plain


def test_a_value_over_the_limit_that_may_hold_the_rows_says_how_to_take_them_out(tmp_path: Path) -> None:
    content = json.dumps({"title": "x", "votes": ROWS * 20}).encode()
    [one] = read(tmp_path, content, "a.json", limits=Limits(row_bytes=500)).rows
    assert isinstance(one.value, RowFault)
    assert one.value.reason == "row_too_large"
    assert "jq -c '.votes[]'" in one.value.message


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_a_byte_order_mark_inside_costs_no_row_and_is_flagged(tmp_path: Path, name: str) -> None:
    parts = [jsonl(ROWS[:1]), jsonl(ROWS[1:])]
    if name == "a.json":
        parts = [json.dumps(ROWS[:1]).encode(), json.dumps(ROWS[1:]).encode()]
    elif name == "a.csv":
        parts = [_csv(ROWS[:1]).encode(), _csv(ROWS).encode().split(b"\n", 2)[2]]
    content = codecs.BOM_UTF8 + parts[0] + codecs.BOM_UTF8 + parts[1]
    result = read(tmp_path, gzip.compress(content, mtime=0) if name.endswith("gz") else content, name)
    assert (result.values, result.faults) == (ROWS, [])
    assert result.flags == {"byte_order_mark": 1, "byte_order_mark_inside": 1}


def test_a_byte_order_mark_inside_is_flagged_by_the_span_that_holds_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS[:1]) + codecs.BOM_UTF8 + jsonl(ROWS[1:]))
    file = found(tmp_path / "a.jsonl")
    spans = spans_of(file, 1)
    assert spans is not None
    rows = [rows_of(file, span) for span in spans]
    assert [one.value for part in rows for one in part] == ROWS
    assert [part.flags["byte_order_mark_inside"] for part in rows] == [0, 1, 0]


def test_utf_16_files_that_were_put_together_keep_their_rows(tmp_path: Path) -> None:
    parts = [part.decode().encode("utf-16-le") for part in (jsonl(ROWS[:1]), jsonl(ROWS[1:]))]
    result = read(tmp_path, b"".join(codecs.BOM_UTF16_LE + part for part in parts))
    assert (result.values, result.flags["byte_order_mark_inside"]) == (ROWS, 1)


def test_case_19_a_huge_integer_is_kept(tmp_path: Path) -> None:
    assert read(tmp_path, b'{"id": ' + b"9" * 100 + b"}").values == [{"id": int("9" * 100)}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_case_20_a_row_over_the_limit_costs_itself(tmp_path: Path, name: str) -> None:
    rows = [ROWS[0], ROWS[1] | {"chosen": "x" * 10 * 2**20}, ROWS[2]]
    content = {"a.jsonl": jsonl(rows), "a.json": json.dumps(rows).encode(), "a.csv": _csv(rows).encode()}[name]
    result = read(tmp_path, content, name)
    assert result.values == [ROWS[0], ROWS[2]]
    assert [reason for _, reason in result.faults] == ["row_too_large"]
    assert len(result.rows[1].raw) <= Limits().row_bytes + 1
    if name != "a.csv":  # Its header would be over this limit.
        small = read(tmp_path, content, name, limits=Limits(row_bytes=20))
        assert small.faults == [(n, "row_too_large") for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.zip", b"PK\x03\x04....", "zip archive"),
        ("a.jsonl", b"PK\x03\x04....", "zip archive"),
        ("a.tar", b"\0" * 257 + b"ustar\0" + b"\0" * 300, "tar archive"),
        ("a.jsonl.gz", gzip.compress(b"\0" * 257 + b"ustar\0" + b"\0" * 300, mtime=0), "tar archive"),
        ("a.jsonl", gzip.compress(jsonl(), mtime=0), "let its name end in `.gz`"),
        ("a.jsonl.bz2", b"BZh91AY&SY", "bzip2"),
        ("a.jsonl.xz", b"\xfd7zXZ\x00", "xz"),
    ],
)
def test_case_21_archives_and_unnamed_compression_are_refused(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    result = read(tmp_path, content, name)
    assert result.reason == "wrong_magic"
    assert said in str(result.refused)


@pytest.mark.parametrize("packed", ["gz", "zst"])
def test_case_21_gzip_and_zstd_are_read_when_named_so(tmp_path: Path, packed: str) -> None:
    zstandard = pytest.importorskip("zstandard")
    pack = gzip.compress if packed == "gz" else zstandard.compress
    content = jsonl()
    assert read(tmp_path, pack(content), f"a.jsonl.{packed}").values == ROWS
    parts = pack(content[:50]) + pack(content[50:])
    assert read(tmp_path, parts, f"a.jsonl.{packed}").values == ROWS
    assert read(tmp_path, pack(_csv(ROWS).encode()), f"a.csv.{packed}").values == ROWS


def test_case_21_padding_behind_a_gzip_member_is_allowed_and_other_bytes_are_not(tmp_path: Path) -> None:
    assert read(tmp_path, gzip.compress(jsonl(), mtime=0) + b"\0" * 100_000, "a.jsonl.gz").values == ROWS
    assert read(tmp_path, gzip.compress(jsonl(), mtime=0) + b"tail", "a.jsonl.gz").reason == "damaged_file"


@pytest.mark.parametrize("packed", ["gz", "zst"])
def test_case_21_a_bomb_is_refused_by_the_bytes_or_the_rows_that_it_holds_and_the_ways_on_are_named(
    tmp_path: Path, packed: str
) -> None:
    zstandard = pytest.importorskip("zstandard")
    pack, unpack = (gzip.compress, "gunzip") if packed == "gz" else (zstandard.compress, "unzstd")
    content, name = b'{"a": 1}\n' * 1_000, f"a.jsonl.{packed}"
    for limits, setting in (
        (Limits(unpacked_bytes=8_999), "feedback.max_unpacked_gib"),
        (Limits(unpacked_rows=999), "feedback.max_unpacked_rows"),
    ):
        result = read(tmp_path, pack(content), name, limits=limits)
        assert result.reason == "decompression_bomb"
        assert setting in str(result.refused)
        assert f"unpack it yourself ({unpack})" in str(result.refused)
        assert len(read(tmp_path, content, limits=limits).values) == 1_000
    assert (
        len(read(tmp_path, pack(content), name, limits=Limits(unpacked_bytes=9_000, unpacked_rows=1_000)).rows) == 1_000
    )


def test_the_recipe_sets_what_a_packed_file_may_hold() -> None:
    feedback = FeedbackSection.model_validate(
        {"sources": [{"path": "a.jsonl"}], "max_unpacked_gib": 0.5, "max_unpacked_rows": 7}
    )
    limits = Limits.of(feedback)
    assert (limits.unpacked_bytes, limits.unpacked_rows) == (2**29, 7)
    assert Limits.of(FeedbackSection.model_validate({"sources": [{"path": "a.jsonl"}]})) == Limits()


@pytest.mark.parametrize("packed", ["gz", "zst"])
def test_rows_that_share_a_long_system_prompt_are_no_bomb_however_well_they_compress(
    tmp_path: Path, packed: str
) -> None:
    zstandard = pytest.importorskip("zstandard")
    system = os.urandom(12_000).hex()
    rows = [{"prompt": f"{system} {n}", "chosen": "yes", "rejected": "no"} for n in range(800)]
    content = jsonl(rows)
    small = gzip.compress(content, mtime=0) if packed == "gz" else zstandard.compress(content)
    assert len(content) > 16 * 2**20
    assert len(content) > 100 * len(small) or packed == "gz"
    assert read(tmp_path, small, f"a.jsonl.{packed}").values == rows


def test_case_21_zstd_without_its_package_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    result = read(tmp_path, b"\x28\xb5\x2f\xfd....", "a.jsonl.zst")
    assert result.reason == "needs_package"
    assert "pip install zstandard" in str(result.refused)


@pytest.mark.parametrize("packed", ["gz", "zst"])
@pytest.mark.parametrize("keep", [0.2, 0.9, 0.999])
def test_case_22_a_truncated_file_is_refused_whole_with_its_hash(tmp_path: Path, packed: str, keep: float) -> None:
    zstandard = pytest.importorskip("zstandard")
    rows = [{"prompt": os.urandom(200).hex()} for _ in range(2_000)]
    whole = gzip.compress(jsonl(rows), mtime=0) if packed == "gz" else zstandard.compress(jsonl(rows))
    content = whole[: int(len(whole) * keep)]
    result = read(tmp_path, content, f"a.jsonl.{packed}")
    assert result.reason == "truncated_file"
    assert len(result.file.sha256) == 64
    assert (tmp_path / f"a.jsonl.{packed}").read_bytes() == content


def test_case_22_a_damaged_gzip_file_is_refused_whole(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(jsonl([{"prompt": os.urandom(50).hex()} for _ in range(500)]), mtime=0))
    content[-6] ^= 0xFF  # The checksum.
    assert read(tmp_path, bytes(content), "a.jsonl.gz").reason == "damaged_file"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", jsonl()),
        ("a.jsonl", b"PAR1....PAR1"),
        ("a.csv", b"PAR1....PAR1"),
        ("a.csv", jsonl()),
        ("a.csv", json.dumps(ROWS).encode()),
        ("a.jsonl.gz", jsonl()),
        ("a.jsonl.zst", gzip.compress(jsonl(), mtime=0)),
        ("a.parquet.gz", gzip.compress(b"PAR1....PAR1", mtime=0)),
        ("a.jsonl", b"SQLite format 3\x00...."),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
        ("a.jsonl", b"<!DOCTYPE html><html>"),
        ("a.csv", b"\n <html>"),
    ],
)
def test_case_23_a_name_that_says_another_thing_than_the_bytes_is_refused(
    tmp_path: Path, name: str, content: bytes
) -> None:
    assert read(tmp_path, content, name).reason == "wrong_magic"


@pytest.mark.parametrize(("name", "reason"), [("notes.txt", "unknown_container"), ("export", "unknown_container")])
def test_case_23_what_neither_name_nor_bytes_tell_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    assert read(tmp_path, b"hello\n", name).reason == reason
    assert read(tmp_path, jsonl(), name).values == ROWS


@posix
def test_case_24_a_link_out_of_the_folder_is_refused_and_one_inside_is_read(tmp_path: Path) -> None:
    outside, inside = tmp_path / "secret.jsonl", tmp_path / "feedback"
    inside.mkdir()
    outside.write_bytes(jsonl())
    (inside / "a.jsonl").write_bytes(jsonl())
    (inside / "b.jsonl").symlink_to(inside / "a.jsonl")
    (inside / "c.jsonl").symlink_to(outside)
    (inside / "d.jsonl").symlink_to("nowhere.jsonl")
    (inside / "e.jsonl").symlink_to("e.jsonl")
    real, link, out, broken, loop = [outcome(f) for f in files_of([FeedbackSource(path=str(inside / "*.jsonl"))])]
    assert real.values == link.values == ROWS
    assert (out.reason, out.file.name, out.file.sha256) == ("outside_folder", "c.jsonl", "")
    assert (broken.reason, loop.reason) == ("unreadable", "not_a_regular_file")
    assert outcome(found(inside / "c.jsonl")).reason == "outside_folder"


@posix
def test_case_24_a_folder_that_is_a_link_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.jsonl").write_bytes(jsonl())
    (tmp_path / "feedback").mkdir()
    (tmp_path / "feedback" / "more").symlink_to(tmp_path / "outside")
    assert outcome(found(tmp_path / "feedback" / "*" / "*.jsonl")).reason == "outside_folder"
    # The folder that a source names itself may be a link: that is where its owner says feedback lies.
    assert outcome(found(tmp_path / "feedback" / "more" / "*.jsonl")).values == ROWS


@posix
def test_case_24_a_file_that_becomes_a_link_after_it_was_found_is_refused(tmp_path: Path) -> None:
    (tmp_path / "feedback").mkdir()
    path = tmp_path / "feedback" / "a.jsonl"
    path.write_bytes(jsonl())
    (tmp_path / "secret.jsonl").write_bytes(jsonl())
    file = found(path)
    path.unlink()
    path.symlink_to(tmp_path / "secret.jsonl")
    assert outcome(file).reason == "outside_folder"


def test_case_24_a_pattern_that_climbs_behind_a_wildcard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "x.jsonl").write_bytes(jsonl())
    with pytest.raises(FeedbackError, match=r"climbs out of its folder by `\.\.`"):
        files_of([FeedbackSource(path=str(tmp_path / "*" / ".." / "x.jsonl"))])


@posix
def test_case_24_pipes_sockets_and_devices_are_refused_without_being_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        short = tmp_path / "b.jsonl"
        server.bind(str(short))
        pipe, sock = files_of([FeedbackSource(path=str(tmp_path / "*.jsonl"))])
        device = found("/dev/zero")
    assert [file.refused and file.refused.reason for file in (pipe, sock, device)] == ["not_a_regular_file"] * 3
    assert [file.refused and file.refused.message for file in (pipe, sock, device)] == [
        "it is a pipe, not a file",
        "it is a socket, not a file",
        "it is a device, not a file",
    ]


@posix
def test_case_24_a_hard_link_from_outside_is_refused_and_one_inside_is_read(tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_bytes(jsonl())
    (tmp_path / "in").mkdir()
    os.link(tmp_path / "secret.jsonl", tmp_path / "in" / "a.jsonl")
    assert outcome(found(tmp_path / "in" / "a.jsonl")).reason == "hard_link"
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "a.jsonl").write_bytes(jsonl())
    os.link(tmp_path / "both" / "a.jsonl", tmp_path / "both" / "b.jsonl")
    assert [outcome(f).values for f in files_of([FeedbackSource(path=str(tmp_path / "both" / "*"))])] == [ROWS, ROWS]


@posix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_case_24_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    (tmp_path / "a.jsonl").chmod(0)
    assert outcome(found(tmp_path / "a.jsonl")).reason == "unreadable"


@posix
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\nb.jsonl", "a\\nb.jsonl"),
        ("a\x1b[31mred.jsonl", "a\\x1b[31mred.jsonl"),
        ("\u202egnp.jsonl", "\\u202egnp.jsonl"),
        (unicodedata.normalize("NFD", "é.jsonl"), "é.jsonl"),
        (os.fsdecode(b"\xff.jsonl"), "\\udcff.jsonl"),
    ],
)
def test_case_25_odd_file_names_are_read_and_shown_escaped(tmp_path: Path, name: str, shown: str) -> None:
    result = read(tmp_path, jsonl(), name)
    assert result.values == ROWS
    assert result.file.name == shown
    shown.encode("utf-8")


@posix
def test_case_25_names_that_are_one_in_nfc_stay_apart_and_long_ones_are_cut(tmp_path: Path) -> None:
    for name in ("\u00e9.jsonl", "e\u0301.jsonl"):
        (tmp_path / name).write_bytes(jsonl())
    names = [file.name for file in files_of([FeedbackSource(path=str(tmp_path / "*.jsonl"))])]
    assert len(set(names)) == 2
    assert all("\u00e9.jsonl" in name for name in names)
    long = read(tmp_path, jsonl(), "x" * 240 + ".jsonl")
    assert len(long.file.name) < 140
    assert long.file.name.endswith("x.jsonl")


CELLS = ["NA", "None", "null", "007", "TRUE", "5", "1e5", "", "=1+1", "@SUM(A1)", 'a "quote"', "two\nlines", "a,b;c\td"]


def test_case_43_csv_cells_are_the_text_that_stands_there(tmp_path: Path) -> None:
    rows = [{"prompt": cell, "chosen": "yes", "rejected": ""} for cell in CELLS]
    assert read(tmp_path, _csv(rows).encode(), "a.csv").values == rows
    assert read(tmp_path, _csv(rows, delimiter="\t").encode(), "a.tsv").values == rows


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_case_43_another_delimiter_is_found_and_flagged(tmp_path: Path, delimiter: str) -> None:
    result = read(tmp_path, _csv(ROWS, delimiter=delimiter).encode(), "a.csv")
    assert result.values == ROWS
    assert result.flags == {f"delimiter {delimiter!r}": 1}


def test_case_43_a_row_of_more_or_fewer_cells_and_an_open_quote_cost_themselves(tmp_path: Path) -> None:
    content = b'prompt,chosen,rejected\nq0,yes,no\na,b\na,b,c,d\n"open,b,c\nq1,yes,no\n\nq2,yes,no\n'
    result = read(tmp_path, content, "a.csv")
    assert result.values == ROWS
    assert result.faults == [(3, "wrong_cells"), (4, "wrong_cells"), (5, "unclosed_quote")]
    assert [one.number for one in result.rows] == [2, 3, 4, 5, 6, 8]
    assert result.rows[3].raw == b'"open,b,c'


def test_case_43_a_cell_that_is_not_utf_8_costs_its_row(tmp_path: Path) -> None:
    result = read(tmp_path, b"prompt,chosen,rejected\nq0,yes,no\nq\xff,yes,no\n", "a.csv")
    assert (result.values, result.faults) == (ROWS[:1], [(3, "invalid_utf8")])


@pytest.mark.parametrize("header", [b"prompt,prompt,rejected", b"prompt,\xff,rejected", b"prompt,a\x01,b"])
def test_case_43_a_header_that_is_none_is_refused(tmp_path: Path, header: bytes) -> None:
    assert read(tmp_path, header + b"\na,b,c\n", "a.csv").reason == "bad_header"


def _csv(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def parquet(folder: Path, table: pa.Table, name: str = "a.parquet", **options: Any) -> Path:
    pq.write_table(table, folder / name, **options)
    return folder / name


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_case_44_the_families_of_text_are_text(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({name: pa.array([r[name] for r in ROWS]).cast(kind) for name in ROWS[0]})
    assert outcome(found(parquet(tmp_path, table))).values == ROWS


def test_case_44_other_types_stay_what_they_are_for_the_reader_to_refuse(tmp_path: Path) -> None:
    import datetime as dt

    table = pa.table(
        {
            "prompt": [1, None, 3],
            "chosen": [[{"role": "assistant", "content": "é"}], None, []],
            "margin": [0.5, float("nan"), None],
            "at": [dt.datetime(2026, 1, 2, 3, tzinfo=dt.UTC)] * 3,
        }
    )
    result = outcome(found(parquet(tmp_path, table)))
    at = "2026-01-02T03:00:00+00:00"
    assert result.values == [
        {"prompt": 1, "chosen": [{"role": "assistant", "content": "é"}], "margin": 0.5, "at": at},
        {"prompt": None, "chosen": None, "margin": None, "at": at},
        {"prompt": 3, "chosen": [], "margin": None, "at": at},
    ]
    assert json.loads(result.rows[0].raw) == result.values[0]
    assert result.flags == {"nan_read_as_nothing": 1}


def test_case_44_text_that_is_not_utf_8_and_infinite_numbers_cost_their_row(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc")]
    )
    texts = {name: ["x", "y", "z"] for name in ("prompt", "chosen")} | {"rejected": ["1", "2", "3"]}
    for column, values, reason in (
        ("prompt", bad, "invalid_utf8"),
        ("chosen", pa.array([b"a", b"\xff\xfe", b"c"]), "invalid_utf8"),
        ("margin", pa.array([1.0, float("inf"), 2.0]), "invalid_number"),
    ):
        path = parquet(tmp_path, pa.table({**texts, column: values}))
        batch = read_file(found(path), ReadOptions())
        assert [(row.reason, row.line) for row in batch.rejected] == [(reason, 2)]
        assert [pair.line for pair in batch.pairs] == [1, 3]
    assert outcome(found(parquet(tmp_path, pa.table({"prompt": bad})))).rows[1].raw == b'{"prompt": "\xff"}'


def test_parquet_columns_that_nobody_asks_for_judge_no_row(tmp_path: Path) -> None:
    """A uuid, a picture, an embedding, an infinite number, a time that Python does not know."""
    unread = {
        "uid": pa.array([b"\xff" * 16, b"plain"], pa.binary()),
        "fixed": pa.array([b"\x80" * 16] * 2, pa.binary(16)),
        "thumbnail": pa.array([{"bytes": b"\x89PNG\xff", "path": "a.png"}, None]),
        "large": pa.array([b"\xff" * 6 * 2**20, None], pa.binary()),
        "loss": pa.array([float("inf"), float("-inf")]),
        "losses": pa.array([[float("nan"), float("inf")], []]),
        "at": pa.array([1, 2], pa.timestamp("ns")),
        "late": pa.array([2**62, 0], pa.timestamp("us")),
    }
    texts = {"prompt": ["q", "q2"], "chosen": ["yes", "yes"], "rejected": ["no", "no"]}
    file = found(parquet(tmp_path, pa.table({**texts, **unread})))
    batch = read_file(file, ReadOptions())
    assert (len(batch.pairs), batch.rejected) == (2, [])
    [first, second] = outcome(file).values
    assert (first["thumbnail"]["path"], bytes(first["thumbnail"]["bytes"])) == ("a.png", b"\x89PNG\xff")
    assert (second["uid"], str(second["loss"])) == ("plain", "-inf")
    meta = json.loads(as_json(batch.pairs[0].meta), parse_constant=lambda name: pytest.fail(name))
    assert meta["large"].startswith("<6291456 bytes, sha256 ")
    assert meta["losses"] == [None, "inf"]
    assert len(outcome(file).rows[0].raw) < 2_000


def test_a_parquet_column_of_pictures_is_a_modality_that_is_not_supported(tmp_path: Path) -> None:
    texts = {"prompt": ["q", "q2"], "chosen": ["yes", "yes"], "rejected": ["no", "no"]}
    pictures = pa.array([{"bytes": b"\x89PNG\xff", "path": "a.png"}, None])
    batch = read_file(found(parquet(tmp_path, pa.table({**texts, "image": pictures}))), ReadOptions())
    assert [(row.reason, row.line) for row in batch.rejected] == [("unsupported_modality", 1)]
    assert [pair.line for pair in batch.pairs] == [2]


@pytest.mark.parametrize("damage", ["footer", "page", "magic only", "cut"])
def test_case_44_a_corrupt_parquet_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = parquet(tmp_path, pa.table({"prompt": [os.urandom(20).hex() for _ in range(5_000)]}))
    content = bytearray(path.read_bytes())
    if damage == "footer":
        content[-60:-20] = b"\xff" * 40
    elif damage == "page":
        content[4:200] = b"\xff" * 196
    elif damage == "magic only":
        content = bytearray(b"PAR1PAR1")
    else:
        content = content[: len(content) // 2]
    assert read(tmp_path, bytes(content), "b.parquet").reason == "damaged_file"


def test_case_44_columns_given_twice_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    assert outcome(found(parquet(tmp_path, table))).reason == "bad_header"


def test_case_45_what_says_it_is_too_large_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = pa.table({"prompt": ["0" * 1_000_000] * 64})
    path = parquet(tmp_path, bomb, use_dictionary=False, compression="zstd")
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("it was read"))
    for limits, setting in (
        (Limits(unpacked_bytes=60_000_000), "feedback.max_unpacked_gib"),
        (Limits(unpacked_rows=63), "feedback.max_unpacked_rows"),
    ):
        refused = outcome(found(path), limits)
        assert refused.reason == "decompression_bomb"
        assert setting in str(refused.refused)
    monkeypatch.setattr(parquet_module, "CHUNK_BYTES", 100)
    small = parquet(tmp_path, pa.table({"prompt": ["x" * 200]}))
    result = outcome(found(small))
    assert result.reason == "row_group_too_large"
    assert "write smaller row groups" in str(result.refused)


def test_case_45_a_value_that_stands_in_many_rows_is_held_once(tmp_path: Path) -> None:
    path = parquet(tmp_path, pa.table({"prompt": ["x" * 100_000] * 1_000}), use_dictionary=True)
    rows = iter(rows_of(found(path)))
    assert len(next(rows).raw) > 100_000
    assert sum(1 for _ in rows) == 999


def test_a_row_over_the_limit_costs_itself_in_parquet_too(tmp_path: Path) -> None:
    path = parquet(tmp_path, pa.table({"prompt": ["a", "x" * 5 * 2**20, "b"]}))
    assert outcome(found(path)).faults == [(2, "row_too_large")]


# A file that changes


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("how", ["appended", "same size and time", "replaced", "removed"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, name: str, how: str) -> None:
    rows = [{"prompt": f"q{n}"} for n in range(3)]
    path = tmp_path / name
    if name == "a.parquet":
        parquet(tmp_path, pa.Table.from_pylist(rows))
    else:
        text = {"a.json": json.dumps(rows).encode(), "a.csv": _csv(rows).encode()}.get(name, jsonl(rows))
        path.write_bytes(gzip.compress(text, mtime=0) if name.endswith("gz") else text)
    file = found(path)
    reading = iter(rows_of(file))
    next(reading)
    status, content = path.stat(), path.read_bytes()
    if how == "appended":
        path.write_bytes(content + b"\n")
    elif how == "same size and time":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif how == "replaced":
        (tmp_path / "other").write_bytes(content[:-1])
        os.replace(tmp_path / "other", path)
    else:
        path.unlink()
    if how == "appended" and name == "a.jsonl":  # It is read as it was found.
        assert len(list(reading)) == len(rows) - 1
        return
    with pytest.raises(FileRefused) as refused:
        list(reading)
    assert refused.value.reason in ("changed_while_read", "unreadable", "truncated_file", "damaged_file")


def test_zlib_is_what_gzip_says(tmp_path: Path) -> None:
    """The limits are ours, so the decompression is too; it must read what the standard library writes."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    assert read(tmp_path, packer.compress(jsonl()) + packer.flush(), "a.jsonl.gz").values == ROWS
