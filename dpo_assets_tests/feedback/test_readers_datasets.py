"""Formats of public preference data: expected items spelled out for each row of exports/FORMAT.jsonl."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dpo_assets.feedback.pair import Pair
from dpo_assets.feedback.readers import ReadOptions, RowFault
from dpo_assets_tests.feedback.exported import (
    items_of,
    read_export,
    rows_of,
    said,
    talk,
    the_answer,
    the_fault,
    the_pair,
)
from dpo_assets_tests.samples import assistant, user


def wrong(format: str, row: dict[str, Any], reason: str, *words: str) -> None:
    """The row is refused with this reason, and the message has these words."""
    fault = the_fault(items_of(format, row))
    assert fault.reason == reason, fault
    for word in words:
        assert word in fault.message


# ultrafeedback_raw


def test_ultrafeedback_raw_export() -> None:
    first, second = read_export("ultrafeedback_raw")
    unrated, pair = first
    assert isinstance(unrated, RowFault)
    assert isinstance(pair, Pair)
    assert (unrated.reason, unrated.row) == ("missing_field", "line-7.3")
    assert talk(pair) == ("u: How do magnets work?", "a: Aligned spins.", "a: Magic.")
    # (5 + 4 + 5 + 4) / 4 over (1 + 2 + 1 + 2) / 4, although the worse one has the overall score 10.
    assert (pair.row, pair.margin, pair.label_kind) == ("line-7.0>1", 3.0, "judge_rating")
    assert pair.meta == {"source": "sharegpt", "chosen": {"model": "a"}, "rejected": {"model": "b"}}
    # An overall score of 3 of 10 is not compared with a mean of 5 of 5.
    assert [item.reason for item in second if isinstance(item, RowFault)] == ["missing_field", "no_comparison"]


def test_ultrafeedback_raw_an_aspect_without_a_number_does_not_count() -> None:
    adjacent = items_of("ultrafeedback_raw", rows_of("ultrafeedback_raw")[0], ReadOptions("adjacent"))
    pairs = [item for item in adjacent if isinstance(item, Pair)]
    assert [talk(pair)[1:] for pair in pairs] == [
        ("a: Aligned spins.", "a: Spins, mostly."),
        ("a: Spins, mostly.", "a: Magic."),
    ]
    assert [pair.margin for pair in pairs] == [pytest.approx(4.5 - 11 / 3), pytest.approx(11 / 3 - 1.5)]


def test_ultrafeedback_raw_overall_scores_count_where_a_row_has_nothing_else() -> None:
    completions = [{"response": "a", "overall_score": 8.5}, {"response": "b", "overall_score": 2}]
    pair = the_pair(items_of("ultrafeedback_raw", {"instruction": "q", "completions": completions}))
    assert (talk(pair), pair.margin) == (("u: q", "a: a", "a: b"), 6.5)


def test_ultrafeedback_raw_equal_ratings_are_a_tie() -> None:
    completions = [{"response": "a", "fine-grained_score": 4}, {"response": "b", "fine-grained_score": 4.0}]
    wrong("ultrafeedback_raw", {"instruction": "q", "completions": completions}, "tie")


def test_ultrafeedback_raw_rows_of_another_shape() -> None:
    wrong("ultrafeedback_raw", {"instruction": "q", "output": "a"}, "wrong_shape", "has: instruction, output")
    wrong("ultrafeedback_raw", {"instruction": "q", "completions": ["a"]}, "wrong_shape", "a response each")
    wrong("ultrafeedback_raw", {"completions": [{"response": "a"}]}, "missing_field", "no `instruction`")


# ultrafeedback_binarized


def test_ultrafeedback_binarized_export() -> None:
    good, tie, upside_down = read_export("ultrafeedback_binarized")
    pair = the_pair(good)
    assert talk(pair) == ("u: What is tin?", "a: A metal.", "a: A can.")
    assert (pair.row, pair.margin, pair.label_kind, pair.meta) == ("p1", 2.5, "judge_rating", {})
    assert (the_fault(tie).reason, the_fault(tie).row) == ("tie", "p2")
    assert the_fault(upside_down).reason == "score_contradicts"
    assert "`score_chosen` is 2, `score_rejected` is 9" in the_fault(upside_down).message


def test_ultrafeedback_binarized_rows_of_another_shape() -> None:
    wrong("ultrafeedback_binarized", {"prompt": "q", "messages": []}, "wrong_shape", "the row has: messages, prompt")
    row = rows_of("ultrafeedback_binarized")[0]
    wrong("ultrafeedback_binarized", row | {"rejected": row["chosen"]}, "no_preference", "same conversation")
    wrong("ultrafeedback_binarized", row | {"chosen": 5}, "wrong_type", "`chosen` is int")


# ultrafeedback_argilla


def test_ultrafeedback_argilla_export() -> None:
    whole, texts, tie = read_export("ultrafeedback_argilla")
    assert talk(the_pair(whole)) == ("u: Do fish sleep?", "a: They rest.", "a: Never.")
    assert the_pair(whole).margin == 2.25
    assert the_pair(whole).meta == {"source": "truthful_qa", "chosen-model": "m1", "rejected-model": "m2"}
    assert talk(the_pair(texts)) == ("u: Do cats swim?", "a: Some do.", "a: Cats.")
    assert the_fault(tie).reason == "tie"


def test_ultrafeedback_argilla_rows_of_another_shape() -> None:
    wrong("ultrafeedback_argilla", {"instruction": "q"}, "wrong_shape", "the row has: instruction")
    wrong("ultrafeedback_argilla", {"chosen": "a", "rejected": "b"}, "missing_field", "no `prompt`")


# distilabel


def test_distilabel_export() -> None:
    rated, half_rated, formatted = read_export("distilabel")
    unwritten, pair = rated
    assert isinstance(unwritten, RowFault)
    assert isinstance(pair, Pair)
    assert (unwritten.reason, unwritten.row) == ("missing_field", "line-7.2")
    assert talk(pair) == ("u: Name a tree.", "a: Oak.", "a: Granite.")
    assert (pair.margin, pair.label_kind) == (4.0, "judge_rating")
    assert pair.meta == {"chosen": {"model": "m1"}, "rejected": {"model": "m2"}}
    assert [(i.reason, i.row) for i in half_rated if isinstance(i, RowFault)] == [
        ("missing_field", "line-7.1"),
        ("no_comparison", "line-7"),
    ]
    by_the_pipeline = the_pair(formatted)
    assert talk(by_the_pipeline) == ("u: Name a fish.", "a: Cod.", "a: Frog.")
    assert (by_the_pipeline.row, by_the_pipeline.margin) == ("f1", 3.0)
    assert by_the_pipeline.meta == {"chosen_model": "m1", "rejected_model": "m2"}


def test_distilabel_generations_after_messages_or_a_system_prompt() -> None:
    row = {"messages": [user("Hi"), assistant("Hello"), user("Bye")], "generations": ["a", "b"], "ratings": ["1", 2]}
    assert talk(the_pair(items_of("distilabel", row))) == ("u: Hi\na: Hello\nu: Bye", "a: b", "a: a")
    row = {"instruction": "q", "system_prompt": "s", "generations": ["a", "b"], "ratings": [2, 1]}
    assert talk(the_pair(items_of("distilabel", row))) == ("s: s\nu: q", "a: a", "a: b")


def test_distilabel_rows_of_another_shape() -> None:
    row = {"instruction": "q", "generations": ["a", "b"], "ratings": [1, 2]}
    wrong("distilabel", {"instruction": "q", "generation": "a"}, "wrong_shape", "the row has: generation, instruction")
    wrong("distilabel", row | {"ratings": None}, "missing_field", "no `ratings`")
    wrong("distilabel", row | {"ratings": [1]}, "wrong_shape", "2 `generations`, but 1 `ratings`")
    wrong("distilabel", row | {"generations": [], "ratings": []}, "no_comparison", "0 judged answers")
    wrong("distilabel", row | {"chosen": "a", "rejected": "b", "prompt": "q"} | TIE, "tie")


TIE = {"chosen_rating": 3, "rejected_rating": 3}


# nectar


def test_nectar_export() -> None:
    ranked, two, tie = read_export("nectar")
    best_worst = the_pair(ranked)
    assert talk(best_worst) == ("u: Name a river.", "a: The Rhine.", "a: A river.")
    assert (best_worst.row, best_worst.margin) == ("line-7.0>1", 2.0)
    pair = the_pair(two)
    assert talk(pair) == ("u: Hi\na: Hello!\nu: Name a lake.", "a: Garda.", "a: Mud.")
    assert (pair.margin, pair.label_kind) == (1.0, "judge_rating")
    assert pair.meta == {"chosen": {"model": "m1"}, "rejected": {"model": "m2"}}
    assert the_fault(tie).reason == "tie"


def test_nectar_rows_of_another_shape() -> None:
    wrong("nectar", {"prompt": "q"}, "wrong_shape", "the row has: prompt")
    wrong("nectar", {"prompt": "q", "answers": ["a"]}, "wrong_type", "`answers[0]` is str; expected {answer, rank}")
    wrong("nectar", {"prompt": "q", "answers": [{"answer": "a", "rank": None}]}, "missing_field", "no `rank`")
    wrong("nectar", {"prompt": "\n\nHuman:x\n\nAssistant:y", "answers": []}, "no_comparison", "0 judged answers")


# helpsteer2


def test_helpsteer2_export() -> None:
    rows = read_export("helpsteer2")
    best, worst = the_answer(rows[0]), the_answer(rows[1])
    assert said(best) == ("u: What is jazz?", "a: A kind of music with swing.", 4.0)
    assert said(worst) == ("u: What is jazz?", "a: Noise.", 0.0)
    assert best.label_kind == "human_rating"
    assert best.meta == {"helpfulness": 4, "correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 1}
    first_better = the_pair(rows[2])  # -2: response_1 is better
    assert talk(first_better) == ("u: Hi\na: Hello!\nu: What is a waltz?", "a: A dance in three.", "a: A walk.")
    assert (first_better.margin, first_better.label_kind) == (2.0, "human_pair")
    second_better = the_pair(rows[3])  # 1: response_2 is slightly better
    assert talk(second_better) == ("u: What is a polka?", "a: A lively dance.", "a: Dots.")
    assert second_better.margin == 1.0
    assert the_fault(rows[4]).reason == "tie"


def test_helpsteer2_rows_of_another_shape() -> None:
    wrong("helpsteer2", {"prompt": "q", "answer": "a"}, "wrong_shape", "the row has: answer, prompt")
    wrong(
        "helpsteer2", {"prompt": "q", "response": "a"}, "missing_field", "no `helpfulness`; the row has: prompt, resp"
    )
    wrong(
        "helpsteer2", {"prompt": "q", "response": "a", "helpfulness": "high"}, "wrong_type", "`helpfulness` is 'high'"
    )
    two = {"prompt": "q", "response_1": "a", "response_2": "b"}
    wrong("helpsteer2", two, "missing_field", "no `preference_strength`")
    wrong("helpsteer2", two | {"preference_strength": 1, "prompt": ["q"]}, "wrong_type", "`prompt` is list")


# helpsteer3


def test_helpsteer3_export() -> None:
    first, second, tie = read_export("helpsteer3")
    pair = the_pair(first)  # -3: response1 is much better
    assert talk(pair) == ("u: Reverse a list.\na: Which one?\nu: xs", "a: xs[::-1]", "a: xs.sort()")
    assert (pair.margin, pair.meta) == (3.0, {"domain": "code", "language": "python"})
    assert talk(the_pair(second)) == ("u: Name a planet.", "a: Mars.", "a: Moon.")
    assert the_pair(second).margin == 2.0
    assert the_fault(tie).reason == "tie"


def test_helpsteer3_rows_of_another_shape() -> None:
    wrong("helpsteer3", {"context": "q", "response": "a"}, "wrong_shape", "the row has: context, response")
    wrong("helpsteer3", {"context": "q", "response1": "a"}, "missing_field", "no `response2`")
    two = {"context": 1, "response1": "a", "response2": "b", "overall_preference": 1}
    wrong("helpsteer3", two, "wrong_type", "`context` is int")
    wrong("helpsteer3", two | {"overall_preference": True}, "wrong_type", "`overall_preference` is True")


# arena


def test_arena_export() -> None:
    rows = read_export("arena")
    cleaned = the_pair(rows[0])  # 33k
    assert talk(cleaned) == ("u: What is rust?", "a: Iron oxide.", "a: A colour.")
    assert (cleaned.row, cleaned.label_kind) == ("q1", "arena")
    assert (cleaned.created_at, cleaned.user) == ("2023-04-24T15:53:11.500000+00:00", "arena_user_7")
    assert cleaned.meta["winner"] == "model_b"
    assert the_fault(rows[1]).reason == "tie"
    columns = the_pair(rows[2])  # 55k: the later turns belong to the answers, as they follow other first answers
    assert talk(columns) == (
        "u: Name a nut.",
        "a: Walnut.\nu: Another?\na: Hazel.",
        "a: Bolt.\nu: Another?\na: Screw.",
    )
    assert columns.row == "30192"
    text = the_pair(rows[3])  # 100k
    assert talk(text) == ("u: 2+2?", "a: 4", "a: 5")
    assert (text.user, text.created_at) == ("abc123", "2024-07-01T00:00:00+00:00")
    parts = the_pair(rows[4])  # 140k
    assert talk(parts) == ("u: A haiku?", "a: Old pond.", "a: No.")
    assert (parts.row, parts.created_at) == ("v5", "2025-06-01T12:00:00+00:00")
    later_vote = the_fault(rows[5])
    assert (later_vote.reason, later_vote.row) == ("no_shared_prompt", "v6")
    logged = the_pair(rows[6])  # a server's log: what stands before `offset` was never said
    assert talk(logged) == ("u: What is tea?", "a: A hot drink.", "a: Leaf.")
    assert logged.user == "203.0.113.7"  # Who it was: ingestion keeps a keyed digest of it.
    assert logged.meta == {"winner": "model_a", "model_a": "m1", "model_b": "m2"}
    assert the_fault(rows[7]).reason == "leaked_identity"


VOTE = rows_of("arena")[0]
LOG = rows_of("arena")[6]


@pytest.mark.parametrize("winner", ["tie", "tie (bothbad)", "both_bad"])
def test_arena_ties_by_each_of_their_names(winner: str) -> None:
    wrong("arena", VOTE | {"winner": winner}, "tie")


@pytest.mark.parametrize("kind", ["tievote", "bothbad_vote"])
def test_arena_ties_of_a_log(kind: str) -> None:
    wrong("arena", LOG | {"type": kind}, "tie")


def b_says(text: str) -> dict[str, Any]:
    return VOTE | {"conversation_b": [user("What is rust?"), assistant(text)]}


def test_arena_what_fastchat_leaves_out() -> None:
    wrong("arena", VOTE | {"anony": False}, "not_anonymous", "could see the models' names")
    wrong("arena", LOG | {"models": ["<h3>Model A: m1</h3>\n", ""]}, "not_anonymous")
    wrong("arena", LOG | {"models": ["vicuna-13b", "koala-13b"]}, "not_anonymous")
    wrong("arena", LOG | {"models": [None, ""]}, "wrong_shape", "one side of the vote had no model")
    wrong("arena", LOG | {"type": "chat"}, "no_comparison", "a 'chat' event of the log")
    wrong("arena", b_says("**API REQUEST ERROR** Reason: blocked."), "error_answer", "side b")
    wrong("arena", b_says("NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE."), "error_answer")
    wrong("arena", b_says("Iron▌"), "unfinished", "side b")
    wrong("arena", b_says(" "), "unfinished")
    wrong("arena", VOTE | {"conversation_b": VOTE["conversation_b"][:1]}, "unfinished", "side b ends before")
    wrong("arena", LOG | {"states": [LOG["states"][0] | {"offset": 9}, LOG["states"][1]]}, "unfinished", "side a")


def test_arena_a_name_inside_another_word_leaks_no_identity() -> None:
    state = LOG["states"][1] | {
        "messages": [["Human", "What is tea?"], ["Assistant", "Palms bombard a lamdaesque sea."]]
    }
    assert isinstance(items_of("arena", LOG | {"states": [LOG["states"][0], state]})[0], Pair)
    state["messages"][1][1] = "Ask GPT-4."
    wrong("arena", LOG | {"states": [LOG["states"][0], state]}, "leaked_identity", "'GPT-4'")


def test_arena_users_turns_must_be_the_same() -> None:
    other = [user("What is rust, the language?"), assistant("A tool.")]
    wrong("arena", VOTE | {"conversation_b": other}, "no_shared_prompt", "different things on the two sides")


def test_arena_rows_of_another_shape() -> None:
    wrong("arena", {"question_id": "q", "winner": "model_a"}, "wrong_shape", "the row has: question_id, winner")
    wrong("arena", VOTE | {"winner": "model_c"}, "wrong_shape", "winner 'model_c' is none of: model_a, model_b, tie")
    wrong("arena", VOTE | {"winner": None}, "missing_field", "no `winner`")
    wrong("arena", VOTE | {"conversation_a": "[{"}, "invalid_json", "`conversation_a` is text that is not JSON")
    wrong("arena", VOTE | {"conversation_a": '[{"role": "user", "content": "\\ud800"}]'}, "invalid_utf8")
    wrong("arena", VOTE | {"conversation_a": "[" * 100_000}, "too_deep")
    image = json.loads(json.dumps(rows_of("arena")[4]))
    image["conversation_a"][0]["content"].append({"type": "image", "text": None, "image": "x", "mimeType": "image/png"})
    wrong("arena", image, "unsupported_modality", "holds image")
    columns = rows_of("arena")[2]
    wrong("arena", columns | {"winner_tie": 1}, "wrong_shape", "2 of winner_model_a")
    wrong("arena", columns | {"response_b": '["Bolt."]'}, "wrong_shape", "2 prompts, but 1 in `response_b`")
    wrong("arena", columns | {"response_b": '["Bolt.", null]'}, "unfinished")
    wrong("arena", columns | {"winner_model_a": "0", "winner_tie": "1"}, "tie")


def test_arena_columns_as_csv_has_them() -> None:
    row = {name: str(value) for name, value in rows_of("arena")[2].items()}
    assert talk(the_pair(items_of("arena", row)))[0] == "u: Name a nut."
