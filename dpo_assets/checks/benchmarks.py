"""Whether the scores of benchmarks are what they are called: of all rows, and of none that was trained on."""

from __future__ import annotations

from collections.abc import Mapping

from dpo_assets.checks.reports import BenchmarkScores
from dpo_assets.checks.verdict import Verdict


def benchmark_verdicts(report: BenchmarkScores, seen: Mapping[str, int]) -> list[Verdict]:
    """All checks of `benchmark_scores`.

    Args:
        seen: by benchmark, the scored rows whose opening message the model was trained on.
    """
    return [benchmark_whole(report), benchmark_unseen(report, seen)]


def benchmark_whole(report: BenchmarkScores) -> Verdict:
    """Rows that were left out: without them a score is not the benchmark's own."""
    faults = [
        f"{one.name}: {sum(one.left_out.values())} of {one.rows} rows "
        f"({', '.join(f'{count} {reason}' for reason, count in sorted(one.left_out.items()))})"
        for one in report.benchmarks
        if one.left_out
    ]
    rows = sum(one.rows for one in report.benchmarks)
    return Verdict(
        "benchmark_whole",
        "warn" if faults else "pass",
        f"{sum(sum(one.left_out.values()) for one in report.benchmarks)} of {rows} rows left out",
        "0 rows left out",
        "a part of a benchmark is another benchmark: compare it with nothing that was published",
        "mend the rows that left_out.json of the artefact names; `too_long`: a longer feedback.max_length"
        if faults
        else "",
        "; ".join(faults),
    )


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
