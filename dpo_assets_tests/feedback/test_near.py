"""Near duplicates: proposed by hashes, decided by the exact measure, at a cost that is bounded."""

from __future__ import annotations

import random
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.feedback.near import (
    BAND_COLUMNS,
    COMPARED,
    band_frame,
    candidates,
    run_hashes,
    similarity,
    tokens_of,
)
from dpo_assets.feedback.pair import Pair
from dpo_assets.feedback.tables import pairs_frame
from dpo_assets_tests.samples import assistant, pair, user

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "nine",
    "old",
    "men",
    "watch",
    "from",
    "under",
    "one",
    "tall",
    "green",
    "tree",
]


def text(seed: int, words: int = 80) -> str:
    draw = random.Random(seed)
    return " ".join(f"{draw.choice(WORDS)}{draw.randint(0, 99)}" for _ in range(words))


def long_pair(number: int, **changes: Any) -> Pair:
    values = {
        "prompt": [user(text(3 * number))], "chosen": [assistant(text(3 * number + 1))],
        "rejected": [assistant(text(3 * number + 2))],
    }  # fmt: skip
    return pair(number, **values | changes)


def compared(*pairs: Pair) -> pl.DataFrame:
    table = pairs_frame(pairs)
    rank = table["pair_id"].rank("ordinal").cast(pl.UInt32) - 1
    return candidates(band_frame(table).get_columns(), rank)


def proposals(*pairs: Pair) -> set[frozenset[int]]:
    return {frozenset(row) for row in compared(*pairs).rows()}


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text(max_size=30), max_size=5), length=st.integers(1, 8))
def test_there_is_one_run_for_every_token_and_equal_texts_have_equal_runs(texts: list[str], length: int) -> None:
    texts = [t for t in texts if not any("\ud800" <= c <= "\udfff" for c in t)]
    hashes, starts, counts = run_hashes([*texts, *texts], length)
    assert counts.tolist() == [len(tokens_of(t)) for t in (*texts, *texts)]
    assert len(hashes) == counts.sum()
    half = int(counts[: len(texts)].sum())
    assert hashes[:half].tolist() == hashes[half:].tolist()
    assert starts.size == counts.size


@settings(max_examples=100, deadline=None)
@given(one=st.text(max_size=30), other=st.text(max_size=30))
def test_texts_of_other_tokens_have_other_runs(one: str, other: str) -> None:
    try:
        a, b = (run_hashes([t], 3)[0].tolist() for t in (one, other))
    except UnicodeEncodeError:
        return
    if tokens_of(one) == tokens_of(other):
        assert a == b
    elif sorted(tokens_of(one)) != sorted(tokens_of(other)) and len(one) == len(set(one.lower())):
        assert a != b


def test_case_and_punctuation_are_no_difference_and_other_scripts_are_read_letter_by_letter() -> None:
    assert tokens_of("Hi, there! x2") == ["hi", "there", "x2"]
    assert tokens_of("日本語 é") == ["日", "本", "語", "é"]
    assert run_hashes(["Hi, THERE"], 3)[0].tolist() == run_hashes(["hi there!"], 3)[0].tolist()


def test_a_pair_with_a_few_other_words_is_proposed_and_similar() -> None:
    one = long_pair(0)
    words = one.chosen[0]["content"].split()
    words[40] = "else"
    other = long_pair(0, chosen=[assistant(" ".join(words))], row="other")
    assert proposals(one, long_pair(1), other, long_pair(2)) == {frozenset({0, 2})}
    table = pairs_frame([one, other])
    assert 0.9 < similarity(table.row(0, named=True), table.row(1, named=True)) < 1


def test_a_pair_that_shares_all_but_one_answer_is_not_similar() -> None:
    """The two pairs of three ranked answers: equal prompts, one answer in common."""
    one = long_pair(0)
    other = long_pair(0, chosen=one.rejected, rejected=[assistant(text(99))])
    table = pairs_frame([one, other])
    assert similarity(table.row(0, named=True), table.row(1, named=True)) < 0.1


def test_short_answers_are_told_apart_by_their_prompts() -> None:
    many = [
        pair(n, prompt=[user(text(n, 12))], chosen=[assistant("Yes.")], rejected=[assistant("No.")]) for n in range(50)
    ]
    assert proposals(*many) == set()


def test_text_without_a_token_is_no_candidate() -> None:
    marks = [
        pair(n, prompt=[user("?!")], chosen=[assistant("!" * (n + 1))], rejected=[assistant("-")]) for n in range(3)
    ]
    table = band_frame(pairs_frame(marks))
    assert all(table[name].null_count() == 3 for name in BAND_COLUMNS)
    assert proposals(*marks) == set()


def test_the_number_of_comparisons_is_bounded_even_when_all_pairs_are_alike() -> None:
    base = text(0).split()
    many = []
    for n in range(200):
        words = list(base)
        words[n % 80] = f"word{n}"
        many.append(long_pair(0, chosen=[assistant(" ".join(words))], row=f"r{n}"))
    assert compared(*many).height <= COMPARED * len(many)


def test_what_is_proposed_does_not_depend_on_the_order_of_rows() -> None:
    base = [long_pair(n % 3, chosen=[assistant(text(3 * (n % 3) + 1) + f" {n}")], row=f"r{n}") for n in range(12)]
    found = {frozenset((base[a].row, base[b].row)) for a, b in (tuple(p) for p in proposals(*base))}
    turned = base[::-1]
    again = {frozenset((turned[a].row, turned[b].row)) for a, b in (tuple(p) for p in proposals(*turned))}
    assert found == again != set()


@pytest.mark.parametrize("changed", [1, 4])
def test_nine_in_ten_near_duplicates_are_proposed(changed: int) -> None:
    found = 0
    for n in range(60):
        one = long_pair(n)
        words = one.rejected[0]["content"].split()
        for place in range(changed):
            words[place * 17 + 3] = "changed"
        found += bool(proposals(one, long_pair(n, rejected=[assistant(" ".join(words))], row="x")))
    assert found >= 54
