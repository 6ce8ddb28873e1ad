"""The history of a pipeline's releases as rows for a table."""

from __future__ import annotations

from dpo_assets.checks.evidence.ledger import Decided, Ledger

HISTORY = ("line", "at", "what", "challenger", "why")


def history_rows(ledger: Ledger) -> list[tuple[str, str, str, str, str]]:
    """HISTORY of every line, newest first; the one by which a model is live is marked."""
    rows, waiting = [], ledger.waiting
    for line in reversed(ledger.lines):
        if isinstance(line, Decided):
            cost = "" if line.level is None else f", level {line.level:.2g}"
            by_hand = ", by override" if line.override else ""
            waits = ", never released" if line in waiting else ""
            what, why = f"{line.decision}{by_hand}{cost}{waits}", line.reason
        else:
            said = "release" if line.kind == "release" else "back to release"
            what = f"{said} {line.release}{', live' if line is ledger.live else ''}"
            why = f"{line.repo_id}@{line.commit[:12]}, {line.tag}"
            why += f": {line.reason}" if line.kind == "rollback" else ""
        rows.append((str(line.number), line.at, what, line.challenger[:12], why))
    return rows
