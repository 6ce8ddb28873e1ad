"""LMSYS and LMArena votes: raw logs, cleaned logs (33k), text columns (55k), JSON text (100k), content parts (140k)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from dpo_assets.feedback.pair import Message, Pair, named
from dpo_assets.feedback.readers import Format, Row, RowFault, has
from dpo_assets.feedback.readers.conversations import assistant, messages, shared_prefix, user
from dpo_assets.feedback.readers.modality import UNSUPPORTED
from dpo_assets.feedback.readers.shapes import At, by_row
from dpo_assets.feedback.readers.values import (
    field,
    from_json,
    listed,
    mapping,
    needed_text,
    number,
    other_shape,
    timestamp,
    truth,
)

_VOTES = {"leftvote": "model_a", "rightvote": "model_b", "tievote": "tie", "bothbad_vote": "both_bad"}
_TIES = {
    "tie": "the vote is a tie",
    "tie (bothbad)": "the vote calls both answers bad",
    "both_bad": "the vote calls both answers bad",
}
_KEPT = ("model_a", "model_b", "language", "turn", "is_code", "is_refusal", "category_tag", "evaluation_session_id")

# What FastChat's clean_battle_data.py leaves out. It looks for names anywhere in the text; here they are whole words,
# so that "bombard" or "palms" names no model.
_NAMES = (
    *("vicuna", "lmsys", "koala", "uc berkeley", "open assistant", "laion", "chatglm", "chatgpt", "gpt-4", "openai"),
    *("anthropic", "claude", "bard", "palm", "lamda", "google", "llama", "qianwan", "alibaba", "mistral", "zhipu"),
    *("keg lab", "01.ai", "ai2", "tülu", "tulu"),
)
_IDENTITY = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, _NAMES))})(?!\w)", re.IGNORECASE)
_ERRORS = (
    "network error due to high traffic. please regenerate or refresh this page.",
    "$moderation$ your input violates our content moderation guidelines.",
    "api request error",
)


@by_row("question_id", "id")
def read(row: Row, at: At) -> Iterator[Pair]:
    """One vote. What both sides share is the prompt, so the users' turns must be the same on both."""
    if has(row, "states", "type"):
        a, b, winner, about = _raw_log(row)
    elif has(row, "conversation_a", "conversation_b"):
        a, b, winner, about = _cleaned(row)
    elif has(row, "response_a", "response_b"):
        a, b, winner, about = _columns(row)
    else:
        raise other_shape(row, "conversation_a and conversation_b, response_a and response_b, or states of a vote")
    if winner in _TIES:
        raise RowFault("tie", _TIES[winner])
    if winner not in ("model_a", "model_b"):
        raise RowFault("wrong_shape", f"winner {winner[:40]!r} is none of: model_a, model_b, {', '.join(_TIES)}")
    _comparable(a, b)
    prompt, answer_a, answer_b = shared_prefix(a, b)
    chosen, rejected = (answer_a, answer_b) if winner == "model_a" else (answer_b, answer_a)
    when, judge = row.get("tstamp", row.get("timestamp")), row.get("judge_hash", row.get("judge", row.get("ip")))
    who = named(judge if isinstance(judge, str | int) else None)
    pair = at.pair(prompt, chosen, rejected, {"winner": winner} | about, "arena")
    yield replace(pair, created_at=timestamp(when), user=who)


Vote = tuple[list[Message], list[Message], str, dict[str, Any]]


def _cleaned(row: Row) -> Vote:
    """33k, 100k and 140k: two conversations, as lists or as JSON text, and a winner."""
    if row.get("anony") is not None and truth(row["anony"]) is False:
        raise RowFault("not_anonymous", "the voter could see the models' names")
    a, b = (messages(from_json(row[name], name), name) for name in ("conversation_a", "conversation_b"))
    whole, order = from_json(row.get("full_conversation"), "full_conversation"), number(row.get("evaluation_order"))
    turns = sum(said["role"] == "user" for said in a)
    later = len(whole) > turns if isinstance(whole, list) else (order or 1) > 1
    if later:
        # After a vote new models answer, each after the earlier answers on its own side, which the vote does not hold.
        raise RowFault("no_shared_prompt", "a later vote of a session: each side answers after other earlier turns")
    about = {name: row[name] for name in _KEPT if row.get(name) is not None}
    return a, b, needed_text(row, "winner"), about


def _columns(row: Row) -> Vote:
    """55k: prompts and responses as JSON lists in text, the winner as three columns of 0 and 1."""
    asked = listed(from_json(field(row, "prompt"), "prompt"), "prompt", "a JSON list of texts")
    sides: list[list[Message]] = []
    for name in ("response_a", "response_b"):
        said = listed(from_json(row[name], name), name, "a JSON list of texts")
        if len(said) != len(asked):
            raise RowFault("wrong_shape", f"{len(asked)} prompts, but {len(said)} in `{name}`")
        if not all(isinstance(text, str) for text in (*asked, *said)):
            raise RowFault("unfinished", f"a turn of `prompt` or `{name}` has no text")
        sides.append([turn for q, s in zip(asked, said, strict=True) for turn in (user(q), assistant(s))])
    won = [name for name in ("model_a", "model_b", "tie") if truth(row.get(f"winner_{name}"))]
    if len(won) != 1:
        raise RowFault(
            "wrong_shape", f"{len(won)} of winner_model_a, winner_model_b and winner_tie are 1; expected one"
        )
    about = {name: row[name] for name in ("model_a", "model_b") if isinstance(row.get(name), str)}
    return sides[0], sides[1], won[0], about


def _raw_log(row: Row) -> Vote:
    """A line of a server's log. Votes only, of two anonymous models that did not say who they are."""
    kind = row["type"]
    if not isinstance(kind, str) or kind not in _VOTES:
        raise RowFault("no_comparison", f"a {str(kind)[:40]!r} event of the log; votes are: {', '.join(_VOTES)}")
    states = listed(row["states"], "states")
    shown = listed(field(row, "models"), "models")
    if len(states) != 2 or len(shown) != 2:
        raise RowFault("wrong_shape", f"{len(states)} `states` and {len(shown)} `models`; a vote has two of each")
    if None in shown:
        raise RowFault("wrong_shape", "one side of the vote had no model")
    if any(_plain(name) not in ("", "Model A", "Model B") for name in shown):
        raise RowFault("not_anonymous", "the voter could see the models' names")
    a, b = (_logged(mapping(state, f"states[{n}]"), f"states[{n}].") for n, state in enumerate(states))
    told = {"model_a": states[0].get("model_name"), "model_b": states[1].get("model_name")}
    about = {name: model for name, model in told.items() if isinstance(model, str)}
    if leak := _IDENTITY.search("\n".join(turn["content"] for turn in (*a, *b))):
        raise RowFault("leaked_identity", f"the conversation names {leak.group()!r}, so the vote was not blind")
    return a, b, _VOTES[kind], about


def _plain(name: Any) -> str:
    """What a voter was shown as a model's name: "", or "<h3>Model A: name</h3>" once it was revealed."""
    text = name if isinstance(name, str) else "unknown"
    return text.split(": ", 1)[-1].removesuffix("</h3>\n") if text.startswith("<h3>") else text


def _logged(state: Mapping[str, Any], where: str) -> list[Message]:
    said = listed(field(state, "messages", where), f"{where}messages")
    start = number(state.get("offset"))
    turns = []
    for n, turn in enumerate(said[max(int(start or 0), 0) :]):
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowFault("wrong_type", f"`{where}messages` holds something else than [role, text]")
        if isinstance(turn[1], list):  # FastChat: text and pictures.
            raise RowFault(UNSUPPORTED, f"a turn of `{where}messages` holds more than text; only text can be read")
        if not isinstance(turn[1], str):
            raise RowFault("unfinished", f"a turn of `{where}messages` has no text")
        turns.append(user(turn[1]) if n % 2 == 0 else assistant(turn[1]))
    return turns


def _comparable(a: list[Message], b: list[Message]) -> None:
    for name, side in (("a", a), ("b", b)):
        if not side or side[-1]["role"] != "assistant":
            raise RowFault("unfinished", f"side {name} ends before the assistant's answer")
        for turn in side:
            if turn["role"] != "assistant":
                continue
            text = turn["content"].rstrip()
            if not text or text.endswith("▌"):  # FastChat's cursor: the answer was still being written.
                raise RowFault("unfinished", f"side {name} holds an answer that was not finished")
            if text.lstrip("* ").lower().startswith(_ERRORS):
                raise RowFault("error_answer", f"side {name} holds an error of the server instead of an answer")
    if [t["content"] for t in a if t["role"] == "user"] != [t["content"] for t in b if t["role"] == "user"]:
        raise RowFault("no_shared_prompt", "the user said different things on the two sides")


def _fits(row: Row) -> float:
    if has(row, "conversation_a", "conversation_b", "winner"):
        return 1.0
    if has(row, "response_a", "response_b") and any(f"winner_{name}" in row for name in ("model_a", "tie")):
        return 1.0
    return 1.0 if has(row, "states", "models", "type") else 0.0


FORMAT = Format(
    name="arena",
    title="Chatbot Arena votes (LMSYS, LMArena)",
    example='{"question_id": "...", "winner": "model_a", "conversation_a": [...], "conversation_b": [...]}',
    documented="FastChat, clean_battle_data.py; cards of chatbot_arena_conversations, arena-human-preference-*",
    fits=_fits,
    read=read,
)
