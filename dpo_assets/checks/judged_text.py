"""Verdict on what reading did to the texts that people judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from dpo_assets.checks.bands import Bands
from dpo_assets.checks.verdict import Verdict, upper_limit
from dpo_assets.feedback.turns import FOREIGN_TURN, LATER_TURNS_CUT, PROMPT_REPEATED, REASONING_LEFT_OUT

_WAYS_OUT = {
    LATER_TURNS_CUT: "later_turns_cut: judge one answer at a time, or export each turn as a row of its own",
    PROMPT_REPEATED: "prompt_repeated: export answers without their prompt",
    REASONING_LEFT_OUT: "reasoning_left_out: write the reasoning into the text, if it was judged",
    FOREIGN_TURN: "foreign_turn: answers go on with a user's turn, or prompts are transcripts; cut or parse them",
}


def judged_text_kept(index: Mapping[str, Any], bands: Bands) -> Verdict:
    """Shares of the kept pairs and judged answers of which text was cut, moved or left out, or is somebody else's turn.

    Args:
        index: what `raw_preferences` says of its files (`flags`, `pairs`, `answers`) and of paired answers.
        bands: with the limit on the largest of the shares.
    """
    limit = bands.limit("judged_text_kept")
    seen: Counter[str] = Counter()
    for one in (*index["files"], index["paired"] or {}):
        seen.update({flag: count for flag, count in one.get("flags", {}).items() if count and flag in _WAYS_OUT})
    kept = max(1, sum(row["pairs"] + row["answers"] for row in index["files"]))
    counts = ", ".join(f"{count} {flag}" for flag, count in sorted(seen.items()))
    level = upper_limit(max(seen.values(), default=0) / kept, limit.warn, limit.error)
    return Verdict(
        "judged_text_kept",
        level,
        f"{counts} of {kept} pairs and judged answers" if counts else f"{kept} pairs and judged answers as they were",
        f"each at most {limit.warn:.0%}",
        limit.source,
        "" if level == "pass" else "; ".join(_WAYS_OUT[flag] for flag in sorted(seen)),
    )
