"""What a pair or a judged answer must satisfy by itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dpo_assets.feedback.pair import ROLES, JudgedAnswer, Message, Pair, said
from dpo_assets.feedback.readers.base import RowFault
from dpo_assets.feedback.readers.written import MESSAGES_AS_TEXT, WAY_OUT, messages_in

Fault = tuple[str, str]
# What only the tokenizer and the chat template of the base model see.
TEMPLATE_BOUNDARY, TEMPLATE_REFUSED = "template_boundary", "template_refused"
TEMPLATE_DROPS_TEXT = "template_drops_text"
NO_EMBEDDING = "no_embedding"
UNSUPPORTED_MODALITY = "unsupported_modality"
# Those of them that another template would not show.
TEMPLATE_FAULTS = (TEMPLATE_BOUNDARY, TEMPLATE_REFUSED, TEMPLATE_DROPS_TEXT)


def pair_fault(pair: Pair) -> Fault | None:
    """(reason, message) of the first rule a pair breaks, or None."""
    if fault := _text_faults((("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected))):
        return fault
    if not pair.chosen or not pair.rejected:
        return "empty_answer", "an answer has no message"
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if problem := _order_fault(pair.prompt, answer):
            return "bad_role_order", f"{name}: {problem}"
    if _same(pair.chosen, pair.rejected):
        return "no_preference", "chosen and rejected are the same text, but for Unicode's forms and space at its end"
    if len(pair.chosen) > 1 or len(pair.rejected) > 1:
        # Only what an assistant says is trained: `turns.one_answer` has cut all pairs that part at an answer.
        return "no_shared_prompt", "an answer holds further turns, and the two do not part at an assistant's answer"
    return None


def answer_fault(answer: JudgedAnswer) -> Fault | None:
    """(reason, message) of the first rule a judged answer breaks, or None."""
    if fault := _text_faults((("prompt", answer.prompt), ("answer", answer.answer))):
        return fault
    if not answer.answer:
        return "empty_answer", "the answer has no message"
    if problem := _order_fault(answer.prompt, answer.answer):
        return "bad_role_order", f"answer: {problem}"
    score = answer.score
    if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= HIGHEST_SCORE:
        return "bad_score", f"the score {score!r} is no number that a judgement has"
    return None


HIGHEST_SCORE = 1e9


def _text_faults(named: Iterable[tuple[str, Sequence[Message]]]) -> Fault | None:
    for name, messages in named:
        if name == "prompt" and not messages:
            return "empty_prompt", "the prompt has no message"
        for message in messages:
            text = message["content"]
            if message["role"] not in ROLES:
                return "unknown_role", f"{name}: role {message['role']!r}; known: {', '.join(ROLES)}"
            if not isinstance(text, str):
                return "wrong_type", f"{name}: a message's content is {type(text).__name__}, expected text"
            if "\x00" in text:
                return "nul_character", f"{name}: NUL character in the text"
            if not text or text.isspace():
                return f"empty_{name}", f"{name}: a message without text"
            if text[0] in "[{a \n\t" and (fault := _written_fault(name, text)):
                return fault
    return None


def _written_fault(name: str, text: str) -> Fault | None:
    try:
        if not isinstance(messages_in(text, name), list):
            return None
    except RowFault as fault:
        return fault.reason, fault.message
    return MESSAGES_AS_TEXT, f"{name}: a message's text is itself a list of messages; {WAY_OUT}"


def _order_fault(prompt: Sequence[Message], answer: Sequence[Message]) -> str | None:
    if prompt[-1]["role"] != "user":
        return f"the prompt ends with a {prompt[-1]['role']} message, expected user"
    if answer[-1]["role"] != "assistant":
        return f"it ends with a {answer[-1]['role']} message, expected assistant"
    if len(prompt) == len(answer) == 1:
        return None
    turns = [m["role"] for m in [*prompt, *answer]]
    if turns[0] == "system":
        turns = turns[1:]
    expected = ["user" if n % 2 == 0 else "assistant" for n in range(len(turns))]
    if turns != expected:
        return f"roles do not alternate: {' '.join(turns)}"
    return None


def _same(one: Sequence[Message], other: Sequence[Message]) -> bool:
    if len(one) != len(other):
        return False
    return all(
        a["role"] == b["role"] and said(a["content"]) == said(b["content"]) for a, b in zip(one, other, strict=True)
    )


def differ_in_space_alone(pair: Pair) -> bool:
    """Whether nothing but white space tells the answers of a sound pair apart. Most differ in their first words."""
    one, other = ([m["content"] for m in answer] for answer in (pair.chosen, pair.rejected))
    if len(one) != len(other) or one[0].split(None, 3)[:3] != other[0].split(None, 3)[:3]:
        return False
    return [text.split() for text in one] == [text.split() for text in other]


# Rows left out by a choice of the recipe or by the model's size. They are quarantined too, but they do not say that
# an export is broken, so the quarantine-rate gate does not count them.
NOT_DAMAGE = frozenset(
    {
        # Nobody compared or judged it, or it is the other half of what was.
        "synthetic", "no_comparison", "tie", "unpaired", "not_compared", "no_feedback", "superseded", "other_side",
        "cancelled", "unsubmitted", "unfinished", "other_question",
        # What its format leaves out by its own rules.
        "not_anonymous", "leaked_identity", "excluded_tag", "error_answer",
        # The recipe's choice, and the model's size.
        "near_duplicate", "over_prompt_cap", "evaluation_overlap", "personal_data", "secret", "prompt_too_long",
        "identical_after_truncation",
    }
)  # fmt: skip
