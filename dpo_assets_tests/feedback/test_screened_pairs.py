"""Screening, fitting and splitting: which pairs are refused and why, and what no order of rows can change."""

from __future__ import annotations

import base64
import json
import unicodedata
from collections import Counter
from typing import Any

import pandera.polars  # noqa: F401  Imported here, so that no single test pays for it.
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandera.errors import SchemaErrors

from dpo_assets.feedback.ingest import read_file
from dpo_assets.feedback.pair import LABEL_KINDS, PAIR_COLUMNS, Message, Pair, Rejected, fold, token_schema
from dpo_assets.feedback.readers import ReadOptions
from dpo_assets.feedback.rules import NOT_DAMAGE, TEMPLATE_FAULTS, pair_fault
from dpo_assets.feedback.screening import Screened, _apply_schema, screen
from dpo_assets.feedback.sources import files_of
from dpo_assets.feedback.splits import fit_to_model, in_eval_split, shared_prompts, split, unfit_template
from dpo_assets.feedback.tables import pairs_frame, quarantine_frame
from dpo_assets.recipe import FeedbackSource
from dpo_assets_tests.samples import assistant, pair, system, user


def screened(*pairs: Pair) -> Screened:
    return screen(pairs_frame(pairs), quarantine_frame([]))


def flipped(one: Pair) -> Pair:
    return Pair(one.prompt, one.rejected, one.chosen, one.source, f"{one.row} flipped", one.line + 1000)


# What a pair must satisfy

NFC, NFD = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")

FAULTY: list[tuple[str, dict[str, Any]]] = [
    ("empty_prompt", {"prompt": []}),
    ("empty_prompt", {"prompt": [user("")]}),
    ("empty_prompt", {"prompt": [user(" \n\t\u00a0\u2003")]}),
    ("empty_prompt", {"prompt": [system(" "), user("q")]}),
    ("no_shared_prompt", {"chosen": [assistant("a"), user("b"), assistant("c")]}),
    ("messages_as_text", {"chosen": [assistant('[{"role": "assistant", "content": "x"}]')]}),
    ("empty_answer", {"chosen": []}),
    ("empty_answer", {"rejected": []}),
    ("empty_chosen", {"chosen": [assistant("")]}),
    ("empty_rejected", {"rejected": [assistant("\n")]}),
    ("unknown_role", {"prompt": [{"role": "human", "content": "q"}]}),
    ("unknown_role", {"chosen": [{"role": "Assistant", "content": "a"}]}),
    ("unknown_role", {"rejected": [{"role": "tool", "content": "a"}]}),
    ("nul_character", {"prompt": [user("a\x00b")]}),
    ("nul_character", {"chosen": [assistant("\x00")]}),
    ("bad_role_order", {"prompt": [user("a"), user("b")]}),
    ("bad_role_order", {"prompt": [assistant("hello"), user("b")]}),
    ("bad_role_order", {"prompt": [user("a"), assistant("b")]}),
    ("bad_role_order", {"prompt": [system("s")]}),
    ("bad_role_order", {"prompt": [user("a"), system("s"), user("b")]}),
    ("bad_role_order", {"prompt": [system("s"), system("t"), user("b")]}),
    ("bad_role_order", {"chosen": [user("a")]}),
    ("bad_role_order", {"chosen": [assistant("a"), user("b")]}),
    ("bad_role_order", {"chosen": [assistant("a"), assistant("b")]}),
    ("bad_role_order", {"chosen": [user("q"), assistant("a")]}),
    ("bad_role_order", {"rejected": [system("s"), assistant("a")]}),
    ("no_preference", {"rejected": [assistant("a good answer")]}),
    ("no_preference", {"rejected": [assistant("a good answer \n")]}),
    ("no_preference", {"chosen": [assistant(NFC)], "rejected": [assistant(NFD)]}),
]
SOUND: list[dict[str, Any]] = [
    {},
    {"prompt": [system("s"), user("q")]},
    {"prompt": [user("a"), assistant("b"), user("c")]},
    {"chosen": [assistant("x")], "rejected": [assistant("X")]},
    # NFKC would make these equal; mathematics and code depend on the difference.
    {"chosen": [assistant("x²")], "rejected": [assistant("x2")]},
    {"chosen": [assistant("ﬁ")], "rejected": [assistant("fi")]},
    {"chosen": [assistant("a b")], "rejected": [assistant("ab")]},
    {"rejected": [assistant("  a good\n\nanswer ")]},
    {"chosen": [assistant("one\u2028two")]},
    {"prompt": [user("tab\tand bell\x07")]},
]


@pytest.mark.parametrize(("reason", "changes"), FAULTY, ids=[f"{n}-{r}" for n, (r, _) in enumerate(FAULTY)])
def test_a_pair_that_breaks_a_rule_is_quarantined_under_its_reason(reason: str, changes: dict[str, Any]) -> None:
    found = pair_fault(pair(1, **changes))
    assert found is not None
    assert found[0] == reason
    result = screened(pair(0), pair(1, **changes), pair(2))
    assert result.pairs["row"].to_list() == ["row-0", "row-2"]
    [row] = result.quarantine.to_dicts()
    assert (row["reason"], row["source"], row["row"], row["line"]) == (reason, "feedback.jsonl", "row-1", 2)
    assert row["message"] == found[1] != ""
    kept = json.loads(base64.b64decode(row["raw"]))
    assert kept == {name: getattr(pair(1, **changes), name) for name in ("prompt", "chosen", "rejected")}


@pytest.mark.parametrize("changes", SOUND, ids=repr)
def test_a_pair_that_breaks_no_rule_is_accepted_as_it_is(changes: dict[str, Any]) -> None:
    assert pair_fault(pair(1, **changes)) is None
    [record] = screened(pair(1, **changes)).pairs.to_dicts()
    expected = pair(1, **changes)
    assert (record["prompt"], record["chosen"], record["rejected"]) == (
        expected.prompt,
        expected.chosen,
        expected.rejected,
    )


# Duplicates and contradictions


def test_an_exact_duplicate_is_dropped_and_counted_and_not_quarantined() -> None:
    result = screened(pair(1), pair(2), pair(1), pair(1))
    assert (result.pairs.height, result.duplicates, result.quarantine.height) == (2, 2, 0)


def test_two_rows_that_prefer_opposite_answers_are_both_quarantined() -> None:
    result = screened(pair(1), pair(2), flipped(pair(1)))
    assert result.pairs["row"].to_list() == ["row-2"]
    assert set(result.quarantine["row"]) == {"row-1", "row-1 flipped"}
    assert set(result.quarantine["reason"]) == {"conflict"}


def test_a_contradiction_in_any_script_is_found() -> None:
    one = pair(1, prompt=[user("質問")], chosen=[assistant("café")], rejected=[assistant("答え\u2028")])
    assert screened(one, flipped(one)).pairs.is_empty()


def test_a_contradiction_with_duplicates_leaves_neither_side() -> None:
    result = screened(pair(1), pair(1), flipped(pair(1)), flipped(pair(1)), pair(1))
    assert (result.pairs.height, result.quarantine.height, result.duplicates) == (0, 2, 3)


def test_the_same_answers_to_another_question_are_no_duplicate_and_no_contradiction() -> None:
    result = screened(pair(1), flipped(pair(2)))
    assert (result.pairs.height, result.quarantine.height, result.duplicates) == (2, 0, 0)


def test_what_was_quarantined_before_stays_in_front() -> None:
    before = quarantine_frame([Rejected("invalid_json", "cut", "f", "line-9", 9, b"{")])
    result = screen(pairs_frame([pair(1, prompt=[])]), before)
    assert result.quarantine["reason"].to_list() == ["invalid_json", "empty_prompt"]
    assert result.quarantine[:1].equals(before)


_pairs = st.lists(
    st.builds(
        lambda number, source, flip, changes: (
            flipped(pair(number, source=source, **changes)) if flip else pair(number, source=source, **changes)
        ),
        st.integers(0, 3),
        st.sampled_from(["monday.jsonl", "tuesday.jsonl"]),
        st.booleans(),
        st.one_of(st.just({}), st.sampled_from([changes for _, changes in FAULTY] + SOUND)),
    ),
    max_size=8,
)


def outcome(result: Screened) -> tuple[list[Any], list[Any], int]:
    """What was accepted and quarantined, in an order of its own."""
    return result.pairs.sort("pair_id").to_dicts(), sorted(result.quarantine.rows()), result.duplicates


@settings(max_examples=20, deadline=None)
@given(pairs=_pairs, data=st.data())
def test_every_pair_is_accepted_quarantined_or_a_duplicate_in_whatever_order_it_came(
    pairs: list[Pair], data: st.DataObject
) -> None:
    result = screened(*pairs)
    assert len(pairs) == result.pairs.height + result.quarantine.height + result.duplicates
    assert result.pairs["pair_id"].is_unique().all()
    accepted = set(result.pairs["pair_id"])
    assert accepted <= {one.pair_id for one in pairs if pair_fault(one) is None}
    assert not accepted & {flipped(one).pair_id for one in pairs if pair_fault(one) is None}
    assert outcome(screened(*data.draw(st.permutations(pairs)))) == outcome(result)


def test_which_of_two_equal_rows_is_kept_does_not_depend_on_the_order_of_files() -> None:
    monday = pair(1, source="monday.jsonl", line=7, margin=1.0, meta={"lang": "en"})
    tuesday = pair(1, source="tuesday.jsonl", line=3, margin=2.0)
    assert screened(monday, tuesday).pairs.equals(screened(tuesday, monday).pairs)


def test_no_pair_at_all_is_an_empty_table_of_the_right_columns() -> None:
    result = screened()
    assert result.pairs.columns == [column.name for column in PAIR_COLUMNS]
    assert (result.pairs.height, result.quarantine.height, result.duplicates) == (0, 0, 0)


# The schema

AGAINST_SCHEMA: list[tuple[str, str, Any]] = [
    ("pair_id", "32 hex digits", "x" * 32),
    ("prompt_id", "32 hex digits", "ab"),
    ("group_id", "32 hex digits", "A" * 32),
    ("line", "at least 1", 0),
    ("label_kind", " or ".join(LABEL_KINDS), "guess"),
    ("source", "no null", None),
    ("meta", "no null", None),
    ("row_hash", "32 hex digits", "z"),
]


@pytest.mark.parametrize(("column", "rule", "value"), AGAINST_SCHEMA, ids=[f"{c}: {r}" for c, r, _ in AGAINST_SCHEMA])
def test_a_row_against_the_schema_is_quarantined_and_its_neighbours_are_not(column: str, rule: str, value: Any) -> None:
    table = pairs_frame([pair(0), pair(1), pair(2)])
    broken = pl.when(pl.col("row") == "row-1").then(pl.lit(value, dtype=table.schema[column])).otherwise(pl.col(column))
    result = screen(table.with_columns(broken.alias(column)), quarantine_frame([]))
    assert result.pairs["row"].to_list() == ["row-0", "row-2"]
    [row] = result.quarantine.to_dicts()
    assert (row["reason"], row["row"]) == ("schema", "row-1")
    assert row["message"].startswith(f"{column}: ")


@pytest.mark.parametrize(
    ("column", "messages"),
    [
        ("prompt", [assistant("a")]),
        ("prompt", [user("a"), system("b")]),
        ("prompt", [user(" \n")]),
        ("prompt", [user(""), assistant("b"), user("c")]),
        ("chosen", [user("a")]),
        ("chosen", [assistant("")]),
        ("rejected", [assistant("a"), user("b")]),
        ("rejected", [assistant("\t")]),
    ],
)
def test_the_schema_refuses_conversations_by_itself(column: str, messages: list[Message]) -> None:
    """Screening refuses them first; the schema is what holds when a reader or a rule is changed."""
    kept, faults = _apply_schema(pairs_frame([pair(0), pair(1, **{column: messages}), pair(2)]))
    assert kept["row"].to_list() == ["row-0", "row-2"]
    assert [(fault["row"], fault["reason"]) for fault in faults] == [("row-1", "schema")]
    assert faults[0]["message"].startswith(f"{column}: ")


def test_the_schema_is_held_against_every_rule_that_the_columns_promise() -> None:
    promised = {(column.name, rule) for column in PAIR_COLUMNS for rule in column.rules if column.kind != "messages"}
    assert promised <= {(column, rule) for column, rule, _ in AGAINST_SCHEMA}


def test_when_every_row_is_against_the_schema_the_table_keeps_its_columns() -> None:
    result = screened(pair(0, line=0), pair(1, line=-1))
    assert result.pairs.columns == [column.name for column in PAIR_COLUMNS]
    assert (result.pairs.height, result.quarantine["reason"].to_list()) == (0, ["schema", "schema"])


@pytest.mark.parametrize(
    "table",
    [
        pairs_frame([pair(0)]).drop("meta"),
        pairs_frame([pair(0)]).with_columns(extra=pl.lit(1)),
        pairs_frame([pair(0)]).with_columns(pl.col("line").cast(pl.String)),
    ],
    ids=["a column less", "a column more", "another type"],
)
def test_a_table_of_another_shape_is_a_fault_of_the_package_and_raises(table: pl.DataFrame) -> None:
    with pytest.raises(SchemaErrors):
        _apply_schema(table)


# Fit to the model

TOKENS = token_schema()


def tokens(number: int, prompt: int, chosen: list[int], rejected: list[int], fault: str | None = None) -> list[Any]:
    return [pair(number).pair_id, [9] * prompt, chosen, rejected, fault]


def fitted(*rows: list[Any], max_length: int = 8) -> tuple[list[str], dict[str, str]]:
    """Rows that were kept, and reason by row of those that were not."""
    pairs = pairs_frame([pair(number) for number in range(len(rows))])
    table = pl.DataFrame(list(reversed(rows)), schema=TOKENS, orient="row")
    kept, faults = fit_to_model(pairs, table, max_length)
    assert kept.columns == [*pairs.columns, "prompt_ids", "chosen_ids", "rejected_ids"]
    assert kept.height + len(faults) == pairs.height
    return kept["row"].to_list(), {fault["row"]: fault["reason"] for fault in faults}


def test_pairs_get_their_own_tokens_whatever_the_order_of_the_token_table() -> None:
    pairs = pairs_frame([pair(0), pair(1)])
    rows = [tokens(1, 1, [1], [2]), tokens(0, 2, [3], [4])]
    kept, _ = fit_to_model(pairs, pl.DataFrame(rows, schema=TOKENS, orient="row"), 8)
    assert kept["row"].to_list() == ["row-0", "row-1"]
    assert kept["prompt_ids"].to_list() == [[9, 9], [9]]
    assert kept["chosen_ids"].to_list() == [[3], [1]]


def test_a_prompt_that_fills_the_length_is_quarantined_and_one_token_less_is_not() -> None:
    full, room = tokens(0, 8, [1], [2]), tokens(1, 7, [1], [2])
    over = tokens(2, 50, [1], [2])
    assert fitted(full, room, over) == (["row-1"], {"row-0": "prompt_too_long", "row-2": "prompt_too_long"})


def test_answers_that_differ_behind_the_cut_only_are_quarantined() -> None:
    behind, inside = tokens(0, 5, [1, 1, 1, 2], [1, 1, 1, 3]), tokens(1, 5, [1, 1, 2, 5], [1, 1, 3, 5])
    assert fitted(behind, inside) == (["row-1"], {"row-0": "identical_after_truncation"})


def test_answers_of_which_one_begins_with_the_other_are_equal_only_if_the_cut_makes_them() -> None:
    longer_inside, longer_behind = tokens(0, 5, [1, 1], [1, 1, 1]), tokens(1, 5, [1, 1, 1], [1, 1, 1, 1])
    assert fitted(longer_inside, longer_behind) == (["row-0"], {"row-1": "identical_after_truncation"})


def test_a_prompt_that_the_template_renders_differently_is_quarantined() -> None:
    rows = [tokens(0, 2, [1], [2], "template_boundary"), tokens(1, 2, [1], [2])]
    assert fitted(*rows) == (["row-1"], {"row-0": "template_boundary"})


def test_a_pair_that_the_template_refuses_is_quarantined_with_what_the_template_said() -> None:
    rows = [tokens(0, 0, [], [], "template_refused: no system: really"), tokens(1, 2, [1], [2])]
    assert fitted(*rows) == (["row-1"], {"row-0": "template_refused"})
    pairs = pairs_frame([pair(0)])
    _, [fault] = fit_to_model(pairs, pl.DataFrame(rows[:1], schema=TOKENS, orient="row"), 8)
    assert fault["message"] == "the chat template refuses the conversation: no system: really"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("template_drops_text: of the chosen answer", "leaves out text of the chosen answer"),
        ("unsupported_modality: the chat template has no place for tools", "has no place for tools"),
        ("no_embedding: <image>", "the text holds `<image>`, for which the model's embedding has no row"),
    ],
)
def test_what_the_worker_finds_of_a_pair_is_told_in_its_quarantine(fault: str, message: str) -> None:
    rows = [tokens(0, 2, [1], [2], fault)]
    assert fitted(*rows) == ([], {"row-0": fault.partition(":")[0]})
    _, [told] = fit_to_model(pairs_frame([pair(0)]), pl.DataFrame(rows, schema=TOKENS, orient="row"), 8)
    assert message in told["message"]


def test_answers_that_the_template_or_the_tokenizer_makes_equal_are_not_told_to_be_cut() -> None:
    """White space may be all in which two answers differ, and a template may strip it."""
    rows = [tokens(0, 2, [1, 3], [1, 3])]
    _, [told] = fit_to_model(pairs_frame([pair(0)]), pl.DataFrame(rows, schema=TOKENS, orient="row"), 8)
    assert (told["reason"], told["message"]) == (
        "identical_after_truncation",
        "chosen and rejected have the same tokens",
    )


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ([None] * 10, None),
        ([], None),
        (["template_refused: no system"] * 8 + [None] * 2, None),
        # Tools that a template has no place for are the rows' own.
        (["unsupported_modality: the chat template has no place for tools"] * 10, None),
        (
            ["template_refused: no system"] * 7 + ["template_boundary"] * 2 + [None],
            "9 of 10 pairs cannot be rendered: the chat template refuses the conversation: no system (7); the chat "
            "template renders the prompt differently once an answer follows it (2)",
        ),
    ],
    ids=["fine", "no pair", "some", "tools", "nearly all"],
)
def test_a_template_that_fits_nearly_no_pair_is_told_of_once(faults: list[str | None], said: str | None) -> None:
    assert unfit_template(Counter(filter(None, faults)), len(faults)) == said


def test_when_no_pair_fits_the_table_keeps_its_columns() -> None:
    assert fitted(tokens(0, 9, [1], [2])) == ([], {"row-0": "prompt_too_long"})
    assert fitted() == ([], {})


def test_an_answer_longer_than_the_room_is_kept_whole_for_whoever_trains() -> None:
    rows = [tokens(0, 5, [1] * 20, [2])]
    kept, _ = fit_to_model(pairs_frame([pair(0)]), pl.DataFrame(rows, schema=TOKENS, orient="row"), 8)
    assert kept["chosen_ids"].to_list() == [[1] * 20]


def test_only_rows_left_out_by_choice_or_by_the_models_size_are_no_damage() -> None:
    later = {"conflict", "schema", *TEMPLATE_FAULTS, "unsupported_modality", "no_embedding"}
    assert NOT_DAMAGE.isdisjoint({reason for reason, _ in FAULTY} | later)
    assert {"synthetic", "tie", "no_comparison", "prompt_too_long", "identical_after_truncation"} <= NOT_DAMAGE


# The split

_questions = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), max_size=12)
_fractions = st.sampled_from([0.05, 0.3, 0.5, 0.89])


def asked(texts: list[str]) -> pl.DataFrame:
    """Pairs that open with these questions; an equal question is asked in another conversation."""
    return pairs_frame(
        [
            pair(n, prompt=[user(text), assistant("hm"), user(f"and then {n}")], line=n + 1)
            for n, text in enumerate(texts)
        ]
    )


@settings(max_examples=40, deadline=None)
@given(texts=_questions, fraction=_fractions, seed=st.integers(0, 3), data=st.data())
def test_no_group_stands_in_both_splits_and_the_order_of_rows_changes_nothing(
    texts: list[str], fraction: float, seed: int, data: st.DataObject
) -> None:
    table = asked(texts)
    train, held_out = split(table, fraction, seed)
    assert not set(train["group_id"]) & set(held_out["group_id"])
    assert not set(train["prompt_id"]) & set(held_out["prompt_id"])
    assert shared_prompts(train, held_out) == 0
    assert sorted([*train["pair_id"], *held_out["pair_id"]]) == sorted(table["pair_id"])
    assert train.columns == held_out.columns == table.columns
    order = data.draw(st.permutations(range(len(texts))))
    again = split(table[list(order)], fraction, seed) if order else (train, held_out)
    assert again[0].equals(train)
    assert again[1].equals(held_out)


def test_a_prompt_on_both_sides_is_seen_by_its_text_whatever_its_ids_say() -> None:
    one = asked(["Who  was\nit?", "Why?"])
    conversation = [system("Be brief."), user(" Who was it?")]
    other = pairs_frame([pair(7, prompt=conversation), pair(8, prompt=[user("When?")])])
    assert shared_prompts(one, other.with_columns(group_id=pl.lit("0" * 32), prompt_id=pl.lit("0" * 32))) == 1
    assert shared_prompts(one, other[1:]) == 0
    assert shared_prompts(one, other[:0]) == 0


@settings(max_examples=40, deadline=None)
@given(old=_questions, new=_questions, fraction=_fractions, seed=st.integers(0, 3))
def test_a_group_never_changes_sides_as_feedback_grows(
    old: list[str], new: list[str], fraction: float, seed: int
) -> None:
    train, held_out = split(asked(old), fraction, seed)
    grown_train, grown_held_out = split(asked([*old, *new]), fraction, seed)
    assert set(train["pair_id"]) <= set(grown_train["pair_id"])
    assert set(held_out["pair_id"]) <= set(grown_held_out["pair_id"])


@settings(max_examples=60, deadline=None)
@given(group=st.text("0123456789abcdef", min_size=32, max_size=32), seed=st.integers(0, 9), data=st.data())
def test_a_larger_fraction_only_adds_to_what_is_held_out(group: str, seed: int, data: st.DataObject) -> None:
    small, large = sorted(data.draw(st.tuples(st.floats(0.01, 0.89), st.floats(0.01, 0.89))))
    assert in_eval_split(group, large, seed) or not in_eval_split(group, small, seed)


def test_the_held_out_share_is_about_the_fraction_and_another_seed_draws_another_one() -> None:
    groups = [pair(number).group_id for number in range(2000)]
    drawn = {seed: [in_eval_split(group, 0.2, seed) for group in groups] for seed in (0, 1)}
    # Five standard deviations of a fair draw.
    assert all(abs(sum(chosen) - 400) < 90 for chosen in drawn.values())
    assert sum(a and b for a, b in zip(drawn[0], drawn[1], strict=True)) < 150


def test_no_tree_of_the_embedded_sample_stands_in_both_splits() -> None:
    [file] = files_of([FeedbackSource(path="builtin:oasst", format="oasst_tree")])
    table = pairs_frame(read_file(file, ReadOptions("adjacent", True)).pairs)
    train, held_out = split(table, 0.3, 0)
    trees = [{json.loads(meta)["tree"] for meta in part["meta"]} for part in (train, held_out)]
    assert not trees[0] & trees[1]
    assert min(train.height, held_out.height) > 50


# Identity of pairs

_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=60, deadline=None)
@given(text=_text)
def test_folding_ignores_composition_and_white_space_and_nothing_is_left_to_fold(text: str) -> None:
    once = fold(text)
    assert fold(once) == once
    assert fold(f" \n{unicodedata.normalize('NFD', text)}\t") == fold(unicodedata.normalize("NFC", text))
    assert "  " not in once
    assert once == once.strip()


@settings(max_examples=60, deadline=None)
@given(one=_text, other=_text)
def test_pairs_of_equal_content_and_only_those_have_equal_ids(one: str, other: str) -> None:
    first = pair(0, chosen=[assistant(one)])
    moved = pair(0, chosen=[assistant(one)], source="else.jsonl", row="x", line=99, margin=2.0, meta={"a": 1})
    assert first.pair_id == moved.pair_id
    assert (first.pair_id == pair(0, chosen=[assistant(other)]).pair_id) == (one == other)
    assert first.prompt_id == pair(0, chosen=[assistant(other)]).prompt_id


def test_the_order_of_keys_in_a_message_or_in_other_columns_is_no_difference() -> None:
    one = pair(0, chosen=[{"role": "assistant", "content": "a"}], meta={"a": 1, "b": 2})
    other = pair(0, chosen=[{"content": "a", "role": "assistant"}], meta={"b": 2, "a": 1})
    assert pairs_frame([one]).equals(pairs_frame([other]))


def test_the_ids_of_a_prompt_ignore_spelling_but_not_roles_or_turns() -> None:
    base = pair(0, prompt=[user(f"Wo ist das {NFC}?")])
    spelt = pair(0, prompt=[user(f" Wo  ist\ndas {NFD}?")])
    assert (base.prompt_id, base.group_id) == (spelt.prompt_id, spelt.group_id)
    assert base.pair_id != spelt.pair_id
    longer = pair(0, prompt=[system("Be kind."), *base.prompt, assistant("x"), user("y")])
    assert longer.prompt_id != base.prompt_id
    assert longer.group_id == base.group_id
    assert (
        pair(0, prompt=[assistant("a"), user("b")]).prompt_id != pair(0, prompt=[user("a"), assistant("b")]).prompt_id
    )


def test_the_sound_and_faulty_samples_are_all_different_pairs() -> None:
    ids = Counter(pair(0, **changes).pair_id for changes in [*(c for _, c in FAULTY), *SOUND])
    assert max(ids.values()) == 1
