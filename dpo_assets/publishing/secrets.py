"""Keeps credentials out of logs, cards and releases."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

from dpo_assets.secret_shapes import MASK, PATTERNS, masked, passwords_in, says_secret

SECRET_VARIABLES = frozenset({"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN", "WANDB_API_KEY"})
SHORTEST = 8  # Characters; a shorter value would mask ordinary words.
# Variables that recipes and resources of this process name as secret; names are only ever added.
_NAMED: set[str] = set()


def name_secrets(*variables: str) -> None:
    """Tells `scrub` of environment variables whose names do not say that they hold a secret."""
    _NAMED.update(variables)


def is_secret(variable: str) -> bool:
    """Whether an environment variable holds a secret: by its name, or because a recipe or a resource says so."""
    return variable in SECRET_VARIABLES or variable in _NAMED or says_secret(variable)


def scrub(text: str) -> str:
    """The text with every known secret and everything shaped like one masked.

    Known are the values of secret variables (`is_secret`) and the passwords of URLs in any variable, as they are and as
    URLs and JSON write them.
    """
    for secret in sorted({form for value in _known().values() for form in _forms(value)}, key=len, reverse=True):
        text = text.replace(secret, MASK)
    return masked(text)


def scrub_all(value: Any) -> Any:
    """A JSON value with every text in it scrubbed, keys of mappings included."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, Mapping):
        return {scrub(name) if isinstance(name, str) else name: scrub_all(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [scrub_all(item) for item in value]
    return value


def find_secrets(text: str) -> list[str]:
    """Kinds of secrets that a text seems to hold."""
    return [
        *(kind for kind, pattern in PATTERNS.items() if pattern.search(text)),
        *(f"value of {name}" for name, value in _known().items() if value in text and not _is_word(value)),
    ]


def _is_word(value: str) -> bool:
    """Whether a value may well be an entry of a vocabulary: a development password such as `postgres` is."""
    return value.isalpha() and len(value) < 2 * SHORTEST


def _known() -> dict[str, str]:
    """The secrets of this environment, by what they are the value of."""
    found = {}
    for name, value in sorted(os.environ.items()):
        if is_secret(name):
            found[name] = value
        for password in sorted(passwords_in(value)):
            found[f"{name} (password)"] = password
    return {name: value for name, value in found.items() if len(value) >= SHORTEST}


def _forms(value: str) -> set[str]:
    """Ways in which a value is written down."""
    return {value, quote(value, safe=""), unquote(value), json.dumps(value)[1:-1]}
