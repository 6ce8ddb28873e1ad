"""What a table of scored pairs says of the policy: accuracies, differences and shifts, by conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median
from typing import Any

import polars as pl

from dpo_assets.checks.evidence.candidate import ScoredPairs
from dpo_assets.checks.evidence.clusters import COUNTED_BY, clustered_mean, clustered_share, pick_the_longer
from dpo_assets.checks.evidence.paired import compare
from dpo_assets.checks.evidence.slices import Part, SliceScore, parts
from dpo_assets.checks.neutral import perplexities
from dpo_assets.checks.reports import (
    ChampionScores,
    Divergence,
    EvaluationReport,
    GreedyAnswers,
    InstructionsFollowed,
    NotMeasured,
    Perplexity,
)
from dpo_assets.training.scoring.proof import Settled

ANSWERS = ("_chosen", "_rejected", "_tokens")  # How the names of columns end that are about one answer.
SLICE_DRAWS = 2_000  # Of the bootstrap for each part: there may be a dozen.


@dataclass(frozen=True)
class Opponent:
    """The champion that a table has columns of, and by reason how many held-out pairs it could not be asked."""

    name: str
    left_out: Mapping[str, int]


def summarise(
    table: pl.DataFrame,
    confidence: float,
    *,
    scored: str,
    settled: Settled,
    generation: GreedyAnswers,
    opponent: Opponent | None = None,
    kl: Divergence | NotMeasured | None = None,
    neutral: Perplexity | NotMeasured | None = None,
    kl_of_champion: Divergence | NotMeasured | None = None,
    neutral_of_champion: Perplexity | NotMeasured | None = None,
    instructions: InstructionsFollowed | NotMeasured | None = None,
) -> EvaluationReport:
    """Scores with intervals over conversations, from the per-pair table: pairs of one are no independent evidence."""
    chosen_ratio = (table["policy_chosen"] - table["sft_chosen"]) / table["chosen_tokens"]
    rejected_ratio = (table["policy_rejected"] - table["sft_rejected"]) / table["rejected_tokens"]
    conversations = table[COUNTED_BY].to_list()
    pairs = ScoredPairs(
        conversations, {name: table[name].to_list() for name in table.columns if name.endswith(ANSWERS)}
    )
    share = partial(clustered_share, prompts=conversations, confidence=confidence)
    against = partial(compare, prompts=conversations, confidence=confidence)
    margin, rewarded = pairs.reward_margins(), pairs.reward_wins()
    ranked, ranked_before = pairs.logp_wins("policy"), pairs.logp_wins("sft")
    champion, theirs = None, list[float]()
    if opponent is not None:
        theirs, ranked_by_them = pairs.reward_wins("champion", "champion_start"), pairs.logp_wins("champion")
        champion = ChampionScores(
            implicit_reward_accuracy=share(theirs),
            logp_accuracy=share(ranked_by_them),
            reward_against=against(rewarded, theirs),
            logp_against=against(ranked, ranked_by_them),
            reward_accuracy_per_token=share(pairs.reward_wins_per_token("champion", "champion_start")),
            margin=clustered_mean(pairs.reward_margins("champion", "champion_start"), conversations, confidence),
            kl=kl_of_champion,
            neutral=neutral_of_champion,
            chosen=perplexities(
                table["champion_chosen_tokens"].to_list(),
                table["champion_start_chosen"].to_list(),
                table["champion_chosen"].to_list(),
                conversations,
                confidence,
            ),
            left_out=dict(opponent.left_out),
        )

    def slice_of(part: Part) -> SliceScore:
        def of_part(values: Sequence[Any]) -> list[Any]:
            return [values[n] for n in part.pairs]

        own = of_part(conversations)
        return SliceScore(
            part.by,
            part.name,
            clustered_share(of_part(rewarded), own, confidence),
            compare(of_part(ranked), of_part(ranked_before), own, confidence, draws=SLICE_DRAWS),
            clustered_share(of_part(theirs), own, confidence) if theirs else None,
            compare(of_part(rewarded), of_part(theirs), own, confidence, draws=SLICE_DRAWS) if theirs else None,
        )

    return EvaluationReport(
        pairs=table.height,
        prompts=len(set(conversations)),
        implicit_reward_accuracy=share(rewarded),
        reward_accuracy_per_token=share(pairs.reward_wins_per_token()),
        logp_accuracy_sft=share(ranked_before),
        logp_accuracy_policy=share(ranked),
        pick_the_longer=pick_the_longer(
            table["chosen_tokens"].to_list(), table["rejected_tokens"].to_list(), conversations, confidence
        ),
        reward_against_chance=against(rewarded, [0.5] * table.height),
        logp_against_sft=against(ranked, ranked_before),
        margin=clustered_mean(margin, conversations, confidence),
        slices=tuple(slice_of(part) for part in parts(table["source"].to_list(), table["margin"].to_list())),
        margin_mean_nats=fmean(margin),
        margin_median_nats=median(margin),
        chosen_shift_nats_per_token=fmean(chosen_ratio),
        rejected_shift_nats_per_token=fmean(rejected_ratio),
        nll_ratio_chosen=float(table["policy_chosen"].sum() / table["sft_chosen"].sum()),
        confidence=confidence,
        scored=scored,
        kernels=settled.kernels,
        kernels_note=settled.note,
        generation=generation,
        champion=opponent.name if opponent else None,
        champion_scores=champion,
        kl=kl,
        neutral=neutral,
        instructions=instructions,
        chosen=perplexities(
            table["chosen_tokens"].to_list(),
            table["sft_chosen"].to_list(),
            table["policy_chosen"].to_list(),
            conversations,
            confidence,
        ),
    )
