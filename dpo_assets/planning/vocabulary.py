"""Whether every token of a tokenizer has an embedding, read from the tokenizer's files without its library."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_assets.errors import ConfigError
from dpo_assets.planning.weights import listed

NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def refuse_tokens_without_embedding(folder: Path, tokenizer: Mapping[str, Any], templates: str, rows: int) -> None:
    """Refuses a tokenizer that can make an id for which the embedding has no row.

    Special tokens that neither the chat template nor the tokenizer's config uses are let be: text-only checkpoints of
    multimodal families keep a mark for images beyond their embedding (Gemma 3 1B: token 262144 of 262144 rows). A pair
    in whose text one stands goes to quarantine when it is tokenized.

    Args:
        tokenizer: the values of tokenizer_config.json.
        templates: the chat templates as text.
        rows: rows of the embedding.

    Raises:
        ConfigError: naming such tokens and both numbers.
    """
    named = {content(tokenizer.get(name)) for name in NAMED_TOKENS}
    used = [
        (number, text)
        for number, text, special in _tokens(folder / "tokenizer.json", tokenizer)
        if number >= rows and (not special or text in named or text in templates)
    ]
    if used:
        highest = max(number for number, _ in used)
        shown = listed([f"`{text}` ({number})" for number, text in sorted(set(used))])
        raise ConfigError(
            f"the tokenizer in {folder} numbers its tokens up to {highest}, but the embedding has {rows} rows: "
            f"there is none for {shown}. Take the tokenizer that belongs to these weights, or "
            "enlarge the embedding with resize_token_embeddings and save model and tokenizer together."
        )


def content(token: Any) -> str | None:
    """The text of a token as tokenizer_config.json writes it: plain, or with its properties."""
    value = token.get("content") if isinstance(token, Mapping) else token
    return value if isinstance(value, str) else None


def _tokens(path: Path, tokenizer: Mapping[str, Any]) -> Iterator[tuple[int, str, bool]]:
    """(id, text, special) of every token that the files name; a token may come twice."""
    added = tokenizer.get("added_tokens_decoder")
    if isinstance(added, Mapping):
        yield from _added({"id": int(n), **row} for n, row in added.items() if str(n).isdigit() and _is_row(row))
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    rows = [row for row in whole.get("added_tokens") or [] if _is_row(row) and isinstance(row.get("id"), int)]
    yield from _added(rows)
    special = {row["id"] for row in rows if row.get("special")}
    vocabulary = (whole.get("model") or {}).get("vocab")
    # BPE and WordPiece write text to id, Unigram a list of (text, score).
    if isinstance(vocabulary, Mapping):
        yield from ((n, str(text), n in special) for text, n in vocabulary.items() if isinstance(n, int))
    elif isinstance(vocabulary, list):
        yield from ((n, str(entry[0]), n in special) for n, entry in enumerate(vocabulary) if entry)


def _added(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, str, bool]]:
    return ((row["id"], str(row.get("content")), bool(row.get("special"))) for row in rows)


def _is_row(value: Any) -> bool:
    return isinstance(value, Mapping)
