"""A model card as it is read: metadata between two lines of three dashes at its head, and the text behind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

FENCE = "---"


def split_card(text: str) -> tuple[str | None, str]:
    """(front matter as YAML, what stands behind it); None and the whole text where there is none."""
    first, *lines = text.splitlines(keepends=True) or [""]
    closing = next((n for n, line in enumerate(lines) if line.rstrip() == FENCE), None)
    if first.rstrip() != FENCE or closing is None:
        return None, text
    return "".join(lines[:closing]), "".join(lines[closing + 1 :])


def front_matter(text: str) -> Mapping[str, Any]:
    """The metadata of a card; empty where there is none, or none that can be read."""
    front, _ = split_card(text)
    try:
        values = yaml.safe_load(front or "")
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def is_front_matter_alone(text: str) -> bool:
    """Whether a card says nothing but metadata, as the one that the Hub puts into a new repository."""
    front, body = split_card(text)
    return front is not None and not body.strip()
