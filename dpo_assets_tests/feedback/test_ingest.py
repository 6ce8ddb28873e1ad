"""Files to batches: every row of every file ends as a pair or as a rejected row with its bytes, whatever is in it."""

from __future__ import annotations

import base64
import codecs
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandera.polars  # noqa: F401  Imported here, so that no single test pays for it.
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo_assets.feedback.batches import QUARANTINE, Batch, write_batch
from dpo_assets.feedback.ingest import read_file
from dpo_assets.feedback.pair import PAIR_COLUMNS, QUARANTINE_COLUMNS, Rejected
from dpo_assets.feedback.pool import stored
from dpo_assets.feedback.readers import ReadOptions, RowByRow
from dpo_assets.feedback.screening import Screening, screen
from dpo_assets.feedback.sources import NO_ROWS, FeedbackFile, SourceRow, files_of
from dpo_assets.feedback.sources import rows_of as rows_of_file
from dpo_assets.feedback.tables import pairs_frame, quarantine_frame
from dpo_assets.recipe import FeedbackSource, resolve_paths
from dpo_assets_tests.samples import assistant, pair, recipe, user

FORMATS = ["trl", "oasst_tree", "hh_rlhf"]
OPTIONS = ReadOptions("best_worst", include_synthetic=False)


def read(content: bytes, format: str = "trl", options: ReadOptions = OPTIONS) -> Batch:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "export.jsonl"
        path.write_bytes(content)
        return read_file(FeedbackFile(path, path.name, format), options)


def rows_of(content: bytes) -> list[bytes]:
    """The rows of a file, counted without the package: what stands between line feeds and is not blank."""
    return [line.rstrip(b"\r") for line in content.removeprefix(codecs.BOM_UTF8).split(b"\n") if line.strip()]


def cut_by_the_sources(content: bytes) -> list[SourceRow]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "export.jsonl"
        path.write_bytes(content)
        return list(rows_of_file(FeedbackFile(path, path.name, "trl")))


def row(number: int = 0, **changes: Any) -> bytes:
    return json.dumps(
        {"prompt": f"q{number}", "chosen": "yes", "rejected": "no"} | changes, ensure_ascii=False
    ).encode()


# Arbitrary files

_ROWS = [
    row(),
    b'{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": "\\n\\nHuman: a\\n\\nAssistant: c"}',
    b'{"prompt": {"role": "prompter", "text": "q", "replies": ['
    b'{"role": "assistant", "text": "a", "rank": 0}, {"role": "assistant", "text": "b", "rank": 1}]}}',
]


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """Good rows of all formats, with a few bytes of the file replaced, removed or put in."""
    content = bytearray(b"\n".join(draw(st.lists(st.sampled_from(_ROWS), min_size=1, max_size=4))))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(content)))
        content[place : place + draw(st.integers(0, 3))] = draw(
            st.one_of(
                st.binary(max_size=3), st.sampled_from([b"\n", b'"', b"{", b"}", b"[", b"]", b"\\", b"\xff", b"\0"])
            )
        )
    return bytes(content)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=60, deadline=None)
@given(content=st.one_of(st.binary(max_size=200), damaged_files()))
@example(content=b"")
@example(content=codecs.BOM_UTF8)
@example(content=b"\n \r\n\t\n")
@example(content=b"\0" * 50)
@example(content=b"[" * 5000)
def test_any_bytes_are_read_without_raising_and_every_row_is_accounted_for(format: str, content: bytes) -> None:
    batch = read(content, format)
    expected = rows_of(content)
    assert batch.rows_in == len(batch.pairs) + len(batch.rejected)
    if not expected:
        assert [(r.reason, r.line, r.raw) for r in batch.rejected] == [(NO_ROWS, 0, b"")]
        return
    if any(rejected.line == 0 for rejected in batch.rejected):
        # Refused as a whole, by its first bytes: an archive, say. Then nothing else is said about it.
        assert batch.rows_in == 1
        return
    # A file that is no JSONL (values over several lines, say) is cut by the sources: their rows count then.
    given = {row.number: row.raw for row in cut_by_the_sources(content)}
    assert batch.rows == len(given)
    lines = [pair.line for pair in batch.pairs] + [rejected.line for rejected in batch.rejected]
    # A tree may hold several comparisons; a row of the other formats is one pair or one rejected row.
    assert set(lines) == set(given)
    assert len(lines) == len(given) or format == "oasst_tree"
    assert all(rejected.reason and rejected.raw == given[rejected.line] for rejected in batch.rejected)
    assert pairs_frame(batch.pairs).height == len(batch.pairs)
    raw = quarantine_frame(batch.rejected)["raw"].to_list()
    assert [base64.b64decode(text) for text in raw] == [rejected.raw for rejected in batch.rejected]


@settings(max_examples=40, deadline=None)
@given(contents=st.lists(damaged_files(), min_size=1, max_size=3))
def test_what_is_read_from_a_file_does_not_depend_on_what_was_read_before(contents: list[bytes]) -> None:
    assert [read(content) for content in contents] == [read(content) for content in reversed(contents)][::-1]


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(st.one_of(st.binary(max_size=200), damaged_files()), min_size=1, max_size=3), data=st.data())
def test_any_files_end_as_accepted_quarantined_or_duplicate_rows_the_same_in_any_order(
    contents: list[bytes], data: st.DataObject
) -> None:
    def outcome(names: list[int]) -> tuple[list[Any], list[Any], int, int]:
        with tempfile.TemporaryDirectory() as work:
            folders, rows = [], 0
            for n in names:
                path, folder = Path(work) / f"{n}.jsonl", Path(work) / str(n)
                path.write_bytes(contents[n])
                folder.mkdir()
                rows += write_batch(read_file(FeedbackFile(path, path.name, FORMATS[n]), OPTIONS), folder)["rows_in"]
                folders.append(folder)
            screening = Screening(stored(folders))
            kept = [row for part, _ in screening.parts() for row in part.rows()]
            faults = pl.concat([*(pl.read_parquet(f / QUARANTINE) for f in folders), screening.quarantine()])
            return kept, sorted(faults.filter(faults["line"] > 0).rows()), screening.duplicates, rows

    names = list(range(len(contents)))
    accepted, quarantined, duplicates, rows_in = outcome(names)
    assert rows_in == len(accepted) + len(quarantined) + duplicates
    assert outcome(data.draw(st.permutations(names))) == (accepted, quarantined, duplicates, rows_in)


# Damaged rows among good ones

DAMAGED: list[tuple[str, bytes]] = [
    ("invalid_json", b'{"prompt": "q", "chosen": "ye'),
    ("duplicate_key", b'{"prompt": "q", "chosen": "a", "chosen": "b", "rejected": "c"}'),
    ("invalid_json", b'{"prompt": "q", "chosen": "a", "rejected": "b", "margin": NaN}'),
    ("invalid_utf8", b'{"prompt": "q", "chosen": "\\ud83d", "rejected": "b"}'),
    ("invalid_utf8", b'{"prompt": "q", "chosen": "caf\xe9", "rejected": "b"}'),
    ("not_an_object", b"42"),
    ("not_an_object", b'["q", "a", "b"]'),
    ("too_deep", b"[" * 5000),
    ("missing_field", b'{"prompt": "q", "chosen": null, "rejected": "b"}'),
    ("missing_field", b'{"prompt": "q", "chosen": "a"}'),
    ("wrong_type", b'{"prompt": 5, "chosen": "a", "rejected": "b"}'),
    ("no_shared_prompt", b'{"chosen": "a", "rejected": "b"}'),
]


@pytest.mark.parametrize(("reason", "damaged"), DAMAGED, ids=[f"{n}-{r}" for n, (r, _) in enumerate(DAMAGED)])
def test_a_damaged_row_costs_that_row_and_nothing_else(reason: str, damaged: bytes) -> None:
    batch = read(b"\n".join([row(1), damaged, row(2)]) + b"\n")
    assert [pair.prompt[0]["content"] for pair in batch.pairs] == ["q1", "q2"]
    assert [pair.line for pair in batch.pairs] == [1, 3]
    [rejected] = batch.rejected
    assert (rejected.reason, rejected.line, rejected.row, rejected.raw) == (reason, 2, "line-2", damaged)
    assert rejected.source == "export.jsonl"
    assert rejected.message


def test_a_truncated_last_line_is_quarantined_and_the_rest_goes_on() -> None:
    whole = b"\n".join(row(n) for n in range(5))
    batch = read(whole[:-7])
    assert len(batch.pairs) == 4
    [rejected] = batch.rejected
    assert (rejected.reason, rejected.line, rejected.raw) == ("invalid_json", 5, row(4)[:-7])


def test_a_row_too_large_is_quarantined_with_its_beginning_and_the_rest_goes_on() -> None:
    large = row(1, chosen="x" * (5 * 2**20))
    batch = read(b"\n".join([row(0), large, row(2)]))
    assert [pair.line for pair in batch.pairs] == [1, 3]
    [rejected] = batch.rejected
    assert (rejected.reason, rejected.line) == ("row_too_large", 2)
    assert len(rejected.raw) < len(large)
    assert large.startswith(rejected.raw)


@pytest.mark.parametrize("content", [b"", b"\n\n", b" \t\r\n", codecs.BOM_UTF8], ids=repr)
@pytest.mark.parametrize("format", FORMATS)
def test_a_file_without_a_row_is_one_rejected_file(content: bytes, format: str) -> None:
    batch = read(content, format)
    assert batch.pairs == []
    assert batch.rejected == [Rejected(NO_ROWS, "it holds no row", "export.jsonl", "", 0, b"")]


def test_byte_order_mark_windows_line_ends_and_odd_separators_change_no_text() -> None:
    text = "one\u2028two\u2029three\u0085four"
    plain = read(b"\n".join([row(1, chosen=text), row(2)]))
    windows = read(codecs.BOM_UTF8 + b"\r\n".join([row(1, chosen=text), row(2), b""]))
    assert plain.rejected == windows.rejected == []
    assert plain.pairs == windows.pairs
    assert plain.pairs[0].chosen == [assistant(text)]


def test_texts_that_look_like_numbers_dates_or_nothing_stay_texts() -> None:
    answers = ["5", "NA", "007", "TRUE", "=1+1", "2024-01-01", "null"]
    batch = read(b"\n".join(row(n, chosen=answer) for n, answer in enumerate(answers)))
    table = pairs_frame(batch.pairs)
    assert [messages[0]["content"] for messages in table["chosen"].to_list()] == answers


def test_a_huge_integer_costs_its_row_and_nothing_else() -> None:
    batch = read(b"\n".join([row(1), b'{"id": ' + b"1" * 5_000 + b"}", row(2)]))
    assert (len(batch.pairs), len(batch.rejected)) == (2, 1)


@pytest.mark.parametrize(
    ("format", "damaged"),
    [
        ("trl", b'{"prompt": "q", "chosen": "a", "rejected": "b", "margin": 1' + b"0" * 400 + b"}"),
        ("oasst_tree", b'{"prompt": {"role": ["prompter"], "text": "q"}}'),
        ("oasst_tree", _ROWS[2].replace(b'"rank": 1', b'"rank": 1' + b"0" * 400)),
    ],
    ids=["huge margin", "role in a list", "huge rank"],
)
def test_a_value_that_a_reader_stumbles_over_costs_its_row_and_nothing_else(format: str, damaged: bytes) -> None:
    good = _ROWS[0] if format == "trl" else _ROWS[2]
    batch = read(b"\n".join([good, damaged, good]), format)
    assert {pair.line for pair in batch.pairs} >= {1, 3}


def test_a_reader_that_fails_itself_costs_the_row_that_showed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_badly(row: dict[str, Any], *_: Any) -> Iterator[Any]:
        if row["prompt"] == "q1":
            raise ZeroDivisionError("a bug")
        yield pair(7)

    badly = SimpleNamespace(reader=lambda options: RowByRow(read_badly, options))
    monkeypatch.setattr("dpo_assets.feedback.ingest.format_named", lambda _: badly)
    batch = read(b"\n".join(row(n) for n in range(3)))
    assert len(batch.pairs) == 2
    [rejected] = batch.rejected
    assert (rejected.reason, rejected.line, rejected.raw) == ("reader_failed", 2, row(1))
    assert rejected.message == "the trl reader failed on it: ZeroDivisionError: a bug"


# Tables


def test_the_tables_have_the_declared_columns_even_when_they_are_empty() -> None:
    assert pairs_frame([]).columns == pairs_frame([pair()]).columns == [column.name for column in PAIR_COLUMNS]
    assert pairs_frame([]).schema == pairs_frame([pair()]).schema
    assert quarantine_frame([]).columns == [column.name for column in QUARANTINE_COLUMNS]


def test_other_columns_of_a_row_are_kept_as_json() -> None:
    batch = read(row(1, lang="de", scores=[1, 2.5], who={"ä": None}))
    [meta] = pairs_frame(batch.pairs)["meta"].to_list()
    assert json.loads(meta) == {"lang": "de", "scores": [1, 2.5], "who": {"ä": None}}


# The embedded real feedback


def _messages(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for answer in node["replies"]:
        yield from _messages(answer)


def counted_by_hand(pairing: str) -> tuple[int, int]:
    """(pairs of human answers, pairs with a machine-written side) of the embedded trees, by another reader."""
    human = synthetic = 0
    text = (files("dpo_assets") / "data/oasst/oasst_en_100_tree.jsonl").read_text(encoding="utf-8")
    messages = [message for line in text.split("\n") if line for message in _messages(json.loads(line)["prompt"])]
    for message in messages:
        if message["role"] != "prompter":
            continue
        ranked = {answer["rank"]: answer for answer in message["replies"] if answer.get("rank") is not None}
        order = [ranked[rank] for rank in sorted(ranked)]
        pairs = list(pairwise(order)) if pairing == "adjacent" else list(zip(order[:1], order[1:][-1:], strict=False))
        machine = sum(bool(one.get("synthetic") or other.get("synthetic")) for one, other in pairs)
        human, synthetic = human + len(pairs) - machine, synthetic + machine
    return human, synthetic


@pytest.mark.parametrize(("pairing", "expected"), [("best_worst", (207, 5)), ("adjacent", (417, 12))])
def test_the_embedded_oasst_sample_gives_the_pairs_that_a_count_by_hand_gives(
    pairing: str, expected: tuple[int, int]
) -> None:
    [file] = files_of([FeedbackSource(path="builtin:oasst", format="oasst_tree")])
    assert counted_by_hand(pairing) == expected
    human, synthetic = expected
    without = read_file(file, ReadOptions(pairing, include_synthetic=False))
    assert len(without.pairs) == human
    assert Counter(rejected.reason for rejected in without.rejected) == {"synthetic": synthetic}
    everything = read_file(file, ReadOptions(pairing, include_synthetic=True))
    assert (len(everything.pairs), everything.rejected) == (human + synthetic, [])


def test_every_pair_of_the_embedded_sample_passes_every_rule() -> None:
    [file] = files_of([FeedbackSource(path="builtin:oasst", format="oasst_tree")])
    batch = read_file(file, OPTIONS)
    screened = screen(pairs_frame(batch.pairs), quarantine_frame(batch.rejected))
    assert screened.pairs.height + screened.duplicates == 207
    assert set(screened.quarantine["reason"]) == {"synthetic"}
    assert all(margin > 0 for margin in screened.pairs["margin"])


# Finding files


def test_two_files_of_one_name_are_named_apart(tmp_path: Path) -> None:
    for part in ("monday", "tuesday"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "export.jsonl").write_bytes(b"broken")
    found = files_of([FeedbackSource(path=str(tmp_path / "*" / "export.jsonl"))])
    assert len({read_file(file, OPTIONS).rejected[0].source for file in found}) == 2


def test_a_pattern_is_found_in_a_folder_whose_name_holds_brackets(tmp_path: Path) -> None:
    folder = tmp_path / "run[1]"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(row())
    resolved = resolve_paths(recipe(feedback={"sources": [{"path": "*.jsonl"}]}), folder)
    assert [file.path for file in files_of(resolved.feedback.sources)] == [folder / "a.jsonl"]


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights on Windows")
def test_a_link_to_a_file_is_read_like_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(row())
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    found = files_of([FeedbackSource(path=str(tmp_path / "link.jsonl"))])
    assert read_file(found[0], OPTIONS).pairs[0].prompt == [user("q0")]
