"""Overlap with evaluation sets: prompts that a model will be judged by must not be trained on.

A prompt overlaps with a pair when they say the same (token by token, without regard to case and punctuation), or when
half of its runs of 8 tokens stand in one of the pair's user messages (8-grams and one half: Tulu 3, arXiv 2411.15124,
section 3.2).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_assets.errors import ConfigError
from dpo_assets.feedback.near import run_hashes, tokens_of

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from numpy.typing import NDArray

RUN, SHARE = 8, 0.5
_FIELDS = ("prompt", "question", "instruction", "query", "input", "text", "messages")
Run = tuple[str, ...]


def read_prompts(paths: Iterable[Path]) -> list[str]:
    """The prompts of evaluation sets: JSONL rows (the first of these keys: prompt, question, instruction, query, input,
    text, messages), JSON strings, or plain lines.

    Raises:
        ConfigError: when a file cannot be read, or gives no prompt.
    """
    found: list[str] = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"evaluation set {path} cannot be read: {error}") from None
        prompts = [prompt for line in lines if line.strip() for prompt in _prompts_of(line)]
        if not prompts:
            raise ConfigError(
                f"evaluation set {path} gives no prompt; a line is text, or JSON with one of: {', '.join(_FIELDS)}."
            )
        found += prompts
    return found


def _prompts_of(line: str) -> list[str]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return [line]
    if isinstance(value, dict):
        value = next((value[name] for name in _FIELDS if value.get(name)), None)
    if isinstance(value, list):
        return [m["content"] for m in value if _is_user_message(m)]
    return [value] if isinstance(value, str) else []


def _is_user_message(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "user" and isinstance(message.get("content"), str)


class EvaluationSets:
    """What is asked in evaluation sets, to hold conversations against."""

    def __init__(self, prompts: Sequence[str]) -> None:
        import numpy as np

        tokens = [tokens_of(prompt) for prompt in prompts]
        self.whole = {tuple(t) for t in tokens if t}
        self.runs: dict[Run, list[int]] = {}
        self.sizes: list[int] = []
        for t in {tuple(t) for t in tokens if len(t) >= RUN}:
            runs = {t[n : n + RUN] for n in range(len(t) - RUN + 1)}
            for run in runs:
                self.runs.setdefault(run, []).append(len(self.sizes))
            self.sizes.append(len(runs))
        # What a message must hold at least one of: full runs, and short prompts whole.
        texts = [" ".join(run) for run in [*self.runs, *(t for t in self.whole if len(t) < RUN)]]
        hashes, firsts, counts = run_hashes(texts, RUN)
        self._hashes: NDArray[np.uint64] = np.unique(hashes[firsts[counts > 0]])

    def overlapping(self, prompts: pl.Series) -> list[int]:
        """Rows of a column of prompts that overlap with an evaluation prompt."""
        import numpy as np
        import polars as pl

        users = pl.DataFrame({"prompt": prompts}).with_row_index("n").explode("prompt").unnest("prompt")
        users = users.filter(pl.col("role") == "user")
        hashes, _, counts = run_hashes(users["content"], RUN)
        hit = np.isin(hashes, self._hashes)
        messages = np.unique(np.repeat(np.arange(counts.size), counts)[hit])
        some = users[messages.tolist()]
        return sorted({n for n, text in some.select("n", "content").iter_rows() if self.holds(text)})

    def holds(self, text: str) -> bool:
        """Whether one user message overlaps."""
        tokens = tuple(tokens_of(text))
        if tokens in self.whole:
            return True
        shared: dict[int, int] = {}
        for run in {tokens[n : n + RUN] for n in range(len(tokens) - RUN + 1)}:
            for prompt in self.runs.get(run, ()):
                shared[prompt] = shared.get(prompt, 0) + 1
        return any(count >= SHARE * self.sizes[prompt] for prompt, count in shared.items())
