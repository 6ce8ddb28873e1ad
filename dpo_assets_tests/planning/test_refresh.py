"""Where a refresh starts, and on which pairs: the rules, held by properties of pairs and chains of releases."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_assets.planning.plan import steps_of
from dpo_assets.planning.refresh import (
    Ancestor,
    EarlierSft,
    Moved,
    Policy,
    Refresh,
    SftData,
    choose_sft,
    choose_start,
    drawn,
    trained_pairs,
)
from dpo_assets_tests.samples import plan

PAIRS = st.sets(st.integers(0, 40).map(lambda n: f"{n:032x}"))
MOVED = st.builds(Moved, st.integers(1, 50), st.integers(0, 50), st.integers(0, 3)).filter(lambda m: m.new <= m.pairs)
SFT = SftData(dataset="of SFT", pairs=100)


def ids(pairs: set[str]) -> pl.Series:
    return pl.Series("pair_id", sorted(pairs), dtype=pl.String)


def earlier(name: str, moved: Moved) -> EarlierSft:
    return EarlierSft(f"checkpoint {name}", f"dataset {name}", 100, moved)


def release(generation: int, moved: Moved, refused: str = "") -> Ancestor:
    return Ancestor(f"adapter {generation}", f"dataset {generation}", generation, moved, refused)


@given(PAIRS, PAIRS)
def test_what_is_new_and_what_is_gone_are_the_differences_of_two_sets(then: set[str], now: set[str]) -> None:
    assert Moved.between(ids(then), ids(now)) == Moved(len(now), len(now - then), len(then - now))


@given(st.lists(MOVED, max_size=5), st.floats(0.0, 0.99))
def test_sft_is_taken_up_only_where_nothing_of_it_is_gone_and_few_pairs_are_new(
    history: list[Moved], limit: float
) -> None:
    chosen = choose_sft((earlier(str(n), moved) for n, moved in enumerate(history)), "dataset now", 50, limit)
    fits = [n for n, moved in enumerate(history) if not moved.gone and moved.new <= limit * moved.pairs]
    if not fits:  # At most MOST_SFT are looked at, which is as many as there are here.
        assert (chosen.checkpoint, chosen.data) == (None, SftData(dataset="dataset now", pairs=50))
        return
    first = fits[0]
    assert chosen.checkpoint == f"checkpoint {first}", "the first that fits: they come in the order of preference"
    assert chosen.data == SftData(dataset=f"dataset {first}", pairs=100, newer=history[first].new)
    assert f"{history[first].new} of {history[first].pairs} training pairs are new" in chosen.why


def test_one_withdrawn_pair_renews_sft_whatever_the_limit() -> None:
    moved = Moved(1000, 0, 1)
    chosen = choose_sft([earlier("a", moved)], "now", 1000, 0.99)
    assert chosen.checkpoint is None
    assert "and 1 gone" in chosen.why


@given(st.lists(MOVED, max_size=4), st.sampled_from(["full", "replay", "continue"]), st.integers(1, 4))
def test_a_start_keeps_every_promise_of_its_policy(history: list[Moved], asked: Policy, most: int) -> None:
    chain = [release(len(history) - n, moved) for n, moved in enumerate(history)]
    chosen = choose_start(asked, chain, SFT, replayed=1.5, most_continued=most)
    made = chosen.refresh
    assert made.sft == SFT
    if made.whole:
        assert made == Refresh(sft=SFT)
        return
    assert made.policy == asked != "full"
    place = next(n for n, one in enumerate(chain) if one.adapter == made.adapter)
    start = chain[place]
    assert all(one.moved.new == 0 == one.moved.gone for one in chain[:place]), "passed over: nothing is new to them"
    assert start.moved.gone == 0 < made.new == start.moved.new
    assert (made.since, made.generation) == (start.dataset, start.generation + 1)
    old = start.moved.pairs - made.new
    assert made.sampled == (0 if asked == "continue" else min(old, -(-3 * made.new // 2)))
    assert asked == "replay" or made.generation <= most + 1


@pytest.mark.parametrize(
    ("asked", "chain", "why"),
    [
        ("full", [release(1, Moved(10, 2, 0))], "full: DPO starts from SFT"),
        ("replay", [], "no release is live"),
        ("replay", [release(1, Moved(10, 2, 0), "another base")], "another base"),
        ("replay", [release(1, Moved(10, 2, 1))], "1 pairs that the release was trained on are not in train any more"),
        ("replay", [release(1, Moved(10, 0, 0))], "no training pair is new"),
        ("continue", [release(3, Moved(10, 2, 0))], "2 releases in a row went on already"),
    ],
)
def test_where_a_policy_cannot_be_followed_the_run_is_full_and_says_why(
    asked: Policy, chain: list[Ancestor], why: str
) -> None:
    chosen = choose_start(asked, chain, SFT, replayed=1.0, most_continued=2)
    assert chosen.refresh == Refresh(sft=SFT)
    assert why in chosen.why


def test_a_run_in_which_nothing_changed_comes_to_the_plan_of_the_release_that_is_live() -> None:
    """What was new to the release behind it is what it was trained on, so all that was made then is taken up."""
    before = choose_start("replay", [release(1, Moved(12, 2, 0))], SFT, replayed=1.0, most_continued=3)
    since = [release(2, Moved(12, 0, 0)), release(1, Moved(12, 2, 0))]
    assert choose_start("replay", since, SFT, replayed=1.0, most_continued=3).refresh == before.refresh


@given(PAIRS, PAIRS, st.integers(0, 50), st.integers(0, 3))
def test_dpo_trains_on_all_that_is_new_and_on_so_many_of_the_others(
    then: set[str], more: set[str], sampled: int, seed: int
) -> None:
    now = then | more
    refresh = Refresh(policy="replay", adapter="a", new=len(now - then), sampled=min(sampled, len(then)))
    chosen = trained_pairs(ids(now), ids(then), refresh, seed)
    assert chosen.n_unique() == len(chosen) == refresh.new + refresh.sampled
    assert now - then <= set(chosen) <= now


def test_each_pair_is_drawn_as_often_as_another_and_each_release_draws_others() -> None:
    pairs = ids({f"{n:032x}" for n in range(20)})
    counts = dict.fromkeys(pairs, 0)
    for start in range(2000):
        for pair in drawn(pairs, 5, 0, f"release {start}"):
            counts[pair] += 1
    # 500 expected of each; the standard deviation of a binomial with p = 1/4 and n = 2,000 is 19.4.
    assert all(abs(count - 500) < 5 * 19.4 for count in counts.values())
    assert drawn(pairs, 5, 0, "one").to_list() == drawn(pairs.reverse(), 5, 0, "one").to_list()


def test_the_steps_of_a_plan_are_those_of_the_pairs_that_are_trained_on() -> None:
    made = plan().refreshed(Refresh(policy="replay", new=10, sampled=7, sft=SftData(dataset="d", pairs=200)))
    assert made.train_pairs == 17
    assert made.dpo_steps == steps_of(17, made.dpo.batch_size, made.dpo.epochs)
    assert made.sft_steps == steps_of(200, made.sft.batch_size, made.sft.epochs)
    assert plan().refreshed(Refresh()).train_pairs == plan().train_pairs


def test_what_sft_and_dpo_depend_on_is_what_they_train_on_and_from() -> None:
    one, other = (plan(refresh=Refresh(sft=SftData(dataset=name))) for name in "ab")
    assert one.sft_part() != other.sft_part()
    assert one.sft_part() == plan(refresh=Refresh(sft=SftData(dataset="a", pairs=9, newer=3))).sft_part()
    assert one.dpo_part() == other.dpo_part(), "of SFT the adapter depends by its digest"
    parts = [
        plan(refresh=Refresh(**change)).dpo_part()
        for change in ({}, {"policy": "replay"}, {"policy": "replay", "adapter": "a"}, {"since": "d"}, {"sampled": 1})
    ]
    assert all(parts.count(part) == 1 for part in parts)
