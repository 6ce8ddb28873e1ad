"""What ends an answer, and what no answer may hold: read from a model folder's JSON files, without a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Turn marks of the common chat templates. As text in an answer they are left over from another model's template.
TEMPLATE_MARKS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|begin_of_text|>", "<|end_of_text|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>",
    "<|system|>", "<|end|>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<|prompter|>", "<|end_of_turn|>",
)  # fmt: skip
SHORTEST_MARK = 3


@dataclass(frozen=True)
class Markers:
    """`ends`: ids of tokens that end an answer, none where the folder does not say. `texts`: marks, sorted."""

    ends: frozenset[int]
    texts: tuple[str, ...]


def read_markers(model: Path) -> Markers:
    """The markers of a local model folder: its special tokens, and the marks of other templates.

    A token ends an answer if the tokenizer, the generation config or the model's config names it as EOS; some models
    end a turn with another token than the tokenizer's.
    """
    tokenizer = _json(model / "tokenizer_config.json")
    ends = {i for name in ("generation_config.json", "config.json") for i in _ids(_json(model / name))}
    special = dict(_special(tokenizer.get("added_tokens_decoder") or {}))
    eos = _content(tokenizer.get("eos_token"))
    if not special or (eos is not None and eos not in special):
        whole = _json(model / "tokenizer.json")
        rows = {str(row["id"]): row for row in whole.get("added_tokens") or [] if "id" in row}
        special |= dict(_special(rows))
        vocabulary = (whole.get("model") or {}).get("vocab")
        if eos is not None and eos not in special and isinstance(vocabulary, dict) and eos in vocabulary:
            special[eos] = vocabulary[eos]
    if eos in special:
        ends.add(special[eos])
    own = {text for text in special if len(text) >= SHORTEST_MARK and not text.isalnum()}
    return Markers(frozenset(ends), tuple(sorted(own | set(TEMPLATE_MARKS))))


def _special(rows: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for number, row in rows.items():
        if isinstance(row, Mapping) and row.get("special") and str(number).isdigit() and row.get("content"):
            yield str(row["content"]), int(number)


def _content(token: Any) -> str | None:
    value = token.get("content") if isinstance(token, Mapping) else token
    return value if isinstance(value, str) else None


def _ids(config: Mapping[str, Any]) -> list[int]:
    text = config.get("text_config")  # Of a model of more than text.
    stated = [part.get("eos_token_id") for part in (config, text) if isinstance(part, Mapping)]
    values = [v for value in stated for v in (value if isinstance(value, list) else [value])]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # `base_model` has judged the folder already; what is not there cannot name a token.
        return {}
    return value if isinstance(value, dict) else {}
