"""Paths that name a day: `feedback/{day}/*.jsonl`, or `feedback/{day:%Y/%m/%d}.jsonl`."""

from __future__ import annotations

import posixpath
import re
from datetime import date

PLACE = re.compile(r"\{day(?::([^{}]*))?\}")
ISO = "%Y-%m-%d"
_DIGITS = {"%Y": "[0-9]" * 4, "%m": "[0-9]" * 2, "%d": "[0-9]" * 2}


def names_a_day(path: str | None) -> bool:
    """Whether a path holds the place of a day."""
    return path is not None and PLACE.search(path) is not None


def fault_of(path: str) -> str | None:
    """What is wrong with how a path names its day; None: nothing."""
    written = set(re.findall(r"%.?", "".join(form or ISO for form in PLACE.findall(path))))
    if written - set(_DIGITS):
        return "a day is written with %Y, %m and %d, as in `{day:%Y/%m/%d}`; `{day}` is 2026-01-31"
    if missing := [name for name in _DIGITS if name not in written]:
        return f"its days cannot be told apart without {', '.join(missing)}"
    return None


def of_day(path: str, day: date) -> str:
    """The path of one day."""
    return PLACE.sub(lambda place: day.strftime(place[1] or ISO), path)


def of_every_day(path: str) -> str:
    """The pattern that all days of a path match."""

    def digits(place: re.Match[str]) -> str:
        return re.sub("|".join(_DIGITS), lambda one: _DIGITS[one[0]], place[1] or ISO)

    return PLACE.sub(digits, path)


def from_the_day_on(path: str, file: str) -> str:
    """The end of a file's path that begins with the part that names the day.

    Args:
        path: what the recipe has, with the place of the day; a URL or an absolute path.
        file: a file of it, as its file system names it: of a URL without the protocol.
    """
    place = path.partition("://")[2] or posixpath.normpath(path)
    before = place.lstrip("/")[: next(PLACE.finditer(place.lstrip("/"))).start()].count("/")
    return "/".join(file.lstrip("/").split("/")[before:])
