"""What of a row was judged and can be trained: the one answer at which two conversations part, as it was said.

Only what an assistant says may be scored and trained. A pair whose answers hold further turns is therefore brought to
one answer on each side: turns that both sides share belong to the prompt, and what follows the first answer that
differs is cut, because each side went on after an answer of its own. All of this is one place for all readers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from dpo_assets.feedback.pair import REASONING, JudgedAnswer, Message, Pair
from dpo_assets.feedback.readers.base import RowFault

# Flags of what was changed or seen here.
LATER_TURNS_CUT, PROMPT_REPEATED, REASONING_LEFT_OUT = "later_turns_cut", "prompt_repeated", "reasoning_left_out"
FOREIGN_TURN = "foreign_turn"
SEEN_IN_PAIRS = frozenset({LATER_TURNS_CUT, PROMPT_REPEATED})  # What takes both sides to be seen.
REASONING_APART, TRANSCRIPT = "reasoning_apart", "transcript_as_text"  # Reasons.
LEAVE_OUT = "leave_out"  # What a recipe writes under `fields: {reasoning: ...}`.
KEEP = "keep"  # And under `fields: {repeated_prompt: ...}`.

# Of a prompt that an answer may be said to repeat: "Hi" is answered with "Hi". Letters count where nothing stands
# between words.
FEWEST_WORDS, FEWEST_LETTERS = 3, 12
# Where a text begins or after an empty line, such a mark opens somebody's turn (hh-rlhf's, Vicuna's and Alpaca's
# transcripts); inside a paragraph it is prose.
_TURN = re.compile(r"(?:\A\s*|\n[^\S\n]*\n\s*)(?:Human|User|USER|### Instruction):")
_TRANSCRIPT = re.compile(r"\A\s*Human:.*\n\nAssistant:|\A\n\nHuman:", re.DOTALL)


def settled_pair(pair: Pair, fields: Mapping[str, str], *, are_texts: bool = True) -> Pair:
    """A pair with one answer on each side (`one_answer`), every message of which is its text alone.

    Reasoning that stands apart from an answer was judged with it but would not be trained, so such a row is refused,
    unless the recipe says `fields: {reasoning: leave_out}` of its source. In the prompt it is left out, as chat
    templates leave it out of earlier turns. An answer that is a transcript is refused; text that goes on with somebody
    else's turn is flagged only, because it may be quoted.

    Args:
        pair: as its reader read it.
        fields: of its source. `repeated_prompt: keep` says that answers which begin with the prompt do so by right.
        are_texts: its answers stand in the row as plain text, not in messages, which never hold their prompt.

    Raises:
        RowFault: `reasoning_apart`, `transcript_as_text`.
    """
    flags: dict[str, None] = {}
    prompt = _prompt(pair.prompt, flags)
    chosen = _answer("chosen", pair.chosen, fields, flags)
    rejected = _answer("rejected", pair.rejected, fields, flags)
    if flags:
        pair = replace(pair, prompt=prompt, chosen=chosen, rejected=rejected, flags=(*pair.flags, *flags))
    return one_answer(pair, are_texts=are_texts and fields.get("repeated_prompt") != KEEP)


def settled_answer(judged: JudgedAnswer, fields: Mapping[str, str]) -> JudgedAnswer:
    """A judged answer in the same way. It keeps its turns: where two answers part is seen when they are paired.

    Raises:
        RowFault: `reasoning_apart`, `transcript_as_text`.
    """
    flags: dict[str, None] = {}
    prompt, answer = _prompt(judged.prompt, flags), _answer("answer", judged.answer, fields, flags)
    return replace(judged, prompt=prompt, answer=answer, flags=(*judged.flags, *flags)) if flags else judged


_WAY_OUT = (
    "its reasoning stands apart from the text, so it was judged but would not be trained. Write it into the text as "
    "the base model's chat template does, or say `fields: {reasoning: leave_out}` of this source"
)


def _prompt(messages: list[Message], flags: dict[str, None]) -> list[Message]:
    for message in messages:
        if _holds_a_mark(message["content"]) and _TRANSCRIPT.search(message["content"]):
            flags[FOREIGN_TURN] = None
    return _texts(messages, flags)


def _answer(name: str, messages: list[Message], fields: Mapping[str, str], flags: dict[str, None]) -> list[Message]:
    for message in messages:
        if REASONING in message and fields.get("reasoning") != LEAVE_OUT:
            raise RowFault(REASONING_APART, f"{name}: {_WAY_OUT}")
        if message["role"] != "assistant" or not _holds_a_mark(message["content"]):
            continue
        if _TRANSCRIPT.search(message["content"]):
            raise RowFault(TRANSCRIPT, f"{name} is a transcript of several turns: is this `format: hh_rlhf`?")
        if _TURN.search(message["content"]):
            flags[FOREIGN_TURN] = None
    return _texts(messages, flags)


def _texts(messages: list[Message], flags: dict[str, None]) -> list[Message]:
    for message in messages:
        if REASONING in message:
            flags[REASONING_LEFT_OUT] = None
            return [{"role": m["role"], "content": m["content"]} for m in messages]
    return messages


def _holds_a_mark(text: str) -> bool:
    """Whether a text is worth a closer look. Spelled out: a million rows have several texts each."""
    if not isinstance(text, str) or ":" not in text:
        return False
    if text.lstrip().startswith(("Human:", "User:", "USER:", "### Instruction:")):
        return True
    return "\n" in text and ("Human:" in text or "User:" in text or "USER:" in text or "### Instruction:" in text)


def one_answer(pair: Pair, *, are_texts: bool = True) -> Pair:
    """The pair with one answer on each side, where its conversations part at an answer.

    Turns that both share are moved to the prompt; those after the first answer that differs are cut, with the flag
    `later_turns_cut`. A prompt that both answers repeat is taken off them where they are texts (TRL's text form knows
    answers with their prompt), with the flag `prompt_repeated`. A pair that parts elsewhere stays as it is: the
    dataset's rules refuse it.
    """
    pair = _parted(pair) if len(pair.chosen) > 1 or len(pair.rejected) > 1 else pair
    return _unrepeated(pair) if are_texts else pair


def _parted(pair: Pair) -> Pair:
    chosen, rejected = pair.chosen, pair.rejected
    if not _in_turn(chosen) or not _in_turn(rejected):
        return pair
    most = min(len(chosen), len(rejected))
    at = next((n for n in range(most) if chosen[n] != rejected[n]), most)
    if at == most or chosen[at]["role"] != "assistant":
        return pair
    cut = len(chosen) > at + 1 or len(rejected) > at + 1
    return replace(
        pair,
        prompt=[*pair.prompt, *chosen[:at]],
        chosen=[chosen[at]],
        rejected=[rejected[at]],
        flags=(*pair.flags, LATER_TURNS_CUT) if cut else pair.flags,
    )


def _in_turn(answer: list[Message]) -> bool:
    """Whether an answer begins and ends with the assistant, who speaks in turn with the user."""
    roles = [m["role"] for m in answer]
    return len(roles) % 2 == 1 and roles == ["user" if n % 2 else "assistant" for n in range(len(roles))]


def _unrepeated(pair: Pair) -> Pair:
    if len(pair.chosen) != 1 or len(pair.rejected) != 1 or not pair.prompt:
        return pair
    asked, [good], [bad] = pair.prompt[-1]["content"], pair.chosen, pair.rejected
    if not (better := _after(asked, good["content"])) or not (worse := _after(asked, bad["content"])):
        return pair
    return replace(
        pair,
        chosen=[{**good, "content": better}],
        rejected=[{**bad, "content": worse}],
        flags=(*pair.flags, PROMPT_REPEATED),
    )


def _after(asked: str, answer: str) -> str:
    """What an answer says after it has repeated the question; "" where it does not, or says nothing more."""
    if not isinstance(asked, str) or not isinstance(answer, str):
        return ""
    asked, answer = asked.strip(), answer.lstrip()
    if not asked or not answer.startswith(asked):
        return ""
    rest, words = answer[len(asked) :], len(asked.split())
    long = words >= FEWEST_WORDS or (words == 1 and len(asked) >= FEWEST_LETTERS)
    inside_a_word = asked[-1].isalnum() and rest[:1].isalnum() and rest[:1].isascii()
    if not long or inside_a_word or not rest.strip():
        return ""
    rest = rest.lstrip(" \t")
    return rest.lstrip("\n")  # The space that parts the two, not the indentation of what follows.
