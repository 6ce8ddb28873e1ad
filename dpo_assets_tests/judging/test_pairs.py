"""Which pairs a judge and a reward model are held against."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from dpo_assets.judging.pairs import human_pairs


def test_only_what_people_ranked_is_held_against_a_judge_and_one_pair_a_prompt(tmp_path: Path) -> None:
    """Pairs that another model rated took part: a judge like that one seemed to agree with people."""
    kinds = ["judge_rating", "human_pair", "arena", "human_thumb"]
    rows = [
        {"pair_id": f"{n}", "prompt_id": f"p{n // 2}", "prompt": [{"role": "user", "content": f"{n}?"}],
         "chosen": [{"role": "assistant", "content": "yes"}], "rejected": [{"role": "assistant", "content": "no"}],
         "label_kind": kind}
        for n, kind in enumerate([*kinds, "judge_rating"])
    ]  # fmt: skip
    pl.DataFrame(rows[::-1]).write_parquet(tmp_path / "eval.parquet")
    assert [pair.asked for pair in human_pairs(tmp_path, 9)] == ["1?", "2?"]
    assert [(pair.first, pair.second) for pair in human_pairs(tmp_path, 1)] == [("yes", "no")]
