"""Error spent over releases, the ledger that remembers it, and the ordered rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dpo_assets.checks.evidence.ledger import FIRST, Ledger, Override, Record
from dpo_assets.checks.evidence.measured import Comparison
from dpo_assets.checks.evidence.outlook import Outlook
from dpo_assets.checks.evidence.power import FEWEST_PROMPTS
from dpo_assets.checks.evidence.rules import TOLERANCE, Evidence, Outcome, judge, record_of
from dpo_assets.checks.evidence.spending import ALPHA, EXPONENT, HIGHEST, ZETA, Budget, budget_after, share
from dpo_assets.errors import ConfigError

BETTER = Comparison(0.1, 0.04, 0.16, 0.03, 0.0005, 0.9998, 0.0004, 400, 200, 120)
ALIKE = Comparison(0.01, -0.04, 0.06, 0.03, 0.4, 0.62, 0.4, 400, 200, 120)
WORSE = Comparison(-0.1, -0.16, -0.04, 0.03, 0.9998, 0.0005, 0.9999, 400, 200, 120)
FEW = replace(BETTER, clusters=FEWEST_PROMPTS - 1)
WISH = Override(decision="promote", reason="asked for by the owners of the product")

# ------------------------------------------------------------------------------------------------------------ spending


def levels(found: list[bool]) -> list[float]:
    """The level that each of these tests had."""
    return [budget_after(found[:test]).level for test in range(len(found))]


def test_the_shares_of_all_tests_together_are_one() -> None:
    """The first ones by summing, the rest by the integral of their power."""
    many = 20_000
    head = sum(share(test) for test in range(1, many + 1))
    rest = many ** (1 - EXPONENT) / (EXPONENT - 1) / ZETA
    assert head < 1
    assert head + rest - share(many) / 2 == pytest.approx(1, abs=1e-11)


@settings(max_examples=100, deadline=None)
@given(found=st.lists(st.booleans(), max_size=80))
@example(found=[False] * 300)
@example(found=[True] * 40 + [False] * 40)
def test_levels_that_found_nothing_never_sum_above_the_whole_error(found: list[bool]) -> None:
    """Whatever was promoted in between: so a promotion that is wrong comes at most with the chance of all of it."""
    each = levels(found)
    lost = sum(level for level, success in zip(each, found, strict=True) if not success)
    budget = budget_after(found)
    assert budget.spent == pytest.approx(lost, abs=1e-15)
    assert budget.spent + budget.level <= ALPHA + 1e-15
    assert all(0 < level <= HIGHEST for level in each)
    assert (budget.tests, budget.left) == (len(found), pytest.approx(ALPHA - lost))


def test_the_first_test_has_less_than_one_end_of_an_interval_and_later_ones_less() -> None:
    each = levels([False] * 50)
    assert each[0] == pytest.approx(0.02187, abs=1e-5)
    assert each == sorted(each, reverse=True)
    assert each[9] == pytest.approx(ALPHA * share(10))


def test_a_promotion_hands_its_level_on() -> None:
    assert budget_after([False, True]).level == pytest.approx(ALPHA * (share(2) + share(3)))
    assert budget_after([False, True, False]).level == pytest.approx(ALPHA * share(4))
    assert budget_after([True] * 30).level == HIGHEST
    above = ALPHA * sum(share(test) for test in range(1, 33)) - HIGHEST
    assert budget_after([True] * 30 + [False]).level == pytest.approx(above), "what was above the cap is still there"


# -------------------------------------------------------------------------------------------------------------- ledger


def decided(
    ledger: Ledger, primary: Comparison, *prompts: str, held_out: tuple[str, ...] = (), **of: Any
) -> tuple[Ledger, Outcome]:
    """The ledger after one more decision on the primary `accuracy`."""
    evidence = Evidence({"accuracy": primary}, of.get("guards", {}), of.get("failures", {}))
    outcome = judge(evidence, ledger, of.get("override"))
    record = record_of(
        outcome,
        evidence,
        ledger,
        challenger=f"model {len(ledger.records) + 1}",
        inputs={"merged_model": "a" * 64, "scores": "b" * 64},
        saw=frozenset(prompts),
        held_out=frozenset(held_out or prompts),
        decided_at="2026-11-27T12:00:00+00:00",
    )
    return ledger.append(record), outcome


def life() -> Ledger:
    """First publication, a hold, too few prompts, a promotion, a rejection."""
    ledger = Ledger()
    for primary in (BETTER, ALIKE, FEW, BETTER, WORSE):
        ledger, _ = decided(ledger, primary, f"prompt {len(ledger.records)}")
    return ledger


def test_a_life_of_releases() -> None:
    ledger = life()
    words = [record.decision for record in ledger.records]
    assert words == ["first_publication", "hold", "insufficient_evidence", "promote", "reject"]
    assert [record.champion for record in ledger.records] == [None, "model 1", "model 1", "model 1", "model 4"]
    assert ledger.champion == "model 4"
    spent = [record.level for record in ledger.records]
    assert spent[2] is None, "what was too little to look at spends nothing"
    assert ledger.budget() == budget_after([True, False, True, False])
    assert spent[3] == budget_after([True, False]).level


def test_a_ledger_reads_back_from_its_lines() -> None:
    ledger = life()
    assert Ledger.of_lines(ledger.lines()) == ledger
    assert ledger.lines().count("\n") == 5
    assert Ledger.of_lines("") == Ledger()


def test_a_number_that_is_none_reads_back_as_none() -> None:
    ledger, _ = decided(Ledger(), replace(ALIKE, difference=float("nan")))
    again = Ledger.of_lines(ledger.lines())
    assert again.lines() == ledger.lines()
    assert again.head == ledger.head


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[1:],
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [lines[0].replace("first_publication", "hold"), *lines[1:]],
        lambda lines: [lines[0], lines[1].replace('"level": 0.02', '"level": 0.01'), *lines[2:]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [*lines[:-1], lines[-1][:40]],
        lambda lines: [*lines, "{}"],
    ],
    ids=["first lost", "one lost", "moved", "another word", "another level", "twice", "cut", "no record"],
)
def test_a_ledger_that_was_changed_is_refused(change: Callable[[list[str]], list[str]]) -> None:
    lines = life().lines().splitlines()
    changed = change(lines)
    assert changed != lines
    with pytest.raises(ConfigError, match="the ledger of promotions does not hold"):
        Ledger.of_lines("".join(f"{line}\n" for line in changed))


def test_a_record_of_another_state_is_not_appended() -> None:
    ledger = life()
    with pytest.raises(ValidationError, match="does not follow"):
        ledger.append(ledger.records[0])
    other = ledger.records[-1].model_copy(update={"number": 6, "before": ledger.head, "champion": "model 1"})
    with pytest.raises(ValidationError, match="names model 1 as the champion, the ledger model 4"):
        ledger.append(other)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"decision": "first_publication"}, "without a champion"),
        ({"champion": None}, "for a challenger of a champion"),
        ({"level": None}, "a level is spent exactly where"),
        ({"primaries": {}}, "a level is spent exactly where"),
        ({"primaries": {}, "level": None}, "nothing is found without a test"),
        ({"override": {"decision": "promote", "reason": "because"}}, "at least 10 characters"),
    ],
)
def test_a_record_agrees_with_itself(changes: Mapping[str, Any], told: str) -> None:
    promoted = life().records[3]
    assert promoted.decision == "promote"
    with pytest.raises(ValidationError, match=told):
        Record.model_validate(promoted.model_dump() | changes)


def test_evidence_is_what_came_after_the_cut_and_no_decision_saw() -> None:
    ledger = Ledger()
    assert ledger.fresh(["a", "b"]) == {"a", "b"}
    ledger, _ = decided(ledger, BETTER, "a", held_out=("a", "b"))
    assert ledger.fresh(["a", "b", "c"]) == {"c"}, "b was there when the champion was chosen"
    ledger, _ = decided(ledger, FEW, "c", held_out=("a", "b", "c"))
    assert ledger.fresh(["a", "b", "c", "d"]) == {"c", "d"}, "what was too little waits for more"
    ledger, _ = decided(ledger, ALIKE, "c", "d", held_out=("a", "b", "c", "d", "e"))
    assert ledger.fresh(["a", "b", "c", "d", "e"]) == {"e"}


def test_a_rollback_makes_an_earlier_release_live_again_with_its_cut() -> None:
    ledger, _ = decided(Ledger(), BETTER, "prompt 0", held_out=("prompt 0", "there, and not looked at"))
    for primary in (ALIKE, FEW, BETTER, WORSE):
        ledger, _ = decided(ledger, primary, f"prompt {len(ledger.records)}")
    back = ledger.rollback("model 1", "model 4 answers in the wrong language", "2026-11-28T00:00:00+00:00")
    assert (ledger.champion, back.champion) == ("model 4", "model 1")
    assert back.budget() == ledger.budget(), "it is no test"
    assert back.fresh(["prompt 0", "prompt 1", "prompt 2", "there, and not looked at", "new"]) == {"prompt 2", "new"}
    assert Ledger.of_lines(back.lines()) == back
    again, outcome = decided(back, BETTER, "new")
    assert (outcome.decision, again.champion) == ("promote", "model 7")


@pytest.mark.parametrize(
    ("to", "reason", "told"),
    [
        ("model 2", "it was a good one, I think", "goes back to model 2, which was no release"),
        ("model 1", "oops", "at least 10 characters"),
    ],
)
def test_a_rollback_needs_a_release_and_a_reason(to: str, reason: str, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        life().rollback(to, reason, "2026-11-28T00:00:00+00:00")


def test_a_rollback_is_no_verdict_on_a_challenger() -> None:
    with pytest.raises(ValueError, match="judges no challenger"):
        judge(Evidence({"a": BETTER}), life(), Override(decision="rollback", reason="back to what was"))
    promoted = life().records[3].model_dump()
    with pytest.raises(ValidationError, match="a rollback is made by override"):
        Record.model_validate(promoted | {"decision": "rollback"})


# --------------------------------------------------------------------------------------------------------------- rules

AFTER_FIRST = Ledger().append(
    Record(
        number=1, before=FIRST, decided_at="2026-11-01T00:00:00+00:00", inputs={}, champion=None, challenger="model 1",
        primaries={}, level=None, saw=(), decision="first_publication", found=False, reason="by override",
        override=WISH,
    )
)  # fmt: skip


@pytest.mark.parametrize(
    ("evidence", "decision", "looked"),
    [
        (Evidence({"a": BETTER}), "promote", True),
        (Evidence({"a": BETTER}, failures={"weights": "not finite"}), "reject", False),
        (Evidence({"a": WORSE}, failures={"weights": "not finite"}), "reject", False),
        (Evidence({"a": FEW}), "insufficient_evidence", False),
        (Evidence({}), "insufficient_evidence", False),
        (Evidence({"a": BETTER, "b": FEW}), "insufficient_evidence", False),
        (Evidence({"a": BETTER}, fewest=201), "insufficient_evidence", False),
        (Evidence({"a": FEW}, fewest=1), "insufficient_evidence", False),
        (Evidence({"a": WORSE}), "reject", True),
        (Evidence({"a": BETTER, "b": WORSE}), "reject", True),
        (Evidence({"a": BETTER}, {"frozen": replace(ALIKE, low=-TOLERANCE - 0.001)}), "hold", True),
        (Evidence({"a": BETTER}, {"frozen": replace(ALIKE, low=float("nan"))}), "hold", True),
        (Evidence({"a": BETTER}, {"frozen": replace(ALIKE, low=-TOLERANCE + 0.001)}), "promote", True),
        (Evidence({"a": ALIKE}), "hold", True),
        (Evidence({"a": BETTER, "b": ALIKE}), "promote", True),
        (Evidence({"a": replace(BETTER, p_better=0.0218)}), "promote", True),
        (Evidence({"a": replace(BETTER, p_better=0.0219)}), "hold", True),
        (Evidence({"a": replace(BETTER, p_better=0.0110), "b": ALIKE}), "hold", True),
        (Evidence({"a": replace(BETTER, p_better=0.0109), "b": ALIKE}), "promote", True),
    ],
)
def test_the_first_rule_that_holds_decides(evidence: Evidence, decision: str, looked: bool) -> None:
    outcome = judge(evidence, AFTER_FIRST)
    assert (outcome.decision, outcome.looked) == (decision, looked)
    assert outcome.found == (decision == "promote")
    assert outcome.reason
    first = judge(evidence, Ledger())
    assert first.decision == ("first_publication" if decision == "promote" else decision)


def test_a_level_that_so_few_prompts_cannot_meet_is_not_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Budget(ALPHA, 10**9, 0.05, 2.0**-60)
    monkeypatch.setattr(Ledger, "budget", lambda self: tiny)  # A billion decisions are too many to write down.
    assert judge(Evidence({"a": replace(BETTER, clusters=59)}), AFTER_FIRST).decision == "insufficient_evidence"
    assert judge(Evidence({"a": replace(BETTER, clusters=60)}), AFTER_FIRST).decision == "hold"


@pytest.mark.parametrize(
    ("primary", "decision", "released", "found"),
    [
        (ALIKE, "promote", "promote", False),
        (FEW, "promote", "promote", False),
        (WORSE, "promote", "promote", False),
        (BETTER, "hold", "hold", True),
    ],
)
def test_an_override_decides_and_says_what_the_rules_found(
    primary: Comparison, decision: str, released: str, found: bool
) -> None:
    override = Override.model_validate({"decision": decision, "reason": "agreed on the call of Monday"})
    ledger, outcome = decided(AFTER_FIRST, primary, "x", override=override)
    record = ledger.records[-1]
    assert (record.decision, record.found) == (released, found)
    assert "agreed on the call of Monday" in record.reason
    assert "the rules say" in record.reason
    assert record.override == override
    assert outcome.looked == (primary is not FEW)
    assert (ledger.champion == "model 2") == (released == "promote")


def test_a_release_by_override_spends_its_test_like_a_hold() -> None:
    by_wish, _ = decided(AFTER_FIRST, ALIKE, "x", override=WISH)
    held, _ = decided(AFTER_FIRST, ALIKE, "x")
    assert by_wish.budget() == held.budget()
    assert held.budget().spent == pytest.approx(ALPHA * share(1))


def test_no_override_lifts_a_hard_guard() -> None:
    outcome = judge(Evidence({"a": BETTER}, failures={"secrets": "a token in config.json"}), AFTER_FIRST, WISH)
    assert (outcome.decision, outcome.override) == ("reject", None)
    assert "a token in config.json" in outcome.reason


def test_a_hold_leaves_the_old_model_live() -> None:
    ledger, _ = decided(AFTER_FIRST, ALIKE, "x")
    assert ledger.champion == "model 1"
    assert ledger.records[-1].known == ()


# ------------------------------------------------------------------------------------------------------------- outlook


def test_the_screen_says_what_is_spent_and_whether_the_gate_can_pass() -> None:
    held, _ = decided(AFTER_FIRST, ALIKE, "x")
    rows = dict(Outlook.of(held, 49).rows())
    assert rows["error spent"] == "2.19 % of 5 %; tests so far: 1"
    assert rows["level of the next test"] == "0.722 %, one-sided"
    assert rows["prompts that no decision saw"] == "49, of at least 50"
    assert rows["can the gate pass with these"] == "no: 50 prompts are needed"
    assert len(rows) == 4
    enough = dict(Outlook.of(held, 50, BETTER).rows())
    assert enough["can the gate pass with these"] == "yes"
    assert enough["found with 80% power"] == "9.9 points"  # 0.03 * (2.447 + 0.842)
    assert enough["power for 10 points"] == "81%"
    assert enough["would show 10 points"] == "390 pairs"
    assert Outlook.of(held, 60, fewest=61).can_pass is False


def test_pairs_without_a_spread_say_that_no_number_decides() -> None:
    alone = replace(ALIKE, error=float("nan"))
    assert dict(Outlook.of(Ledger(), 50, alone).rows())["would show 10 points"] == "no number of pairs"
