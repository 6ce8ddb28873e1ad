"""Judged answers to pairs: what each policy makes, what it leaves and why, and that no order changes anything."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.feedback.pair import JudgedAnswer
from dpo_assets.feedback.pairing import POLICIES, Paired, comparisons, pair_answers, proposed
from dpo_assets.feedback.tables import answers_frame
from dpo_assets_tests.samples import assistant, user


def answer(text: str, score: float, prompt: str = "q", **changes: Any) -> JudgedAnswer:
    values: dict[str, Any] = {
        "prompt": [user(prompt)], "answer": [assistant(text)], "score": score, "source": "votes.jsonl",
        "row": f"{prompt}-{text}", "line": 1, "label_kind": "human_rating", "raw": f"raw of {text}".encode(),
    }  # fmt: skip
    return JudgedAnswer(**values | changes)


def paired(*answers: JudgedAnswer, policy: str = "best_worst", min_margin: float = 0.0) -> Paired:
    return pair_answers(answers_frame(answers), policy, min_margin)


def texts(result: Paired) -> list[tuple[str, str, float]]:
    return sorted((p.chosen[-1]["content"], p.rejected[-1]["content"], p.margin or 0.0) for p in result.pairs)


FIVE = [answer("a", 5), answer("b", 3), answer("c", 3), answer("d", 2), answer("e", 1)]


def test_best_worst_takes_the_two_ends_and_leaves_the_middle() -> None:
    result = paired(*FIVE)
    assert texts(result) == [("a", "e", 4.0)]
    assert Counter(row.reason for row in result.rejected) == {"not_compared": 3}
    assert result.counts == {
        "human_rating": {"answers": 5, "left: not_compared": 3, "pairs": 1, "prompts": 1, "used": 2}
    }


def test_adjacent_takes_each_against_the_next_and_no_tie() -> None:
    result = paired(*FIVE, policy="adjacent")
    # Which of b and c, which are equally good, stands beside a and which beside d depends on their content alone.
    assert [margin for *_, margin in texts(result)] == [2.0, 1.0, 1.0]
    assert result.rejected == []


def test_all_above_margin_takes_every_two_that_lie_apart() -> None:
    result = paired(*FIVE, policy="all_above_margin", min_margin=2)
    assert texts(result) == [
        ("a", "b", 2.0), ("a", "c", 2.0), ("a", "d", 3.0), ("a", "e", 4.0), ("b", "e", 2.0), ("c", "e", 2.0)
    ]  # fmt: skip
    assert result.rejected == []


@pytest.mark.parametrize("policy", POLICIES)
def test_equal_scores_are_a_tie_and_make_no_pair(policy: str) -> None:
    result = paired(answer("a", 1), answer("b", 1), policy=policy)
    assert result.pairs == []
    assert {(r.reason, r.raw) for r in result.rejected} == {("tie", b"raw of a"), ("tie", b"raw of b")}


def test_scores_that_lie_less_than_the_margin_apart_are_a_tie() -> None:
    result = paired(answer("a", 4), answer("b", 3), min_margin=2)
    assert result.pairs == []
    assert {r.message for r in result.rejected} == {"no two answers to this prompt lie 2 apart"}


def test_a_thumb_pairs_within_its_own_prompt_only() -> None:
    up = answer("yes", 1, prompt="one", label_kind="human_thumb")
    down = answer("no", -1, prompt="two", label_kind="human_thumb")
    result = paired(up, down)
    assert result.pairs == []
    assert Counter(row.reason for row in result.rejected) == {"unpaired": 2}
    [pair] = paired(up, answer("no", -1, prompt="one", label_kind="human_thumb")).pairs
    assert (pair.label_kind, pair.margin, pair.prompt) == ("human_thumb", 2.0, [user("one")])


def test_judgements_on_different_scales_are_never_compared() -> None:
    result = paired(answer("a", 5), answer("b", -1, label_kind="human_thumb"))
    assert result.pairs == []
    assert Counter(row.reason for row in result.rejected) == {"unpaired": 2}


def test_the_two_sides_of_a_pair_may_stand_in_two_files() -> None:
    [pair] = paired(answer("a", 1, source="monday.jsonl"), answer("b", -1, source="tuesday.jsonl", line=9)).pairs
    assert (pair.source, pair.meta["rejected_from"]) == ("monday.jsonl", "tuesday.jsonl:9")


def test_an_answer_that_was_judged_twice_counts_once_with_the_mean_of_its_scores() -> None:
    result = paired(answer("a", 5), answer("a", 1, row="again"), answer("b", 4))
    assert texts(result) == [("b", "a", 1.0)]
    assert result.counts["human_rating"]["used"] == 3


def test_a_prompt_is_the_same_however_its_white_space_and_accents_are_written() -> None:
    assert len(paired(answer("a", 1, prompt="caf\u00e9 ?"), answer("b", 0, prompt=" cafe\u0301  ?")).pairs) == 1


def test_a_pair_says_what_it_was_made_of() -> None:
    one = answer("a", 2, meta={"model": "x"}, user="u1", created_at="2026-01-02T00:00:00Z", flags=("nfc",))
    other = answer("b", 1, meta={"model": "y"}, user="u1", created_at="2026-01-01T00:00:00Z")
    [pair] = paired(one, other).pairs
    assert pair.row == "q-a>q-b"
    assert pair.meta["chosen"] == {"model": "x"}
    assert pair.meta["rejected"] == {"model": "y"}
    assert (pair.user, pair.created_at, pair.flags) == ("u1", "2026-01-02T00:00:00Z", ("nfc",))
    [mixed] = paired(one, answer("b", 1, user="u2")).pairs
    assert mixed.user is None


def test_an_answer_that_is_left_is_found_again_by_its_file_row_line_and_bytes() -> None:
    [left] = paired(answer("a", 1, source="b.jsonl", row="r7", line=7)).rejected
    assert (left.reason, left.source, left.row, left.line, left.raw) == ("unpaired", "b.jsonl", "r7", 7, b"raw of a")


def test_an_unknown_policy_is_told_those_that_exist() -> None:
    with pytest.raises(ValueError, match="best_worst, adjacent, all_above_margin"):
        proposed([1, 2], "worst_best")


@settings(max_examples=60, deadline=None)
@given(scores=st.lists(st.integers(0, 4), max_size=6), policy=st.sampled_from(POLICIES), margin=st.integers(0, 3))
def test_every_comparison_prefers_the_higher_score_by_the_margin(scores: list[int], policy: str, margin: int) -> None:
    found = comparisons(scores, policy, margin)
    assert len(set(found)) == len(found)
    assert all(scores[a] > scores[b] and scores[a] - scores[b] >= margin for a, b in found)
    if policy == "all_above_margin":
        apart = sum(a != b and abs(a - b) >= margin for a, b in combinations(scores, 2))
        assert len(found) == apart


_answers = st.lists(
    st.builds(
        answer,
        st.sampled_from("abcd"),
        st.sampled_from([-1, 0, 1, 1, 2]),
        st.sampled_from(["one", "two"]),
        label_kind=st.sampled_from(["human_thumb", "human_rating"]),
        source=st.sampled_from(["monday.jsonl", "tuesday.jsonl"]),
        line=st.integers(1, 3),
        row=st.sampled_from(["r", "s"]),
    ),
    max_size=10,
)


@settings(max_examples=80, deadline=None)
@given(answers=_answers, policy=st.sampled_from(POLICIES), margin=st.sampled_from([0, 1, 2]), data=st.data())
def test_every_answer_is_in_a_pair_or_left_with_a_reason_in_whatever_order(
    answers: list[JudgedAnswer], policy: str, margin: int, data: st.DataObject
) -> None:
    result = paired(*answers, policy=policy, min_margin=margin)
    used = sum(count["used"] for count in result.counts.values())
    assert used + len(result.rejected) == len(answers)
    shuffled = data.draw(st.permutations(answers))
    again = paired(*shuffled, policy=policy, min_margin=margin)
    assert [(p.pair_id, p.row, p.source, p.margin) for p in again.pairs] == [
        (p.pair_id, p.row, p.source, p.margin) for p in result.pairs
    ]
    assert Counter(map(repr, again.rejected)) == Counter(map(repr, result.rejected))
    assert again.counts == result.counts
