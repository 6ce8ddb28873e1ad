"""A summary as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpo_assets.checks.statistics import percent
from dpo_assets.demo.breaks import Break
from dpo_assets.demo.summary import TRAINING_STAGES, Summary
from dpo_assets.untrusted import in_terminal


def show_summary(summary: Summary, console: Console, *, answers: int = 0) -> None:
    """The facts of a run, and what kept it from holding."""
    console.print(_grid(_rows(summary)))
    if answers and summary.answers:
        console.print(_answers(summary.answers[:answers]))
    for problem in summary.problems:
        console.print(f"[red]does not hold:[/red] {escape(in_terminal(problem))}", highlight=False)
    for error in summary.errors:
        console.print(in_terminal(error), highlight=False, markup=False)


def _rows(summary: Summary) -> Iterator[tuple[str, str]]:
    yield "run", f"{summary.status} in {summary.seconds:.0f} s, {len(summary.materialised)} assets"
    if summary.reused:
        yield "reused", f"{', '.join(summary.reused)}: inputs unchanged, nothing trained again"
    if pairs := summary.pairs:
        reasons = ", ".join(f"{reason} {count}" for reason, count in pairs["reasons"].items()) or "none"
        split = f"{pairs['train_pairs']} train, {pairs['eval_pairs']} held out"
        yield "pairs read", str(pairs["rows_in"])
        yield "accepted", f"{pairs['accepted']} ({split}), {pairs['duplicates']} duplicates dropped"
        yield "quarantined", f"{pairs['quarantined']} ({reasons})"
    if plan := summary.plan:
        yield "precision", f"{plan['precision_reason']} ({plan['device_name']})"
        yield "steps", f"SFT {plan['sft_steps']}, DPO {plan['dpo_steps']}"
    if (dpo := summary.dpo) and dpo.expected_first_loss is not None:
        off = dpo.first_loss - dpo.expected_first_loss
        yield "first loss", f"{dpo.first_loss:.6f}, expected {dpo.expected_first_loss:.6f} (off by {off:+.1e})"
    if scores := summary.scores:
        for label, score in scores.shares:
            interval = f"{percent(scores.confidence)} interval [{score.low:.3f}, {score.high:.3f}]"
            yield label, f"{score.value:.3f}, {interval}, n = {score.counted}"
    if summary.verdict:
        yield "verdict", f"{summary.verdict['decision']}: {summary.verdict['reason']}"
    for check in summary.failed_checks:
        if not check.blocked:
            yield "warning", f"{check.check}: {check.value} (band: {check.band})"
    if summary.release:
        yield "dry-run release", summary.release


def _answers(answers: list[dict[str, Any]]) -> Table:
    table = Table(title="greedy answers to held-out prompts", show_lines=True)
    for column in ("prompt", "before (SFT)", "after (DPO)"):
        table.add_column(column, ratio=1)
    for answer in answers:
        table.add_row(_short(answer["prompt"][-1]["content"], 200), _short(answer["sft"]), _short(answer["policy"]))
    return table


def _short(text: str, length: int = 500) -> str:
    text = in_terminal(text.strip())
    return escape(text if len(text) <= length else text[: length - 1] + "…")


def show_break(name: str, fault: Break, summary: Summary, console: Console) -> bool:
    """What stopped a broken run. Returns whether it was the check that should have."""
    console.print(f"broken on purpose: {fault.story}", highlight=False)
    stopped = next((c for c in summary.failed_checks if c.check == fault.check and c.blocked), None)
    trained = [stage for stage in summary.worker_stages if stage in TRAINING_STAGES]
    if stopped is None:
        console.print(f"[red]the check {fault.check} did not stop the run ({summary.status})[/red]")
        return False
    rows = {
        "stopped by": f"{stopped.check} on {stopped.asset}",
        "value": stopped.value,
        "band": stopped.band,
        "source": stopped.source,
        "what to change": stopped.fix,
        "run": f"{summary.status}; not materialised: {_not_made(summary)}",
        "training processes started": ", ".join(trained) or "none",
    }
    console.print(_grid(rows.items()))
    return True


def _grid(rows: Iterable[tuple[str, str]]) -> Table:
    """Labels and values; a long value is folded, never cut."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in rows:
        grid.add_row(label, escape(in_terminal(value)))
    return grid


def _not_made(summary: Summary) -> str:
    return next((p.removeprefix("not materialised: ") for p in summary.problems if p.startswith("not mat")), "nothing")
