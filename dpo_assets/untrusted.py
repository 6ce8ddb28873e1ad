"""Text from elsewhere, as it may be shown: feedback, answers of models, names of files, output of workers.

Dagster's UI renders metadata as GitHub's Markdown, and a terminal obeys control characters. Whoever writes feedback
could place an image that tells who looked, a link, or a page of HTML before the eyes of whoever judges a model.
"""

from __future__ import annotations

import re

# Control characters, and those that change the direction of the text around them.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_CONTROL_BUT_LINES = re.compile(_CONTROL.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))
# A backslash by its number: before a `\|` a second one would be counted differently by different parsers of tables.
_NUMBERED = {"\\": "&#92;", "&": "&amp;", "<": "&lt;"}
_SPECIAL = re.compile(r"[\\&<]|[`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])")
# GitHub's Markdown makes links of these wherever they stand; no escape prevents it, because it looks at the text that
# the escapes stand for. A joiner without width between their parts does.
_LINK = re.compile(r"(?:https?|ftp):(?=//)|www(?=\.)|@(?=\w)", re.IGNORECASE)
_JOINER = "\u2060"
# What makes a block where a line begins with it.
_BLOCK = re.compile(r"^(?:([-+=])|([#>])|(\d{1,9})(?=[.)]))")


def in_markdown(text: str) -> str:
    """The text as one line of Markdown that shows it and does nothing: no image, link, HTML, heading or table cell.

    It may stand anywhere in a line, and in a cell. What is in words stays readable in the source as well.
    """
    line = in_cell(text).strip()
    return _BLOCK.sub(lambda found: f"{found[3]}\\" if found[3] else f"\\{found[0]}", line)


def in_cell(text: str) -> str:
    """The same for a cell of a table, where no block can begin."""
    line = _CONTROL.sub(" ", text)
    line = _SPECIAL.sub(lambda found: _NUMBERED.get(found[0]) or f"\\{found[0]}", line)
    return _LINK.sub(lambda found: f"{found[0]}{_JOINER}", line)


def in_code(text: str) -> str:
    """The text as a span of code outside of tables, whatever backticks it holds."""
    line = _CONTROL.sub(" ", text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    padding = " " if len(fence) > 1 else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def in_terminal(text: str) -> str:
    """The text without what a terminal would obey: escape sequences, carriage returns, changes of direction."""
    return _CONTROL_BUT_LINES.sub("\N{REPLACEMENT CHARACTER}", text)
