"""Stage `evaluate`: held-out pairs and greedy answers, for the SFT policy, for what is released, and for the champion.

Implicit reward (Rafailov et al., arXiv 2305.18290, section 4): log pi(y|x) - log pi_ref(y|x), summed over the answer
with its EOS. RewardBench's DPO mode uses the same masks and sums. The reference is each policy's own start.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from dpo_assets.artifact import VOLATILE, write_json
from dpo_assets.checks.evidence.clusters import COUNTED_BY
from dpo_assets.checks.instructions import INSTRUCTIONS, Instruction, summarised
from dpo_assets.checks.neutral import perplexities, read_texts
from dpo_assets.checks.reports import (
    AnswerHealth,
    Divergence,
    GreedyAnswers,
    InstructionsFollowed,
    NotMeasured,
    Perplexity,
)
from dpo_assets.contract import EvaluateSpec
from dpo_assets.errors import ConfigError
from dpo_assets.feedback.dataset import read_split
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.batches.data import dpo_group, first_asked, load_asked
from dpo_assets.training.evaluation.subjects import Bench, Measured, Reading, Subject, as_groups
from dpo_assets.training.evaluation.summary import Opponent, summarise
from dpo_assets.training.models.chat_format import load_chat_format
from dpo_assets.training.reporting import Reporter
from dpo_assets.training.resuming.parts import Parts
from dpo_assets.training.scoring.divergence import log_ratios, per_token
from dpo_assets.training.scoring.generation import generation_health
from dpo_assets.training.stages.rereading import Reread, reread

OF_A_PAIR = ["prompt_id", COUNTED_BY, "source", "margin"]  # Columns of the dataset that the per-pair table keeps.
SFT, POLICY, CHAMPION, START = "sft", "policy", "champion", "champion_start"  # As the table's columns begin.
CALLED = {SFT: "SFT", POLICY: "policy", CHAMPION: "champion", START: "champion's start"}


def run(spec: EvaluateSpec, reporter: Reporter) -> None:
    """Writes `scores.parquet` (a row a pair), `generations.json` and `report.json`."""
    plan = spec.plan.at_release()
    started = time.perf_counter()
    reporter.log(f"evaluate: the policy is the {spec.plan.scored}: {plan.scoring.reason}")
    asked = _asked(spec, plan, reporter)
    subjects = _subjects(spec, asked)
    parts = Parts(spec.parts, {"inputs": spec.inputs})
    bench = Bench(plan, spec.max_new_tokens, plan.dpo.seed, reporter, parts, spec.score_cache)
    settled, results = bench.measure(list(subjects.values()))
    measured = dict(zip(subjects, results, strict=True))
    if parts.told:
        reporter.log(f"evaluate: {parts.told}")
    if spec.champion is not None and spec.champion.same_start:
        measured[START] = measured[SFT]

    of_a_pair = {name: asked.rows[name] for name in ("pair_id", *OF_A_PAIR)}
    table = _score_table(of_a_pair, subjects, measured)
    table.write_parquet(spec.output_dir / "scores.parquet")
    answered = {who: measured[who].answers for who in (SFT, POLICY, CHAMPION) if who in measured}
    write_json(
        spec.output_dir / "generations.json",
        [
            {"prompt": row["prompt"], **{who: answers[n]["text"] for who, answers in answered.items()}}
            for n, row in enumerate(asked.answered)
        ],
    )
    told = _followed(asked, measured, spec.confidence)
    write_json(
        spec.output_dir / "instructions.json",
        [
            {"name": one.name, "prompt": one.prompt, **{who: measured[who].instructed[n]["text"] for who in answered}}
            for n, one in enumerate(asked.instructions)
        ],
    )
    report = summarise(
        table,
        spec.confidence,
        scored=spec.plan.scored,
        settled=settled,
        generation=GreedyAnswers(
            **{who: AnswerHealth.model_validate(generation_health(said)) for who, said in answered.items()}
        ),
        opponent=Opponent(spec.champion.name, asked.left_out) if spec.champion else None,
        kl=_kl(POLICY, SFT, measured),
        kl_of_champion=_kl(CHAMPION, START, measured) if spec.champion else None,
        neutral=_neutral(SFT, POLICY, subjects, measured, spec.confidence),
        instructions=told,
        neutral_of_champion=_neutral(START, CHAMPION, subjects, measured, spec.confidence) if spec.champion else None,
    )
    report.write(spec.output_dir)
    kept = {f"{who}_pairs_from_cache": found.known for who, found in measured.items()}
    write_json(spec.output_dir / VOLATILE, {"seconds": time.perf_counter() - started, **kept})


@dataclass(frozen=True)
class _Asked:
    """What all models are asked: held-out rows, those whose prompts are answered greedily, instructions, and how each
    side reads it.

    `left_out` counts by reason the pairs that the champion cannot be asked, and that nobody is.
    """

    rows: Any
    answered: list[dict[str, Any]]
    instructions: list[Instruction]
    ours: Reading
    theirs: Reading
    left_out: Mapping[str, int]


def _asked(spec: EvaluateSpec, plan: TrainingPlan, reporter: Reporter) -> _Asked:
    """The held-out split as challenger and champion read it.

    Raises:
        ConfigError: when the champion can be asked none of it.
    """
    chat = load_chat_format(spec.base_model, spec.template)
    rows = load_asked(spec.dataset, "eval", spec.scratch, OF_A_PAIR)
    champion = _read_by_the_champion(spec, reporter)
    if champion is not None:
        rows = rows.select([n for n, pair in enumerate(rows["pair_id"]) if pair in champion.groups])
    most, room = max(spec.generations, spec.sampled_answers), plan.max_length - spec.max_new_tokens
    found = first_asked(rows, chat, most, room, by="prompt_id")
    answered = [
        (row, ids)
        for row, ids in found[: spec.generations]
        if champion is None or champion.leaves_room(row, spec.max_new_tokens)
    ]
    instructions = [
        (one, row)
        for one, row in ((one, _as_row(one)) for one in INSTRUCTIONS[: spec.instructions])
        if len(chat.prompt_ids(row["prompt"])) <= room
        and (champion is None or champion.leaves_room(row, spec.max_new_tokens))
    ]
    texts = read_texts(spec.corpus) if spec.corpus is not None else []
    fits = min(plan.max_length, plan.longest_pair or plan.max_length)  # No forward was planned for more.
    ours = Reading(
        chat,
        pairs=[dpo_group(row, plan.max_length) for row in rows],
        prompts=[ids for _, ids in answered],
        texts=as_groups(texts, chat, fits),
        sampled=[ids for _, ids in found[: spec.sampled_answers]],
        instructions=[chat.prompt_ids(row["prompt"]) for _, row in instructions],
    )
    prompts, theirs = [row for row, _ in answered], ours
    if champion is not None:
        drawn = [row for row, _ in found[: spec.sampled_answers] if champion.leaves_room(row, spec.max_new_tokens)]
        theirs = champion.reading(rows["pair_id"], prompts, texts, fits, drawn, [row for _, row in instructions])
    asked = [one for one, _ in instructions]
    return _Asked(rows, prompts, asked, ours, theirs, {} if champion is None else champion.left_out)


def _as_row(instruction: Instruction) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": instruction.prompt}]}


def _followed(asked: _Asked, measured: Mapping[str, Measured], confidence: float) -> InstructionsFollowed | NotMeasured:
    """Which instructions each model's answer followed."""
    if not asked.instructions:
        return NotMeasured(not_measured="evaluation.instructions is 0, or no instruction leaves room for an answer")
    met = {
        who: [
            one.followed_by(answer["text"])
            for one, answer in zip(asked.instructions, measured[who].instructed, strict=True)
        ]
        for who in (SFT, POLICY, CHAMPION)
        if who in measured
    }
    names = [one.name for one in asked.instructions]
    return summarised(names, met[SFT], met[POLICY], met.get(CHAMPION), confidence)


def _kl(policy: str, start: str, measured: Mapping[str, Measured]) -> Divergence | NotMeasured:
    """KL(policy || its start) on what the policy says itself."""
    own, who = measured[policy], CALLED[policy]
    if not own.drawn:
        return NotMeasured(not_measured="no answers were sampled, or no held-out prompt leaves room for one")
    return per_token(log_ratios(own.drawn, own.heard[who], measured[start].heard[who]))


def _neutral(
    start: str, policy: str, subjects: Mapping[str, Subject], measured: Mapping[str, Measured], confidence: float
) -> Perplexity | NotMeasured:
    """What became of the likelihood of neutral texts from a start to its policy."""
    tokens = [len(group.completions[0]) for group in subjects[policy].reading.texts]
    if not tokens:
        return NotMeasured(not_measured="no neutral texts were asked")
    return perplexities(tokens, measured[start].texts, measured[policy].texts, confidence=confidence)


def _read_by_the_champion(spec: EvaluateSpec, reporter: Reporter) -> Reread | None:
    """The held-out pairs in the champion's own tokens; None where it reads them as the challenger does.

    Raises:
        ConfigError: when it can be asked none of them.
    """
    champion = spec.champion
    if champion is None or (champion.base_model, champion.template) == (spec.base_model, spec.template):
        return None
    pairs = read_split(spec.dataset, "eval")
    theirs = reread(pairs, champion.base_model, champion.template, spec.plan.max_length)
    why = ", ".join(f"{count} {reason}" for reason, count in theirs.left_out.items())
    if why:
        reporter.log(
            f"evaluate: {pairs.height - len(theirs.groups)} held-out pairs are left out for the champion: {why}"
        )
    if not theirs.groups:
        raise ConfigError(
            f"the champion {champion.name[:12]} reads none of the {pairs.height} held-out pairs ({why}), so nothing "
            "can be held against it: raise feedback.max_length, or go back to its base_model"
        )
    return theirs


def _subjects(spec: EvaluateSpec, asked: _Asked) -> dict[str, Subject]:
    """The models that are compared, by the names that their columns begin with."""
    ours, theirs = asked.ours, asked.theirs
    merged, champion = spec.plan.scoring.subject == "merged", spec.champion

    def start(who: str, base: Path, adapter: Path | None, reading: Reading, digests: Mapping[str, str]) -> Subject:
        known = {"base": digests.get("base_model", ""), "start": digests.get("sft_checkpoint", "") if adapter else "-"}
        return Subject(CALLED[who], base, adapter, reading, known)

    def released(
        who: str, base: Path, adapter: Path | None, policy: Path, reading: Reading, digests: Mapping[str, str]
    ) -> Subject:
        if merged:
            known = {"merged": digests.get("merged_model", "")}
            return Subject(CALLED[who], policy, None, reading, known)
        known = {"base": digests.get("base_model", ""), "adapter": digests.get("dpo_adapter", "")}
        return Subject(CALLED[who], base, adapter, reading, known)

    # What a policy draws, its start scores after it.
    policy = released(POLICY, spec.base_model, spec.adapter, spec.policy, ours, spec.inputs)
    sft = start(SFT, spec.base_model, spec.sft_adapter, ours, spec.inputs)
    hears = (policy.name,) if ours.sampled else ()
    found = {POLICY: replace(policy, draws=bool(hears), hears=hears)}
    if champion is None:
        return found | {SFT: replace(sft, hears=hears)}
    base, own = champion.base_model, champion.inputs
    live = released(CHAMPION, base, champion.adapter, champion.policy, theirs, own)
    heard = (live.name,) if theirs.sampled else ()
    found[CHAMPION] = replace(live, draws=bool(heard), hears=heard)
    found[SFT] = replace(sft, hears=(*hears, *heard) if champion.same_start else hears)
    if not champion.same_start:
        found[START] = replace(start(START, base, champion.sft_adapter, theirs, own), hears=heard)
    return found


def _score_table(
    of_a_pair: Mapping[str, Sequence[Any]], subjects: Mapping[str, Subject], measured: Mapping[str, Measured]
) -> pl.DataFrame:
    """A row a pair: what is known of it, what each model gives its answers in nats, and the answers' tokens."""
    columns: dict[str, list[Any]] = {name: list(values) for name, values in of_a_pair.items()}
    for who, found in measured.items():
        columns[f"{who}_chosen"] = [chosen for chosen, _ in found.logps]
        columns[f"{who}_rejected"] = [rejected for _, rejected in found.logps]
    for who, before in ((POLICY, ""), (CHAMPION, "champion_")):
        pairs = subjects[who].reading.pairs if who in subjects else []
        if pairs:
            columns[f"{before}chosen_tokens"] = [len(group.completions[0]) for group in pairs]
            columns[f"{before}rejected_tokens"] = [len(group.completions[1]) for group in pairs]
    return pl.DataFrame(columns)
