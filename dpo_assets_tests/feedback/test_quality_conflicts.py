"""Contradicting preferences: reversals in other clothes, and circles."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.feedback.quality_conflicts import contradictions_in, in_circles
from dpo_assets.feedback.tables import pairs_frame
from dpo_assets_tests.samples import assistant, pair, user

edges = st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("abcdef")), max_size=14)


def judged(*preferences: tuple[str, str], prompts: int = 1) -> pl.DataFrame:
    """Pairs "first beats second", on one prompt or in turn on several."""
    return pairs_frame(
        [
            pair(n, prompt=[user(f"question {n % prompts}")], chosen=[assistant(c)], rejected=[assistant(r)])
            for n, (c, r) in enumerate(preferences)
        ]
    )


@settings(max_examples=200, deadline=None)
@given(edges)
def test_an_edge_lies_in_a_circle_if_its_loser_beats_its_winner_over_some_path(found: list[tuple[str, str]]) -> None:
    def reaches(start: str, goal: str) -> bool:
        seen, waiting = set(), [start]
        while waiting:
            node = waiting.pop()
            if node == goal:
                return True
            if node not in seen:
                seen.add(node)
                waiting += [loser for winner, loser in found if winner == node]
        return False

    assert in_circles(found) == {(a, b) for a, b in found if a != b and reaches(b, a)}


def test_a_long_chain_of_preferences_is_no_circle_and_closing_it_makes_one() -> None:
    chain = [(str(n), str(n + 1)) for n in range(5000)]
    assert in_circles(chain) == set()
    assert len(in_circles([*chain, ("5000", "0")])) == 5001


@pytest.mark.parametrize(
    "again",
    [("No", "Yes."), ("no", "YES!"), (" No ", '"Yes"'), ("**no**", "yes…")],
    ids=["end", "case", "space", "bold"],
)
def test_a_reversal_in_other_clothes_contradicts(again: tuple[str, str]) -> None:
    assert contradictions_in(judged(("Yes", "No"), again))["pairs"] == 2


@pytest.mark.parametrize("other", ["x - 1", "x", "X + 1 = y", "x + 1 - -", "(x + 1)", "x + 1%"])
def test_other_signs_and_other_answers_do_not(other: str) -> None:
    assert contradictions_in(judged(("x + 1", "y"), ("y", other), (other, "z")))["pairs"] == 0


def test_a_circle_of_three_contradicts_and_a_ranking_does_not() -> None:
    assert contradictions_in(judged(("a", "b"), ("b", "c"), ("c", "a"), ("a", "d")))["pairs"] == 3
    ranking = contradictions_in(judged(("a", "b"), ("b", "c"), ("a", "c")))
    assert (ranking["pairs"], ranking["compared"]) == (0, 3)


def test_preferences_on_other_prompts_do_not_contradict() -> None:
    found = contradictions_in(judged(("a", "b"), ("b", "a"), prompts=2))
    assert (found["pairs"], found["compared"]) == (0, 0)


def test_contradicting_pairs_are_shown_in_an_order_of_their_own() -> None:
    table = judged(*[("a", "b"), ("b.", "a")] * 10)
    table = table.with_columns(pair_id=pl.Series([f"{n:032x}" for n in range(20)]))
    found, mixed = contradictions_in(table), contradictions_in(table[::-1])
    assert found == mixed
    assert found["pairs"] == 20
    assert len(found["examples"]) == 5
