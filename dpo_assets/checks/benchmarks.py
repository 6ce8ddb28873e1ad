"""Whether the scores of benchmarks are what they are called: of all rows, and of none that was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dpo_assets.checks.reports import BenchmarkScore, BenchmarkScores
from dpo_assets.checks.verdict import Verdict

LEFT_OUT = "mend the rows that left_out.json of the artefact names; `too_long`: a longer feedback.max_length"


def benchmark_verdicts(report: BenchmarkScores, seen: Mapping[str, int]) -> list[Verdict]:
    """All checks of `benchmark_scores`.

    Args:
        seen: by benchmark, the scored rows whose opening message the model was trained on.
    """
    return [benchmark_whole(report), benchmark_unseen(report, seen)]


def benchmark_whole(report: BenchmarkScores) -> Verdict:
    """Rows that were left out, and scores that are no number: without them a score is not the benchmark's own."""
    faults = [
        f"{one.name}: {sum(one.left_out.values())} of {one.rows} rows "
        f"({', '.join(f'{count} {reason}' for reason, count in sorted(one.left_out.items()))})"
        for one in report.benchmarks
        if one.left_out
    ]
    nothing = [f"{one.name}: {', '.join(names)}" for one in report.benchmarks if (names := _no_numbers(one))]
    left_out = sum(sum(one.left_out.values()) for one in report.benchmarks)
    rows = sum(one.rows for one in report.benchmarks)
    return Verdict(
        "benchmark_whole",
        "warn" if faults or nothing else "pass",
        "; ".join([f"{left_out} of {rows} rows left out", *(f"no number: {one}" for one in nothing)]),
        "0 rows left out, every score a number",
        "a part of a benchmark is another benchmark: compare it with nothing that was published",
        "; ".join(
            [LEFT_OUT] * bool(faults)
            + ["rewards that are no number stand in the answers of the artefact; Ties needs its ref rows"]
            * bool(nothing)
        ),
        "; ".join(faults),
    )


def _no_numbers(score: BenchmarkScore) -> list[str]:
    """Scores of a benchmark that are no number; the subsets behind an overall one are named themselves."""
    parts = {**score.sections, **{one.name: one.score for one in score.subsets}}
    names = [name for name, part in parts.items() if not math.isfinite(part.value)]
    return names or ([] if math.isfinite(score.overall.value) else ["overall"])


def benchmark_unseen(report: BenchmarkScores, seen: Mapping[str, int]) -> Verdict:
    """Scored rows against the record that the trainer left of what it trained on."""
    told = [f"{name}: {count}" for name, count in seen.items() if count]
    return Verdict(
        "benchmark_unseen",
        "warn" if told else "pass",
        f"{sum(seen.values())} rows",
        "0 rows with an opening message that the SFT or DPO adapter was trained on",
        "scores on seen prompts measure memory",
        "name the file, as JSONL, in feedback.cleaning.evaluation_sets, which keeps such pairs out, and train again"
        if told
        else "",
        "; ".join(told),
    )
