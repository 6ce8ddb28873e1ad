"""A Modelfile for Ollama: the chat template of a release as a Go template, where it can be said exactly.

A chat template is a program, in Jinja. Most are no more than fixed text around each message; which text, is read off
renderings, and what was read is held against further renderings before it is believed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Messages = Sequence[Mapping[str, str]]
# Messages and whether the assistant's turn is opened, to text; raises ValueError where the template refuses them.
Render = Callable[[Messages, bool], str]

SYSTEM, USER, ANSWER, FURTHER = "Ssystem.", "Uquestion?", "Aanswer.", "Uanother?"
NO_LITERAL = ("{{", "}}", '"""')  # Go's own marks, and the end of a Modelfile's text.


class NotSayable(ValueError):
    """A chat template that is more than fixed text around messages."""


@dataclass(frozen=True)
class Turns:
    """The text before and behind the messages of each role; `first` stands in the place of `user[0]` at the start.

    `system` is None for a template that takes no system message.
    """

    first: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str] | None

    def text(self, messages: Messages, answer_follows: bool) -> str:
        """What the Go template prints."""
        around = {"user": self.user, "assistant": self.assistant, "system": self.system or ("", "")}
        told = []
        for number, message in enumerate(messages):
            before, behind = around[message["role"]]
            told.append((self.first if number == 0 and message["role"] == "user" else before) + message["content"])
            told.append(behind)
        return "".join(told) + (self.assistant[0] if answer_follows else "")

    def go(self) -> str:
        """The same as a template of Go for Ollama's `.Messages`."""
        system = self.system or ("", "")
        return (
            "{{ range $i, $m := .Messages }}"
            + ('{{ if eq $m.Role "system" }}' + system[0] + "{{ $m.Content }}" + system[1] if self.system else "")
            + ("{{ else if" if self.system else "{{ if")
            + ' eq $m.Role "user" }}'
            + (
                self.user[0]
                if self.first == self.user[0]
                else "{{ if eq $i 0 }}" + self.first + "{{ else }}" + self.user[0] + "{{ end }}"
            )
            + "{{ $m.Content }}"
            + self.user[1]
            + '{{ else if eq $m.Role "assistant" }}'
            + self.assistant[0]
            + "{{ $m.Content }}"
            + self.assistant[1]
            + "{{ end }}{{ end }}"
            + self.assistant[0]
        )


@dataclass(frozen=True)
class OllamaTemplate:
    """A Go template, and what it does not say of the chat template."""

    go: str
    notes: tuple[str, ...]


def ollama_template(render: Render, bos: str, adds_bos: bool) -> OllamaTemplate:
    """The chat template for Ollama.

    Args:
        bos: the text of the token that begins a sequence; empty where there is none.
        adds_bos: whether llama.cpp puts that token before every prompt, by the GGUF file.

    Raises:
        NotSayable: with what it does that fixed text around messages does not.
    """

    def rendered(messages: Messages, answer_follows: bool) -> str:
        text = render(messages, answer_follows)
        if not adds_bos or not bos:
            return text
        if not text.startswith(bos):
            raise NotSayable(f"the file has {bos} put before every prompt, and the chat template does not begin so")
        return text.removeprefix(bos)

    turns = _turns(rendered)
    for messages in _conversations(turns.system is not None):
        for answer_follows in (True, False):
            if answer_follows and messages[-1]["role"] == "assistant":
                continue
            if turns.text(messages, answer_follows) != rendered(messages, answer_follows):
                raise NotSayable("the chat template is more than fixed text around each message")
    literals = (turns.first, *turns.user, *turns.assistant, *(turns.system or ()))
    if any(mark in literal for mark in NO_LITERAL for literal in literals):
        raise NotSayable("the chat template has marks in it that a Modelfile cannot hold")
    notes = [] if turns.system else ["The chat template takes no system message: one that is given is left out."]
    padded = [_said("user", f" {USER}\n")]
    if turns.text(padded, True) != rendered(padded, True):
        notes.append("White space around a message, which the chat template takes away, stays.")
    return OllamaTemplate(turns.go(), tuple(notes))


def modelfile(name: str, file: str, template: OllamaTemplate | str, stops: Sequence[str]) -> str:
    """The Modelfile beside a GGUF file.

    Args:
        template: or why there is none.
        stops: texts of the tokens that end a turn.
    """
    lines = [f"# ollama create {name} -f Modelfile", f"FROM ./{file}"]
    if isinstance(template, OllamaTemplate):
        lines += [*(f"# {note}" for note in template.notes), f'TEMPLATE """{template.go}"""']
    else:
        lines += [
            f"# No TEMPLATE, because {' '.join(template.split())}.",
            "# Ollama then guesses one from the file's own chat template, which llama-server renders itself.",
        ]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join(lines) + "\n"


def _turns(rendered: Render) -> Turns:
    """The text around messages, as four renderings show it."""
    user, answered = [_said("user", USER)], [_said("user", USER), _said("assistant", ANSWER)]
    first, behind_user = _around(rendered(user, False), USER)
    opened = _around(rendered(user, True), USER)[1]
    if not opened.startswith(behind_user):
        raise NotSayable("the chat template writes a question otherwise where an answer follows")
    opening = opened.removeprefix(behind_user)
    behind_answer = _around(rendered(answered, False), ANSWER)[1]
    between = _around(rendered([*answered, _said("user", FURTHER)], False), ANSWER)[1]
    further = _around(between, FURTHER)[0]
    if not further.startswith(behind_answer):
        raise NotSayable("the chat template writes the last answer otherwise than earlier ones")
    before_user = further.removeprefix(behind_answer)
    return Turns(
        first,
        (before_user, behind_user),
        (opening, behind_answer),
        _system(rendered, before_user),
    )


def _system(rendered: Render, before_user: str) -> tuple[str, str] | None:
    try:
        text = rendered([_said("system", SYSTEM), _said("user", USER)], False)
    except NotSayable:
        raise
    except ValueError:
        return None
    before, behind = _around(text, SYSTEM)
    between = _around(behind, USER)[0]
    if not between.endswith(before_user):
        raise NotSayable("the chat template writes a question otherwise behind a system message")
    return before, between.removesuffix(before_user)


def _around(text: str, message: str) -> tuple[str, str]:
    before, found, behind = text.partition(message)
    if not found or message in behind:
        raise NotSayable("the chat template does not print each message once, as it is")
    return before, behind


def _conversations(with_system: bool) -> list[list[Mapping[str, str]]]:
    """What the template is held against: one to five turns, texts of several lines."""
    turns = [
        _said("user", "Why?\nTell me."),
        _said("assistant", "Because.\n\n- one\n- two"),
        _said("user", "<b>And</b> then?"),
        _said("assistant", "Then it ends."),
        _said("user", FURTHER),
    ]
    started: list[list[Mapping[str, str]]] = [[*turns[:length]] for length in range(1, len(turns) + 1)]
    told = [[_said("system", "Be brief.\nBe kind."), *one] for one in started] if with_system else []
    return started + told


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
