"""How a scored challenger is decided on: first release, challenger of a champion, again, by override, taken back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dpo_assets.checks.evidence.candidate import LOGP, REWARD, Candidate, ScoredPairs
from dpo_assets.checks.evidence.ledger import Decided, Ledger, Override
from dpo_assets.checks.evidence.rules import TOLERANCE
from dpo_assets.checks.evidence.task_guards import TaskGuard
from dpo_assets.errors import ConfigError
from dpo_assets_tests.samples import scored_pairs

AT = "2026-11-27T12:00:00+00:00"
WISH = Override(decision="promote", reason="asked for by the owners of the product")
STOP = Override(decision="hold", reason="the owners of the product want to wait")


def candidate(
    folder: Path, table: pl.DataFrame, name: str = "m1", opponent: str | None = None, **changes: Any
) -> Candidate:
    path = folder / "scores.parquet"
    table.write_parquet(path)
    given: dict[str, Any] = {"fewest": 50, "inputs": {"eval_scores": f"scores of {name}"}}
    return Candidate(name, opponent, pairs=ScoredPairs.read(path), **given | changes)


def decided(ledger: Ledger, one: Candidate, override: Override | None = None) -> tuple[Ledger, Decided]:
    return one.decide(ledger, override, AT)


def live(ledger: Ledger, line: Decided, held_out: frozenset[str]) -> Ledger:
    return ledger.released(
        line, at=AT, repo_id="org/bot", commit=f"c{line.number}", tag="t", artefact=f"a{line.number}", known=held_out
    )


@pytest.fixture
def champion(tmp_path: Path) -> Ledger:
    """A ledger in which `m1` is live, released on 60 prompts."""
    one = candidate(tmp_path, scored_pairs(0.8))
    ledger, line = decided(Ledger(), one)
    return live(ledger, line, one.held_out)


def challenger(folder: Path, right: float = 0.9, *, new: int = 300, known: int = 60, **changes: Any) -> Candidate:
    """`m2`, scored beside `m1`, which ranks 60 % well, on known conversations and on new ones."""
    frozen = scored_pairs(0.6, champion=0.6, prompts=known) if known else None
    fresh = scored_pairs(right, champion=0.6, prompts=new, first=known or 60, seed=2)
    table = fresh if frozen is None else pl.concat([frozen, fresh])
    return candidate(folder, table, "m2", "m1", **changes)


# ------------------------------------------------------------------------------------------------------ first release


@pytest.mark.parametrize(
    ("table", "decision"),
    [
        (scored_pairs(0.8), "first_publication"),
        (scored_pairs(0.8, prompts=50), "first_publication"),
        (scored_pairs(0.9, prompts=49), "insufficient_evidence"),
        (scored_pairs(0.55), "hold"),
        (scored_pairs(0.2), "reject"),
        (scored_pairs(0.8, of_start=1.0), "hold"),
    ],
    ids=["better", "just enough", "too few", "chance", "worse", "worse than its start by log-probability"],
)
def test_a_first_release_is_held_against_its_start(tmp_path: Path, table: pl.DataFrame, decision: str) -> None:
    ledger, line = decided(Ledger(), candidate(tmp_path, table))
    assert line.decision == decision
    assert line.champion is None
    assert ledger.lines == (line,)
    looked = decision != "insufficient_evidence"
    assert (set(line.primaries), len(line.saw)) == (({REWARD}, table.height) if looked else (set(), 0))


def test_a_recipe_may_ask_for_more_prompts_and_for_no_fewer_than_fifty(tmp_path: Path) -> None:
    few, many = scored_pairs(0.9, prompts=49), scored_pairs(0.9)
    assert decided(Ledger(), candidate(tmp_path, few, fewest=1))[1].decision == "insufficient_evidence"
    assert decided(Ledger(), candidate(tmp_path, many, fewest=61))[1].decision == "insufficient_evidence"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
@pytest.mark.parametrize("column", ["policy_chosen", "sft_rejected"])
def test_a_score_that_is_no_number_is_rejected_and_no_override_lifts_that(
    tmp_path: Path, column: str, bad: float | None
) -> None:
    table = scored_pairs(0.9)
    spoilt = table.with_columns(pl.Series(column, [bad, *table[column].to_list()[1:]], dtype=pl.Float64))
    one = candidate(tmp_path, spoilt)
    for override in (None, WISH):
        ledger, line = decided(Ledger(), one, override)
        assert (line.decision, line.override, line.level) == ("reject", None, None)
        assert column in line.reason
        assert decided(ledger, one, WISH) == (ledger, line)


def test_scores_made_anew_that_are_no_numbers_take_back_a_promotion_that_waits(
    tmp_path: Path, champion: Ledger
) -> None:
    ledger, line = decided(champion, challenger(tmp_path))
    assert ledger.may_release(line)
    spoilt = challenger(tmp_path, inputs={"eval_scores": "made anew"})
    nan = {**spoilt.pairs.columns, "policy_chosen": [float("nan")] * len(spoilt.pairs.conversations)}
    one = replace(spoilt, pairs=replace(spoilt.pairs, columns=nan))
    after, said = decided(ledger, one)
    assert (said.decision, after.may_release(line), after.waiting) == ("reject", False, ())
    assert decided(after, one) == (after, said)
    gone_live = live(ledger, line, one.held_out)
    assert decided(gone_live, one) == (gone_live, line), "what is live is taken back by a person"


def test_a_champion_that_scores_no_numbers_is_no_fault_of_the_challenger(tmp_path: Path, champion: Ledger) -> None:
    """It is held, and a person may replace the champion."""
    table = scored_pairs(0.9, champion=0.6, prompts=300, first=60).with_columns(champion_chosen=pl.lit(float("nan")))
    one = candidate(tmp_path, table, "m2", "m1")
    assert decided(champion, one)[1].decision == "hold"
    assert decided(champion, one, WISH)[1].decision == "promote"


def test_scores_of_an_earlier_version_are_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without group_id; materialise `eval_scores` again"):
        candidate(tmp_path, scored_pairs(0.9).drop("group_id"))
    with pytest.raises(ConfigError, match="holds champion_chosen, champion_rejected, champion_start_chosen alone"):
        candidate(tmp_path, scored_pairs(0.9, champion=0.5).drop("champion_start_rejected"))


# ----------------------------------------------------------------------------------------------- against a champion


def test_a_challenger_is_promoted_on_fresh_prompts_and_guarded_on_known_ones(tmp_path: Path, champion: Ledger) -> None:
    one = challenger(tmp_path, known=0, new=60).evidence(champion)
    assert {name: found.clusters for name, found in one.primaries.items()} == {REWARD: 60, LOGP: 60}
    both = challenger(tmp_path)
    evidence = both.evidence(champion)
    assert [found.clusters for found in evidence.primaries.values()] == [300, 300]
    assert [found.clusters for found in evidence.guards.values()] == [60, 60]
    # Sixty prompts on half of which the two differ: a loss of 5 points cannot be ruled out, and none is seen.
    assert all(found.low < -TOLERANCE for found in evidence.guards.values())
    ledger, line = decided(champion, both)
    assert (line.decision, line.champion) == ("promote", "m1")
    assert line.level is not None, "the fresh prompts were looked at"
    assert not ledger.fresh(both.held_out)


def test_known_prompts_that_are_ranked_worse_hold_a_challenger_that_is_better(tmp_path: Path, champion: Ledger) -> None:
    known = scored_pairs(0.2, champion=0.6, prompts=60)
    fresh = scored_pairs(0.9, champion=0.6, prompts=300, first=60, seed=2)
    _, line = decided(champion, candidate(tmp_path, pl.concat([known, fresh]), "m2", "m1"))
    assert line.decision == "hold"
    assert line.reason.startswith("worse than the champion on known conversations")


@pytest.mark.parametrize("known", [0, 1])
def test_known_prompts_that_left_the_feedback_hold_nobody(tmp_path: Path, champion: Ledger, known: int) -> None:
    """Of none nothing is measured, and one bounds nothing: a challenger is decided on by what is there."""
    frozen = scored_pairs(0.0, champion=1.0, prompts=1).head(known)
    fresh = scored_pairs(0.95, champion=0.6, prompts=600, first=60, seed=2)
    _, line = decided(champion, candidate(tmp_path, pl.concat([frozen, fresh]), "m2", "m1"))
    assert (line.decision, line.found) == ("promote", True)
    assert line.reason.endswith("; no known conversation is left to guard") == (known == 0)


def test_a_challenger_that_is_better_and_lost_nothing_is_promoted(tmp_path: Path, champion: Ledger) -> None:
    frozen = scored_pairs(0.6, champion=0.6, prompts=60)
    same = frozen.with_columns(champion_chosen="policy_chosen")
    fresh = scored_pairs(0.9, champion=0.6, prompts=300, first=60, seed=2)
    one = candidate(tmp_path, pl.concat([same, fresh]), "m2", "m1")
    ledger, line = decided(champion, one)
    assert (line.decision, line.found) == ("promote", True)
    assert set(line.primaries) == {REWARD, LOGP}
    assert line.saw == tuple(sorted(f"conversation {n}" for n in range(60, 360)))
    assert live(ledger, line, one.held_out).champion == "m2"


def test_a_champion_counts_in_its_own_tokens_and_from_its_own_start(tmp_path: Path) -> None:
    table = scored_pairs(0.9, champion=0.5).with_columns(
        champion_chosen=pl.lit(-20.0), champion_rejected=pl.lit(-20.0),
        champion_start_chosen=pl.lit(-21.0), champion_start_rejected=pl.lit(-19.0),
        champion_chosen_tokens=pl.lit(20), champion_rejected_tokens=pl.lit(10),
    )  # fmt: skip
    pairs = candidate(tmp_path, table, "m2", "m1").pairs
    assert set(pairs.reward_wins("champion", "champion_start")) == {1.0}
    assert set(pairs.logp_wins("champion")) == {1.0}, "-1 a token against -2"
    assert set(candidate(tmp_path, table.drop("champion_chosen_tokens")).pairs.logp_wins("champion")) == {0.5}


def test_scores_beside_another_champion_decide_nothing(tmp_path: Path, champion: Ledger) -> None:
    other = challenger(tmp_path)
    with pytest.raises(ConfigError, match="against m1, and the champion is nothing; materialise `eval_scores` again"):
        decided(Ledger(), other)
    alone = candidate(tmp_path, scored_pairs(0.9), "m2")
    with pytest.raises(ConfigError, match="against nothing, and the champion is m1"):
        decided(champion, alone)


def test_turns_of_one_conversation_are_one_piece_of_evidence(tmp_path: Path) -> None:
    """36 of 60 conversations were ranked well, each in all of its ten turns. As 600 prompts that was a release."""
    alone = scored_pairs(0.6)
    prompts = [pl.lit(f"turn {turn} of ") + pl.col("prompt_id") for turn in range(10)]
    turns = pl.concat([alone.with_columns(prompt_id=prompt) for prompt in prompts])
    assert turns["prompt_id"].n_unique() == 600
    one = candidate(tmp_path, turns)
    line = decided(Ledger(), one)[1]
    assert (line.decision, len(line.saw), line.primaries[REWARD].pairs) == ("hold", 60, 600)
    assert {found.clusters for found in one.evidence(Ledger()).guards.values()} == {60}
    as_prompts = turns.with_columns(group_id="prompt_id")
    assert decided(Ledger(), candidate(tmp_path, as_prompts))[1].decision == "first_publication"
    few = scored_pairs(0.9, prompts=490, turns=10)
    assert decided(Ledger(), candidate(tmp_path, few))[1].decision == "insufficient_evidence"


def test_a_new_turn_of_a_known_conversation_is_not_fresh(tmp_path: Path, champion: Ledger) -> None:
    later = scored_pairs(0.9, champion=0.6).with_columns(prompt_id=pl.lit("later turn of ") + pl.col("prompt_id"))
    one = candidate(tmp_path, pl.concat([scored_pairs(0.6, champion=0.6), later]), "m2", "m1")
    assert champion.fresh(one.held_out) == frozenset()
    assert [found.n for found in one.evidence(champion).guards.values()] == [120, 120]
    assert decided(champion, one)[1].decision == "insufficient_evidence"


# -------------------------------------------------------------------------------------------------- again, and by hand


def test_the_same_scores_are_decided_on_once(tmp_path: Path, champion: Ledger) -> None:
    one = challenger(tmp_path, right=0.6)
    ledger, line = decided(champion, one)
    assert decided(ledger, one) == (ledger, line)
    assert ledger.budget().tests == champion.budget().tests + 1


def test_too_little_evidence_is_looked_at_again_when_the_recipe_asks_for_less(tmp_path: Path) -> None:
    strict, mild = (candidate(tmp_path, scored_pairs(0.9), fewest=fewest) for fewest in (100, 50))
    ledger, line = decided(Ledger(), strict)
    assert line.decision == "insufficient_evidence"
    assert decided(ledger, strict) == (ledger, line)
    assert decided(ledger, mild)[1].decision == "first_publication"


def test_what_is_live_keeps_the_decision_that_released_it(tmp_path: Path, champion: Ledger) -> None:
    """Also where it was scored again with other settings: it is no challenger of itself."""
    again = candidate(tmp_path, scored_pairs(0.8), inputs={"eval_scores": "scored with more answers"})
    assert decided(champion, again) == (champion, champion.decisions[0])
    assert decided(champion, again, WISH) == (champion, champion.decisions[0])
    with pytest.raises(ConfigError, match="this model is live: go back by the rollback job"):
        decided(champion, again, STOP)


def test_a_decision_that_waits_for_its_release_outlives_other_settings_of_the_evaluation(tmp_path: Path) -> None:
    ledger, line = decided(Ledger(), candidate(tmp_path, scored_pairs(0.8)))
    again = candidate(tmp_path, scored_pairs(0.8), inputs={"eval_scores": "scored with more answers"})
    assert decided(ledger, again) == (ledger, line)


FALLEN = {"choice acc": TaskGuard("-0.200 [-0.3, -0.1]", 1e-4)}


def test_a_task_that_guards_and_fell_since_the_decision_holds_what_waits_for_its_release(
    tmp_path: Path, champion: Ledger
) -> None:
    """The scores are the same: guards were switched on, or a task was mended, while the Hub was away."""
    for before, one in ((Ledger(), candidate(tmp_path, scored_pairs(0.8))), (champion, challenger(tmp_path))):
        ledger, line = decided(before, one)
        assert ledger.may_release(line)
        assert decided(ledger, replace(one, tasks={"choice acc": TaskGuard("+0.0", 0.4)})) == (ledger, line)
        after, held = decided(ledger, replace(one, tasks=FALLEN))
        assert (held.decision, held.level, held.saw) == ("hold", None, ())
        assert f"line {line.number} said {line.decision}" in held.reason
        assert "on tasks: choice acc -0.200" in held.reason
        assert not after.may_release(line)
        assert decided(after, replace(one, tasks=FALLEN)) == (after, held)
        assert decided(after, replace(one, tasks=FALLEN), WISH)[1].releases


def test_a_task_that_fell_changes_nothing_of_what_is_live_or_what_a_person_decided(
    tmp_path: Path, champion: Ledger
) -> None:
    again = candidate(tmp_path, scored_pairs(0.8), tasks=FALLEN)
    assert decided(champion, again) == (champion, champion.decisions[0])
    wished, line = decided(champion, challenger(tmp_path), WISH)
    assert decided(wished, challenger(tmp_path, tasks=FALLEN)) == (wished, line)


def test_an_override_of_a_decision_that_is_there_looks_at_nothing(tmp_path: Path, champion: Ledger) -> None:
    one = challenger(tmp_path, right=0.6)
    ledger, held = decided(champion, one)
    ledger, wished = decided(ledger, one, WISH)
    assert (wished.decision, wished.level, wished.saw, wished.found) == ("promote", None, (), False)
    assert f"decision {held.number} said hold" in wished.reason
    assert WISH.reason in wished.reason
    assert ledger.budget() == Ledger(lines=ledger.lines[:-1]).budget()
    assert decided(ledger, one, WISH) == (ledger, wished), "the same wish again is the same decision"
    assert decided(ledger, one) == (ledger, wished), "a refresh without a wish leaves it"
    stopped, line = decided(ledger, one, STOP)
    assert line.decision == "hold"
    assert not stopped.may_release(wished)


def test_what_a_person_holds_is_held_whatever_new_scores_say(tmp_path: Path, champion: Ledger) -> None:
    ledger, stopped = decided(champion, challenger(tmp_path), STOP)
    assert stopped.decision == "hold"
    anew = challenger(tmp_path, right=0.95, new=400, inputs={"eval_scores": "scored anew"})
    assert decided(ledger, anew) == (ledger, stopped)
    assert decided(ledger, anew, WISH)[1].decision == "promote"


def test_what_was_replaced_or_is_live_again_was_not_taken_back(tmp_path: Path, champion: Ledger) -> None:
    """`m1`, which gave way to `m2`, may come back by new scores; so may `m2` once a rollback made it live again."""
    ledger, line = decided(champion, challenger(tmp_path), WISH)
    ledger = live(ledger, line, frozenset())
    assert ledger.taken_back("m1") is None
    place = {"at": AT, "repo_id": "org/bot", "commit": "c9"}
    back = ledger.rolled_back(ledger.release(1), reason="it answers in the wrong language", **place)
    assert back.taken_back("m2") == back.live
    assert back.taken_back("m1") is None
    again = back.rolled_back(ledger.release(2), reason="the language was mended in serving", **place)
    assert again.taken_back("m2") is None
    assert again.taken_back("m1") == again.live
    assert again.taken_back("m3") is None


def test_an_override_at_the_first_look_spends_what_the_test_spent(tmp_path: Path) -> None:
    by_hand, line = decided(Ledger(), candidate(tmp_path, scored_pairs(0.55)), WISH)
    alone, _ = decided(Ledger(), candidate(tmp_path, scored_pairs(0.55)))
    assert (line.decision, line.found, line.level is None) == ("first_publication", False, False)
    assert by_hand.budget() == alone.budget()


def test_what_was_rolled_back_is_not_released_again_by_the_next_refresh(tmp_path: Path, champion: Ledger) -> None:
    one = challenger(tmp_path, right=0.6)
    ledger, line = decided(champion, one, WISH)
    ledger = live(ledger, line, one.held_out)
    assert ledger.champion == "m2"
    why = "it answers in the wrong language"
    back = ledger.rolled_back(ledger.release(1), at=AT, repo_id="org/bot", commit="c9", reason=why)
    after, held = decided(back, one)
    assert (held.decision, held.level) == ("hold", None)
    assert "it answers in the wrong language" in held.reason
    assert not after.may_release(held)
    assert decided(after, one) == (after, held)
    anew = challenger(tmp_path, right=0.95, new=400, inputs={"eval_scores": "scored anew"})
    for state in (back, after):
        assert decided(state, anew)[1].level is None
        assert decided(state, anew)[1].decision == "hold", "new scores do not undo a rollback"
    again, wished = decided(after, anew, Override(decision="promote", reason="the language was mended in serving"))
    assert again.may_release(wished)
    assert live(again, wished, one.held_out).champion == "m2"
