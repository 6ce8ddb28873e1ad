"""What was judged and is trained: one answer on each side, its text as it was said, and nothing of anybody else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_assets.feedback.batches import Batch, write_paired
from dpo_assets.feedback.ingest import read_file
from dpo_assets.feedback.pair import Message, Pair
from dpo_assets.feedback.pairing import pair_answers
from dpo_assets.feedback.readers import ReadOptions, RowFault, format_named
from dpo_assets.feedback.rules import pair_fault
from dpo_assets.feedback.sources import FeedbackFile
from dpo_assets.feedback.tables import answers_frame
from dpo_assets.feedback.turns import one_answer, settled_pair
from dpo_assets_tests.feedback.exported import items_of, rows_of, the_answer, the_pair
from dpo_assets_tests.samples import assistant, pair, system, user


def ingested(tmp_path: Path, rows: list[dict[str, Any]], format: str = "trl", **fields: str) -> Batch:
    path = tmp_path / "feedback.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return read_file(FeedbackFile(path, path.name, format, fields=fields), ReadOptions())


def parts(found: Pair) -> tuple[list[Message], list[Message], list[Message]]:
    return found.prompt, found.chosen, found.rejected


# Further turns


def test_turns_after_the_first_answer_that_differs_are_cut_and_flagged(tmp_path: Path) -> None:
    shared = {"prompt": [user("Hi")]}
    row = {
        "chosen": [assistant("Hello?"), user("A cold."), assistant("Rest.")],
        "rejected": [assistant("Yes?"), user("A cold."), assistant("So what.")],
    }
    batch = ingested(tmp_path, [shared | row])
    [found] = batch.pairs
    assert parts(found) == ([user("Hi")], [assistant("Hello?")], [assistant("Yes?")])
    assert found.flags == ("later_turns_cut",)
    assert batch.flags == {"later_turns_cut": 1}


def test_turns_that_both_answers_share_belong_to_the_prompt(tmp_path: Path) -> None:
    opening = [assistant("Hello?"), user("A cold.")]
    row = {"prompt": "Hi", "chosen": [*opening, assistant("Rest.")], "rejected": [*opening, assistant("So what.")]}
    [found] = ingested(tmp_path, [row]).pairs
    assert parts(found) == ([user("Hi"), *opening], [assistant("Rest.")], [assistant("So what.")])
    assert found.flags == ()


@pytest.mark.parametrize(
    ("rejected", "reason"),
    [
        ([assistant("a"), user("other"), assistant("d")], "no_shared_prompt"),
        ([assistant("a")], "no_shared_prompt"),
        ([assistant("a"), user("b"), assistant("c")], "no_preference"),
        ([assistant("x"), user("b")], "bad_role_order"),
        ([assistant("x"), assistant("y")], "bad_role_order"),
    ],
    ids=["the user differs", "one ends early", "equal", "ends with the user", "the assistant twice"],
)
def test_answers_that_do_not_part_at_an_answer_are_refused(
    tmp_path: Path, rejected: list[Message], reason: str
) -> None:
    row = {"prompt": [user("q")], "chosen": [assistant("a"), user("b"), assistant("c")], "rejected": rejected}
    batch = ingested(tmp_path, [row])
    assert [one.reason for one in batch.rejected] == [reason]


def test_transcripts_that_part_early_are_cut_there(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: "
    row = {name: start + said for name, said in (("chosen", "A\n\nHuman: x\n\nAssistant: B"), ("rejected", "C"))}
    [found] = ingested(tmp_path, [row], "hh_rlhf").pairs
    assert parts(found) == ([user("Hi")], [assistant("A")], [assistant("C")])
    assert found.flags == ("later_turns_cut",)


def test_judged_answers_of_several_turns_are_brought_to_one_when_they_are_paired(tmp_path: Path) -> None:
    opening = [assistant("Hello?"), user("A cold.")]
    rows = [
        {"prompt": [user("Hi")], "completion": [*opening, assistant(said)], "label": said == "Rest."}
        for said in ("Rest.", "So what.")
    ]
    batch = ingested(tmp_path, rows)
    [found] = pair_answers(answers_frame(batch.answers), "best_worst").pairs
    assert parts(found) == ([user("Hi"), *opening], [assistant("Rest.")], [assistant("So what.")])


def test_judged_answers_that_part_early_are_cut_flagged_and_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Hi", "completion": [assistant(said), user("more"), assistant("end")], "label": said == "good"}
        for said in ("good", "bad")
    ]
    (tmp_path / "paired").mkdir()
    paired = pair_answers(answers_frame(ingested(tmp_path, rows).answers), "best_worst")
    counts = write_paired(paired, tmp_path / "paired")
    [found] = paired.pairs
    assert parts(found) == ([user("Hi")], [assistant("good")], [assistant("bad")])
    assert counts["flags"] == {"later_turns_cut": 1}


_texts = st.text(alphabet="ab ", min_size=1, max_size=3).map(lambda text: f"{text}.")


@st.composite
def _turns(draw: st.DrawFn) -> list[Message]:
    said = draw(st.lists(_texts, min_size=1, max_size=5))
    return [assistant(text) if n % 2 == 0 else user(text) for n, text in enumerate(said)]


@given(chosen=_turns(), rejected=_turns(), shared=_turns())
def test_no_user_turn_is_ever_in_an_accepted_answer(
    chosen: list[Message], rejected: list[Message], shared: list[Message]
) -> None:
    opening = shared[: len(shared) // 2 * 2]
    before = pair(chosen=[*opening, *chosen], rejected=[*opening, *rejected])
    after = one_answer(before)
    assert one_answer(after) == after
    if pair_fault(after) is None:
        [good], [bad] = after.chosen, after.rejected
        assert good["role"] == bad["role"] == "assistant"
        # What is left is the beginning of both conversations: nothing was moved or made up.
        for side, answer in ((before.chosen, good), (before.rejected, bad)):
            whole = [*before.prompt, *side]
            assert whole[: len(after.prompt) + 1] == [*after.prompt, answer]


# Reasoning


APART = [
    {
        "prompt": [user("2+2?")],
        "chosen": [assistant("4.") | {key: "two and two"}],
        "rejected": [assistant("5.") | {key: "guess"}],
    }
    for key in ("reasoning_content", "reasoning", "thinking")
]


@pytest.mark.parametrize("row", APART, ids=["reasoning_content", "reasoning", "thinking"])
def test_reasoning_that_stands_apart_from_an_answer_is_refused_with_a_way_out(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    [fault] = ingested(tmp_path, [row]).rejected
    assert fault.reason == "reasoning_apart"
    assert fault.message.startswith("chosen: ")
    assert "fields: {reasoning: leave_out}" in fault.message
    [found] = ingested(tmp_path, [row], reasoning="leave_out").pairs
    assert (found.chosen, found.flags) == ([assistant("4.")], ("reasoning_left_out",))


def test_answers_that_differ_in_their_reasoning_are_not_called_the_same(tmp_path: Path) -> None:
    sides = {
        name: [assistant("6") | {"reasoning_content": said}]
        for name, said in (("chosen", "three and three"), ("rejected", "guess"))
    }
    rows = [{"prompt": [user("3+3?")]} | sides, {k: [user("3+3?"), *v] for k, v in sides.items()}]
    assert [one.reason for one in ingested(tmp_path, rows).rejected] == ["reasoning_apart"] * 2


@pytest.mark.parametrize("nothing", [None, "", " ", [], {}])
def test_an_empty_key_of_reasoning_says_nothing(tmp_path: Path, nothing: Any) -> None:
    row = {"prompt": "q", "chosen": [assistant("a") | {"reasoning_content": nothing}], "rejected": "b"}
    [found] = ingested(tmp_path, [row]).pairs
    assert (found.chosen, found.flags) == ([assistant("a")], ())


def test_reasoning_of_earlier_turns_is_left_out_and_flagged(tmp_path: Path) -> None:
    prompt = [user("a"), assistant("b") | {"reasoning_content": "hm"}, user("c")]
    [found] = ingested(tmp_path, [{"prompt": prompt, "chosen": "x", "rejected": "y"}]).pairs
    assert (found.prompt, found.flags) == ([user("a"), assistant("b"), user("c")], ("reasoning_left_out",))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "thinking", "thinking": "hm", "signature": "c2ln"},
        {"type": "reasoning", "text": "hm"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "think", "think": "hm"},
        {"text": "hm", "thought": True},
        {"reasoningContent": {"reasoningText": {"text": "hm", "signature": "c2ln"}}},
        {"type": "reasoning", "value": "hm"},
    ],
)
def test_a_part_of_reasoning_is_known_by_its_shape(part: dict[str, Any]) -> None:
    said = {"role": "assistant", "content": [part, {"type": "text", "text": "Yes."}]}
    found = the_pair(items_of("trl", {"prompt": "q", "chosen": [said], "rejected": "No."}))
    assert found.chosen == [assistant("Yes.") | {"reasoning_content": "hm"}]


def test_reasoning_that_open_webui_folds_into_the_text_is_no_part_of_it() -> None:
    row = json.loads(json.dumps(rows_of("open_webui")[3]))
    messages = row["snapshot"]["chat"]["chat"]["history"]["messages"]
    answer = messages[row["meta"]["message_id"]]
    folded = '<details type="reasoning" done="true" duration="3">\n<summary>Thought</summary>\n> hm\n</details>\n'
    answer["content"] = folded + "Yes."
    found = items_of("open_webui", row)[0]
    assert isinstance(found, Pair)
    assert assistant("Yes.") | {"reasoning_content": "> hm"} in (*found.chosen, *found.rejected)


def test_a_thumb_on_an_answer_with_reasoning_is_refused_or_left_out_by_choice(tmp_path: Path) -> None:
    rows = rows_of("librechat")
    refused = [one.reason for one in ingested(tmp_path, rows, "librechat").rejected]
    assert refused.count("reasoning_apart") == 1
    kept = ingested(tmp_path, rows, "librechat", reasoning="leave_out")
    assert [a.answer for a in kept.answers if a.flags] == [[assistant("Good night")]]


def test_reasoning_in_a_logged_message_of_langchain_is_found() -> None:
    said = {"type": "ai", "content": "Yes.", "additional_kwargs": {"reasoning_content": "hm"}}
    row = {"id": 1, "data": {"prompt": [{"type": "human", "content": "q"}, said, user("c")], "answer1": "a",
                             "answer2": "b"}, "annotations": [{"id": 1, "result": [
        {"type": "pairwise", "from_name": "c", "to_name": "c", "value": {"selected": "left"}}]}]}  # fmt: skip
    assert the_pair(items_of("label_studio", row)).prompt[1] == assistant("Yes.") | {"reasoning_content": "hm"}


# A prompt that both answers repeat


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "left"),
    [
        ("Q: 2+2? A:", "Q: 2+2? A: 4", "Q: 2+2? A: 5", ("4", "5")),
        ("Once upon a time", "Once upon a time there was", "Once upon a time, no", ("there was", ", no")),
        (
            "def add(a, b):",
            "def add(a, b):\n    return a + b",
            "def add(a, b):\n\tpass",
            ("    return a + b", "\tpass"),
        ),
        ("Name a lake.\n", "Name a lake.\nGarda", "\nName a lake.\nMud", ("Garda", "Mud")),
        (
            "你能告诉我一个湖的名字吗？",
            "你能告诉我一个湖的名字吗？加尔达湖",
            "你能告诉我一个湖的名字吗？不能",
            ("加尔达湖", "不能"),
        ),
    ],
)
def test_a_prompt_that_both_answers_repeat_is_taken_off_them_and_flagged(
    tmp_path: Path, prompt: str, chosen: str, rejected: str, left: tuple[str, str]
) -> None:
    batch = ingested(tmp_path, [{"prompt": prompt, "chosen": chosen, "rejected": rejected}])
    [found] = batch.pairs
    assert (found.chosen, found.rejected) == ([assistant(left[0])], [assistant(left[1])])
    assert (found.flags, batch.flags["prompt_repeated"]) == (("prompt_repeated",), 1)


def test_answers_that_begin_with_their_prompt_by_right_stay(tmp_path: Path) -> None:
    """In messages, which never hold their prompt, and where the recipe says so."""
    header = "def add(a, b):"
    texts = {"prompt": header, "chosen": f"{header}\n    return a + b", "rejected": f"{header}\n    return a"}
    messages = {"prompt": [user(header)], **{k: [assistant(texts[k])] for k in ("chosen", "rejected")}}
    for row, fields in ((messages, {}), (texts, {"repeated_prompt": "keep"})):
        [found] = ingested(tmp_path, [row], **fields).pairs
        assert (found.chosen, found.flags) == ([assistant(texts["chosen"])], ())


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("Hi", "Hi there!", "Hi, what?"),
        ("Name a lake.", "Name a lake. Garda", "Mud"),
        ("Once upon a tim", "Once upon a time there was", "Once upon a timid"),
        ("Name a lake.", "Name a lake.", "Name a lake. Mud"),
    ],
    ids=["a greeting", "one side", "inside a word", "nothing else"],
)
def test_answers_that_do_not_both_repeat_the_prompt_stay(
    tmp_path: Path, prompt: str, chosen: str, rejected: str
) -> None:
    [found] = ingested(tmp_path, [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]).pairs
    assert (found.chosen, found.rejected, found.flags) == ([assistant(chosen)], [assistant(rejected)], ())


# Somebody else's turns


@pytest.mark.parametrize(
    "said",
    [
        "\n\nHuman: thanks",
        "\n\nHuman: Hi\n\nAssistant: Hello",
        "Human: Hi\n\nAssistant: Hello",
    ],
)
def test_an_answer_that_is_a_transcript_is_refused(tmp_path: Path, said: str) -> None:
    rows = [{"prompt": "q", "chosen": said, "rejected": "b"}, {"prompt": "q", "completion": said, "label": True}]
    batch = ingested(tmp_path, rows)
    assert [one.reason for one in batch.rejected] == ["transcript_as_text"] * 2
    assert "hh_rlhf" in batch.rejected[0].message


@pytest.mark.parametrize(
    "said",
    ["Human: thanks", "Yes.\n\nHuman: and then?", "Yes.\n \nUser: more", "4.\n\n### Instruction:\nGo on", "USER: x"],
)
def test_an_answer_that_goes_on_with_somebody_elses_turn_is_flagged_and_counted(tmp_path: Path, said: str) -> None:
    batch = ingested(tmp_path, [{"prompt": "q", "chosen": "Yes.", "rejected": said}])
    [found] = batch.pairs
    assert (found.rejected, found.flags) == ([assistant(said)], ("foreign_turn",))
    assert batch.flags == {"foreign_turn": 1}


@pytest.mark.parametrize(
    "said",
    ["Set User: root in it.", "Fields:\nUser: ann\nHost: h", "The Human: a history", "Is it Human:Fall?", "user: x"],
)
def test_prose_that_names_a_user_is_not_flagged(tmp_path: Path, said: str) -> None:
    [found] = ingested(tmp_path, [{"prompt": said, "chosen": said, "rejected": "b"}]).pairs
    assert found.flags == ()


def test_a_prompt_that_is_a_transcript_is_flagged(tmp_path: Path) -> None:
    [found] = ingested(tmp_path, [{"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "Hello", "rejected": "b"}]).pairs
    assert found.flags == ("foreign_turn",)


def test_a_pair_that_is_as_it_should_be_is_the_same_object() -> None:
    one = pair(prompt=[system("s"), user("q")])
    assert settled_pair(one, {}) is one


# LLaMA-Factory


def test_llama_factory_reads_its_kto_rows_with_messages_and_label() -> None:
    row = {"messages": [user("q"), assistant("a")], "label": True}
    answer = the_answer(items_of("llama_factory", row))
    assert (answer.prompt, answer.answer, answer.score) == ([user("q")], [assistant("a")], 1.0)
    assert the_answer(items_of("llama_factory", row | {"label": False})).score == -1.0


def _v1(role: str, text: str) -> dict[str, Any]:
    part = {"type": "text", "value": text}
    return {"role": role, "content": [part], "loss_weight": float(role == "assistant")}


def test_llama_factory_reads_messages_of_v1() -> None:
    asked = [_v1("system", "s"), _v1("user", "q")]
    sides = {"chosen_messages": [*asked, _v1("assistant", "a")], "rejected_messages": [*asked, _v1("assistant", "b")]}
    expected = ([system("s"), user("q")], [assistant("a")], [assistant("b")])
    assert parts(the_pair(items_of("llama_factory", sides))) == expected
    assert format_named("llama_factory").fits(sides) == 1.0
    answer = the_answer(items_of("llama_factory", {"messages": sides["chosen_messages"], "label": True}))
    assert answer.answer == [assistant("a")]
    picture = [{"role": "user", "content": [{"type": "image_url", "value": "a.png"}], "loss_weight": 0.0}]
    for bad, reason in (
        ([*picture, _v1("assistant", "a")], "unsupported_modality"),
        ([*asked, _v1("assistant", "a") | {"loss_weight": 0.5}], "wrong_shape"),
    ):
        [fault] = items_of("llama_factory", sides | {"chosen_messages": bad})
        assert isinstance(fault, RowFault)
        assert fault.reason == reason
