"""`judged_answers`: what a language model says of the answers of SFT and policy, and how far it can be believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from dpo_assets.artifact import write_json
from dpo_assets.assets.lineage import Inputs, Read
from dpo_assets.assets.node import Node
from dpo_assets.assets.step import Events, Step
from dpo_assets.checks.judged import judge_verdicts
from dpo_assets.checks.reports import JudgedAnswers
from dpo_assets.checks.statistics import percent
from dpo_assets.judging.comparing import Comparison, Judge, compare
from dpo_assets.judging.endpoint import Endpoint
from dpo_assets.judging.rates import Tally, at_equal_length, corrected
from dpo_assets.judging.replies import Remembered
from dpo_assets.report.tables import table

COMPARED = "compared.json"
REPLIES = Path("cache") / "judge.sqlite"
SHOWN = 20


def materialise(step: Step) -> Events:
    """Asks about every answer that `eval_scores` kept, and about held-out pairs of people."""
    settings, inputs = step.recipe.evaluation.judge, step.inputs()
    assert settings is not None, "the node is wanted where a judge is declared"
    confidence = step.recipe.evaluation.confidence
    endpoint = Endpoint(
        settings.url, settings.model, settings.key_variable, settings.max_tokens, settings.timeout_seconds
    )

    def make(folder: Path, _: str) -> None:
        judge = Remembered(endpoint, step.tree.root / REPLIES)
        answers = [_Pair.of_answers(row) for row in inputs["eval_scores"].json("generations.json")]
        people = _human_pairs(inputs, settings.human_pairs)
        compared = _compared(judge, answers, step, "answers of the policy")
        by_people = _compared(judge, people, step, "pairs of people")
        step.context.log.info(f"judged_answers: {judge.asked} questions, the others were answered before")
        if judge.damage:
            step.context.log.warning(f"judged_answers: {judge.damage}; the judge was asked again")
        _report(endpoint.identity, answers, compared, by_people, confidence).write(folder)
        write_json(folder / COMPARED, [pair.told(one) for pair, one in zip(answers, compared, strict=True)])

    config = {"judge": endpoint.identity, "human_pairs": settings.human_pairs, "confidence": confidence}
    artifact, reused = step.build("judged_answers", config, inputs, make)
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


@dataclass(frozen=True)
class _Pair:
    """Two answers to one conversation."""

    conversation: Sequence[dict[str, str]]
    first: str
    second: str

    @classmethod
    def of_answers(cls, row: dict[str, Any]) -> _Pair:
        """The policy's answer, then that of SFT."""
        return cls([_plain(message) for message in row["prompt"]], row["policy"], row["sft"])

    @property
    def lengths(self) -> tuple[int, int]:
        return len(self.first), len(self.second)

    def told(self, one: Comparison) -> dict[str, Any]:
        return {
            "prompt": self.conversation[-1]["content"],
            "policy": self.first,
            "sft": self.second,
            "outcome": one.outcome,
            "flipped": one.flipped,
            "replies": list(one.replies),
        }


def _human_pairs(inputs: Inputs, most: int) -> list[_Pair]:
    """Held-out pairs, chosen answer first: those that people ranked, in the order of their ids, which is none.

    One of each prompt: pairs of one prompt agree, and the interval of the judge's agreement takes them for independent.
    """
    import polars as pl

    pairs = pl.read_parquet(inputs["dpo_dataset"].path / "eval.parquet").sort("pair_id")
    table_ = pairs.unique("prompt_id", keep="first", maintain_order=True).head(most)
    return [
        _Pair([_plain(m) for m in row["prompt"]], row["chosen"][-1]["content"], row["rejected"][-1]["content"])
        for row in table_.select("prompt", "chosen", "rejected").iter_rows(named=True)
    ]


def _plain(message: dict[str, Any]) -> dict[str, str]:
    return {"role": str(message["role"]), "content": str(message["content"])}


def _compared(judge: Judge, pairs: Sequence[_Pair], step: Step, what: str) -> list[Comparison]:
    found = []
    for number, pair in enumerate(pairs, start=1):
        found.append(compare(judge, pair.conversation, pair.first, pair.second))
        if number % 20 == 0 or number == len(pairs):
            step.context.log.info(f"judged_answers: {number} of {len(pairs)} {what} compared")
    return found


def _report(
    judge: str, answers: list[_Pair], compared: list[Comparison], people: list[Comparison], confidence: float
) -> JudgedAnswers:
    tally, by_people = Tally.of(compared), Tally.of(people)
    share, agreement = tally.share(confidence), by_people.share(confidence)
    return JudgedAnswers(
        judge=judge,
        confidence=confidence,
        wins=tally.wins,
        ties=tally.ties,
        losses=tally.losses,
        nulls=tally.nulls,
        flipped=tally.flipped + by_people.flipped,
        share=share,
        share_at_equal_length=at_equal_length(compared, [pair.lengths for pair in answers]),
        human_pairs=by_people.asked,
        human_nulls=by_people.nulls,
        agreement=agreement,
        corrected=corrected(share, agreement),
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
