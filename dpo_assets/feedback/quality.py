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

SAMPLE = 100_000  # At a share of one half the standard error is then 0.0016.
DISTANCE_BINS = 100  # Of width 0.01.
LEAD = 20  # Letters shown before the first difference of two answers.
PERCENTILES = tuple(90 + half / 2 for half in range(21))  # 90, 90.5, ... 100.
QUALITY_VERSION = 2  # Part of a dataset's identity: a report with other measures is another report.


def token_stats(accepted: pl.DataFrame, max_length: int) -> dict[str, Any]:
    """What planning and `distinct_after_truncation` need: tokens of a pair with its prompt shared, after truncation.

    TRL cuts an answer's end where prompt and answer exceed `max_length` (keep_start).
    """
    import polars as pl

    cut = with_cut_answers(accepted, max_length)
    pairs = cut.select(pl.col("prompt_ids").list.len().cast(pl.Int64) + _length("chosen") + _length("rejected"))
    lengths = pairs.to_series()
    counted = cut.select(
        prompts=pl.col("prompt_ids").list.len().cast(pl.Int64).sum(),
        truncated=(_lost("chosen").cast(pl.Int64) + _lost("rejected").cast(pl.Int64)).sum(),
        identical=(pl.col("chosen_cut") == pl.col("rejected_cut")).sum(),
    ).row(0, named=True)
    return {
        "max_length": max_length,
        "longest_pair": int(lengths.max() or 0),
        "mean_pair": int(lengths.sum()) / max(1, accepted.height),
        "mean_prompt": int(counted["prompts"] or 0) / max(1, accepted.height),
        "truncated_answers": int(counted["truncated"] or 0),
        "identical_after_truncation": int(counted["identical"] or 0),
    }


def measure(
    accepted: pl.DataFrame, tokens: pl.DataFrame, max_length: int, context: int, markers: Markers
) -> dict[str, Any]:
    """All measures of accepted pairs, as plain values.

    Args:
        accepted: pairs with `prompt_ids`, `chosen_ids` and `rejected_ids`, not truncated.
        tokens: the same columns of every pair that was tokenized, those too long for `max_length` included: from them
            comes the length that would hold the answers.
        max_length: tokens of prompt and answer.
        context: tokens that the model can read.
        markers: what ends an answer, and what no answer may hold.
    """
    ordered = with_cut_answers(accepted.sort("pair_id"), max_length)
    sample = ordered.head(SAMPLE)
    texts = answer_texts(sample)
    return {
        "pairs": ordered.height,
        "sample": sample.height,
        "lengths": lengths(ordered),
        "truncation": truncation(ordered, tokens, context),
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


def _length(side: str) -> pl.Expr:
    import polars as pl

    return pl.col(f"{side}_cut").list.len().cast(pl.Int64)


def _lost(side: str) -> pl.Expr:
    import polars as pl

    return pl.col(f"{side}_ids").list.len() > pl.col(f"{side}_cut").list.len()


def lengths(cut: pl.DataFrame) -> dict[str, Any]:
    """Tokens of chosen and rejected answers after truncation, and how far length alone tells the label.

    `ratio` is mean chosen over mean rejected (Park et al., arXiv 2403.19159); `chosen_longer` the share of pairs, ties
    half; `auc` see `paired_auc`, of the difference in tokens. `grid` counts pairs by "bin of
    chosen, bin of rejected"; bin i holds 2^(i/2) up to 2^((i+1)/2) tokens.
    """
    import numpy as np

    chosen, rejected = (cut.select(_length(side)).to_series().to_numpy() for side in ("chosen", "rejected"))
    difference = chosen - rejected
    bins = [np.floor(2 * np.log2(np.maximum(side, 1))).astype(np.int64) for side in (chosen, rejected)]
    grid = Counter(zip(*(side.tolist() for side in bins), strict=True))
    means = [float(side.mean()) if side.size else None for side in (chosen, rejected)]
    return {
        "chosen_mean": rounded(means[0]),
        "rejected_mean": rounded(means[1]),
        "ratio": rounded(means[0] / means[1]) if means[0] is not None and means[1] else None,
        "chosen_longer": rounded(float(((difference > 0) + 0.5 * (difference == 0)).mean())) if cut.height else None,
        "auc": rounded(paired_auc(difference)),
        "grid": {f"{a},{b}": count for (a, b), count in sorted(grid.items())},
    }


def truncation(cut: pl.DataFrame, tokens: pl.DataFrame, context: int) -> dict[str, Any]:
    """Share of answers that lost their end, and the max_length that would hold a share of them.

    `needed` has, for every percentile of PERCENTILES, the tokens of prompt and answer within which that share of all
    answers ends, those of pairs that are in quarantine for their length included: a larger max_length brings them back.
    """
    import polars as pl

    lost = cut.select((_lost("chosen").cast(pl.Int64) + _lost("rejected").cast(pl.Int64)).sum()).item()
    prompt = pl.col("prompt_ids").list.len().cast(pl.Int64)
    whole = pl.concat(
        [tokens.select((prompt + pl.col(f"{side}_ids").list.len()).alias("n")) for side in ("chosen", "rejected")]
    )["n"]
    answers = 2 * cut.height
    return {
        "share": rounded(lost / answers) if answers else None,
        "context": context,
        "needed": {
            f"{p:g}": int(whole.quantile(p / 100, interpolation="higher") or 0) for p in PERCENTILES if whole.len()
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
