"""Formats of training platforms and trainers: expected pairs spelled out for each row of exports/FORMAT.jsonl."""

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
from dpo_assets_tests.samples import assistant, system, user


def wrong(format: str, row: dict[str, Any], reason: str, *words: str) -> None:
    """The row is refused with this reason, and the message has these words."""
    fault = the_fault(items_of(format, row))
    assert fault.reason == reason, fault
    for word in words:
        assert word in fault.message
    assert fault.row == "line-7"


# trl: unpaired rows, and answers that repeat their prompt. The rest of TRL is in test_readers.py.


def test_trl_export() -> None:
    rows = read_export("trl")
    assert talk(the_pair(rows[0])) == ("u: What is a fjord?", "a: A sea inlet between cliffs.", "a: A car.")
    assert talk(the_pair(rows[1]))[0] == "s: Be brief.\nu: Capital of Peru?"
    assert the_pair(rows[1]).margin == 1.5
    assert talk(the_pair(rows[2])) == ("u: Say hi.", "a: Hi!", "a: No.")
    assert talk(the_pair(rows[3])) == ("u: Say bye.", "a: Bye!", "a: Why?")
    liked, disliked = the_answer(rows[4]), the_answer(rows[5])
    assert said(liked) == ("u: Is ice cold?", "a: Yes, it is.", 1.0)
    assert said(disliked) == ("u: Is ice cold?", "a: Sometimes.", -1.0)
    assert (liked.label_kind, liked.prompt) == ("human_thumb", disliked.prompt)


@pytest.mark.parametrize(("label", "score"), [("true", 1.0), ("False", -1.0), (1, 1.0), (0, -1.0), ("1", 1.0)])
def test_trl_a_label_may_be_a_number_or_text_as_csv_has_it(label: Any, score: float) -> None:
    assert the_answer(items_of("trl", {"prompt": "p", "completion": "c", "label": label})).score == score


def test_trl_an_unpaired_row_of_another_shape() -> None:
    wrong("trl", {"prompt": "p", "completion": "c", "label": "good"}, "wrong_type", "`label` is str")
    wrong("trl", {"completion": "c", "label": True}, "missing_field", "no `prompt`; the row has: completion, label")


def test_trl_answers_that_repeat_the_prompt_after_a_system_message_are_split_where_they_part() -> None:
    shared = [system("Be kind."), user("Hi")]
    row = {"prompt": "Hi", "chosen": [*shared, assistant("Hello")], "rejected": [*shared, assistant("No")]}
    assert talk(the_pair(items_of("trl", row))) == ("s: Be kind.\nu: Hi", "a: Hello", "a: No")


def test_trl_conversations_about_something_else_than_the_prompt_stay_as_they_are() -> None:
    row = {"prompt": "Hi", "chosen": [user("Bye"), assistant("a")], "rejected": [user("Bye"), assistant("b")]}
    assert talk(the_pair(items_of("trl", row))) == ("u: Hi", "u: Bye\na: a", "u: Bye\na: b")


# openai


def test_openai_export() -> None:
    rows = read_export("openai")
    expected = ("u: How cold is Oslo today?", "a: I cannot see live weather; yr.no has it.", "a: Cold.")
    assert talk(the_pair(rows[0])) == expected
    assert talk(the_pair(rows[1])) == (
        "s: Answer in French.\nu: Good morning\na: Bonjour\nu: Good night",
        "a: Bonne nuit",
        "a: Good night",
    )
    parts = the_pair(rows[2])
    assert talk(parts) == ("u: Two lines:\nsum them up.", "a: Two lines.", "a: No.")
    assert json.loads(parts.tools) == rows_of("openai")[2]["input"]["tools"]
    assert parts.meta == {}
    assert the_pair(rows[0]).label_kind == "human_pair"
    fault = the_fault(rows[3])
    assert (fault.reason, "`preferred_output[0]` has `tool_calls`" in fault.message) == (
        "unsupported_modality",
        True,
    )


def test_openai_rows_of_another_shape() -> None:
    answers = {"preferred_output": [assistant("a")], "non_preferred_output": [assistant("b")]}
    wrong("openai", {"question": "q", "best": "a"}, "wrong_shape", "the row has: best, question")
    wrong(
        "openai",
        {"input": {"messages": [user("q")]}, "preferred_output": []},
        "missing_field",
        "`non_preferred_output`",
    )
    wrong("openai", {"input": {"prompt": "q"}, **answers}, "missing_field", "`input.messages`; `input` has: prompt")
    wrong("openai", {"input": "q", **answers}, "wrong_type", "`input` is str")
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    wrong("openai", {"input": {"messages": [image]}, **answers}, "unsupported_modality", "holds image_url")
    wrong("openai", {"input": {"messages": [{"role": "user"}]}, **answers}, "wrong_type", "it has: ['role']")


# openpipe


def test_openpipe_export() -> None:
    rows = read_export("openpipe")
    first = the_pair(rows[0])
    assert talk(first) == ("s: You know geography.\nu: Capital of Estonia?", "a: Tallinn", "a: Riga")
    assert first.meta == {"split": "TRAIN"}
    assert talk(the_pair(rows[1])) == ("u: Capital of Latvia?", "a: Riga", "a: Vilnius")
    assert the_fault(rows[2]).reason == "wrong_shape"
    assert "does not end with an assistant's answer" in the_fault(rows[2]).message


def test_openpipe_rows_of_another_shape() -> None:
    wrong("openpipe", {"input": 1, "output": 2}, "wrong_shape", "the row has: input, output")
    messages = [user("q"), assistant("a")]
    wrong(
        "openpipe", {"messages": messages, "split": "TRAIN"}, "missing_field", "`rejected_message`", "messages, split"
    )
    wrong("openpipe", {"messages": "q", "rejected_message": assistant("b")}, "wrong_type", "`messages` is str")


# vertex


def test_vertex_export() -> None:
    rows = read_export("vertex")
    assert talk(the_pair(rows[0])) == (
        "s: You sell tea.\nu: Do you have oolong?",
        "a: We do, two kinds.",
        "a: No idea.",
    )
    assert talk(the_pair(rows[1])) == ("u: Hi\na: Hello\nu: Tea\nplease", "a: Here it is.", "a: Coffee?")
    assert the_pair(rows[1]).margin is None  # The score says which one, not by how much.
    assert the_fault(rows[2]).reason == "tie"


def test_vertex_rows_of_another_shape() -> None:
    row = rows_of("vertex")[0]
    wrong("vertex", {"input_text": "q", "candidate_0": "a"}, "wrong_shape", "candidate_0, input_text")
    wrong("vertex", row | {"completions": row["completions"][:1]}, "wrong_shape", "`completions` has 1 entries")
    wrong(
        "vertex",
        row | {"completions": [{"completion": {}}] * 2},
        "wrong_type",
        "`completions[0].completion` needs text",
    )
    unscored = [{"completion": item["completion"]} for item in row["completions"]]
    wrong("vertex", row | {"completions": unscored}, "missing_field", "no `score`")
    calls = [{"role": "user", "parts": [{"functionCall": {"name": "f"}}]}]
    wrong("vertex", row | {"contents": calls}, "unsupported_modality", "holds functionCall")


# nova


def test_nova_export() -> None:
    rows = read_export("nova")
    assert talk(the_pair(rows[0])) == ("s: You are a librarian.\nu: Who wrote Emma?", "a: Jane Austen.", "a: Emma.")
    assert talk(the_pair(rows[1])) == ("u: Hi\na: Hello\nu: A short novel?", "a: Animal Farm.", "a: Ulysses.")
    assert the_fault(rows[2]).reason == "tie"


def test_nova_rows_of_another_shape() -> None:
    asked = {"role": "user", "content": [{"text": "q"}]}
    wrong("nova", {"messages": [asked]}, "wrong_shape", "the row has: messages")
    wrong("nova", {}, "wrong_shape", "the row has: no keys")
    odd = {"role": "assistant", "candidates": [{"content": [{"text": "a"}], "preferenceLabel": "best"}]}
    wrong("nova", {"messages": [asked, odd]}, "wrong_type", "`candidates[0].preferenceLabel` is none of: preferred")
    bare = {"role": "assistant", "candidates": [{"content": [{"text": "a"}]}]}
    wrong("nova", {"messages": [asked, bare]}, "missing_field", "no `candidates[0].preferenceLabel`", "has: content")
    lone = {"role": "assistant", "candidates": [{"content": [{"text": "a"}], "preferenceLabel": "preferred"}]}
    wrong("nova", {"messages": [asked, lone]}, "no_comparison", "1 judged answers")
    picture = {"role": "user", "content": [{"image": {"format": "jpeg"}}]}
    wrong("nova", {"messages": [picture, lone]}, "unsupported_modality", "holds image")


# ms_swift


def test_ms_swift_export() -> None:
    rows = read_export("ms_swift")
    assert talk(the_pair(rows[0])) == ("s: You are helpful.\nu: Weather tomorrow?", "a: Sunny.", "a: I do not know.")
    assert talk(the_pair(rows[1])) == ("u: 1 + 1?\na: 2\nu: And 1 more?", "a: 3", "a: 12")
    kto = the_answer(rows[2])
    assert (*said(kto), kto.label_kind) == ("u: Weather tomorrow?", "a: No.", -1.0, "human_thumb")
    prompt = "s: You are helpful.\nu: Weather tomorrow?\na: Sunny.\nu: And the day after?"
    assert talk(the_pair(rows[3])) == (prompt, "a: Rain.", "a: Never.")


def test_ms_swift_rows_of_another_shape() -> None:
    messages = [user("q"), assistant("a")]
    wrong("ms_swift", {"text": "q"}, "wrong_shape", "the row has: text")
    wrong("ms_swift", {"messages": messages}, "missing_field", "no `label`; the row has: messages")
    wrong("ms_swift", {"messages": messages, "label": 3}, "wrong_shape", "classification")
    wrong("ms_swift", {"messages": messages[:1], "rejected_response": "b"}, "wrong_shape", "does not end")
    wrong("ms_swift", {"messages": messages, "rejected_messages": messages}, "no_preference")
    wrong("ms_swift", {"query": "q", "response": "a", "history": [["x"]]}, "wrong_type", "`history[0]`")


# nemo_rl


def test_nemo_rl_export() -> None:
    rows = read_export("nemo_rl")
    first = the_pair(rows[0])
    assert talk(first) == ("u: Name a prime.", "a: 7", "a: 9")
    assert (first.label_kind, first.margin, first.meta) == ("human_ranking", 1.0, {"task_name": "maths"})
    best_worst = the_pair(rows[1])
    assert talk(best_worst) == ("s: Be exact.\nu: Name an even prime.", "a: 2", "a: 4")
    assert (best_worst.row, best_worst.margin) == ("line-7.1>0", 2.0)
    assert the_fault(rows[2]).reason == "tie"


def test_nemo_rl_more_than_two_completions_follow_the_recipes_policy() -> None:
    row = rows_of("nemo_rl")[1]
    adjacent = items_of("nemo_rl", row, ReadOptions("adjacent"))
    assert [(item.row, talk(item)[1:]) for item in adjacent if isinstance(item, Pair)] == [
        ("line-7.1>2", ("a: 2", "a: Two, or 2.")),
        ("line-7.2>0", ("a: Two, or 2.", "a: 4")),
    ]
    apart = items_of("nemo_rl", row, ReadOptions("all_above_margin", min_margin=2))
    assert [(type(item).__name__, item.row) for item in apart] == [
        ("RowFault", "line-7.1>2"),
        ("Pair", "line-7.1>0"),
        ("RowFault", "line-7.2>0"),
    ]
    assert {item.reason for item in apart if isinstance(item, RowFault)} == {"tie"}


def test_nemo_rl_rows_of_another_shape() -> None:
    context = [user("q")]
    wrong("nemo_rl", {"prompt": "q"}, "wrong_shape", "the row has: prompt")
    wrong("nemo_rl", {"context": context}, "missing_field", "`completions`", "the row has: context")
    wrong("nemo_rl", {"context": context, "completions": []}, "no_comparison", "0 judged answers")
    entry = {"completion": [assistant("a")]}
    wrong(
        "nemo_rl", {"context": context, "completions": [entry]}, "missing_field", "no `rank`; the row has: completion"
    )
    entry["rank"] = "best"  # type: ignore[assignment]
    wrong("nemo_rl", {"context": context, "completions": [entry]}, "wrong_type", "`rank` is 'best'")


# llama_factory


def test_llama_factory_export() -> None:
    rows = read_export("llama_factory")
    assert talk(the_pair(rows[0])) == (
        "s: You are funny.\nu: Hi\na: Hello\nu: Tell a joke.",
        "a: A horse walks into a bar.",
        "a: No.",
    )
    assert talk(the_pair(rows[1])) == ("u: Translate to German.\ngood morning", "a: Guten Morgen", "a: Buenos días")
    assert said(the_answer(rows[2])) == ("u: Tell a joke.", "a: No.", -1.0)
    assert said(the_answer(rows[3])) == ("u: Tell a joke.", "a: A horse walks into a bar.", 1.0)


def test_llama_factory_tags_may_name_role_and_content() -> None:
    row = {"conversations": [user("Hi")], "chosen": assistant("Hello"), "rejected": assistant("No")}
    assert talk(the_pair(items_of("llama_factory", row))) == ("u: Hi", "a: Hello", "a: No")


def test_llama_factory_rows_of_another_shape() -> None:
    said_by = {"from": "human", "value": "q"}
    wrong("llama_factory", {"text": "q"}, "wrong_shape", "the row has: text")
    wrong("llama_factory", {"conversations": [said_by], "chosen": "a"}, "missing_field", "`rejected`", "chosen, conv")
    wrong(
        "llama_factory", {"conversations": "q", "chosen": "a", "rejected": "b"}, "wrong_type", "`conversations` is str"
    )
    wrong("llama_factory", {"conversations": [said_by], "kto_tag": "good"}, "wrong_type", "`kto_tag` is str")
    call = {"from": "function_call", "value": "{}"}
    row = {"conversations": [said_by, call], "chosen": "a", "rejected": "b"}
    wrong("llama_factory", row, "unsupported_modality", "`conversations[1]`")


# axolotl


def test_axolotl_export() -> None:
    rows = read_export("axolotl")
    assert talk(the_pair(rows[0])) == (
        "s: You explain.\nu: Why is the sky blue?",
        "a: Air scatters blue light most.",
        "a: It is not.",
    )
    assert talk(the_pair(rows[1])) == ("u: Name a colour.", "a: Green.", "a: Seven.")
    assert talk(the_pair(rows[2])) == ("s: You explain.\nu: Why is grass green?", "a: Chlorophyll.", "a: Paint.")
    assert talk(the_pair(rows[3])) == ("u: Name a shade.", "a: Teal.", "a: Loud.")
    prompt = "s: You explain.\nu: Why is snow white?"
    assert talk(the_pair(rows[4])) == (prompt, "a: It scatters all light.", "a: Cold.")


def test_axolotl_rows_of_another_shape() -> None:
    wrong("axolotl", {"question": "q", "chosen": "a"}, "wrong_shape", "the row has: chosen, question")
    wrong("axolotl", {"chosen": "a", "rejected": "b"}, "wrong_shape", "the row has: chosen, rejected")
    wrong("axolotl", {"question": 5, "chosen": "a", "rejected": "b"}, "wrong_type", "`question` is int")
