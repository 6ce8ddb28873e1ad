"""Text from elsewhere is shown as it is and does nothing: in Markdown of whatever place, in a terminal."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console

from dpo_assets.demo.render import show_summary
from dpo_assets.demo.summary import Summary
from dpo_assets.planning.licence import Licence
from dpo_assets.publishing.card import render_card
from dpo_assets.report.plots import as_markdown
from dpo_assets.report.tables import cell, table
from dpo_assets.untrusted import in_code, in_markdown, in_terminal
from dpo_assets_tests.pipelines import failures, materialize, trl_recipe
from dpo_assets_tests.publishing.test_card import facts

PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
# What GitHub's Markdown, which Dagster's UI speaks, makes links of in the text that is left after parsing
# (the two patterns of mdast-util-gfm-autolink-literal).
LINKS = re.compile(r"(?:https?://|www(?=\.))[-.\w]+|[-.\w+]+@[-\w]+(?:\.[-\w]+)+", re.IGNORECASE)
HOSTILE = [
    "![look](https://evil.example/pixel.png)",
    "[click](javascript:alert(1))",
    "<img src=https://evil.example/pixel.png>",
    "<script>alert(1)</script>",
    "<!-- a comment",
    "&lt;b&gt; &#60;b&#62;",
    "<https://evil.example>",
    "https://evil.example and www.evil.example and me@evil.example",
    "[a]: https://evil.example",
    "a | b \\| c \\\\| d",
    "`code` ``` ~~~",
    "# heading",
    "> quote",
    "- item",
    "1. item",
    "*a* **b** __c__ ~~d~~ _e_",
    "line\n\n# heading\r\n| a | b |\n|---|---|",
    "a\u2028b\x00c\x1b[31m",
    "---",
    "===",
]
SPANS = {"image", "link_open", "html_inline", "em_open", "strong_open", "s_open", "code_inline"}
LIVE = SPANS | {"html_block", "fence", "code_block"}
PARTS = LIVE | {"heading_open", "tr_open", "hr"}
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def tokens(markdown: str) -> Iterator[Token]:
    for token in PARSER.parse(markdown):
        yield token
        yield from token.children or ()


def live(markdown: str) -> list[str]:
    """Everything in a Markdown text that is more than text, and that GitHub's Markdown would make a link of."""
    found = [token.type for token in tokens(markdown) if token.type in LIVE]
    return found + [link for token in tokens(markdown) if token.type == "text" for link in LINKS.findall(token.content)]


def shown(markdown: str) -> str:
    return "".join(token.content for token in tokens(markdown) if token.type == "text").replace("\u2060", "")


def as_one_line(text: str) -> str:
    return CONTROL.sub(" ", text)


anything = st.one_of(
    st.text(max_size=60),
    st.text("ab<>[]()!`*_~|\\&#-+=:./@wh1 \n", max_size=40),
    st.sampled_from(HOSTILE),
)


@settings(max_examples=300, deadline=None)
@given(text=anything)
@example("\\|")
@example("\\\\|")
@example("https://https://www.www.")
def test_a_text_in_markdown_is_one_paragraph_that_shows_it(text: str) -> None:
    kinds = [token.type for token in PARSER.parse(in_markdown(text))]
    assert live(in_markdown(text)) == []
    assert kinds in ([], ["paragraph_open", "inline", "paragraph_close"])
    assert shown(in_markdown(text)).strip() == as_one_line(text).replace("\u2060", "").strip()


@settings(max_examples=300, deadline=None)
@given(first=anything, second=anything)
@example("a\\", "|b")
def test_a_text_in_a_table_stays_in_its_cell(first: str, second: str) -> None:
    made = table(["left", first], [[first, second], [second, 1]])
    assert live(made) == []
    parsed = list(tokens(made))
    assert [token.type for token in parsed if token.type in ("th_open", "td_open")] == ["th_open"] * 2 + ["td_open"] * 4
    cells = [token for token in parsed if token.type == "inline"]
    text = "".join(part.content for part in cells[3].children or () if part.type == "text").replace("\u2060", "")
    assert text.strip() == as_one_line(second).replace("\u2060", "").strip()


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_hostile_is_live_in_a_cell_a_title_or_a_span_of_code(text: str) -> None:
    from matplotlib.figure import Figure

    assert live(f"| a |\n|---|\n| {cell(text)} |") == []
    assert [token.type for token in tokens(as_markdown(Figure(figsize=(1, 1)), text)) if token.type in LIVE] == [
        "image"
    ]
    assert [token.type for token in tokens(in_code(text)) if token.type in LIVE] == ["code_inline"]


def test_words_and_names_stay_as_they_are_in_the_source() -> None:
    for text in ("no_preference", "a good answer (really), 3.5 of 10", "f-2026-10.jsonl", "1e-05", "Grüße, 你好", "-"):
        assert cell(text) == text


def test_nothing_that_a_card_takes_from_elsewhere_is_live() -> None:
    hostile = " ".join(HOSTILE)
    licence = Licence(identifier=hostile, name=hostile, link=hostile, stated_by="model card")
    made = facts(title=hostile, base_source=hostile, licence=licence, licence_files=(hostile, hostile), reason=hostile)
    body = render_card(made).split("---\n", 2)[2]
    plain = render_card(facts()).split("---\n", 2)[2]
    bodies = [[token.type for token in tokens(text) if token.type in PARTS] for text in (body, plain)]
    assert bodies[0] == bodies[1]


def test_hostile_feedback_is_live_nowhere_in_the_event_log(tmp_path: Path) -> None:
    hostile = " ".join(text for text in HOSTILE if "\x00" not in text)
    rows: list[dict[str, Any]] = [
        {"prompt": f"{n} {hostile}", "chosen": f"yes {n} {hostile}", "rejected": f"no {n} {hostile}", "model": hostile}
        for n in range(70)
    ]
    rows += [{"prompt": hostile, "chosen": "same", "rejected": "same", hostile: hostile}]
    path = tmp_path / "a <img src=x> ![x](y) [z](z) www.evil.example `me@evil.example` |.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + hostile, encoding="utf-8")
    recipe = trl_recipe(path, max_length=480, max_quarantine_rate=1.0, min_pairs=1)
    nodes = ["base_model", "raw_preferences", "quarantined_preferences", "dpo_dataset"]
    with dg.DagsterInstance.ephemeral(str(tmp_path)) as instance:
        result = materialize(recipe, instance, nodes)
        shown_on = [e.step_materialization_data.materialization for e in result.get_asset_materialization_events()]
        checks = result.get_asset_check_evaluations()
    made = {one.asset_key.path[-1] for one in shown_on}
    assert made >= {"raw_preferences", "quarantined_preferences", "dpo_dataset"}, failures(result)
    texts = [
        value.value
        for one in [*shown_on, *checks]
        for value in one.metadata.values()
        if isinstance(value, dg.MarkdownMetadataValue)
    ]
    assert sum("evil.example" in text.replace("\u2060", "") for text in texts) >= 3, "the feedback is shown somewhere"
    for text in texts:
        without_plots = re.sub(r"!\[[^\]]*\]\(data:image/png;base64,[A-Za-z0-9+/=]*\)", "", text)
        assert live(without_plots) == []


def test_a_terminal_obeys_nothing_that_a_model_answered() -> None:
    answer = {
        "prompt": [{"content": "\x1b]8;;https://evil.example\x07click"}],
        "sft": "[red]a\x1b[2J",
        "policy": "b\r\x9b1mc\n",
    }
    summary = Summary(
        "run", "SUCCESS", 1.0, answers=[answer], errors=["\x1b[2J"], problems=["[link=https://x]y[/link]\x1b[2J"]
    )
    stream = io.StringIO()
    show_summary(summary, Console(file=stream, width=120, force_terminal=False), answers=1)
    assert not set("\x1b\x07\r\x9b") & set(stream.getvalue())
    assert "[red]a" in stream.getvalue()
    assert "[link=https://x]y" in stream.getvalue()
    assert in_terminal("two\nlines\tof text") == "two\nlines\tof text"


def test_entities_are_shown_as_they_were_written() -> None:
    assert html.unescape(in_markdown("&amp; <b>")) == "&amp; <b>"
