"""The table "I have ... feedback" of docs/feedback.md, from the readers themselves.

python -m dpo_assets.report.formats        # writes it into the file named, or docs/feedback.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from dpo_assets.feedback.readers import READERS, Format, formats

BEGIN, END = "<!-- formats: begin -->", "<!-- formats: end -->"


def formats_table() -> str:
    """One row a format of this package: what it is, its name, one line of it, and what to write in a recipe."""
    lines = [
        "| I have ... | `format` | one row of it | in the recipe, under `feedback.sources` | as documented in |",
        "|---|---|---|---|---|",
    ]
    for name in READERS:
        one = formats()[name]
        cells = [one.title, f"`{one.name}`", f"`{one.example}`", f"`{yaml_line(one)}`", one.documented]
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |")
    return "\n".join(lines)


def yaml_line(one: Format) -> str:
    """A source of this format, to copy."""
    companion = f", companion: feedback/{one.name}_joined.jsonl" if one.companion else ""
    return f"- {{path: feedback/{one.name}/*, format: {one.name}{companion}}}"


def updated(text: str) -> str:
    """A document with the table in its place."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{formats_table()}\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/feedback.md")
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
