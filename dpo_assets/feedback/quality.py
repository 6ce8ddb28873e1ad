"""What a dataset's pairs look like, in numbers: lengths, truncation, distance of the two answers, faults of answers.

The numbers go into the dataset's report, and checks and plots are made from them: neither reads a pair again. Pairs are
taken in the order of their ids, so nothing here depends on the order of files. A pair's id is a digest of its content,
so the first of them are a random sample, and the measures that read every token or letter stop at SAMPLE pairs.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dpo_assets.feedback.quality_numbers import EXAMPLES, SNIPPET, paired_auc, place, rounded, sparse
from dpo_assets.feedback.quality_text import answer_texts, degenerate, surface
from dpo_assets.feedback.quality_tokens import Markers

if TYPE_CHECKING:
    import polars as pl

SAMPLE = 20_000  # At a share of one half the standard error is then 0.0035.
DISTANCE_BINS = 100  # Of width 0.01.
LEAD = 20  # Letters shown before the first difference of two answers.
PERCENTILES = tuple(90 + half / 2 for half in range(21))  # 90, 90.5, ... 100.
QUALITY_VERSION = 3  # Part of a dataset's identity: a report with other measures is another report.


def sizes(pairs: pl.DataFrame, max_length: int) -> pl.DataFrame:
    """Tokens of prompts and answers, row for row: `prompt_tokens`, `chosen_tokens`, `rejected_tokens`, and `same_cut`,
    whether both answers are equal once they are cut."""
    import polars as pl

    cut = with_cut_answers(pairs, max_length)
    return cut.select(
        *(pl.col(f"{side}_ids").list.len().alias(f"{side}_tokens") for side in ("prompt", "chosen", "rejected")),
        same_cut=pl.col("chosen_cut") == pl.col("rejected_cut"),
    )


def token_stats(sized: pl.DataFrame, max_length: int) -> dict[str, Any]:
    """What planning and `distinct_after_truncation` need: tokens of a pair with its prompt shared, after truncation.

    TRL cuts an answer's end where prompt and answer exceed `max_length` (keep_start).

    Args:
        sized: `sizes` of accepted pairs.
    """
    import polars as pl

    prompt = pl.col("prompt_tokens").cast(pl.Int64)
    pairs = sized.select(prompt + _cut("chosen", max_length) + _cut("rejected", max_length)).to_series()
    return {
        "max_length": max_length,
        "longest_pair": int(pairs.max() or 0),
        "mean_pair": int(pairs.sum()) / max(1, sized.height),
        "mean_prompt": int(sized.select(prompt.sum()).item() or 0) / max(1, sized.height),
        "truncated_answers": _lost(sized, max_length),
        "identical_after_truncation": int(sized["same_cut"].sum()),
    }


def measure(
    sized: pl.DataFrame, first: pl.DataFrame, tokenized: pl.DataFrame, max_length: int, context: int, markers: Markers
) -> dict[str, Any]:
    """All measures of accepted pairs, as plain values.

    Args:
        sized: `sizes` of all of them.
        first: the first SAMPLE of them in the order of ids, with `prompt_ids`, `chosen_ids` and `rejected_ids`, not
            truncated.
        tokenized: `sizes` of every pair that was tokenized, those too long for `max_length` included: from them comes
            the length that would hold the answers.
        max_length: tokens of prompt and answer.
        context: tokens that the model can read.
        markers: what ends an answer, and what no answer may hold.
    """
    sample = with_cut_answers(first.sort("pair_id"), max_length)
    texts = answer_texts(sample)
    return {
        "pairs": sized.height,
        "sample": sample.height,
        "lengths": lengths(sized, max_length),
        "truncation": truncation(sized, tokenized, max_length, context),
        "distance": distances(sample, texts),
        "degenerate": degenerate(sample, texts, markers),
        "surface": surface(sample, texts),
    }


def with_cut_answers(pairs: pl.DataFrame, max_length: int) -> pl.DataFrame:
    """The same pairs with `chosen_cut` and `rejected_cut`: the answers' tokens that training sees."""
    import polars as pl

    room = max_length - pl.col("prompt_ids").list.len().cast(pl.Int64)
    return pairs.with_columns(
        pl.col(f"{side}_ids").list.head(room.clip(lower_bound=0)).alias(f"{side}_cut")
        for side in ("chosen", "rejected")
    )


def _cut(side: str, max_length: int) -> pl.Expr:
    """Tokens of an answer that training sees."""
    import polars as pl

    room = (max_length - pl.col("prompt_tokens").cast(pl.Int64)).clip(lower_bound=0)
    return pl.min_horizontal(pl.col(f"{side}_tokens").cast(pl.Int64), room)


def _lost(sized: pl.DataFrame, max_length: int) -> int:
    """Answers that lost their end."""
    import polars as pl

    whole = (pl.col(f"{side}_tokens").cast(pl.Int64) > _cut(side, max_length) for side in ("chosen", "rejected"))
    return int(sized.select(sum((one.cast(pl.Int64) for one in whole), pl.lit(0)).sum()).item() or 0)


def lengths(sized: pl.DataFrame, max_length: int) -> dict[str, Any]:
    """Tokens of chosen and rejected answers after truncation, and how far length alone tells the label.

    `ratio` is mean chosen over mean rejected (Park et al., arXiv 2403.19159); `chosen_longer` the share of pairs, ties
    half; `auc` see `paired_auc`, of the difference in tokens. `grid` counts pairs by "bin of
    chosen, bin of rejected"; bin i holds 2^(i/2) up to 2^((i+1)/2) tokens.
    """
    import numpy as np
    import polars as pl

    chosen, rejected = (sized.select(_cut(side, max_length)).to_series() for side in ("chosen", "rejected"))
    difference = (chosen - rejected).to_numpy()
    bins = [np.floor(2 * np.log2(np.maximum(side.to_numpy(), 1))).astype(np.int64) for side in (chosen, rejected)]
    grid = pl.DataFrame({"a": bins[0], "b": bins[1]}).group_by("a", "b").len().sort("a", "b")
    means = [float(side.sum()) / side.len() if side.len() else None for side in (chosen, rejected)]
    return {
        "chosen_mean": rounded(means[0]),
        "rejected_mean": rounded(means[1]),
        "ratio": rounded(means[0] / means[1]) if means[0] is not None and means[1] else None,
        "chosen_longer": rounded(float(((difference > 0) + 0.5 * (difference == 0)).mean())) if sized.height else None,
        "auc": rounded(paired_auc(difference)),
        "grid": {f"{a},{b}": count for a, b, count in grid.iter_rows()},
    }


def truncation(sized: pl.DataFrame, tokenized: pl.DataFrame, max_length: int, context: int) -> dict[str, Any]:
    """Share of answers that lost their end, and the max_length that would hold a share of them.

    `needed` has, for every percentile of PERCENTILES, the tokens of prompt and answer within which that share of all
    answers ends, those of pairs that are in quarantine for their length included: a larger max_length brings them back.
    """
    import polars as pl

    prompt = pl.col("prompt_tokens")
    whole = pl.concat(
        [tokenized.select((prompt + pl.col(f"{side}_tokens")).alias("n")) for side in ("chosen", "rejected")]
    )["n"]
    answers = 2 * sized.height
    ordered = whole.sort()
    return {
        "share": rounded(_lost(sized, max_length) / answers) if answers else None,
        "context": context,
        "needed": {
            f"{p:g}": int(ordered.quantile(p / 100, interpolation="higher") or 0) for p in PERCENTILES if whole.len()
        },
    }


def distances(cut: pl.DataFrame, texts: pl.DataFrame) -> dict[str, Any]:
    """Normalised token edit distance of chosen and rejected, after truncation: Levenshtein over the longer length.

    0 is equal, 1 has nothing in common. `bins[i]` counts pairs in [i/100, (i+1)/100), the last bin also those at 1.
    `shared_prefix` is the mean over pairs of common first tokens over the longer length. Smaug (arXiv 2402.13228):
    DPO lowers the likelihood of chosen answers where this distance is small.
    """
    import numpy as np
    from rapidfuzz.distance import Levenshtein, Prefix

    bins: Counter[int] = Counter()
    values = np.empty(cut.height)
    prefix = 0.0
    sides = [_as_text(cut[f"{side}_cut"]) for side in ("chosen", "rejected")]
    for n, (chosen, rejected) in enumerate(zip(*sides, strict=True)):
        longer = max(len(chosen), len(rejected), 1)
        steps = Levenshtein.distance(chosen, rejected)
        # In whole numbers: 0.29 as a float would fall into the bin of 0.28.
        bins[min(DISTANCE_BINS - 1, DISTANCE_BINS * steps // longer)] += 1
        values[n] = steps / longer
        prefix += Prefix.similarity(chosen, rejected) / longer
    nearest = np.argsort(values, kind="stable")[:EXAMPLES]
    return {
        "median": rounded(float(np.median(values))) if cut.height else None,
        "shared_prefix": rounded(prefix / cut.height) if cut.height else None,
        "bins": sparse(bins),
        "nearest": [_example(texts.row(int(n), named=True), float(values[n])) for n in nearest],
    }


def _as_text(ids: pl.Series) -> list[str]:
    """Each list of token ids as a string of one letter a token: what edit distances are computed on fastest."""
    import numpy as np

    # Ids are letters' numbers; those of surrogates are letters here like any other.
    flat = ids.explode().drop_nulls().to_numpy().astype(np.uint32)
    text = flat.tobytes().decode("utf-32-le", "surrogatepass")
    ends = [0, *ids.list.len().cum_sum()]
    return [text[start:end] for start, end in pairwise(ends)]


def _example(row: dict[str, Any], distance: float) -> dict[str, Any]:
    """A pair as a person sees it: both texts from shortly before their first difference."""
    chosen, rejected = row["chosen_text"], row["rejected_text"]
    pairs = enumerate(zip(chosen, rejected, strict=False))
    start = max(0, next((n for n, (a, b) in pairs if a != b), min(len(chosen), len(rejected))) - LEAD)
    return {
        "distance": rounded(distance),
        "row": place(row),
        "chosen": chosen[start : start + SNIPPET],
        "rejected": rejected[start : start + SNIPPET],
    }
