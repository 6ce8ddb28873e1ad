"""Instructions that a program checks: each has an answer that follows it and one that does not."""

from __future__ import annotations

import pytest

from dpo_assets.checks.instructions import INSTRUCTIONS, Instruction, digest, instructions_followed, summarised
from dpo_assets.report.scores import instructions_table
from dpo_assets_tests.samples import evaluation_report

FOLLOWED = {
    "small letters": "the sea is wide.",
    "no comma": "It is quiet. A cat sleeps.",
    "a JSON object": '```json\n{"name": "Ada", "age": 36}\n```',
    "three points": "- Short showers\n- Full machines\n\n- No drips",
    "ten words at most": "A place that lends books to everybody.",
    "last words": "The body rests. That is all.",
    "first word": "Certainly! Put it into boiling water.",
    "digits only": "7",
    "capitals": "GOOD MORNING, ANNE!",
    "a word twice": "Bread comes from the oven. The oven is hot.",
    "a word left out": "It is white and cold. Nobody is out.",
    "a numbered list": "1. Apple\n2. Pear\n3. Plum\n4. Fig",
    "one word": "Paris.",
    "a question": "Where did you go last summer?",
    "quotation marks": '"Read and grow"',
    "brackets": "[[The red guest]]",
    "yes or no": "Yes.",
    "a postscript": "Thank you for the book.\n\nP.S. I have read it.",
    "placeholders": "Come on [date] to [place].",
    "repeated first": "Why is grass green? Because of chlorophyll.",
    "semicolons": "cat; dog; owl",
    "bold": "A **banana**.",
    "two parts": "Trees grow.\n***\nTrees fall.",
    "a JSON list": '["red", "green", "blue"]',
}
BROKEN = {
    "small letters": "The sea is wide.",
    "no comma": "It is quiet, and a cat sleeps.",
    "a JSON object": 'Here it is: {"name": "Ada", "age": 36}',
    "three points": "- Short showers\n- Full machines",
    "ten words at most": "A library is a place in which books are kept and lent to everybody.",
    "last words": "That is all. The body rests.",
    "first word": "Of course. Certainly.",
    "digits only": "seven",
    "capitals": "Good morning, ANNE!",
    "a word twice": "Bread comes from the oven.",
    "a word left out": "Snowflakes fall.",
    "a numbered list": "1. Apple\n3. Pear\n2. Plum\n4. Fig",
    "one word": "It is Paris.",
    "a question": "Fine. Where did you go?",
    "quotation marks": 'Our motto is "Read and grow"',
    "brackets": "[The red guest]",
    "yes or no": "Yes, it is.",
    "a postscript": "P.S. Thank you for the book.",
    "placeholders": "Come on [date] at noon.",
    "repeated first": "Because of chlorophyll.",
    "semicolons": "cat, dog, owl",
    "bold": "A ** banana.",
    "two parts": "Trees grow. *** Trees fall.",
    "a JSON list": '["red", "green"]',
}


@pytest.mark.parametrize("one", INSTRUCTIONS, ids=lambda one: one.name)
def test_an_answer_that_follows_is_told_from_one_that_does_not(one: Instruction) -> None:
    assert one.followed_by(f"\n {FOLLOWED[one.name]} \n")
    assert not one.followed_by(BROKEN[one.name])
    assert not one.followed_by(" \n")
    assert not one.followed_by(one.prompt), "who only repeats what was asked follows nothing"


def test_the_set_is_known_by_what_is_asked() -> None:
    assert len({one.name for one in INSTRUCTIONS}) == len(INSTRUCTIONS) == 24
    assert digest(23) != digest(24) != digest(0)


def test_a_policy_that_lost_instructions_beyond_chance_is_warned_about_and_one_within_chance_is_not() -> None:
    names = [one.name for one in INSTRUCTIONS]
    sft = [True] * 20 + [False] * 4
    lost, alike = [n < 12 for n in range(24)], [n != 3 for n in range(24)]
    for policy, level in ((lost, "warn"), (alike, "pass")):
        report = evaluation_report(instructions=summarised(names, sft, policy, sft, 0.95))
        assert instructions_followed(report).level == level
    shown = instructions_table(evaluation_report(instructions=summarised(names, sft, lost, sft, 0.95))).splitlines()
    assert shown[2].startswith("| SFT | 0.833 |")
    assert shown[3].startswith("| policy | 0.500 |")
    assert shown[5].startswith("| policy less SFT, paired | -0.333 |")
    assert shown[6].startswith("| policy less champion, paired | -0.333 |")
    assert "| capitals | yes | yes | yes |" in shown
    assert "| one word | yes | no | yes |" in shown
    unasked = evaluation_report(instructions={"not_measured": "none were asked"})
    assert instructions_followed(unasked).value == "not measured: none were asked"
    assert instructions_table(unasked) == "not measured: none were asked"
    assert instructions_followed(evaluation_report()).level == "pass"
