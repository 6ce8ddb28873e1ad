"""What a model was trained on stays on the train side of every later split, and is counted where it was scored."""

from __future__ import annotations

from pathlib import Path

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.feedback.splits import split
from dpo_assets.feedback.tables import pairs_frame, with_new_content
from dpo_assets.feedback.trained import (
    TRAINED_GROUPS,
    bound_to_train,
    groups_digest,
    seen_pairs,
    trained_groups,
    write_trained_groups,
)
from dpo_assets_tests.samples import assistant, pair, user

PAIRS = pairs_frame([pair(number) for number in range(60)])
_fractions, _seeds = st.floats(0.05, 0.85), st.integers(0, 5)


@settings(max_examples=60, deadline=None)
@given(splits=st.lists(st.tuples(_fractions, _seeds), min_size=1, max_size=5))
def test_no_group_that_a_model_was_trained_on_is_held_out_whatever_fraction_and_seed_come_after(
    splits: list[tuple[float, int]],
) -> None:
    trained: set[str] = set()
    for fraction, seed in splits:
        bound = bound_to_train(trained, fraction, seed)
        train, held_out = split(PAIRS, fraction, seed, bound)
        assert not trained & set(held_out["group_id"])
        assert sorted([*train["pair_id"], *held_out["pair_id"]]) == sorted(PAIRS["pair_id"])
        trained |= set(train["group_id"])


@settings(max_examples=30, deadline=None)
@given(fraction=_fractions, seed=_seeds, before=st.tuples(_fractions, _seeds))
def test_the_same_split_again_is_the_same_whatever_was_trained_on_it(
    fraction: float, seed: int, before: tuple[float, int]
) -> None:
    """Its identity too, so that a refresh after a training makes no new dataset."""
    earlier = set(split(PAIRS, *before)[0]["group_id"])
    bound = bound_to_train(earlier, fraction, seed)
    train, held_out = split(PAIRS, fraction, seed, bound)
    again = bound_to_train(earlier | set(train["group_id"]), fraction, seed)
    assert groups_digest(again) == groups_digest(bound)
    assert split(PAIRS, fraction, seed, again)[1].equals(held_out)
    assert bound_to_train(split(PAIRS, fraction, seed)[0]["group_id"], fraction, seed) == frozenset()


def sides(folder: Path, fraction: float = 0.3, seed: int = 0) -> Path:
    folder.mkdir()
    for name, side in zip(("train", "eval"), split(PAIRS, fraction, seed), strict=True):
        side.write_parquet(folder / f"{name}.parquet")
    return folder


def test_scores_of_another_split_count_the_pairs_that_were_trained_on(tmp_path: Path) -> None:
    first, other = sides(tmp_path / "first"), sides(tmp_path / "other", seed=1)
    write_trained_groups(first, tmp_path)
    record = tmp_path / TRAINED_GROUPS
    trained = set(pl.read_parquet(first / "train.parquet")["group_id"])
    assert set(trained_groups(record)) == trained
    assert seen_pairs(first / "eval.parquet", first, [record]) == 0
    expected = sum(group in trained for group in pl.read_parquet(other / "eval.parquet")["group_id"])
    assert 0 < expected < pl.read_parquet(other / "eval.parquet").height
    assert seen_pairs(other / "eval.parquet", other, [record, record]) == expected


def test_a_scored_pair_that_the_dataset_does_not_hold_out_counts_as_seen(tmp_path: Path) -> None:
    first = sides(tmp_path / "first")
    write_trained_groups(first, tmp_path)
    scored = pl.DataFrame({"pair_id": ["0" * 32]})
    scored.write_parquet(tmp_path / "scores.parquet")
    assert seen_pairs(tmp_path / "scores.parquet", first, [tmp_path / TRAINED_GROUPS]) == 1
    assert seen_pairs(first / "eval.parquet", first, []) == 0


def test_another_cleaning_keeps_the_groups_by_which_a_model_knows_what_it_was_trained_on() -> None:
    """And openings that it made equal are on one side: that of whatever may not be held out."""
    asked = [user(f"Mail bob{n}@corp.com please.") for n in range(40)]
    read = pairs_frame([pair(prompt=[one], chosen=[assistant(f"yes {n}")]) for n, one in enumerate(asked)])
    records = [one | {"prompt": [user("Mail [EMAIL] please.")]} for one in read.to_dicts()]
    cleaned = pl.DataFrame(with_new_content(records), schema=read.schema)
    assert cleaned["group_id"].to_list() == read["group_id"].to_list()
    assert cleaned["prompt_id"].n_unique() == 1
    train, held_out = split(cleaned, 0.5, 1)
    assert (train.height, held_out.height) == (40, 0)
    assert all(side.height for side in split(read, 0.5, 1))
