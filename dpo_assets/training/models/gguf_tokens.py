"""SentencePiece vocabularies in GGUF files: as llama.cpp reads a text by them, and scores where they have none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_assets.training.models.chat_format import TOKENIZER

SPACE = "\u2581"
SPECIAL = frozenset({2, 3, 4})  # Types of tokens that stand for themselves in a text: unknown, control, user-defined.
SCORES = "tokenizer.ggml.scores"


@dataclass(frozen=True)
class SentencePieces:
    """llama.cpp's reading of a text by a vocabulary of the kind `llama` (src/llama-vocab.cpp, b10605).

    The two neighbours whose union is the token with the highest score are joined first, the left ones of equals; what
    is no token in the end is written as its bytes. It knows no merges: by their scores tokens are read in the order of
    training, and without scores from left to right.
    """

    ids: Mapping[str, int]
    scores: Mapping[str, float]
    special: tuple[str, ...]
    adds_space: bool

    @classmethod
    def of(cls, tokens: list[str], scores: list[float], types: list[int], adds_space: bool) -> SentencePieces:
        special = [token for token, type_ in zip(tokens, types, strict=True) if type_ in SPECIAL]
        return cls(
            {token: number for number, token in enumerate(tokens)},
            dict(zip(tokens, scores, strict=True)),
            tuple(sorted(special, key=len, reverse=True)),
            adds_space,
        )

    def read(self, text: str) -> list[int]:
        """Token ids, without a BOS token before them. A special token's text is that token."""
        parts = re.split(f"({'|'.join(map(re.escape, self.special))})", text) if self.special else [text]
        found: list[int] = []
        for part in parts:
            if part in self.special:
                found.append(self.ids[part])
            elif part:  # Each of them begins behind a special token, or the text.
                found += self._pieces((" " if self.adds_space else "") + part)
        return found

    def _pieces(self, text: str) -> Iterable[int]:
        pieces = list(text.replace(" ", SPACE))
        while True:
            joined = [
                (self.scores[union], -place)
                for place in range(len(pieces) - 1)
                if (union := pieces[place] + pieces[place + 1]) in self.ids
            ]
            if not joined:
                break
            place = -max(joined)[1]
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
        for piece in pieces:
            if piece in self.ids:
                yield self.ids[piece]
            else:
                yield from (self.ids[f"<0x{byte:02X}>"] for byte in piece.encode())


def write_scores(file: Path, folder: Path) -> bool:
    """Scores for a vocabulary that llama.cpp's converter wrote from a tokenizer.json, in the file itself.

    It gives every token the same score then (gguf-py, `LlamaHfVocab.get_token_score`: a placeholder), and llama.cpp
    reads most texts as other tokens by them. A BPE joins in the order of its merges, so the score of a token is minus
    the rank of the merge that makes it, as SentencePiece has it for its own BPE models.

    Returns:
        whether that was so.
    """
    from gguf import GGUFReader

    ranks = _ranks(folder)
    reader: Any = GGUFReader(file, "r+")
    model, scores, tokens = (reader.fields.get(f"tokenizer.ggml.{name}") for name in ("model", "scores", "tokens"))
    if not ranks or scores is None or model.contents() != "llama" or len(set(scores.contents())) > 1:
        return False
    for token, index in zip(tokens.contents(), scores.data, strict=True):
        # Behind all that merges make: tokens that no merge makes are never joined.
        scores.parts[index][0] = -float(ranks.get(token, len(ranks)))
    reader.data.flush()
    return True


def _ranks(folder: Path) -> dict[str, int]:
    """The rank of the first merge that makes a token, of tokenizer.json; empty where that holds no BPE."""
    path = folder / TOKENIZER
    if not path.is_file():
        return {}
    merges = json.loads(path.read_text(encoding="utf-8"))["model"].get("merges") or []
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        ranks.setdefault(left + right, rank)
    return ranks
