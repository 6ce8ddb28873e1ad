"""What export formats have in common: fields, messages, scores and times as a pair wants them, or a fault that says why
not. No format of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import wraps
from typing import Any, NamedTuple

from dpo_assets.feedback.pair import ROLES, JudgedAnswer, LabelKind, Message, Pair
from dpo_assets.feedback.pairing import proposed
from dpo_assets.feedback.readers import Item, Place, Read, ReadOptions, Row, RowFault, keys_of

# What formats call the three roles. A name that is not here stays as it is, and the dataset's rules name it.
ROLE_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "developer": "system",
}
TOOL_ROLES = frozenset({"tool", "function", "function_call", "observation", "ipython"})
Scored = tuple[list[Message], float, dict[str, Any]]  # An answer, its score (higher is better), and its meta.
_MILLISECONDS = 1e11  # Seconds of the year 5138, milliseconds of 1973.
_YES, _NO = ("true", "1", "yes"), ("false", "0", "no")


class At(NamedTuple):
    """One row as its reader sees it: where it stands, what it is called, and the choices of the recipe."""

    place: Place
    row: str
    options: ReadOptions

    def pair(
        self,
        prompt: list[Message],
        chosen: list[Message],
        rejected: list[Message],
        meta: dict[str, Any],
        kind: LabelKind = "human_pair",
        margin: float | None = None,
        row: str = "",
    ) -> Pair:
        """The pair that the row holds, or one of them, which `row` then names."""
        return Pair(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            source=self.place.source,
            row=row or self.row,
            line=self.place.line,
            label_kind=kind,
            margin=margin,
            meta=meta,
        )

    def judged(
        self, prompt: list[Message], answer: list[Message], score: float, kind: LabelKind, meta: dict[str, Any]
    ) -> JudgedAnswer:
        """The one answer that the row judges. What it is held against is a policy's choice among other rows."""
        source, line = self.place.source, self.place.line
        return JudgedAnswer(prompt, answer, score, source, self.row, line, label_kind=kind, meta=meta)

    def thumb(self, prompt: list[Message], answer: list[Message], liked: bool, meta: dict[str, Any]) -> JudgedAnswer:
        return self.judged(prompt, answer, 1.0 if liked else -1.0, "human_thumb", meta)

    def ranking(
        self, prompt: list[Message], scored: Sequence[Scored], kind: LabelKind, meta: dict[str, Any]
    ) -> Iterator[Pair | RowFault]:
        """The pairs of a row that ranks several answers itself, as the recipe's policy chooses them.

        They are made here and not with other rows' answers: a rank, or a judge's score, says nothing outside its row.

        Raises:
            RowFault: `no_comparison` for fewer than two answers.
        """
        if len(scored) < 2:
            raise RowFault("no_comparison", f"{len(scored)} judged answers; a comparison needs two")
        for a, b in proposed([score for _, score, _ in scored], self.options.pairing):
            (chosen, high, of_chosen), (rejected, low, of_rejected) = scored[a], scored[b]
            row = self.row if len(scored) == 2 else f"{self.row}.{a}>{b}"
            sides = {"chosen": of_chosen, "rejected": of_rejected} if of_chosen or of_rejected else {}
            labels = kind == "human_pair"  # Which one is better, not by how much.
            if high == low:
                yield RowFault("tie", "both answers were judged alike", row)
            elif not labels and high - low < self.options.min_margin:
                yield RowFault("tie", f"the answers lie {high - low:g} apart, less than min_margin", row)
            else:
                margin = None if labels else high - low
                yield self.pair(prompt, chosen, rejected, meta | sides, kind, margin, row)


def by_row(*ids: str) -> Callable[[Callable[[Row, At], Iterable[Item]]], Read]:
    """A `read` from a generator of items that raises its faults; a row's id stands under the first of `ids` it has."""

    def decorate(body: Callable[[Row, At], Iterable[Item]]) -> Read:
        @wraps(body)
        def read(row: Row, place: Place, options: ReadOptions) -> Iterator[Item]:
            given = None
            for name in ids:
                if (given := row.get(name)) is not None:
                    break
            at = At(place, place.row_id(given), options)
            try:
                yield from body(row, at)
            except RowFault as fault:
                yield RowFault(fault.reason, fault.message, fault.row or at.row)

        return read

    return decorate


# Fields


def field(row: Row, name: str, inside: str = "") -> Any:
    """The value of a key.

    Raises:
        RowFault: `missing_field`, with the keys that are there.
    """
    value = row.get(name)
    if value is None:
        raise RowFault("missing_field", f"no `{inside}{name}`; {_owner(inside)} has: {keys_of(row)}")
    return value


def other_shape(row: Row, expected: str) -> RowFault:
    """The fault of a row that is not of the format at all."""
    return RowFault("wrong_shape", f"expected {expected}; the row has: {keys_of(row)}")


def mapping(value: Any, where: str, expected: str = "an object") -> Row:
    if not isinstance(value, Mapping):
        raise RowFault("wrong_type", f"`{where}` is {type(value).__name__}; expected {expected}")
    return value


def listed(value: Any, where: str, expected: str = "a list") -> list[Any]:
    if not isinstance(value, list):
        raise RowFault("wrong_type", f"`{where}` is {type(value).__name__}; expected {expected}")
    return value


def others(row: Row, *used: str) -> dict[str, Any]:
    """The columns that became no part of the pair, where they say something."""
    return {name: value for name, value in row.items() if name not in used and value is not None}


def number(value: Any) -> float | None:
    """A finite number, or text that is one (as CSV exports have it)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and "_" in value:  # `float` reads "1_0" as 10, which no export means.
        return None
    try:
        result = float(value)
    except (OverflowError, ValueError):
        return None
    return result if math.isfinite(result) else None


def needed_number(row: Row, name: str) -> float:
    value = number(field(row, name))
    if value is None:
        raise RowFault("wrong_type", f"`{name}` is {_shown(row[name])}; expected a number")
    return value


def truth(value: Any) -> bool | None:
    """True or False, also as 1 and 0 or as text (as CSV exports have it)."""
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower() if isinstance(value, int | str) else ""
    return True if text in _YES else False if text in _NO else None


def utc(value: Any) -> str | None:
    """ISO 8601 in UTC from seconds or milliseconds since 1970, or from ISO text (UTC where it names no zone)."""
    try:
        if isinstance(value, str):
            when = datetime.fromisoformat(value.strip())
            when = when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
        elif (seconds := number(value)) is not None:
            when = datetime.fromtimestamp(seconds / 1000 if seconds > _MILLISECONDS else seconds, UTC)
        else:
            return None
    except (OverflowError, OSError, ValueError):
        return None
    return when.isoformat()


def from_json(value: Any, where: str) -> Any:
    """What a column that holds JSON as text holds; other values as they are.

    Raises:
        RowFault: `invalid_json`, or `invalid_utf8` for a lone surrogate that the outer JSON could not show.
    """
    if not isinstance(value, str):
        return value
    try:
        result = json.loads(value)
        json.dumps(result, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise RowFault("invalid_utf8", f"`{where}` holds a lone surrogate escape, which is not text") from None
    except RecursionError:
        raise RowFault("too_deep", f"`{where}` is nested too deeply") from None
    except ValueError:
        raise RowFault("invalid_json", f"`{where}` is text that is not JSON") from None
    return result


# Messages


def text_of(value: Any, where: str) -> str:
    """Text, or a list of content parts that are all text; a line break stands between parts.

    Raises:
        RowFault: `unsupported_modality` for an image, a file, a tool call; `wrong_type` for what is no content.
    """
    if isinstance(value, str):
        return value
    parts = listed(value, where, "text or a list of content parts")
    return "\n".join(_part(part, f"{where}[{n}]") for n, part in enumerate(parts))


def _part(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    kind = mapping(value, where, "a content part").get("type")
    if isinstance(value.get("text"), str) and kind in (None, "text", "input_text", "output_text"):
        text: str = value["text"]
        return text
    if kind == "text":
        raise RowFault("wrong_type", f"`{where}` needs text in `text`; it has: {sorted(value)}")
    kind = kind if isinstance(kind, str) else ", ".join(sorted(k for k, v in value.items() if v is not None))
    raise RowFault("unsupported_modality", f"`{where}` holds {kind or 'nothing'}; only text can be read")


def message(value: Any, where: str, role: str = "role", content: str = "content") -> Message:
    """One message, whose role and content stand under these keys."""
    given, said = mapping(value, where, f"{{{role}, {content}}}").get(role), value.get(content)
    if not isinstance(given, str):
        raise RowFault("wrong_type", f"`{where}` needs text in `{role}` and `{content}`; it has: {sorted(value)}")
    if given in TOOL_ROLES or value.get("tool_calls") or value.get("function_call"):
        raise RowFault("unsupported_modality", f"`{where}` is part of a tool call; only text can be read")
    if not isinstance(said, str):
        if not isinstance(said, list):
            raise RowFault("wrong_type", f"`{where}` needs text in `{role}` and `{content}`; it has: {sorted(value)}")
        said = text_of(said, f"{where}.{content}")
    return {"role": given if given in ROLES else ROLE_NAMES.get(given, given), "content": said}


def messages(value: Any, where: str, role: str = "role", content: str = "content") -> list[Message]:
    """A list of messages."""
    found: list[Message] = []
    for n, item in enumerate(listed(value, where, "a list of messages")):
        # The usual message first and without a call: a million rows have several each.
        if type(item) is dict and item.get(role) in ROLES and type(item.get(content)) is str and len(item) == 2:
            found.append({"role": item[role], "content": item[content]})
        else:
            found.append(message(item, f"{where}[{n}]", role, content))
    return found


def turns(value: Any, where: str, speaker: str) -> list[Message]:
    """Plain text as one message of `speaker`, or a list of messages."""
    if isinstance(value, str):
        return [{"role": speaker, "content": value}]
    if not isinstance(value, list):
        raise RowFault("wrong_type", f"`{where}` is {type(value).__name__}; expected text or a list of messages")
    return messages(value, where)


def answer_in(row: Row, name: str, role: str = "role", content: str = "content") -> list[Message]:
    """A field that holds an answer: plain text, one message, or a list of them."""
    value = field(row, name)
    if isinstance(value, Mapping):
        return [message(value, name, role, content)]
    return messages(value, name, role, content) if isinstance(value, list) else turns(value, name, "assistant")


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def needed_text(row: Row, name: str, inside: str = "") -> str:
    value = field(row, name, inside)
    if not isinstance(value, str):
        raise RowFault("wrong_type", f"`{inside}{name}` is {type(value).__name__}; expected text")
    return value


def with_system(row: Row, prompt: list[Message], name: str = "system") -> list[Message]:
    """The prompt after the row's system text, where it has one and the prompt does not open with its own."""
    said = row.get(name)
    if said is None or said == "" or (prompt and prompt[0]["role"] == "system"):
        return prompt
    return [{"role": "system", "content": text_of(said, name)}, *prompt]


def history(row: Row) -> list[Message]:
    """Earlier turns under `history`, each a question and an answer (alpaca's fashion)."""
    found = []
    for n, turn in enumerate(listed(row.get("history") or [], "history")):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise RowFault("wrong_type", f"`history[{n}]` is not a question and an answer as text")
        found += [user(turn[0]), assistant(turn[1])]
    return found


def last_answer(conversation: list[Message], where: str) -> tuple[list[Message], list[Message]]:
    """A conversation as its prompt and its last message, which must be the assistant's."""
    if len(conversation) < 2 or conversation[-1]["role"] != "assistant":
        raise RowFault("wrong_shape", f"`{where}` does not end with an assistant's answer to something")
    return conversation[:-1], conversation[-1:]


def shared_prefix(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Splits two conversations into their common prompt and the two answers.

    Raises:
        RowFault: when they share nothing, or one is the beginning of the other.
    """
    length = 0
    while length < min(len(chosen), len(rejected)) and chosen[length] == rejected[length]:
        length += 1
    if length == len(chosen) == len(rejected):
        raise RowFault("no_preference", "chosen and rejected are the same conversation")
    if length == 0:
        raise RowFault("no_shared_prompt", "no `prompt`, and chosen and rejected begin with different messages")
    if length == min(len(chosen), len(rejected)):
        raise RowFault("no_shared_prompt", "one conversation is the beginning of the other, so an answer is missing")
    return chosen[:length], chosen[length:], rejected[length:]


def is_whole(conversation: list[Message]) -> bool:
    """Whether it opens like a conversation, so that it holds its prompt too."""
    return bool(conversation) and conversation[0]["role"] in ("system", "user")


def prompt_and_answers(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """The three parts, where both answers repeat the prompt (UltraFeedback's fashion) or neither does."""
    if is_whole(chosen) and is_whole(rejected):
        shared, good, bad = shared_prefix(chosen, rejected)
        # The system message may stand in the prompt, in the conversations, or in both.
        system = prompt[:1] if prompt and prompt[0]["role"] == "system" and shared[0]["role"] != "system" else []
        asked = prompt[len(system) :]
        if shared[: len(asked)] == asked or shared[-len(asked) :] == asked:
            return [*system, *shared], good, bad
    return prompt, chosen, rejected


# Comparisons


def strength(row: Row, chosen: str, rejected: str) -> float | None:
    """How much higher the chosen answer was scored, or None where a score is missing.

    Raises:
        RowFault: `tie` for equal scores, `score_contradicts` where the rejected answer has the higher one.
    """
    better, worse = number(row.get(chosen)), number(row.get(rejected))
    if better is None or worse is None:
        return None
    if better == worse:
        raise RowFault("tie", f"`{chosen}` and `{rejected}` are both {better:g}")
    if better < worse:
        raise RowFault("score_contradicts", f"`{chosen}` is {better:g}, `{rejected}` is {worse:g}")
    return better - worse


def rated_pair(row: Row, at: At, chosen_score: str, rejected_score: str, left_out: tuple[str, ...] = ()) -> Pair:
    """`chosen` and `rejected` as answers to `prompt` or as whole conversations, with a judge's score each."""
    margin = strength(row, chosen_score, rejected_score)
    chosen, rejected = answer_in(row, "chosen"), answer_in(row, "rejected")
    if is_whole(chosen) and is_whole(rejected):
        prompt, chosen, rejected = shared_prefix(chosen, rejected)
    else:
        prompt = turns(field(row, "prompt"), "prompt", "user")
    meta = others(row, "id", "prompt", "chosen", "rejected", chosen_score, rejected_score, *left_out)
    return at.pair(prompt, chosen, rejected, meta, "judge_rating", margin)


def stronger(first: Message, second: Message, told: float, name: str) -> tuple[list[Message], list[Message], float]:
    """(chosen, rejected, margin) where a negative number prefers the first answer.

    Raises:
        RowFault: `tie` for 0.
    """
    if told == 0:
        raise RowFault("tie", f"`{name}` is 0: neither response was preferred")
    return ([first], [second], -told) if told < 0 else ([second], [first], told)


def _owner(inside: str) -> str:
    return f"`{inside.rstrip('.')}`" if inside else "the row"


def _shown(value: Any) -> str:
    return repr(value)[:40]
