"""Pairs of token ids with the lengths of UltraFeedback. Pure Python and seeded: every process makes the same ones."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist

Row = dict[str, list[int]]
PAIRS_PER_STEP = 16
WARM_STEPS, TIMED_STEPS = 2, 3  # Different steps; longer runs go through them again, so all arms time the same pairs.
EOS = 1
CORPUS_FILE = "corpus_ids.json"
# Medians and spreads of log-normals fitted to what is published of UltraFeedback-binarized (arXiv 2410.20305 and its
# repository): prompt + response about 409 tokens, prompt / response 0.42, 95th percentile of a pair about 1,860.
LENGTHS = {"prompt": (120, 1.0, 12, 512), "chosen": (285, 0.75, 8, 2_048), "rejected": (265, 0.80, 8, 2_048)}


def read_corpus(folder: Path) -> list[int]:
    """Token ids of the text that lies beside a model."""
    ids: list[int] = json.loads((folder / CORPUS_FILE).read_text(encoding="utf-8"))
    return ids


def like_ultrafeedback(corpus: Sequence[int], count: int, seed: int, scale: float = 1.0) -> list[Row]:
    """Pairs whose lengths follow LENGTHS times `scale`.

    Lengths are a Latin hypercube sample: each of `count` equal parts of a distribution gives one pair, so that even 48
    pairs have the means of the whole.
    """
    rng = random.Random(seed)
    lengths = {part: [max(1, int(scale * x)) for x in _hypercube(count, rng, *fit)] for part, fit in LENGTHS.items()}
    return [
        _pair(corpus, rng, lengths["prompt"][n], lengths["chosen"][n], lengths["rejected"][n]) for n in range(count)
    ]


def near_max_length(corpus: Sequence[int], count: int, seed: int, ratio: float, max_length: int) -> list[Row]:
    """Pairs whose rows have 0.95 to 1 times `max_length` tokens, with `ratio` prompt tokens per completion token."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        longest = max_length * rng.uniform(0.95, 1.0)
        prompt = max(1, round(longest * ratio / (1 + ratio)))
        answers = [max(1, round(longest * rng.uniform(0.95, 1.0)) - prompt) for _ in range(2)]
        rows.append(_pair(corpus, rng, prompt, *answers))
    return rows


def block(make: Callable[[int, int], list[Row]], warmup: int, steps: int) -> list[Row]:
    """Rows of `warmup` + `steps` optimizer steps; `make(count, seed)` makes pairs."""
    warm = make(WARM_STEPS * PAIRS_PER_STEP, 1)
    timed = make(TIMED_STEPS * PAIRS_PER_STEP, 2)
    return _cycle(warm, warmup) + _cycle(timed, steps)


def _cycle(rows: list[Row], steps: int) -> list[Row]:
    return [rows[n % len(rows)] for n in range(steps * PAIRS_PER_STEP)]


def _hypercube(count: int, rng: random.Random, median: float, sigma: float, low: float, high: float) -> list[float]:
    """One value of a clipped log-normal from each of `count` equally likely parts of it, shuffled."""
    parts = list(range(count))
    rng.shuffle(parts)
    normals = [NormalDist().inv_cdf(min(max((n + rng.random()) / count, 1e-9), 1 - 1e-9)) for n in parts]
    return [min(max(median * math.exp(sigma * normal), low), high) for normal in normals]


def _pair(corpus: Sequence[int], rng: random.Random, prompt: int, chosen: int, rejected: int) -> Row:
    """Text spans; the rejected one runs backwards, so that there is something to prefer."""

    def span(length: int) -> list[int]:
        start = rng.randrange(len(corpus) - length)
        return list(corpus[start : start + length])

    return {
        "prompt_ids": span(prompt),
        "chosen_ids": [*span(chosen)[1:], EOS],
        "rejected_ids": [*span(rejected)[:0:-1], EOS],
    }
