"""Keeps credentials out of logs, cards and releases."""

from __future__ import annotations

import os

from dpo_assets.secret_shapes import PATTERNS

SECRET_VARIABLES = frozenset({"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN", "WANDB_API_KEY"})
MASK = "[secret]"


def scrub(text: str) -> str:
    """The text with every known secret and everything shaped like one masked."""
    for value in _known().values():
        text = text.replace(value, MASK)
    for pattern in PATTERNS.values():
        text = pattern.sub(MASK, text)
    return text


def find_secrets(text: str) -> list[str]:
    """Kinds of secrets that a text seems to hold."""
    return [
        *(kind for kind, pattern in PATTERNS.items() if pattern.search(text)),
        *(f"value of {name}" for name, value in _known().items() if value in text),
    ]


def _known() -> dict[str, str]:
    """The secrets of this environment; a value of a few characters would mask ordinary words."""
    values = {name: os.environ.get(name, "") for name in sorted(SECRET_VARIABLES)}
    return {name: value for name, value in values.items() if len(value) >= 8}
