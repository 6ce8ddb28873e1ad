"""A card's metadata and its text, wherever either is missing."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dpo_assets.planning.model_card import front_matter, is_front_matter_alone, split_card


@pytest.mark.parametrize(
    ("text", "front", "body", "alone"),
    [
        ("", None, "", False),
        ("# Model\n", None, "# Model\n", False),
        ("# Model\n---\nlicense: mit\n---\n", None, "# Model\n---\nlicense: mit\n---\n", False),
        ("---\nlicense: mit\n", None, "---\nlicense: mit\n", False),
        ("---\nlicense: mit\n---\n", "license: mit\n", "", True),
        ("---\r\nlicense: mit\r\n---\r\n\r\n", "license: mit\r\n", "\r\n", True),
        ("---\n---\n", "", "", True),
        ("---\nbase_model: org/a---b\n---\na --- b\n---\n", "base_model: org/a---b\n", "a --- b\n---\n", False),
    ],
)
def test_metadata_stands_between_two_lines_and_the_text_behind(
    text: str, front: str | None, body: str, alone: bool
) -> None:
    assert split_card(text) == (front, body)
    assert is_front_matter_alone(text) is alone


@given(st.text())
def test_no_card_breaks_the_reading_of_it(text: str) -> None:
    assert isinstance(front_matter(f"---\n{text}"), dict)


@given(st.dictionaries(st.sampled_from(["license", "license_name", "tags"]), st.text(max_size=9), max_size=3))
def test_front_matter_reads_back_as_it_was_written(front: dict[str, str]) -> None:
    assert front_matter(f"---\n{yaml.safe_dump(front)}---\nbody\n---\n") == front
