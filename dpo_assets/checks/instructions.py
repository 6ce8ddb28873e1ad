"""Instructions of which a program can tell whether an answer followed them: a small set of the project's own.

Of the kind that IFEval asks (Zhou et al., arXiv 2311.07911): about the form of an answer, strict, and no judge is
needed. What feedback rewards may cost such obedience, and no held-out pair shows it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dpo_assets.checks.evidence.measured import Comparison
from dpo_assets.checks.evidence.paired import compare
from dpo_assets.checks.reports import EvaluationReport, InstructionsFollowed
from dpo_assets.checks.statistics import Proportion, wilson
from dpo_assets.checks.verdict import Verdict


@dataclass(frozen=True)
class Instruction:
    """What is asked, as one message of a user, and the rule that an answer follows."""

    name: str
    prompt: str
    rule: Callable[[str], bool]

    def followed_by(self, answer: str) -> bool:
        """Whether an answer follows the rule, white space at its ends apart. Neither an empty answer does, nor one that
        repeats the instruction, which may name what it asks for."""
        said = answer.strip()
        return bool(said) and self.prompt not in said and self.rule(said)


def _json(said: str) -> object:
    """What an answer holds as JSON, in a fence of code or without; None where it holds none."""
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", said, re.DOTALL)
    try:
        return json.loads(fenced[1] if fenced else said)
    except (ValueError, RecursionError):
        return None


def _lines(said: str) -> list[str]:
    return [line.strip() for line in said.split("\n") if line.strip()]


def _words(said: str) -> list[str]:
    return re.findall(r"\w+(?:['’-]\w+)*", said.casefold())


def _is_object_with(said: str, *names: str) -> bool:
    found = _json(said)
    return isinstance(found, dict) and set(names) <= found.keys()


def _is_list_of(said: str, count: int) -> bool:
    found = _json(said)
    return isinstance(found, list) and len(found) == count


def _all_begin(said: str, count: int, begins: Callable[[int], str]) -> bool:
    lines = _lines(said)
    return len(lines) == count and all(line.startswith(begins(n)) for n, line in enumerate(lines, start=1))


def _has_letters(said: str) -> bool:
    return any(letter.isalpha() for letter in said)


INSTRUCTIONS: tuple[Instruction, ...] = (
    Instruction(
        "small letters",
        "Tell me about the sea in one or two sentences. Use small letters only, no capitals at all.",
        lambda said: _has_letters(said) and said == said.lower(),
    ),
    Instruction(
        "no comma",
        "Describe a quiet street in two sentences. Do not use any comma.",
        lambda said: "," not in said,
    ),
    Instruction(
        "a JSON object",
        "Invent a person. Answer with one JSON object that has the keys name and age, and with nothing else.",
        lambda said: _is_object_with(said, "name", "age"),
    ),
    Instruction(
        "three points",
        "Name three ways to save water. Answer with exactly three lines, each of which begins with a hyphen.",
        lambda said: _all_begin(said, 3, lambda _: "-"),
    ),
    Instruction(
        "ten words at most",
        "What is a library? Answer in at most ten words.",
        lambda said: len(_words(said)) <= 10,
    ),
    Instruction(
        "last words",
        "Why do people sleep? Answer briefly, and end your answer with exactly these words: That is all.",
        lambda said: said.endswith("That is all."),
    ),
    Instruction(
        "first word",
        "How do I boil an egg? The first word of your answer must be: Certainly",
        lambda said: _words(said)[:1] == ["certainly"],
    ),
    Instruction(
        "digits only",
        "How many days has a week? Answer with digits only, without any word.",
        lambda said: said.rstrip(".").isdecimal(),
    ),
    Instruction(
        "capitals",
        "Wish a neighbour a good morning. Write in capital letters only.",
        lambda said: _has_letters(said) and said == said.upper(),
    ),
    Instruction(
        "a word twice",
        "Write two sentences about bread. Use the word oven at least twice.",
        lambda said: _words(said).count("oven") >= 2,
    ),
    Instruction(
        "a word left out",
        "Describe a winter day in two sentences, without the word snow.",
        lambda said: not any(word.startswith("snow") for word in _words(said)),
    ),
    Instruction(
        "a numbered list",
        "List four kinds of fruit as a numbered list from 1. to 4., one a line, and write nothing else.",
        lambda said: _all_begin(said, 4, lambda n: f"{n}."),
    ),
    Instruction(
        "one word",
        "What is the capital of France? Answer with a single word.",
        lambda said: len(_words(said)) == 1,
    ),
    Instruction(
        "a question",
        "Ask me one question about my holidays, and write nothing but that question.",
        lambda said: said.endswith("?") and not re.search(r"[?.!]", said[:-1]),
    ),
    Instruction(
        "quotation marks",
        "Write a short motto for a school, wrapped in double quotation marks, and nothing else.",
        lambda said: len(said) > 2 and said[0] + said[-1] in ('""', "“”", "«»", "„“"),
    ),
    Instruction(
        "brackets",
        "Invent a title for a story about a fox. Put it in double square brackets, as in [[title]].",
        lambda said: re.search(r"\[\[[^\[\]]+\]\]", said) is not None,
    ),
    Instruction(
        "yes or no",
        "Is Paris in France? Answer with yes or no, and with nothing else.",
        lambda said: _words(said) in (["yes"], ["no"]),
    ),
    Instruction(
        "a postscript",
        "Thank a friend for a gift in one sentence. Then add a postscript that begins with P.S.",
        lambda said: re.search(r"\S\s+P\.\s?S\.", said) is not None,
    ),
    Instruction(
        "placeholders",
        "Write a one-line invitation with at least two placeholders in square brackets, such as [date].",
        lambda said: len(re.findall(r"\[[^\[\]]+\]", said)) >= 2,
    ),
    Instruction(
        "repeated first",
        "First repeat this question word for word, then answer it briefly: Why is grass green?",
        lambda said: said.startswith("Why is grass green?") and len(said) > len("Why is grass green?"),
    ),
    Instruction(
        "semicolons",
        "Name three animals on one line, with semicolons between them, and write nothing else.",
        lambda said: "\n" not in said and [bool(part.strip()) for part in said.rstrip(";.").split(";")] == [True] * 3,
    ),
    Instruction(
        "bold",
        "Which fruit is yellow and bent? Make its name bold with two asterisks on each side, as in **this**.",
        lambda said: re.search(r"\*\*[^*\s][^*]*\*\*", said) is not None,
    ),
    Instruction(
        "two parts",
        "Write two short sentences about trees. Put a line of three asterisks (***) between them.",
        lambda said: [bool(part.strip()) for part in re.split(r"(?m)^\s*\*\*\*\s*$", said)] == [True, True],
    ),
    Instruction(
        "a JSON list",
        "Name three colours as a JSON list of strings, and write nothing else.",
        lambda said: _is_list_of(said, 3),
    ),
)


def digest(count: int) -> str:
    """Of the first `count` instructions, as they are asked; a rule that changes must change its name too."""
    asked = [[one.name, one.prompt] for one in INSTRUCTIONS[:count]]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def summarised(
    names: Sequence[str],
    sft: Sequence[bool],
    policy: Sequence[bool],
    champion: Sequence[bool] | None,
    confidence: float,
) -> InstructionsFollowed:
    """Shares of instructions that were followed, one bool each; every instruction counts for itself."""

    def share(met: Sequence[bool]) -> Proportion:
        return wilson(sum(met), len(met), confidence)

    def less(theirs: Sequence[bool]) -> Comparison:
        return compare([float(met) for met in policy], [float(met) for met in theirs], confidence=confidence)

    return InstructionsFollowed(
        sft=share(sft),
        policy=share(policy),
        champion=None if champion is None else share(champion),
        against_sft=less(sft),
        against_champion=None if champion is None else less(champion),
        by_instruction=tuple(
            (name, sft[n], policy[n], None if champion is None else champion[n]) for n, name in enumerate(names)
        ),
    )


def instructions_followed(report: EvaluationReport) -> Verdict:
    """Whether the policy follows fewer instructions than SFT, beyond chance. There are few: it sees a large loss."""
    name, band = "instructions_followed", "not fewer than SFT, beyond chance"
    source = "verifiable instructions: IFEval, arXiv 2311.07911; exact paired test"
    part = report.instructions
    if not isinstance(part, InstructionsFollowed):
        why = "these scores are of an earlier version" if part is None else part.not_measured
        return Verdict(name, "pass", f"not measured: {why}", band, source)
    lost = part.against_sft.high < 0
    return Verdict(
        name,
        "warn" if lost else "pass",
        f"{part.policy.value:.0%} of {part.policy.n}, SFT {part.sft.value:.0%}",
        band,
        source,
        "read the answers beside this check; lower dpo.learning_rate, or add pairs that ask for a form" if lost else "",
        f"paired difference {part.against_sft.difference:+.3f} [{part.against_sft.low:+.3f}, "
        f"{part.against_sft.high:+.3f}]",
    )
