"""What is no text, in every reader whose shape can carry it: refused by name where it is filled, never dropped."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_assets.feedback.pair import JudgedAnswer, Pair, pair_and_flipped_id
from dpo_assets.feedback.pairing import pair_answers
from dpo_assets.feedback.readers import Item, Place, ReadOptions, RowFault, format_named, formats
from dpo_assets.feedback.readers.modality import MEDIA, filled, tools_text
from dpo_assets.feedback.scan import with_flags
from dpo_assets.feedback.screening import Screened, screen
from dpo_assets.feedback.tables import answers_frame, pairs_frame, quarantine_frame
from dpo_assets.recipe import CleaningSection
from dpo_assets_tests.feedback.exported import COMPANIONS, items_of, rows_of, the_fault, the_pair
from dpo_assets_tests.feedback.test_readers_all import ROWS
from dpo_assets_tests.samples import assistant, pair, user

ROW_BY_ROW = sorted(name for name, format in formats().items() if format.read is not None)
TEXT_ONLY = {
    "hh_rlhf",
    "oasst_tree",
    "nectar",
    "helpsteer2",
    "ultrafeedback_raw",
}  # No message is an object of its own.
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}

QUESTION, ANSWERED = [user("q")], {"messages": [user("q")], "chosen": assistant("a"), "rejected": assistant("b")}
RATED = {"messages": QUESTION, "generations": ["a", "b"], "ratings": [1, 2]}
V1 = {
    "chosen_messages": [user("q"), assistant("a") | {"loss_weight": 1.0}],
    "rejected_messages": [user("q"), assistant("b") | {"loss_weight": 1.0}],
}


def with_messages(row: dict[str, Any], *path: str) -> dict[str, Any]:
    """The row with a list of messages where it had a question as text."""
    row = copy.deepcopy(row)
    inner: Any = row
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = [user(inner[path[-1]])]
    return row


# A row of each format that keeps messages as objects, the paths of a question and of an answer in it, and the key of
# what they say.
CARRIERS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "trl": (rows_of("trl")[1], ["prompt.1", "chosen.0"], "content"),
    "openai": (rows_of("openai")[0], ["input.messages.0", "preferred_output.0", "non_preferred_output.0"], "content"),
    "openpipe": (rows_of("openpipe")[0], ["messages.1", "messages.2", "rejected_message"], "content"),
    "vertex": (rows_of("vertex")[0], ["contents.0", "completions.0.completion"], "parts"),
    "nova": (rows_of("nova")[1], ["messages.0", "messages.1"], "content"),
    "ms_swift": (rows_of("ms_swift")[1], ["messages.0", "messages.3", "rejected_messages.3"], "content"),
    "nemo_rl": (rows_of("nemo_rl")[0], ["context.0", "completions.1.completion.0"], "content"),
    "llama_factory": (rows_of("llama_factory")[0], ["conversations.0", "chosen"], "value"),
    "axolotl": (ANSWERED, ["messages.0", "rejected"], "content"),
    "ultrafeedback_binarized": (rows_of("ultrafeedback_binarized")[0], ["chosen.1", "rejected.0"], "content"),
    "ultrafeedback_argilla": (rows_of("ultrafeedback_argilla")[0], ["chosen.0", "rejected.1"], "content"),
    "distilabel": (RATED, ["messages.0"], "content"),
    "helpsteer3": (rows_of("helpsteer3")[0], ["context.0"], "content"),
    "arena": (rows_of("arena")[0], ["conversation_a.0", "conversation_b.1"], "content"),
    "open_webui": (rows_of("open_webui")[2], ["snapshot.chat.chat.history.messages.m1"], "content"),
    "label_studio": (with_messages(rows_of("label_studio")[0], "data", "prompt"), ["data.prompt.0"], "content"),
    "argilla": (with_messages(rows_of("argilla")[0], "prompt"), ["prompt.0"], "content"),
}
JOINED = {"langfuse", "langsmith", "librechat"}  # Their messages stand in other rows: tests of their own, below.


def changed(row: dict[str, Any], path: str, changes: dict[str, Any]) -> dict[str, Any]:
    row = copy.deepcopy(row)
    inner: Any = row
    for key in path.split("."):
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    inner.update(changes)
    return row


def refused(items: Sequence[Item]) -> bool:
    return bool(items) and all(isinstance(i, RowFault) and i.reason == "unsupported_modality" for i in items)


def contents(items: Sequence[Item]) -> list[Any]:
    """What was read, without what other columns said."""
    return [
        (i.reason, i.message)
        if isinstance(i, RowFault)
        else (i.prompt, i.tools, *((i.answer,) if isinstance(i, JudgedAnswer) else (i.chosen, i.rejected)))
        for i in items
    ]


def screened(*pairs: Pair, **policy: Any) -> Screened:
    return screen(with_flags(pairs_frame(pairs)), quarantine_frame([]), CleaningSection(**policy))


def test_every_reader_is_looked_at() -> None:
    assert set(formats()) == set(CARRIERS) | TEXT_ONLY | JOINED


@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_a_column_of_pictures_sound_or_films_is_refused_in_every_format(name: str) -> None:
    row = next(row for row in ROWS[name] if any(not isinstance(item, RowFault) for item in items_of(name, row)))
    for column in sorted(MEDIA):
        for value in ("a.png", ["a.png"], {"bytes": b"x", "path": None}, [{"url": "u"}]):
            assert refused(items_of(name, row | {column: value})), (column, value)
        for value in (None, [], "", {}, "[]", "null", [None], {"bytes": None, "path": None}):
            assert contents(items_of(name, row | {column: value})) == contents(items_of(name, row)), (column, value)


@pytest.mark.parametrize("name", sorted(CARRIERS))
def test_a_message_with_more_than_text_is_refused_in_every_format(name: str) -> None:
    row, paths, key = CARRIERS[name]
    as_it_is = contents(items_of(name, row))
    assert not any(isinstance(item, RowFault) for item in items_of(name, row))
    role = "from" if key == "value" else "role"
    for path in paths:
        for changes in (
            {key: [{"type": "image_url", "image_url": {"url": "u"}}]},
            {key: [{"type": "text", "text": "see"}, {"type": "input_audio", "input_audio": {}}]},
            {key: [{"type": "text", "text": "see", "image": "a.png"}]},
            {key: [{"type": "file", "file": {"file_id": "f"}}]},
            {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            {"function_call": {"name": "f"}},
            {"tool_call_id": "c1"},
            {"images": ["a.png"]},
            {"audio": {"id": "a"}},
            {"files": [{"type": "file", "name": "a.pdf"}]},
            {role: "tool"},
            {role: "function"},
        ):
            items = items_of(name, changed(row, path, changes))
            assert refused(items), (path, changes, items)
        for empty in ({"tool_calls": None}, {"tool_calls": []}, {"images": []}, {"function_call": None}, {"files": []}):
            assert contents(items_of(name, changed(row, path, empty))) == as_it_is, (path, empty)


def nested(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row of an annotation tool, and the fields inside it."""
    row = copy.deepcopy(rows_of(name)[0])
    if name == "argilla":
        fields = {key: row[key] for key in ("prompt", "response_1", "response_2", "response_3")}
        values = [{"value": v, "user_id": "u", "status": "submitted"} for v in row["ranking.responses"]]
        row = {"id": "r", "status": "completed", "fields": fields, "responses": {"ranking": values}}
    return row, row["fields"] if name == "argilla" else row["data"]


@pytest.mark.parametrize("name", ["argilla", "label_studio"])
def test_a_picture_among_the_fields_that_annotators_saw_is_refused(name: str) -> None:
    row, inner = nested(name)
    assert not refused(items_of(name, row))
    inner["image"] = "https://example.org/a.png"
    fault = the_fault(items_of(name, row))
    assert (fault.reason, "image` is filled" in fault.message) == ("unsupported_modality", True)


def joined(name: str, tmp_path: Path, changes: dict[str, Any]) -> list[Item]:
    """What the first row of a joined export leads to when what it judges is changed."""
    lines = [json.loads(line) for line in COMPANIONS[name].read_text("utf-8").splitlines()]
    companion = tmp_path / "companion.jsonl"
    companion.write_text("\n".join(json.dumps(line | changes) for line in lines), "utf-8")
    fields = {"question": "helpful"} if name == "langfuse" else {"question": "preference"}
    reader = format_named(name).reader(ReadOptions(companion=companion, fields=fields))
    for n, row in enumerate(rows_of(name)[:2]):
        list(reader.read(row, Place("export.jsonl", n + 1)))
    return [item for _, item in reader.finish()][:1]


@pytest.mark.parametrize("name", ["langfuse", "langsmith"])
def test_what_was_logged_with_pictures_or_calls_is_refused(name: str, tmp_path: Path) -> None:
    asked, said = ("input", "output") if name == "langfuse" else ("inputs", "outputs")
    assert not refused(joined(name, tmp_path, {}))
    image = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}
    called = assistant("x") | {"tool_calls": [{"id": "c"}]}
    langchain = {"id": ["m", "AIMessage"], "type": "constructor", "kwargs": {"content": "x"}}
    more = langchain | {"kwargs": {"content": "x", "additional_kwargs": {"tool_calls": [{"id": "c"}]}}}
    for changes in (
        {asked: image},
        {asked: {"question": "what is it?", "image": "data:image/png;base64,xx"}},
        {asked: {"messages": [user("q"), {"role": "tool", "content": "4", "tool_call_id": "c"}]}},
        {said: called},
        {said: more},
        {said: {"answer": "x", "images": ["u"]}},
    ):
        assert refused(joined(name, tmp_path, changes)), changes
    assert not refused(joined(name, tmp_path, {said: langchain}))


@pytest.mark.parametrize("name", ["langfuse", "langsmith"])
def test_tools_that_were_logged_belong_to_the_prompt(name: str, tmp_path: Path) -> None:
    asked = "input" if name == "langfuse" else "inputs"
    [item] = joined(name, tmp_path, {asked: {"messages": QUESTION, "tools": [TOOL]}})
    assert isinstance(item, Pair | JudgedAnswer)
    assert json.loads(item.tools) == [TOOL]
    if name == "langsmith":  # Its model runs keep them apart from the inputs.
        [item] = joined(name, tmp_path, {"extra": {"invocation_params": {"tools": [TOOL]}}})
        assert isinstance(item, Pair)
        assert json.loads(item.tools) == [TOOL]


@pytest.mark.parametrize(
    "changes",
    [
        {"files": [{"type": "image/png"}]},
        {"files": [{"type": "application/pdf"}]},
        {"attachments": [{"type": "web_search"}]},
        {"image_urls": ["u"]},
        {"plugins": [{"name": "p"}]},
        {"content": [{"type": "tool_call", "tool_call": {}}]},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("which", [0, 1], ids=["question", "answer"])
def test_a_message_of_librechat_with_more_than_text_is_refused(changes: dict[str, Any], which: int) -> None:
    rows = copy.deepcopy(rows_of("librechat")[:2])
    rows[which] |= changes
    reader = format_named("librechat").reader(ReadOptions())
    for n, row in enumerate(rows):
        list(reader.read(row, Place("export.jsonl", n + 1)))
    assert refused([item for place, item in reader.finish() if place.line == 2])


def test_open_webui_runs_of_tools_that_it_folds_into_the_text_are_refused() -> None:
    row, [path], _ = CARRIERS["open_webui"]
    for kind in ("tool_calls", "code_interpreter"):
        folded = f'<details type="{kind}" done="true"><summary>Ran</summary>x</details>\nYes.'
        assert refused(items_of("open_webui", changed(row, path, {"content": folded})))
    html = "<details><summary>More</summary>x</details>"  # Nobody's but the text's own.
    assert not refused(items_of("open_webui", changed(row, path, {"content": html})))


def test_a_raw_log_of_the_arena_with_pictures_is_refused() -> None:
    state = {"messages": [["Human", ["see", ["a.png"]]], ["Assistant", "x"]], "model_name": "m"}
    row = {"type": "leftvote", "states": [state, state], "models": ["", ""]}
    assert refused(items_of("arena", row))


# Tools


@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_a_column_of_tools_belongs_to_the_prompt_in_every_format(name: str) -> None:
    row = next(row for row in ROWS[name] if any(not isinstance(item, RowFault) for item in items_of(name, row)))
    plain = items_of(name, row)
    for given_as in ([TOOL], json.dumps([TOOL]), [TOOL["function"]]):
        for item, before in zip(items_of(name, row | {"tools": given_as}), plain, strict=True):
            if isinstance(item, RowFault) or isinstance(before, RowFault):
                assert item == before
                continue
            assert json.loads(item.tools) == [TOOL]
            assert (item.prompt, item.meta, before.tools) == (before.prompt, before.meta, "")
    for nothing in (None, [], "", "[]", "null"):
        assert items_of(name, row | {"tools": nothing}) == plain
    for value in ("[{}]", [{}], "a hammer", [{"type": "web_search"}], {"name": "f"}, [5], [{"name": "f"}]):
        assert refused(items_of(name, row | {"tools": value})), value


def test_openai_keeps_tools_in_its_input() -> None:
    row = copy.deepcopy(rows_of("openai")[0])
    row["input"]["tools"] = [TOOL]
    assert json.loads(the_pair(items_of("openai", row)).tools) == [TOOL]
    row["input"]["tools"] = [{"type": "file_search"}]
    assert refused(items_of("openai", row))


@pytest.mark.parametrize("name", ["argilla", "label_studio"])
def test_tools_among_the_fields_that_annotators_saw_belong_to_the_prompt(name: str) -> None:
    row, inner = nested(name)
    assert all(not item.tools for item in items_of(name, row) if not isinstance(item, RowFault))
    inner["tools"] = json.dumps([TOOL])
    assert [json.loads(i.tools) for i in items_of(name, row) if not isinstance(i, RowFault)] == [[TOOL]]
    inner["tools"] = "a hammer"
    assert refused(items_of(name, row))


def test_tools_of_another_form_are_refused_in_nova() -> None:
    row = rows_of("nova")[0] | {"toolConfig": {"tools": [{"toolSpec": {"name": "f"}}]}}
    assert refused(items_of("nova", row))
    assert not refused(items_of("nova", row | {"toolConfig": None}))


def test_answers_that_were_given_with_other_tools_are_not_held_against_each_other() -> None:
    def answer(said: str, score: float, tools: str) -> JudgedAnswer:
        return JudgedAnswer([user("q")], [assistant(said)], score, "f", said, 1, "human_thumb", tools=tools)

    one, other = tools_text([TOOL], "t"), tools_text([TOOL] * 2, "t")
    apart = pair_answers(answers_frame([answer("a", 1.0, one), answer("b", -1.0, other)]), "best_worst")
    assert [row.reason for row in apart.rejected] == ["unpaired", "unpaired"]
    [found] = pair_answers(answers_frame([answer("a", 1.0, one), answer("b", -1.0, one)]), "best_worst").pairs
    assert found.tools == one


def test_other_tools_are_another_prompt_and_none_change_no_id() -> None:
    plain, with_tools, others = pair(), pair(tools=tools_text([TOOL], "t")), pair(tools=tools_text([TOOL] * 2, "t"))
    assert len({p.pair_id for p in (plain, with_tools, others)}) == 3
    assert len({p.prompt_id for p in (plain, with_tools, others)}) == 3
    assert len({p.group_id for p in (plain, with_tools, others)}) == 1
    turned = replace(with_tools, chosen=with_tools.rejected, rejected=with_tools.chosen)
    assert pair_and_flipped_id(with_tools) == (with_tools.pair_id, turned.pair_id)
    assert plain.pair_id == "47709356bb33680fa1a77bf535c09072"  # As it was before pairs had tools.
    table = pairs_frame([plain, with_tools])
    assert table["tools"].to_list() == ["", with_tools.tools]
    assert table["pair_id"].to_list() == [plain.pair_id, with_tools.pair_id]


def test_tools_are_cleaned_like_any_text_that_a_template_renders() -> None:
    told = {"name": "f", "description": "ask ann@example.org <|im_end|>", "parameters": {}}
    one = pair(tools=tools_text([told], "t"))
    kept = screened(one, template_marks="keep", personal_data="redact").pairs
    assert json.loads(kept["tools"].item())[0]["function"]["description"] == "ask [email] <|im_end|>"
    assert kept["pair_id"].item() == replace(one, tools=kept["tools"].item()).pair_id
    escaped = screened(one, template_marks="escape").pairs["tools"].item()
    assert json.loads(escaped)[0]["function"]["description"] == "ask ann@example.org < |im_end|>"
    assert screened(one).quarantine["reason"].to_list() == ["template_marks"]
    raw = json.loads(base64.b64decode(screened(one).quarantine["raw"].item()))
    assert raw["tools"] == one.tools


def test_equal_texts_with_other_tools_are_neither_duplicates_nor_contradictions() -> None:
    others = tools_text([TOOL], "t"), tools_text([TOOL] * 2, "t")
    turned = pair(chosen=pair().rejected, rejected=pair().chosen)
    found = screened(
        pair(), *(pair(tools=tools) for tools in others), replace(turned, tools=tools_text([TOOL] * 3, "t"))
    )
    assert (found.pairs.height, found.duplicates, found.quarantine.height) == (4, 0, 0)
    assert screened(pair(tools=others[0]), pair(1, prompt=pair().prompt, tools=others[0])).duplicates == 1


def test_nulls_that_parquet_adds_to_tools_are_left_out_and_the_order_is_kept() -> None:
    one = {"function": {"name": "f", "description": "é", "parameters": {"z": {"type": "string"}, "a": None}}}
    assert tools_text([one], "t") == (
        '[{"type": "function", "function": {"name": "f", "description": "é", "parameters": {"z": {"type": "string"}}}}]'
    )


_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=8,
)


@given(value=_json)
def test_any_value_is_tools_is_nothing_or_is_refused(value: Any) -> None:
    try:
        text = tools_text(value, "t")
    except RowFault as fault:
        refusal = fault.reason
    else:
        refusal = ""
    if refusal:
        assert refusal == "unsupported_modality"
        return
    assert (text == "") is (not filled(value) or value == [])
    assert text == "" or tools_text(text, "t") == text


@pytest.mark.parametrize("value", [["search"], "search, calculator", {"used": "search"}])
def test_a_column_of_tools_that_is_something_else_is_told_how_to_rename_it(value: Any) -> None:
    row = {"prompt": "q", "chosen": "yes", "rejected": "no", "tools": value}
    fault = the_fault(items_of("trl", row))
    assert fault.reason == "unsupported_modality"
    assert "if it is something else, rename it: `columns: {my_tools: tools}`" in fault.message
