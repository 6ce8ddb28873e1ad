"""Stage `benchmark`: implicit rewards of the release against SFT for the answers of RewardBench's files.

The reward is that of RewardBench's DPO mode: log-probability under the policy less that under SFT, summed over the
answer with its end of turn, without beta. The answers of one question are scored behind one copy of its prompt.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import polars as pl

from dpo_assets.artifact import VOLATILE, write_json
from dpo_assets.checks.reports import BenchmarkScores
from dpo_assets.contract import ANSWERED, LEFT_OUT, QUESTION, BenchmarkSpec, Progress
from dpo_assets.errors import ConfigError
from dpo_assets.feedback.pair import TEMPLATE_FAULT, prompt_ids
from dpo_assets.judging.questions import Format, LeftOut, Question, Questions, read_questions
from dpo_assets.judging.rewardbench import Answered, summarise
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.models.chat_format import load_chat_format
from dpo_assets.training.models.loading import autocast_of
from dpo_assets.training.policy import load_scored
from dpo_assets.training.reporting import Reporter
from dpo_assets.training.scoring.logprobs import score_groups
from dpo_assets.training.scoring.proof import Settled, alike, settle_engine
from dpo_assets.training.stages.tokenize import PART, PairTokenizer

TOO_LONG, NO_TOKENS = "too_long", "no_tokens"


def run(spec: BenchmarkSpec, reporter: Reporter) -> None:
    """Writes `answers.parquet` (a row an answer), `left_out.json` (a row a row) and `report.json`.

    Raises:
        ConfigError: a file cannot be read, or no row of any fits.
    """
    plan, started = spec.plan.at_release(), time.perf_counter()
    tokenizer = PairTokenizer(load_chat_format(spec.base_model, spec.template), spec.vocabulary)
    fitted = [
        _fitted(file.name, read_questions(file.path, file.format), tokenizer, plan.max_length)
        for file in spec.benchmarks
    ]
    for one in fitted:
        reporter.log(f"benchmark: {one.name}: {len(one.asked)} rows to score, {len(one.left_out)} left out")
    groups = [part for one in fitted for group in one.groups for part in group.within(plan.token_budget)]
    if not groups:
        raise ConfigError(f"no row of any benchmark fits feedback.max_length {plan.max_length}: {_reasons(fitted)}")

    scored = partial(_scored, groups=groups, plan=plan, reporter=reporter)
    (settled, sft), (_, policy) = alike([partial(scored, *subject) for subject in spec.compared])
    scores = zip(sft, policy, strict=True)
    taken = [[list(islice(scores, len(question.answers))) for question in one.asked] for one in fitted]

    _answers_table(fitted, taken).write_parquet(spec.output_dir / ANSWERED)
    write_json(
        spec.output_dir / LEFT_OUT,
        [{"benchmark": one.name, **asdict(row)} for one in fitted for row in one.left_out],
    )
    BenchmarkScores(
        confidence=spec.confidence,
        scored=spec.plan.scored,
        kernels=settled.kernels,
        kernels_note=settled.note,
        benchmarks=tuple(
            summarise(one.name, one.format, _answered(one.asked, rows), one.left_out, spec.confidence)
            for one, rows in zip(fitted, taken, strict=True)
        ),
    ).write(spec.output_dir)
    write_json(spec.output_dir / VOLATILE, {"seconds": time.perf_counter() - started})


@dataclass(frozen=True)
class _Fitted:
    """A benchmark as the model can be asked it: `groups` has the tokens of each question of `asked`."""

    name: str
    format: Format
    asked: list[Question]
    groups: list[Group]
    left_out: list[LeftOut]


def _fitted(name: str, read: Questions, tokenizer: PairTokenizer, max_length: int) -> _Fitted:
    """What the chat template renders, and what fits `max_length` whole; answers that were cut would be others."""
    found = _Fitted(name, read.format, [], [], list(read.left_out))
    for question, group in zip(read.asked, _groups(read.asked, tokenizer), strict=True):
        if isinstance(group, str):
            reason, _, said = group.partition(": ")
            found.left_out.append(LeftOut(question.number, reason, said))
        elif group.longest_row > max_length:
            said = f"{group.longest_row} tokens with its longest answer, feedback.max_length is {max_length}"
            found.left_out.append(LeftOut(question.number, TOO_LONG, said))
        else:
            found.asked.append(question)
            found.groups.append(group)
    return found


def _groups(asked: Sequence[Question], tokenizer: PairTokenizer) -> Iterator[Group | str]:
    """The tokens of each question, or the fault that the tokenizer of pairs found in it.

    Its answers are tokenized two by two. Each two share the beginning of the same rendered prompt, and all of them the
    shortest of these beginnings.
    """
    twos = [
        (number, question.prompt, question.answers[n], question.answers[min(n + 1, len(question.answers) - 1)])
        for number, question in enumerate(asked)
        for n in range(0, len(question.answers), 2)
    ]
    table = pl.DataFrame(
        {
            "pair_id": [str(number) for number, *_ in twos],
            "prompt": [list(prompt) for _, prompt, _, _ in twos],
            "chosen": [[{"role": "assistant", "content": text}] for *_, text, _ in twos],
            "rejected": [[{"role": "assistant", "content": text}] for *_, text in twos],
        }
    )
    rows = [row for part in table.iter_slices(PART) for row in tokenizer.encoded(tokenizer.rendered(part)).to_dicts()]
    by_question = groupby(rows, key=lambda row: row["pair_id"])
    for question, (_, own) in zip(asked, by_question, strict=True):
        yield _joined(list(own), len(question.answers))


def _joined(twos: Sequence[dict[str, Any]], answers: int) -> Group | str:
    if fault := next((row[TEMPLATE_FAULT] for row in twos if row[TEMPLATE_FAULT]), None):
        return str(fault)
    whole = [row["prompt_ids"] + row[side] for row in twos for side in ("chosen_ids", "rejected_ids")][:answers]
    prompt = min((row["prompt_ids"] for row in twos), key=len)
    if any(len(ids) == len(prompt) for ids in whole):
        return f"{NO_TOKENS}: an answer has no token of its own"
    return Group(prompt, tuple(ids[len(prompt) :] for ids in whole))


def _scored(
    who: str,
    folder: Path,
    adapter: Path | None,
    first: str | None,
    *,
    groups: list[Group],
    plan: TrainingPlan,
    reporter: Reporter,
) -> tuple[Settled, list[float]]:
    """Log-probabilities of all answers, by a model that is loaded for it and let go."""
    model = load_scored(folder, plan, adapter)
    settled = settle_engine(model, plan, max(groups, key=lambda group: group.longest_row), first)
    with autocast_of(plan):
        logps, _ = score_groups(model, groups, plan.token_budget)
    reporter.log(Progress(stage="benchmark", done=1 if who == "SFT" else 2, total=2, note=f"{who} done").line())
    del model
    gc.collect()
    return settled, logps


Scores = list[tuple[float, float]]  # By SFT and by the policy, an answer each.


def _answered(asked: Sequence[Question], scores: Sequence[Scores]) -> list[Answered]:
    return [
        Answered(question, prompt_ids(question.prompt)[0], tuple(policy - sft for sft, policy in own))
        for question, own in zip(asked, scores, strict=True)
    ]


def _answers_table(fitted: Sequence[_Fitted], scores: Sequence[Sequence[Scores]]) -> pl.DataFrame:
    rows = []
    for one, of_questions in zip(fitted, scores, strict=True):
        for question, group, own in zip(one.asked, one.groups, of_questions, strict=True):
            (prompt_id, group_id), answers = prompt_ids(question.prompt), question.answers_sha256
            rows += [
                {
                    "benchmark": one.name, "row": question.number, "id": question.name, "subset": question.subset,
                    "prompt_id": prompt_id, "group_id": group_id, QUESTION: answers, "answer": n,
                    "right": n < len(question.right), "tokens": len(group.completions[n]), "sft": sft, "policy": policy,
                }
                for n, (sft, policy) in enumerate(own)
            ]  # fmt: skip
    return pl.DataFrame(rows, infer_schema_length=None)


def _reasons(fitted: Sequence[_Fitted]) -> str:
    counted = Counter(row.reason for one in fitted for row in one.left_out)
    return ", ".join(f"{count} {reason}" for reason, count in counted.most_common())
