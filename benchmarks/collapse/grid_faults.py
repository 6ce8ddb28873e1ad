"""Preference data of the world, sound or with one fault, written as the pipeline writes it.

Rows go the pipeline's way: a JSONL file is read, screened, tokenized, fitted to the model, split and written with its
report. `leaked` cannot pass that way, so it is put in behind the split that would have kept it out.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.collapse.world import FACTS, MAX_LENGTH, SAYS, STYLE_A, STYLE_B, VALUES, Question, paired_questions

EVAL_FRACTION = 0.2
FLIPPED_SHARE = 0.4
REPEATS = 3
CONTEXT = 512  # Tokens that the world's model reads.
Answers = tuple[str, str]
CLEAN, NEAR, FLIPPED, ALL_FLIPPED, REPETITIVE = "clean", "near_identical", "flipped_40", "all_flipped", "repetitive"
LEAKED, TRUNCATED, WRONG_REFERENCE = "leaked", "truncated", "wrong_reference"
FAULTS = (CLEAN, NEAR, FLIPPED, ALL_FLIPPED, REPETITIVE, LEAKED, TRUNCATED, WRONG_REFERENCE)


def _clean(question: Question, draw: random.Random) -> Answers:
    return question.answer(STYLE_A, draw), question.answer(STYLE_B, draw)


def _near_identical(question: Question, draw: random.Random) -> Answers:
    """Equal up to the last mark: one token."""
    answer = question.answer(STYLE_A, draw)
    return answer, answer.removesuffix(".") + "!"


def _flipped(question: Question, draw: random.Random) -> Answers:
    chosen, rejected = _clean(question, draw)
    return (rejected, chosen) if draw.random() < FLIPPED_SHARE else (chosen, rejected)


def _repetitive(question: Question, draw: random.Random) -> Answers:
    """The chosen answer says its sentence three times."""
    sentence = STYLE_A.format(core=f"the {question.core}", ending="")
    return " ".join([sentence] * REPEATS), question.answer(STYLE_B, draw)


def _truncated(question: Question, draw: random.Random) -> Answers:
    """Equal in everything that `MAX_LENGTH` leaves of them."""
    creature = question.creature
    facts = [f"the {SAYS[a].format(c=creature, v=FACTS[creature, a])}" for a in VALUES]
    story = f"Once upon a time, the {question.core}. " + " and ".join(facts * 2) + "."
    return f"{story} They play.", f"{story} Lily said to mom that she was happy!"


_ANSWERS: dict[str, Callable[[Question, random.Random], Answers]] = {
    NEAR: _near_identical,
    FLIPPED: _flipped,
    REPETITIVE: _repetitive,
    TRUNCATED: _truncated,
}


def rows_of(fault: str, seed: int) -> list[dict[str, Any]]:
    """Conversational rows in TRL's format, one a question."""
    draw = random.Random(f"{fault if fault in _ANSWERS else CLEAN}:{seed}")
    answers = _ANSWERS.get(fault, _clean)
    rows = []
    for question in paired_questions():
        chosen, rejected = answers(question, draw)
        rows.append(
            {
                "prompt": [{"role": "user", "content": question.text}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        )
    return rows


@dataclass(frozen=True)
class Silent:
    """A reporter that keeps still."""

    def log(self, message: str) -> None:
        pass


def write_dataset(fault: str, seed: int, model: Path, folder: Path) -> None:
    """`train.parquet`, `eval.parquet` and `report.json` of a dataset with a fault."""
    import polars as pl

    from dpo_assets.artifact import write_json
    from dpo_assets.contract import TokenizeSpec
    from dpo_assets.feedback.ingest import read_file
    from dpo_assets.feedback.quality import SAMPLE, measure, sizes, token_stats
    from dpo_assets.feedback.quality_conflicts import contradictions_in
    from dpo_assets.feedback.quality_tokens import read_markers
    from dpo_assets.feedback.readers import ReadOptions
    from dpo_assets.feedback.rules import NOT_DAMAGE
    from dpo_assets.feedback.screening import screen
    from dpo_assets.feedback.sources import files_of
    from dpo_assets.feedback.splits import fit_to_model, in_eval_split, split
    from dpo_assets.feedback.tables import pairs_frame, quarantine_frame
    from dpo_assets.recipe import CleaningSection, FeedbackSource
    from dpo_assets.training.stages import tokenize

    folder.mkdir(parents=True)
    source = folder / "feedback.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows_of(fault, seed)), encoding="utf-8")
    options = ReadOptions(pairing="best_worst", include_synthetic=False)
    [file] = files_of([FeedbackSource(path=str(source), format="trl")])
    batch = read_file(file, options)
    # So small a world says nearly the same of everything: near duplicates are what it is made of.
    kept = CleaningSection(near_duplicates="keep")
    screened = screen(pairs_frame(batch.pairs), quarantine_frame(batch.rejected), kept)
    screened.pairs.write_parquet(folder / "pairs.parquet")
    spec = TokenizeSpec(
        output_dir=folder, fingerprint="f" * 32, inputs={}, base_model=model, pairs=folder / "pairs.parquet",
    )  # fmt: skip
    tokenize.run(spec, Silent())
    tokens = pl.read_parquet(folder / "tokens.parquet")
    accepted, faults = fit_to_model(screened.pairs, tokens, MAX_LENGTH)
    if fault == ALL_FLIPPED:
        # Columns swapped in what is trained on. Held-out pairs are right: with those swapped too, nothing in the data
        # would contradict the labels.
        held_out = pl.Series([in_eval_split(group, EVAL_FRACTION, seed) for group in accepted["group_id"]])
        names = {"chosen": "rejected", "rejected": "chosen", "chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"}
        swapped = accepted.filter(~held_out).rename(names).select(accepted.columns)
        accepted = pl.concat([swapped, accepted.filter(held_out)])
    sized, every = sizes(accepted, MAX_LENGTH), sizes(tokens, MAX_LENGTH)
    first = accepted.sort("pair_id").head(SAMPLE)
    quality = measure(sized, first, every, MAX_LENGTH, CONTEXT, read_markers(model))
    train, held = split(accepted, EVAL_FRACTION, seed)
    reasons = Counter([*screened.quarantine["reason"], *(row["reason"] for row in faults)])
    report: dict[str, Any] = {
        "rows_in": batch.rows_in, "accepted": accepted.height, "duplicates": screened.duplicates,
        "quarantined": reasons.total(), "reasons": dict(sorted(reasons.items())),
        "damaged": sum(count for reason, count in reasons.items() if reason not in NOT_DAMAGE),
        "train_pairs": train.height, "eval_pairs": held.height,
        "leaked_prompts": len(set(train["prompt_id"]) & set(held["prompt_id"])),
        **token_stats(sized, MAX_LENGTH),
        "quality": quality | {"contradictions": contradictions_in(screened.pairs)},
    }  # fmt: skip
    if fault == LEAKED:
        chosen = sorted(random.Random(seed).sample(range(train.height), train.height - held.height))
        train = pl.concat([train[chosen], held]).sort("pair_id")
        report["leaked_prompts"] = len(set(train["prompt_id"]) & set(held["prompt_id"]))
    train.write_parquet(folder / "train.parquet")
    held.write_parquet(folder / "eval.parquet")
    write_json(folder / "report.json", report)
