"""A chat template in Ollama's words: the same text for every conversation, or none, with the reason."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dpo_assets.publishing.ollama import (
    FURTHER,
    NotSayable,
    OllamaTemplate,
    Render,
    Turns,
    _conversations,
    modelfile,
    ollama_template,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a bot.<|im_end|>\n{% endif %}" + CHATML
)
LLAMA_3 = (
    "{{ '<s>' }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
IN_THE_QUESTION = (  # Gemma's and Mistral's way.
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}<t>{{ m.role }}\n"
    "{% if loop.first and s %}{{ s }}\n\n{% endif %}{{ m.content }}</t>\n{% endfor %}"
    "{% if add_generation_prompt %}<t>assistant\n{% endif %}"
)
LAST_ANSWER_THINKS = CHATML.replace(
    "{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
)
NUMBERED = CHATML.replace("{{ m.role }}\n", "{{ m.role }} {{ loop.index }}\n")


def refuses(message: str) -> str:
    raise TemplateError(message)


def renderer(template: str) -> Render:
    environment = ImmutableSandboxedEnvironment(keep_trailing_newline=True)
    environment.globals["raise_exception"] = refuses
    compiled = environment.from_string(template)

    def render(messages: Sequence[Mapping[str, str]], answer_follows: bool) -> str:
        try:
            return compiled.render(messages=messages, add_generation_prompt=answer_follows)
        except TemplateError as error:
            raise ValueError(str(error)) from None

    return render


def go(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """What Go makes of the few actions that are written: they are put into Jinja's words one by one."""
    opened: list[str] = []

    def action(found: re.Match[str]) -> str:
        said = found[1]
        if said == "range $i, $m := .Messages":
            opened.append("endfor")
            return "{% for m in messages %}{% set i = loop.index0 %}"
        if said == "end":
            return "{% " + opened.pop() + " %}"
        if said == "else":
            return "{% else %}"
        if said == "$m.Content":
            return "{{ m.content }}"
        if said == "if eq $i 0":
            opened.append("endif")
            return "{% if i == 0 %}"
        role = re.fullmatch(r'(else )?if eq \$m\.Role "(\w+)"', said)
        assert role is not None, said
        if not role[1]:
            opened.append("endif")
        return "{% " + ("elif" if role[1] else "if") + f" m.role == '{role[2]}'" + " %}"

    written = re.sub(r"\{\{ (.*?) \}\}", action, template)
    assert opened == []
    return renderer(written)(messages, True)


@pytest.mark.parametrize(
    ("template", "bos", "notes"),
    [
        (CHATML, "", []),
        (DEFAULT_SYSTEM, "", []),
        (LLAMA_3, "<s>", ["White space"]),
        (NO_SYSTEM, "", ["no system message"]),
    ],
)
def test_ollama_prints_what_the_chat_template_prints(template: str, bos: str, notes: list[str]) -> None:
    render = renderer(template)
    found = ollama_template(render, bos, adds_bos=bool(bos))
    for messages in _conversations("system" not in " ".join(notes)):
        if messages[-1]["role"] == "user":
            assert bos + go(found.go, messages) == render(messages, True)
    assert [note for note in notes if note not in " ".join(found.notes)] == []
    assert len(found.notes) == len(notes)


@pytest.mark.parametrize(
    ("template", "bos", "why"),
    [
        (IN_THE_QUESTION, "", "behind a system message"),
        (LAST_ANSWER_THINKS, "", "more than fixed text"),
        (NUMBERED, "", "behind a system message"),
        (CHATML, "<s>", "does not begin so"),
        (CHATML.replace("<|im_end|>", '"""'), "", "cannot hold"),
        ("{{ messages[0].content | upper }}", "", "as it is"),
        ("Hello.", "", "as it is"),
    ],
)
def test_a_template_that_is_more_than_text_around_messages_is_said_not_to_be_sayable(
    template: str, bos: str, why: str
) -> None:
    with pytest.raises(NotSayable, match=why):
        ollama_template(renderer(template), bos, adds_bos=bool(bos))


_literal = st.text("ab<|>/:\n []", max_size=8)
_around = st.tuples(_literal, _literal)


@settings(max_examples=40, deadline=None)
@given(first=_literal, user=_around, assistant=_around, system=st.none() | _around)
def test_whatever_stands_around_messages_is_found_or_refused_and_never_said_wrong(
    first: str, user: tuple[str, str], assistant: tuple[str, str], system: tuple[str, str] | None
) -> None:
    meant = Turns(first + user[0], user, assistant, system)

    def render(messages: Sequence[Mapping[str, str]], answer_follows: bool) -> str:
        if system is None and messages[0]["role"] == "system":
            raise ValueError("no system")
        return meant.text(messages, answer_follows)

    try:
        found = ollama_template(render, "", adds_bos=False)
    except NotSayable:
        return
    for messages in _conversations(system is not None):
        if messages[-1]["content"] == FURTHER:
            assert go(found.go, messages) == render(messages, True)


def test_a_modelfile_names_the_file_the_stops_and_why_it_has_no_template() -> None:
    exact = modelfile("bot", "bot-F16.gguf", OllamaTemplate("{{ .Prompt }}", ("A note.",)), ["<|im_end|>", 'a"b'])
    assert exact.splitlines() == [
        "# ollama create bot -f Modelfile",
        "FROM ./bot-F16.gguf",
        "# A note.",
        'TEMPLATE """{{ .Prompt }}"""',
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "a\\"b"',
    ]
    without = modelfile("bot", "bot-F16.gguf", "it counts\nthe messages", [])
    assert "TEMPLATE " not in without
    assert "# No TEMPLATE, because it counts the messages." in without
