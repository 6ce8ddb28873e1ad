"""Faults and surface of answers, read from their text: loops, template marks, missing ends, features of form."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from dpo_assets.feedback.quality_numbers import EXAMPLES, SNIPPET, paired_auc, place, rounded, sparse
from dpo_assets.feedback.quality_tokens import Markers

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from numpy.typing import NDArray

LOOP_BINS = 100
REPEATS, LOOP_WORDS, N_GRAM = 3, 12, 4
FOLDS, RIDGE, NEWTON_STEPS = 5, 1e-3, 25
# A word, one ideograph or kana (which no space separates), or one sign. Long words count as several, so that a single
# letter without end is a loop too.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_]{1,20}|[^\w\s]|_")


def answer_texts(pairs: pl.DataFrame) -> pl.DataFrame:
    """pair_id, group_id, source, line, `chosen_text` and `rejected_text`: the assistant's messages, a line each."""
    import polars as pl

    spoken = pl.element().filter(pl.element().struct.field("role") == "assistant").struct.field("content")
    return pairs.select(
        "pair_id", "group_id", "source", "line",
        *(pl.col(side).list.eval(spoken).list.join("\n").alias(f"{side}_text") for side in ("chosen", "rejected")),
    )  # fmt: skip


def loop_share(text: str) -> float:
    """Share of a text's words that stand in its longest loop: a unit said REPEATS times or more without a break.

    A loop has LOOP_WORDS words or more, and its unit has a letter or digit: rules of a table and lines of dashes are
    none. Lists, code and tables repeat 4-grams, but seldom the same lines without a break.
    """
    import numpy as np

    words = _WORD.findall(text.casefold())
    n = len(words)
    last: dict[tuple[str, ...], int] = {}
    gaps: Counter[int] = Counter()
    for at, gram in enumerate(zip(*(words[start:] for start in range(N_GRAM)), strict=False)):
        if gram in last:
            gaps[at - last[gram]] += 1
        last[gram] = at
    # In a loop, the 4-grams that its unit holds once come back after one unit, and again after the next.
    units = [gap for gap, count in gaps.items() if count >= REPEATS - 1 and gap <= n // REPEATS]
    if n < LOOP_WORDS or not units:
        return 0.0
    numbers: dict[str, int] = {}
    codes = np.array([numbers.setdefault(word, len(numbers)) for word in words])
    best = 0
    for unit in units:
        same = np.concatenate(([False], codes[unit:] == codes[:-unit], [False]))
        edges = np.flatnonzero(same[1:] != same[:-1])
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            size = int(end - start) + unit
            spoken = any(word[0].isalnum() for word in words[start : start + unit])
            if spoken and size >= max(REPEATS * unit, LOOP_WORDS, best):
                best = size
    return best / n


def degenerate(pairs: pl.DataFrame, texts: pl.DataFrame, markers: Markers) -> dict[str, Any]:
    """Faults of chosen answers, pair by pair, and counts of each.

    `blank`: no letter, digit or symbol; `no_end`: not cut, and no end token among the last two (as `eos_kept` counts);
    `template`: a mark of a chat template as text; `misread`: U+FFFD or C1 controls; `loops[i]`: answers whose
    `loop_share` is in [i/100, (i+1)/100).
    `others` counts answers with any fault but a loop, `other_loops` the loops of all the other answers.
    """
    import polars as pl

    whole = pl.col("chosen_ids").list.len() == pl.col("chosen_cut").list.len()
    tail = pl.col("chosen_ids").list.tail(2)
    ends = pl.any_horizontal(tail.list.contains(i) for i in sorted(markers.ends)) if markers.ends else pl.lit(True)
    faults = pairs.select(no_end=whole & ~ends).hstack(
        texts.select(
            blank=~pl.col("chosen_text").str.contains(r"[\p{L}\p{N}\p{S}]"),
            template=pl.col("chosen_text").str.contains_any(list(markers.texts)),
            misread=pl.col("chosen_text").str.contains("[\\x{fffd}\\x{80}-\\x{9f}]"),
        )
    )
    loops: Counter[int] = Counter()
    other_loops: Counter[int] = Counter()
    shares = [loop_share(text) for text in texts["chosen_text"]]
    other = faults.select(pl.any_horizontal(pl.all())).to_series().to_list()
    for share, found in zip(shares, other, strict=True):
        n = min(LOOP_BINS - 1, int(LOOP_BINS * share + 1e-9))
        loops[n] += 1
        other_loops[n] += not found
    kinds = {name: faults[name].to_list() for name in ("blank", "no_end", "template", "misread")}
    order = {name: [n for n, found in enumerate(flags) if found][:EXAMPLES] for name, flags in kinds.items()}
    worst = [(name.replace("_", " "), n, 0.0) for name, rows in order.items() for n in rows]
    looped = sorted((-share, n) for n, share in enumerate(shares) if share)[:EXAMPLES]
    worst += [("loop", n, -share) for share, n in looped]
    return {
        **{name: sum(flags) for name, flags in kinds.items()},
        "others": sum(other),
        "loops": sparse(loops),
        "other_loops": sparse(other_loops),
        "ends_known": bool(markers.ends),
        "examples": [
            {"fault": fault, "loop": rounded(share), "row": place(row), "chosen": row["chosen_text"][-SNIPPET:]}
            for fault, n, share in worst
            for row in [texts.row(n, named=True)]
        ],
    }


def _features(side: str) -> dict[str, pl.Expr]:
    """Features of an answer's form. None of them reads what it says."""
    import polars as pl

    text = pl.col(f"{side}_text")
    letters = text.str.len_chars().cast(pl.Float64)
    some = letters.clip(lower_bound=1)
    first = text.str.strip_chars_start().str.head(1)
    return {
        "letters": letters,
        "log letters": letters.log1p(),
        "punctuation": text.str.count_matches(r"\p{P}") / some,
        "digits": text.str.count_matches(r"\p{N}") / some,
        "capitals": text.str.count_matches(r"\p{Lu}") / some,
        "line breaks": text.str.count_matches("\n").cast(pl.Float64).log1p(),
        "list markers": text.str.count_matches(r"(?m)^\s*(?:[-*•]|\d+[.)])\s").cast(pl.Float64).log1p(),
        "code fences": text.str.count_matches("```").cast(pl.Float64).log1p(),
        "starts with a capital": first.str.contains(r"\p{Lu}").cast(pl.Float64),
        "starts with a small letter": first.str.contains(r"\p{Ll}").cast(pl.Float64),
        "starts with a digit": first.str.contains(r"\p{N}").cast(pl.Float64),
        "ends with punctuation": text.str.contains(r"\p{P}\s*$").cast(pl.Float64),
    }


def surface(pairs: pl.DataFrame, texts: pl.DataFrame) -> dict[str, Any]:
    """How well form alone tells chosen from rejected: AUC of a logistic regression on differences of features.

    The regression has no intercept (a pair has no first side) and a ridge of RIDGE; it is fitted on four fifths of the
    prompt groups and scored on the fifth, five times, and `auc` is `paired_auc` of all scores. `features` has the AUC
    of each feature alone. `auc` is None where the pairs do not fill two folds.
    """
    import numpy as np
    import polars as pl

    chosen, rejected = _features("chosen"), _features("rejected")
    if not texts.height:
        return {"auc": None, "features": {}}
    table = texts.select([(chosen[name] - rejected[name]).cast(pl.Float64).alias(name) for name in chosen])
    x = table.to_numpy()
    scale = np.sqrt((x**2).mean(axis=0))
    x = x / np.where(scale > 0, scale, 1.0)
    folds = np.array([int(group[:8], 16) % FOLDS for group in texts["group_id"]])
    scores = np.zeros(texts.height)
    for fold in range(FOLDS):
        inside = folds != fold
        scores[~inside] = x[~inside] @ _fit(x[inside])
    alone = {name: paired_auc(x[:, n]) for n, name in enumerate(table.columns)}
    auc = paired_auc(np.round(scores, 9)) if len(set(folds.tolist())) > 1 else None
    return {
        "auc": rounded(auc),
        "features": {name: rounded(value) for name, value in alone.items()},
    }


def _fit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights w that maximise the mean of log s(w x) less RIDGE |w|^2 / 2, by Newton's method."""
    import numpy as np

    n, features = x.shape
    weights = np.zeros(features)
    for _ in range(NEWTON_STEPS):
        p = 1.0 / (1.0 + np.exp(np.clip(x @ weights, -30.0, 30.0)))
        gradient = x.T @ p / max(1, n) - RIDGE * weights
        curvature = (x * (p * (1.0 - p))[:, None]).T @ x / max(1, n) + RIDGE * np.eye(features)
        step = np.linalg.solve(curvature, gradient)
        weights = weights + step
        if np.abs(step).max() < 1e-6:
            break
    return weights
