"""`judged_answers`: what a language model says of the answers of SFT and policy, and how far it can be believed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from dpo_assets.artifact import write_json
from dpo_assets.assets.lineage import Read
from dpo_assets.assets.node import Node
from dpo_assets.assets.scorers_ahead import judge_endpoint
from dpo_assets.assets.step import Events, Step
from dpo_assets.checks.judged import judge_verdicts
from dpo_assets.checks.reports import JudgedAnswers
from dpo_assets.checks.statistics import percent
from dpo_assets.judging.comparing import Comparison, Judge, compare
from dpo_assets.judging.pairs import AnswerPair, answers_of, human_pairs
from dpo_assets.judging.rates import Tally, at_equal_length, share_of
from dpo_assets.judging.replies import Remembered
from dpo_assets.judging.shares import corrected
from dpo_assets.report.tables import table

COMPARED = "compared.json"
REPLIES = Path("cache") / "judge.sqlite"
SHOWN = 20
Asked = tuple[Sequence[AnswerPair], Sequence[Comparison]]


def materialise(step: Step) -> Events:
    """Asks about every answer that `eval_scores` kept, and about held-out pairs of people."""
    settings, inputs = step.recipe.evaluation.judge, step.inputs()
    assert settings is not None, "the node is wanted where a judge is declared"
    confidence = step.recipe.evaluation.confidence
    judge = Remembered(judge_endpoint(settings), step.tree.root / REPLIES)
    identity = "" if step.only_checks else judge.identity  # Checks of what was made ask nobody.

    def make(folder: Path, _: str) -> None:
        answers = answers_of(inputs["eval_scores"].json("generations.json"))
        people = human_pairs(inputs["dpo_dataset"].path, settings.human_pairs)
        compared = _compared(judge, answers, step, "answers of the policy")
        by_people = _compared(judge, people, step, "pairs of people")
        step.context.log.info(f"judged_answers: {judge.asked} questions, the others were answered before")
        _report(identity, (answers, compared), (people, by_people), confidence).write(folder)
        write_json(folder / COMPARED, [_told(pair, one) for pair, one in zip(answers, compared, strict=True)])

    config = {"judge": identity, "human_pairs": settings.human_pairs, "confidence": confidence}
    artifact, reused = step.build("judged_answers", config, inputs, make)
    if judge.damage:
        step.context.log.warning(f"judged_answers: {judge.damage}; what is asked of them is asked again")
    report = JudgedAnswers.of(artifact)
    rows = [
        ["policy preferred, as judged", str(report.share)],
        ["corrected by its agreement with people", str(report.corrected)],
        ["agrees with people", str(report.agreement)],
    ]
    told = artifact.json(COMPARED)[:SHOWN]
    yield from step.result(
        "judged_answers",
        artifact,
        reused,
        judge_verdicts(report),
        {
            "judge": report.judge,
            "shares": dg.MetadataValue.md(table(["share", f"{percent(report.confidence)} interval"], rows)),
            "at_equal_length": report.share_at_equal_length,
            "answers": dg.MetadataValue.md(
                table(
                    ["prompt (last message)", "policy", "SFT", "the policy's is", "the judge said"],
                    [[t["prompt"], t["policy"], t["sft"], t["outcome"], t["replies"][0]] for t in told],
                )
            ),
        },
    )


def _told(pair: AnswerPair, one: Comparison) -> dict[str, Any]:
    return {
        "prompt": pair.asked,
        "policy": pair.first,
        "sft": pair.second,
        "outcome": one.outcome,
        "flipped": one.flipped,
        "log_odds": one.log_odds,
        "replies": list(one.replies),
    }


def _compared(judge: Judge, pairs: Sequence[AnswerPair], step: Step, what: str) -> list[Comparison]:
    found = []
    for number, pair in enumerate(pairs, start=1):
        found.append(compare(judge, pair.conversation, pair.first, pair.second))
        if number % 20 == 0 or number == len(pairs):
            step.context.log.info(f"judged_answers: {number} of {len(pairs)} {what} compared")
    return found


def _report(judge: str, answers: Asked, people: Asked, confidence: float) -> JudgedAnswers:
    (pairs, compared), (_, of_people) = answers, people
    tally, by_people = Tally.of(compared), Tally.of(of_people)
    share, agreement = (share_of(found, [pair.opening for pair in of], confidence) for of, found in (answers, people))
    alike = at_equal_length(compared, [pair.lengths for pair in pairs], [pair.opening for pair in pairs], confidence)
    return JudgedAnswers(
        judge=judge,
        confidence=confidence,
        wins=tally.wins,
        ties=tally.ties,
        losses=tally.losses,
        nulls=tally.nulls,
        flipped=tally.flipped + by_people.flipped,
        share=share.proportion(confidence),
        share_at_equal_length=alike.value,
        interval_at_equal_length=(alike.low, alike.high),
        human_pairs=by_people.asked,
        human_nulls=by_people.nulls,
        agreement=agreement.proportion(confidence),
        corrected=corrected(share, agreement, confidence),
    )


NODE = Node(
    name="judged_answers",
    description="What a judge prefers of the answers of SFT and policy, corrected by what people preferred.",
    phase="release",
    kinds=frozenset({"openai"}),
    body=materialise,
    reads=(Read("eval_scores"), Read("dpo_dataset")),
    recipe=("evaluation",),
    wanted=lambda recipe: recipe.evaluation.judge is not None,
)
