"""Readers: each export format as its authors describe it, and what is said about rows that are not like that."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.feedback.pair import Message, Pair
from dpo_assets.feedback.readers import Place, ReadOptions, RowFault, format_named
from dpo_assets.feedback.tables import pairs_frame
from dpo_assets_tests.samples import assistant, system, user

PLACE = Place("export.jsonl", 7)
FORMATS = ["trl", "oasst_tree", "hh_rlhf"]


def read(format: str, row: Any, *, pairing: str = "best_worst", synthetic: bool = False) -> list[Pair | RowFault]:
    reader = format_named(format).reader(ReadOptions(pairing, synthetic))
    return [item for _, item in reader.read(row, PLACE)]


def the_pair(format: str, row: Any, **options: Any) -> Pair:
    [item] = read(format, row, **options)
    assert isinstance(item, Pair), item
    return item


def the_fault(format: str, row: Any, **options: Any) -> RowFault:
    [item] = read(format, row, **options)
    assert isinstance(item, RowFault), item
    return item


def contents(pair: Pair) -> tuple[list[Message], list[Message], list[Message]]:
    return pair.prompt, pair.chosen, pair.rejected


# trl


def test_trl_text_becomes_one_message_each() -> None:
    pair = the_pair("trl", {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."})
    assert contents(pair) == ([user("Why?")], [assistant("Because.")], [assistant("No idea.")])
    assert (pair.source, pair.line, pair.row, pair.label_kind) == ("export.jsonl", 7, "line-7", "human_pair")


def test_trl_messages_stay_messages() -> None:
    prompt = [system("Be kind."), user("Why?")]
    row = {"prompt": prompt, "chosen": [assistant("Because.")], "rejected": [assistant("No.")]}
    assert contents(the_pair("trl", row)) == (prompt, [assistant("Because.")], [assistant("No.")])


def test_trl_text_and_messages_may_be_mixed_in_one_row() -> None:
    row = {"prompt": "Why?", "chosen": [assistant("Because.")], "rejected": "No."}
    assert contents(the_pair("trl", row)) == ([user("Why?")], [assistant("Because.")], [assistant("No.")])


def test_trl_extra_keys_of_a_message_are_dropped() -> None:
    row = {"prompt": "Why?", "chosen": [assistant("A") | {"name": "x"}], "rejected": "B"}
    assert the_pair("trl", row).chosen == [assistant("A")]


def test_trl_conversations_without_a_prompt_share_their_beginning() -> None:
    shared = [user("a"), assistant("b"), user("c")]
    row = {"chosen": [*shared, assistant("good")], "rejected": [*shared, assistant("bad")]}
    assert contents(the_pair("trl", row)) == (shared, [assistant("good")], [assistant("bad")])
    assert contents(the_pair("trl", row | {"prompt": None})) == contents(the_pair("trl", row))


def test_trl_answers_of_several_turns_are_split_where_they_part() -> None:
    chosen = [user("a"), assistant("b"), user("c"), assistant("d")]
    rejected = [user("a"), assistant("x")]
    pair = the_pair("trl", {"chosen": chosen, "rejected": rejected})
    assert contents(pair) == (chosen[:1], chosen[1:], rejected[1:])


def test_trl_id_margin_and_other_columns_are_kept() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "id": "r-9", "margin": 2, "lang": "de", "tags": [1]}
    pair = the_pair("trl", row)
    assert (pair.row, pair.margin, pair.meta) == ("r-9", 2.0, {"lang": "de", "tags": [1]})


@pytest.mark.parametrize(
    ("text", "number"), [("0.7", 0.7), (" 2 ", 2.0), ("-1.5e-1", -0.15), ("+3", 3.0), (".5", 0.5), ("0", 0.0)]
)
def test_trl_a_margin_given_as_text_is_the_number(text: str, number: float) -> None:
    assert the_pair("trl", {"prompt": "p", "chosen": "a", "rejected": "b", "margin": text}).margin == number


@pytest.mark.parametrize(
    "margin",
    [None, True, [2], "", "strong", "0,7", "1_0", "nan", "inf", "-Infinity", "1e999", "9" * 400, "0x10", "0.7 of 1"],
    ids=lambda margin: repr(margin)[:12],
)
def test_trl_a_margin_that_is_no_number_is_no_margin(margin: Any) -> None:
    assert the_pair("trl", {"prompt": "p", "chosen": "a", "rejected": "b", "margin": margin}).margin is None


GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("changes", "reason", "message"),
    [
        ({"chosen": None}, "missing_field", "no `chosen`; the row has: chosen, id, prompt, rejected"),
        ({"rejected": None}, "missing_field", "no `rejected`"),
        ({"prompt": 5}, "wrong_type", "`prompt` is int; expected text or a list of messages"),
        ({"chosen": 5}, "wrong_type", "`chosen` is int"),
        ({"chosen": True}, "wrong_type", "`chosen` is bool"),
        ({"rejected": {"role": "assistant", "content": "x"}}, "wrong_type", "`rejected` is dict"),
        ({"chosen": ["text"]}, "wrong_type", "`chosen[0]` is str; expected {role, content}"),
        ({"chosen": [assistant("x"), {"role": "user"}]}, "wrong_type", "`chosen[1]` needs text"),
        (
            {"chosen": [{"role": "assistant", "content": [{"type": "text"}]}]},
            "wrong_type",
            "`chosen[0].content[0]` needs",
        ),
        ({"chosen": [{"role": None, "content": "x"}]}, "wrong_type", "it has: ['content', 'role']"),
        ({"prompt": None}, "no_shared_prompt", "begin with different messages"),
        ({"prompt": None, "rejected": "a"}, "no_preference", "the same conversation"),
        (
            {"prompt": None, "chosen": [user("u"), assistant("a")], "rejected": [user("u")]},
            "no_shared_prompt",
            "one conversation is the beginning of the other",
        ),
        ({"prompt": None, "chosen": []}, "no_shared_prompt", "begin with different messages"),
    ],
)
def test_trl_a_row_of_another_shape_is_refused_with_its_reason(
    changes: dict[str, Any], reason: str, message: str
) -> None:
    refused = the_fault("trl", GOOD | changes | {"id": "r-1"})
    assert (refused.reason, refused.row) == (reason, "r-1")
    assert message in refused.message


def test_trl_an_absent_key_is_like_null_and_an_empty_row_says_so() -> None:
    assert the_fault("trl", {"prompt": "p", "chosen": "a"}).reason == "missing_field"
    assert the_fault("trl", {}).message == "no `chosen`; the row has: no keys"


def test_trl_a_margin_too_large_for_a_number_is_refused_or_left_out() -> None:
    [item] = read("trl", GOOD | {"margin": 10**400})
    assert isinstance(item, RowFault) or item.margin is None


def test_trl_an_infinite_margin_is_refused_or_left_out() -> None:
    [item] = read("trl", GOOD | {"margin": json.loads("1e999")})
    assert isinstance(item, RowFault) or item.margin is None or math.isfinite(item.margin)


def test_trl_a_number_as_id_is_not_lost() -> None:
    pair = the_pair("trl", GOOD | {"id": 4711})
    assert pair.row == "4711" or pair.meta.get("id") == 4711


# oasst_tree


def reply(name: str, rank: Any = None, **changes: Any) -> dict[str, Any]:
    return {"message_id": name, "text": f"text of {name}", "role": "assistant", "rank": rank, "replies": []} | changes


def tree(*replies: dict[str, Any], **changes: Any) -> dict[str, Any]:
    root = {"message_id": "root", "text": "question", "role": "prompter", "replies": list(replies)}
    return {"message_tree_id": "tree-1", "prompt": root | changes}


def rows(items: list[Pair | RowFault]) -> list[str]:
    return [item.row for item in items]


def test_oasst_the_lowest_rank_is_chosen_over_the_highest_whatever_their_order() -> None:
    pair = the_pair("oasst_tree", tree(reply("c", 2), reply("a", 0), reply("b", 1)))
    assert contents(pair) == ([user("question")], [assistant("text of a")], [assistant("text of c")])
    assert (pair.row, pair.margin, pair.label_kind, pair.meta) == ("a>c", 2.0, "human_ranking", {"tree": "tree-1"})


def test_oasst_adjacent_pairs_each_reply_with_the_next_in_rank() -> None:
    items = read("oasst_tree", tree(reply("c", 5), reply("a", 0), reply("b", 1)), pairing="adjacent")
    assert rows(items) == ["a>b", "b>c"]
    assert [item.margin for item in items if isinstance(item, Pair)] == [1.0, 4.0]


def test_oasst_a_reply_without_a_rank_is_in_no_pair_and_its_own_replies_are_read() -> None:
    below = {"message_id": "u", "text": "more", "role": "prompter", "replies": [reply("d", 0), reply("e", 1)]}
    pair = the_pair("oasst_tree", tree(reply("a", 0), reply("b", None, replies=[below])))
    assert pair.prompt == [user("question"), assistant("text of b"), user("more")]
    assert pair.row == "d>e"


def test_oasst_ranked_prompter_messages_are_no_answers() -> None:
    asks = [{"message_id": n, "text": n, "role": "prompter", "rank": r, "replies": []} for n, r in (("x", 0), ("y", 1))]
    assert the_fault("oasst_tree", tree(reply("a", 0, replies=asks))).reason == "no_comparison"


def test_oasst_every_compared_message_of_a_tree_gives_a_pair() -> None:
    below = {"message_id": "u", "text": "more", "role": "prompter", "replies": [reply("d", 0), reply("e", 1)]}
    items = read("oasst_tree", tree(reply("a", 0, replies=[below]), reply("b", 1)))
    assert rows(items) == ["a>b", "d>e"]
    assert all(isinstance(item, Pair) for item in items)


def test_oasst_equal_ranks_are_a_tie() -> None:
    refused = the_fault("oasst_tree", tree(reply("a", 1), reply("b", 1)))
    assert (refused.reason, refused.row) == ("tie", "a>b")


@pytest.mark.parametrize("machine", ["a", "b"])
def test_oasst_a_machine_written_side_is_left_out_unless_asked_for(machine: str) -> None:
    row = tree(*(reply(name, rank, synthetic=name == machine) for name, rank in (("a", 0), ("b", 1))))
    assert the_fault("oasst_tree", row).reason == "synthetic"
    assert the_pair("oasst_tree", row, synthetic=True).row == "a>b"


def test_oasst_a_machine_written_reply_between_best_and_worst_leaves_the_pair_alone() -> None:
    row = tree(reply("a", 0), reply("b", 1, synthetic=True), reply("c", 2))
    assert the_pair("oasst_tree", row).row == "a>c"
    assert [item.reason for item in read("oasst_tree", row, pairing="adjacent") if isinstance(item, RowFault)] == [
        "synthetic",
        "synthetic",
    ]


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({"message_tree_id": "tree-1", "text": "x"}, "wrong_shape", "the row has: message_tree_id, text"),
        ({"message_tree_id": "tree-1", "prompt": "x"}, "wrong_shape", "no message tree"),
        (tree(), "no_comparison", "two ranked replies"),
        (tree(reply("a", 0)), "no_comparison", "two ranked replies"),
        (tree(reply("a"), reply("b")), "no_comparison", "two ranked replies"),
        (tree(role="narrator"), "wrong_type", "message 'root' lacks a known role or text"),
        (tree(role=None), "wrong_type", "message 'root'"),
        (tree(text=None), "wrong_type", "message 'root'"),
        (tree(replies={"a": 1}), "wrong_type", "`replies` is not a list of messages"),
        (tree(replies=["text"]), "wrong_type", "`replies` is not a list of messages"),
        (tree(reply("a", 0, text=5), reply("b", 1)), "wrong_type", "message 'a'"),
    ],
)
def test_oasst_a_tree_of_another_shape_is_refused_with_its_reason(row: Any, reason: str, message: str) -> None:
    refused = the_fault("oasst_tree", row)
    assert (refused.reason, refused.row) == (reason, "tree-1")
    assert message in refused.message


def test_oasst_a_fault_deep_in_a_tree_keeps_the_pairs_above_it_and_says_so() -> None:
    items = read("oasst_tree", tree(reply("a", 0, replies=[reply("x", role="narrator")]), reply("b", 1)))
    assert isinstance(items[0], Pair)
    assert isinstance(items[1], RowFault)
    assert rows(items) == ["a>b", "tree-1"]


@pytest.mark.parametrize("role", [[], {}], ids=repr)
def test_oasst_a_role_that_is_no_text_is_refused(role: Any) -> None:
    assert the_fault("oasst_tree", tree(role=role)).reason == "wrong_type"


def test_oasst_a_rank_too_large_for_a_number_is_refused() -> None:
    [item] = read("oasst_tree", tree(reply("a", 0), reply("b", 10**400)))
    assert isinstance(item, RowFault)


def test_oasst_true_is_no_rank() -> None:
    assert the_fault("oasst_tree", tree(reply("a", 0), reply("b", True))).reason == "no_comparison"


# hh_rlhf: "\n\nHuman:" and "\n\nAssistant:" open the turns, and both transcripts differ in the last answer.

SHARED = "\n\nHuman: What are some cruise ships?\n\nAssistant: Big ones.\n\nHuman: Name one."


def test_hh_the_common_turns_are_the_prompt_and_the_last_answers_the_pair() -> None:
    row = {"chosen": f"{SHARED}\n\nAssistant: The Icon.", "rejected": f"{SHARED}\n\nAssistant: I will not say."}
    pair = the_pair("hh_rlhf", row)
    assert pair.prompt == [user("What are some cruise ships?"), assistant("Big ones."), user("Name one.")]
    assert (pair.chosen, pair.rejected) == ([assistant("The Icon.")], [assistant("I will not say.")])
    assert (pair.row, pair.line, pair.label_kind) == ("line-7", 7, "human_pair")


def test_hh_white_space_before_the_first_turn_is_nothing() -> None:
    row = {"chosen": f" \n{SHARED}\n\nAssistant: Yes.", "rejected": f"{SHARED}\n\nAssistant: No."}
    assert the_pair("hh_rlhf", row).chosen == [assistant("Yes.")]


def test_hh_line_breaks_inside_an_answer_stay_and_those_around_it_go() -> None:
    row = {"chosen": f"{SHARED}\n\nAssistant: 1. One\n\n2. Two\n ", "rejected": f"{SHARED}\n\nAssistant: No."}
    assert the_pair("hh_rlhf", row).chosen == [assistant("1. One\n\n2. Two")]


@pytest.mark.parametrize("quoted", ["Human: nature", "\nAssistant: quoted", "the Human: body", "\n\nHuman nature"])
def test_hh_a_speaker_name_inside_a_sentence_opens_no_turn(quoted: str) -> None:
    row = {"chosen": f"{SHARED}\n\nAssistant: Well, {quoted}", "rejected": f"{SHARED}\n\nAssistant: No."}
    assert the_pair("hh_rlhf", row).chosen == [assistant(f"Well, {quoted}")]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason", "message"),
    [
        (None, f"{SHARED}\n\nAssistant: No.", "missing_field", "no `chosen`"),
        (f"{SHARED}\n\nAssistant: No.", 5, "wrong_type", "`rejected` is int; expected a transcript"),
        ([assistant("x")], SHARED, "wrong_type", "`chosen` is list"),
        ("", SHARED, "wrong_shape", "`chosen` does not open with"),
        ("Just text.", SHARED, "wrong_shape", "`chosen` does not open with"),
        (f"Note.{SHARED}", SHARED, "wrong_shape", "`chosen` does not open with"),
        (SHARED, SHARED, "no_preference", "the same conversation"),
        (f"{SHARED}\n\nAssistant: Yes.", SHARED, "no_shared_prompt", "beginning of the other"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: x\n\nAssistant: b", "no_shared_prompt", "begin with different"),
    ],
)
def test_hh_a_row_of_another_shape_is_refused_with_its_reason(
    chosen: Any, rejected: Any, reason: str, message: str
) -> None:
    refused = the_fault("hh_rlhf", {"chosen": chosen, "rejected": rejected, "id": "r-1"})
    assert (refused.reason, refused.row) == (reason, "r-1")
    assert message in refused.message


def test_hh_a_red_team_transcript_is_named_as_what_it_is() -> None:
    row = {"transcript": SHARED, "min_harmlessness_score_transcript": -1.2, "rating": 3.0, "tags": None}
    refused = the_fault("hh_rlhf", row)
    assert refused.reason == "wrong_shape"
    assert "red-team transcript" in refused.message


# All formats

_scalars = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(-1, 1), st.text(max_size=6))
_any = st.recursive(
    _scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
_message = st.fixed_dictionaries({}, optional={"role": _any, "content": _any})
_node: st.SearchStrategy[dict[str, Any]] = st.deferred(
    lambda: st.fixed_dictionaries(
        {},
        optional={
            "message_id": _any,
            "text": st.one_of(st.text(max_size=4), _any),
            "role": st.one_of(st.sampled_from(["prompter", "assistant", "x"]), _scalars),
            "rank": _scalars,
            "synthetic": _any,
            "replies": st.one_of(_any, st.lists(_node, max_size=3)),
        },
    )
)
_transcript = st.lists(st.sampled_from(["\n\nHuman:", "\n\nAssistant:", " hi", "\n", "x"]), max_size=6).map("".join)
_field = st.one_of(_any, st.lists(_message, max_size=3), _transcript, _node)
_row = st.dictionaries(
    st.sampled_from(["prompt", "chosen", "rejected", "id", "margin", "message_tree_id", "transcript", "other"]), _field
)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=60, deadline=None)
@given(row=_row, pairing=st.sampled_from(["best_worst", "adjacent"]), synthetic=st.booleans())
def test_any_row_gives_pairs_or_faults_and_never_nothing(
    format: str, row: dict[str, Any], pairing: str, synthetic: bool
) -> None:
    items = read(format, row, pairing=pairing, synthetic=synthetic)
    assert len(items) == 1 if format != "oasst_tree" else items
    for item in items:
        assert item.row
        if isinstance(item, RowFault):
            assert item.reason
            assert item.message
        else:
            assert (item.source, item.line) == (PLACE.source, PLACE.line)
            assert pairs_frame([item])["pair_id"].to_list() == [item.pair_id]
            for messages in contents(item):
                assert all(isinstance(m["role"], str) and isinstance(m["content"], str) for m in messages)


@pytest.mark.parametrize("given_id", [None, True, "", [], {}], ids=repr)
def test_a_row_without_a_usable_id_is_named_by_its_line(given_id: Any) -> None:
    assert PLACE.row_id(given_id) == "line-7"
