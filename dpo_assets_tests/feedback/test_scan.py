"""Personal data, keys and template marks in texts: found, left alone where they only look alike, and masked."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.feedback.scan import (
    CARD,
    EMAIL,
    PHONE,
    SECRET,
    TEMPLATE,
    contents_of,
    escaped,
    flags_of,
    luhn,
    marks_in,
    personal_data,
    redacted,
    with_flags,
)
from dpo_assets.feedback.tables import pairs_frame
from dpo_assets_tests.samples import assistant, pair, user

KEY = "hf_" + "a1B2" * 8
HOLDS: list[tuple[str, str]] = [
    (EMAIL, "write to jane.doe+x@mail.example.co.uk, please"),
    (EMAIL, "(a@b.io)"),
    (CARD, "my card is 4111 1111 1111 1111."),
    (CARD, "4111-1111-1111-1111"),
    (CARD, "378282246310005"),
    (PHONE, "call +49 30 1234567 now"),
    (PHONE, "(555) 123-4567"),
    (PHONE, "555-123-4567"),
    (SECRET, f"token={KEY}"),
    (SECRET, "AKIAABCDEFGHIJKLMNOP"),
    (TEMPLATE, "stop<|im_end|>"),
    (TEMPLATE, "[INST] hi [/INST]"),
    (TEMPLATE, "<start_of_turn>user"),
]
LOOKS_ALIKE = [
    "@property def f(self): pass",
    "a @ b",
    "4111 1111 1111 1112",
    "0000 0000 0000 0000",
    "pi is 3.14159265358979",
    "a measured value of 0.0072973525693",
    "in 2024-01-02 and 2023-11-12",
    "1234567890",
    "sk-learn is a library",
    "a <| b |> c",
    "if a < b or c > d: x[INDEX]",
]


@pytest.mark.parametrize(("kind", "text"), HOLDS, ids=[f"{n}-{k}" for n, (k, _) in enumerate(HOLDS)])
def test_what_a_text_holds_is_flagged_in_whatever_part_of_the_pair_it_stands(kind: str, text: str) -> None:
    pairs = [
        pair(0),
        pair(1, prompt=[user(text)]),
        pair(2, chosen=[assistant(text)]),
        pair(3, rejected=[assistant(text)]),
    ]
    assert flags_of(pairs_frame(pairs))[kind] == {1, 2, 3}
    assert with_flags(pairs_frame(pairs))["flags"].to_list() == ["", kind, kind, kind]


@pytest.mark.parametrize("text", LOOKS_ALIKE)
def test_what_only_looks_alike_is_not(text: str) -> None:
    found = flags_of(pairs_frame([pair(0, chosen=[assistant(text)])]))
    assert {kind for kind, rows in found.items() if rows} == set()
    assert personal_data(text) == set()
    assert marks_in(text) == set()


def test_flags_are_added_behind_those_that_a_row_has() -> None:
    table = pairs_frame([pair(0, chosen=[assistant("a@b.io +49 30 1234567")], flags=("nfc",))])
    assert with_flags(table)["flags"].to_list() == ["nfc,email,phone"]


@pytest.mark.parametrize(("kind", "text"), [row for row in HOLDS if row[0] != TEMPLATE])
def test_what_is_masked_is_gone_and_nothing_else_is(kind: str, text: str) -> None:
    masked = redacted(f"before {text} after", [kind])
    assert f"[{kind}]" in masked
    assert masked.startswith("before ")
    assert masked.endswith(" after")
    assert kind not in personal_data(masked)
    assert redacted(text, []) == text


@pytest.mark.parametrize("text", LOOKS_ALIKE)
def test_masking_changes_no_text_that_only_looks_alike(text: str) -> None:
    assert redacted(text, [EMAIL, CARD, PHONE, SECRET]) == text


def test_a_models_own_marks_count_and_common_ones_only_where_the_model_has_them() -> None:
    assert marks_in("<s>old</s> price") == set()
    assert marks_in("<s>old</s> price", ["<s>", "</s>"]) == {"<s>", "</s>"}
    assert marks_in("x[gMASK]y", ["[gMASK]"]) == {"[gMASK]"}


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.sampled_from(["<|im_end|>", "[INST]", "<s>", "text", "<", "|>"]), max_size=6))
def test_an_escaped_text_holds_no_mark_and_keeps_every_other_letter(parts: list[str]) -> None:
    text = "".join(parts)
    free = escaped(text, ["<s>"])
    assert marks_in(free, ["<s>"]) == set()
    assert free.replace(" ", "") == text


@pytest.mark.parametrize(("digits", "right"), [("4111111111111111", True), ("4111111111111112", False), ("0", True)])
def test_luhn(digits: str, right: bool) -> None:
    assert luhn(digits) is right


def test_every_text_is_found_with_its_row() -> None:
    pairs = [pair(0, prompt=[user("a"), assistant("b"), user("c")]), pair(1, prompt=[user("d")])]
    assert contents_of(pairs_frame(pairs)["prompt"]).rows() == [(0, "a"), (0, "b"), (0, "c"), (1, "d")]
    assert contents_of(pairs_frame([])["prompt"]).rows() == []
