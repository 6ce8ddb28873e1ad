"""Messages that stand in a row as text: read as messages or refused by name, never trained on as what was said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_assets.feedback.ingest import read_file
from dpo_assets.feedback.pair import ROLES, Message, Pair
from dpo_assets.feedback.readers import ReadOptions, RowFault, formats
from dpo_assets.feedback.readers.written import is_conversation, messages_in, opened
from dpo_assets.feedback.rules import pair_fault
from dpo_assets.feedback.sniff import judge
from dpo_assets.feedback.sources import FeedbackFile
from dpo_assets_tests.feedback.exported import items_of, the_fault, the_pair
from dpo_assets_tests.feedback.test_readers_all import ROWS
from dpo_assets_tests.samples import assistant, pair, system, user

ROW_BY_ROW = sorted(name for name, format in formats().items() if format.read is not None)
GOOD, BAD = [user("Hi"), assistant("It's me")], [user("Hi"), assistant("What")]
# What pandas writes into a cell of a table that it has read from Parquet: an array of objects, without commas.
NUMPY = "[{'content': 'Hi', 'role': 'user'}\n {'content': 'It is me', 'role': 'assistant'}]"


def as_text(value: Any, written: Any) -> Any:
    """The row with its lists of messages, and its messages, as text."""
    return {key: written(item) if is_conversation(item) else item for key, item in value.items()}


def told(row: dict[str, Any], name: str) -> list[Any]:
    return [(i.prompt, i.chosen, i.rejected) if isinstance(i, Pair) else i for i in items_of(name, row)]


@pytest.mark.parametrize("written", [json.dumps, str], ids=["JSON", "Python"])
@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_columns_of_messages_that_are_text_read_as_the_messages_do_in_every_format(name: str, written: Any) -> None:
    for row in ROWS[name]:
        text = as_text(row, written)
        if text != row and not any(isinstance(item, RowFault) for item in items_of(name, row)):
            assert [i.prompt for i in items_of(name, text)] == [i.prompt for i in items_of(name, row)]
            assert told(text, name) == told(row, name) or not isinstance(items_of(name, row)[0], Pair)
            assert all("messages_from_text" in item.flags for item in items_of(name, text))


@pytest.mark.parametrize("name", ["openpipe", "ms_swift", "ultrafeedback_binarized"])
def test_rows_with_messages_as_text_are_known_by_their_format(name: str) -> None:
    text = [as_text(row, json.dumps) for row in ROWS[name] if as_text(row, json.dumps) != row]
    assert text
    assert judge(text, list(formats().values())).format == name


def test_cells_of_a_csv_file_with_json_messages_are_messages(tmp_path: Path) -> None:
    quoted = [json.dumps(side).replace('"', '""') for side in (GOOD, BAD)]
    path = tmp_path / "pairs.csv"
    path.write_text(f'prompt,chosen,rejected\nHi,"{quoted[0]}","{quoted[1]}"\n', "utf-8")
    batch = read_file(FeedbackFile(path, path.name, "trl"), ReadOptions())
    [found] = batch.pairs
    assert (found.prompt, found.chosen, found.rejected) == ([user("Hi")], GOOD[1:], BAD[1:])
    assert found.flags == ("messages_from_text",)
    assert batch.flags["messages_from_text"] == 1


@pytest.mark.parametrize(
    "text",
    [
        NUMPY,
        f"array({NUMPY}, dtype=object)",
        json.dumps(GOOD)[:-12],
        str(GOOD)[:-7],
        str(GOOD).replace("'What'", "nan").replace('"It\'s me"', "nan"),
        "[{'weight': None, 'role': 'user', 'content': 'Hi'} {'weight': None, 'role': 'assistant', 'content': 'Yo'}]",
        '[{"role": "user", "role": "assistant", "content": "twice"}]',
    ],
    ids=["numpy", "array", "cut JSON", "cut Python", "nan", "another key first", "a key twice"],
)
def test_messages_as_text_that_cannot_be_read_are_refused_and_named(text: str) -> None:
    fault = the_fault(items_of("trl", {"prompt": "Hi", "chosen": text, "rejected": "No."}))
    assert fault.reason == ("duplicate_key" if "twice" in text else "messages_as_text")
    assert "`chosen`" in fault.message
    assert "`json_columns`" in fault.message


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[1, 2]",
        "{}",
        '[{"name": "Ann", "role": "admin"}]',
        '[{"role": "admin", "content": "all"}]',
        '{"model": "m", "messages": [{"role": "user", "content": "Hi"}]}',
        '[{"role": "user", "content": "Hi"}] is what the API takes.',
        "[{'role': 'user', 'content': 'Hi'}] is what the API takes.",
        "[link](https://example.org), role: user, content: none",
        "{'role': 'user'}",
        'Say [{"role": "user", "content": "Hi"}]',
        "array of things",
        "[" * 3000,
    ],
)
def test_text_that_only_looks_like_messages_stays_as_it_is(text: str) -> None:
    assert messages_in(text, "`chosen`") is None
    row = {"prompt": "Write it.", "chosen": text, "rejected": "No."}
    assert opened(row) == (row, False)
    assert the_pair(items_of("trl", row)).chosen == [assistant(text)]
    assert pair_fault(pair(chosen=[assistant(text)])) is None


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ([user("Hi")], [user("Yo")]),
        (GOOD, "No."),
        ("No.", GOOD),
    ],
    ids=["ends with the user", "only the chosen side", "only the rejected side"],
)
def test_an_answer_that_is_messages_by_right_is_not_opened(chosen: Any, rejected: Any) -> None:
    row = {"prompt": "Give me messages as JSON", "chosen": json.dumps(chosen), "rejected": json.dumps(rejected)}
    assert opened(row) == (row, False)
    assert opened(row | {"chosen": json.dumps(GOOD), "rejected": BAD})[0]["chosen"] == GOOD


def test_a_message_whose_text_is_a_list_of_messages_is_refused_wherever_it_came_from() -> None:
    for name in ("prompt", "chosen", "rejected"):
        for text in (json.dumps(GOOD), str(GOOD), NUMPY):
            said = [user(text)] if name == "prompt" else [assistant(text)]
            fault = pair_fault(pair(**{name: said}))
            assert fault is not None
            assert fault[0] == "messages_as_text"
            assert fault[1].startswith(f"{name}")
            assert "`json_columns`" in fault[1]


def test_an_object_that_is_json_in_text_is_told_of_json_columns() -> None:
    for name, column in (("open_webui", "data"), ("openai", "input")):
        row = {"type": "rating", "data": "{}", "input": '{"messages": [], "x": 1}', "preferred_output": []}
        fault = the_fault(items_of(name, row))
        assert (fault.reason, f"`{column}` is str" in fault.message) == ("wrong_type", True)
        assert "`json_columns`" in fault.message


def test_messages_as_text_inside_other_messages_are_refused() -> None:
    nested = {"context": [user("q")], "completions": [
        {"rank": 0, "completion": [assistant(json.dumps(GOOD))]}, {"rank": 1, "completion": [assistant("b")]},
    ]}  # fmt: skip
    assert pair_fault(the_pair(items_of("nemo_rl", nested))) is not None


_messages = st.lists(
    st.builds(lambda role, text: Message(role=role, content=text), st.sampled_from(ROLES), st.text(max_size=8)),
    min_size=1,
    max_size=4,
)


@given(said=_messages, before=st.sampled_from(["", " ", "\n\t"]))
def test_any_messages_are_found_in_their_json_and_in_their_python_text(said: list[Message], before: str) -> None:
    assert messages_in(before + json.dumps(said), "x") == said
    assert messages_in(before + str(said), "x") == said
    assert messages_in(json.dumps({"messages": said}), "x") == {"messages": said}


@given(text=st.text(alphabet="[{}]'\":, role content user \n", max_size=60))
def test_any_text_is_messages_is_refused_or_stays(text: str) -> None:
    try:
        value = messages_in(text, "x")
    except RowFault as fault:
        value = None
        assert fault.message.startswith("x begins as a list of messages does")  # noqa: PT017
    assert value is None or is_conversation(value)


# Empty system messages


EMPTY = [system(""), user("q")]


@pytest.mark.parametrize("said", ["", " \n"])
def test_a_system_message_that_says_nothing_is_left_out_in_every_reader(said: str) -> None:
    nothing = system(said)
    answers = {"chosen": [assistant("a")], "rejected": [assistant("b")]}
    whole = {"chosen": [nothing, user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    rows: list[tuple[str, dict[str, Any]]] = [
        ("trl", {"prompt": [nothing, user("q")], **answers}),
        ("trl", whole),
        ("trl", {"prompt": [user("q")], **whole}),
        ("openai", {"input": {"messages": [nothing, user("q")]}, "preferred_output": [assistant("a")],
                    "non_preferred_output": [assistant("b")]}),
        ("openpipe", {"messages": [nothing, user("q"), assistant("a")], "rejected_message": assistant("b")}),
        ("ms_swift", {"messages": [nothing, user("q"), assistant("a")], "rejected_response": "b"}),
        ("ms_swift", {"system": said, "query": "q", "response": "a", "rejected_response": "b"}),
        ("axolotl", {"system": said, "question": "q", "chosen": "a", "rejected": "b"}),
        ("nemo_rl", {"context": [nothing, user("q")], "completions": [
            {"rank": 0, "completion": [assistant("a")]}, {"rank": 1, "completion": [assistant("b")]}]}),
        ("llama_factory", {"conversations": [{"from": "system", "value": said}, {"from": "human", "value": "q"}],
                           "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}),
        ("vertex", {"system_instruction": {"parts": [{"text": said}]}, "contents": [{"role": "user", "parts": [
            {"text": "q"}]}], "completions": [{"score": s, "completion": {"role": "model", "parts": [{"text": t}]}}
                                              for s, t in ((1, "a"), (0, "b"))]}),
        ("nova", {"system": [{"text": said}], "messages": [{"role": "user", "content": [{"text": "q"}]}, {
            "role": "assistant", "candidates": [{"content": [{"text": "a"}], "preferenceLabel": "preferred"},
                                                {"content": [{"text": "b"}], "preferenceLabel": "non-preferred"}]}]}),
        ("argilla", {"id": "r", "prompt": [nothing, user("q")], "a": "a", "b": "b", "o.responses": [["a", "b"]],
                     "o.responses.users": ["u"], "o.responses.status": ["submitted"]}),
        ("label_studio", {"id": 1, "data": {"prompt": [nothing, user("q")], "answer1": "a", "answer2": "b"},
                          "annotations": [{"id": 1, "result": [{"type": "pairwise", "from_name": "c", "to_name": "c",
                                                               "value": {"selected": "left"}}]}]}),
    ]  # fmt: skip
    for name, row in rows:
        found = the_pair(items_of(name, row))
        assert (found.prompt, found.chosen, found.rejected) == ([user("q")], [assistant("a")], [assistant("b")]), name
