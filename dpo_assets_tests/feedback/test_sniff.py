"""`format: auto`: what it says, how sure it is, and that it refuses rather than guesses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_assets.feedback.readers import Format, Row, formats
from dpo_assets.feedback.sniff import judge, sniff
from dpo_assets.feedback.sources import FileRefused
from dpo_assets_tests.feedback.exported import EXPORTS
from dpo_assets_tests.feedback.sources.reading import found, jsonl, outcome, row


def format_(name: str, fits: Callable[[Row], float]) -> Format:
    return Format(name, name, "{}", "a test", fits, read=lambda *_: iter(()))


def sure(name: str, fit: float) -> Format:
    return format_(name, lambda _: fit)


def test_the_best_of_the_formats_is_taken_with_what_was_seen_and_how_sure_it_is() -> None:
    sniffed = judge([{"prompt": 1, "chosen": 2}] * 3, [sure("one", 0.9), sure("other", 0.3), sure("none", 0.0)])
    assert (sniffed.format, sniffed.confidence) == ("one", 0.9)
    assert sniffed.message == "`one`, 90% sure, from 3 rows with the keys: chosen, prompt"


def test_two_that_fit_are_both_named_and_neither_is_taken() -> None:
    with pytest.raises(FileRefused) as refused:
        judge([{"a": 1}], [sure("one", 0.9), sure("other", 0.85), sure("third", 0.2)])
    assert refused.value.reason == "ambiguous_format"
    assert refused.value.message == (
        "`one` (90%) and `other` (85%) both fit 1 row with the keys: a. Write the one that it is under `format`"
    )


def test_none_that_fits_is_told_with_the_keys_and_the_nearest() -> None:
    with pytest.raises(FileRefused) as refused:
        judge([{"a": 1}, {"b": 1}], [sure("one", 0.3), sure("other", 0.0)])
    assert refused.value.reason == "unknown_format"
    assert refused.value.message == (
        "no format fits 2 rows with the keys: a; b; nearest is `one` (30%). Name one under `format`, if need be with a "
        "column map under `columns`"
    )
    with pytest.raises(FileRefused, match=r"no format fits 1 row with the keys: no keys\. Name one"):
        judge([{}], [sure("one", 0.0)])


def test_a_format_that_fits_some_rows_only_is_less_sure() -> None:
    some = format_("some", lambda row: 1.0 if "a" in row else 0.0)
    assert judge([{"a": 1}, {"a": 2}, {"b": 3}], [some]).confidence == 0.67
    with pytest.raises(FileRefused, match="no format fits"):
        judge([{"a": 1}, {"b": 2}, {"b": 3}], [some])


def test_a_format_whose_look_fails_or_lies_takes_nothing_from_the_others() -> None:
    def fail(_: Row) -> float:
        raise KeyError("no such key")

    assert judge([{"a": 1}], [format_("fails", fail), sure("right", 1.0)]).format == "right"
    assert judge([{"a": 1}], [sure("lies", 99.0)]).confidence == 1.0


def test_the_order_of_formats_does_not_matter() -> None:
    known = [sure("one", 0.9), sure("other", 0.6), sure("third", 0.7)]
    assert judge([{"a": 1}], known) == judge([{"a": 1}], known[::-1])


def auto(folder: Path, content: bytes, name: str = "a.jsonl", **source: Any) -> Any:
    (folder / name).write_bytes(content)
    return found(folder / name, format="auto", **source)


def test_a_file_gets_the_format_of_its_first_sound_rows(tmp_path: Path) -> None:
    hh = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    assert auto(tmp_path, jsonl()).format == "trl"
    assert auto(tmp_path, jsonl([hh])).format == "hh_rlhf"
    assert auto(tmp_path, b"broken\n" * 50 + jsonl([hh])).format == "hh_rlhf"
    assert found("builtin:oasst", format="auto").format == "oasst_tree"
    csv = auto(tmp_path, b"prompt,chosen,rejected\na,b,c\n", "a.csv")
    assert csv.format == "trl"
    assert "from 1 row with the keys: chosen, prompt, rejected" in csv.sniffed


def test_a_file_that_no_format_fits_is_refused_and_a_column_map_helps(tmp_path: Path) -> None:
    content = json.dumps({"question": "q", "best": "a", "worst": "b"}).encode()
    refused = outcome(auto(tmp_path, content))
    assert refused.reason == "unknown_format"
    assert "best, question, worst" in str(refused.refused)
    columns = {"prompt": "question", "chosen": "best", "rejected": "worst"}
    assert auto(tmp_path, content, columns=columns).format == "trl"


def test_a_file_without_a_sound_row_tells_no_format(tmp_path: Path) -> None:
    assert outcome(auto(tmp_path, b"broken\n" * 5_000)).reason == "unknown_format"
    assert outcome(auto(tmp_path, b"\n\n")).reason == "no_rows"


def test_only_the_first_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr("dpo_assets.feedback.sources.rows.parse_line", lambda raw: read.append(raw) or json.loads(raw))
    file = auto(tmp_path, b"\n".join(row(n) for n in range(5_000)))
    assert (file.format, len(read)) == ("trl", 20)
    assert sniff(file).format == "trl"


@pytest.mark.parametrize("name", sorted(path.stem for path in EXPORTS.glob("*.jsonl") if path.stem in formats()))
def test_the_documented_export_of_every_format_is_recognised(name: str) -> None:
    file = found(EXPORTS / f"{name}.jsonl", format="auto")
    assert file.format == name
    assert file.sniffed.startswith(f"`{name}`, ")


def test_rows_of_two_formats_in_one_file_are_refused(tmp_path: Path) -> None:
    both = b"\n".join((EXPORTS / f"{name}.jsonl").read_bytes().splitlines()[0] for name in ("openai", "vertex"))
    assert outcome(auto(tmp_path, both)).reason == "unknown_format"
