"""Verdicts on what was read, from the index of `raw_preferences` and the tables of its batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dpo_assets.checks.verdict import Verdict
from dpo_assets.feedback.accounting import Held, HeldPaired
from dpo_assets.recipe import FeedbackSection

NAMED = 8  # Files that a verdict names.
KEPT_NAMES = 200  # Files of a source whose rows are kept one by one with its volume.

Volumes = Mapping[str, Mapping[str, Any]]  # Source of the recipe -> files, rows, and the rows of the first files.
NOTHING: Mapping[str, Any] = {"files": 0, "rows": 0, "names": {}}


def ingest_verdicts(
    index: Mapping[str, Any],
    held: Mapping[str, Held],
    paired: HeldPaired | None,
    now: Volumes,
    before: Volumes | None,
    feedback: FeedbackSection,
) -> list[Verdict]:
    """All checks of `raw_preferences`.

    Args:
        index: of this materialisation: the files that were found, and what was read of each.
        held: what the tables of each file hold, counted from disk.
        paired: what the table of paired answers holds; None where no answer was judged alone.
        now: what each source gave.
        before: the same, of the last materialisation that no gate holds; None where there is none.
        feedback: of the declared recipe.
    """
    return [
        every_file_read(index),
        every_row_accounted_for(index, held, paired),
        feedback_volume(now, before, feedback),
    ]


def every_file_read(index: Mapping[str, Any]) -> Verdict:
    """A file that is refused as a whole, or of which no row has the shape that its source says, drops out with all of
    its rows: what is left can look perfectly sound. A whole export without a row (an empty array, a header alone) drops
    nothing: it is counted, and `feedback_volume` sees what it held before."""
    empty = [row["file"] for row in index["files"] if row.get("empty")]
    unread = {row["file"]: row["unread"] for row in index["files"] if row["unread"]}
    return Verdict(
        "every_file_read",
        "error" if unread else "pass",
        f"{len(index['files']) - len(unread)} of {len(index['files'])} files read",
        "every file that the sources name, in the format that they say",
        "nothing is lost (docs/design.md, rules)",
        f"mend {_some([f'{file} ({why})' for file, why in unread.items()])}. To go on without it, take it out of the "
        "folder or the pattern of `feedback.sources`, or set checks.severity.every_file_read to warn"
        if unread
        else "",
        f"{len(empty)} whole files without a row: {_some(empty)}" if empty else "",
    )


def every_row_accounted_for(index: Mapping[str, Any], held: Mapping[str, Held], paired: HeldPaired | None) -> Verdict:
    """Every file that was found was read, every row that its source gave lies in a table, and every judged answer is in
    a pair or in quarantine: counted once while reading, and once from the tables on disk."""
    found, read = Counter(index["found"]), Counter(row["file"] for row in index["files"])
    wrong = [f"{name}: found, and not read" for name in found - read]
    wrong += [f"{name}: read, and not found" for name in read - found]
    for row in index["files"]:
        if fault := _fault_of_file(row, held.get(row["file"])):
            wrong.append(f"{row['file']}: {fault}")
    if fault := _fault_of_answers(index, held, paired):
        wrong.append(f"paired answers: {fault}")
    rows = sum(row["rows"] for row in index["files"])
    return Verdict(
        "every_row_accounted_for",
        "error" if wrong else "pass",
        f"{rows} rows in {len(index['found'])} files",
        "files found = files read; rows seen = rows in the tables on disk, file by file; answers = in a pair + left",
        "nothing is lost (docs/design.md, rules)",
        f"materialise again, and report a bug if it stays: {_some(wrong)}" if wrong else "",
    )


def _fault_of_file(row: Mapping[str, Any], held: Held | None) -> str:
    if held is None:
        return "it has no table"
    if held.lines != row["lines"]:
        return f"{row['lines']} rows were seen, {held.lines} lie in its tables"
    for name, count in (("pairs", held.pairs), ("answers", held.answers), ("rejected", held.rejected)):
        if row[name] != count:
            return f"{row[name]} {name} were made, {count} lie in its tables"
    if row["rows"] > row["rows_in"]:
        return f"{row['rows']} rows were seen, which led to {row['rows_in']} pairs, answers and rejected rows"
    return f"{held.strangers} rows in its tables name another file" if held.strangers else ""


def _fault_of_answers(index: Mapping[str, Any], held: Mapping[str, Held], paired: HeldPaired | None) -> str:
    answers, made = sum(one.answers for one in held.values()), index["paired"]
    if made is None or paired is None:
        return f"{answers} answers were judged, and nothing was made of them" if answers else ""
    if answers != made["used"] + paired.left:
        return f"{answers} answers were judged, {made['used']} are in a pair and {paired.left} in quarantine"
    for name, count in (("pairs", paired.pairs), ("rejected", paired.rejected)):
        if made[name] != count:
            return f"{made[name]} {name} were made, {count} lie in the table"
    return ""


def volumes(read: Iterable[tuple[str, str, int]]) -> Volumes:
    """What each source gave, from (source, file, rows). It says where a project lies, so no artefact holds it."""
    found: dict[str, dict[str, Any]] = {}
    for source, file, rows in read:
        volume = found.setdefault(source, {"files": 0, "rows": 0, "names": {}})
        volume["files"] += 1
        volume["rows"] += rows
        if len(volume["names"]) < KEPT_NAMES:
            volume["names"][file] = rows
    return found


def feedback_volume(now: Volumes, before: Volumes | None, feedback: FeedbackSection) -> Verdict:
    """Rows that are gone since the last materialisation: a share of a source of the recipe, or a whole file of it.

    What grows elsewhere, in another source or another file that was there before, does not make up for lost rows. Files
    under new names do: an export that is renamed, or parts that are put together, are no loss.
    """
    fallen = [
        f"{source} ({was['rows']} rows in {was['files']} files before, {is_['rows']} in {is_['files']} now)"
        for source, was in (before or {}).items()
        if _has_fallen(was, is_ := now.get(source, NOTHING), feedback.max_row_fall)
    ]
    known = {name for volume in now.values() for name in volume["names"]}
    gone = [name for volume in (before or {}).values() for name in volume["names"] if name not in known]
    return Verdict(
        "feedback_volume",
        "error" if fallen else "pass",
        f"{_rows(now)} rows" + (f", {_rows(before)} before" if before is not None else ""),
        f"no source lost more than {feedback.max_row_fall:g} of its rows, nor a whole file",
        "feedback.max_row_fall of the recipe",
        f"put back what is missing: {_some(fallen)}. If it is meant, raise feedback.max_row_fall for one run (1 lets "
        "any file go); where this only warns, the next run is held against this one anyway"
        if fallen
        else "",
        f"files that were there before: {_some(sorted(gone))}" if gone else "",
    )


def _rows(given: Volumes) -> int:
    return sum(volume["rows"] for volume in given.values())


def _has_fallen(was: Mapping[str, Any], is_: Mapping[str, Any], limit: float) -> bool:
    lost = _lost_rows(was, is_)
    return bool(lost > limit * was["rows"] or (lost > 0 and is_["files"] < was["files"] and limit < 1))


def _lost_rows(was: Mapping[str, Any], is_: Mapping[str, Any]) -> int:
    """Rows that files lost, less those of new files. Of more than KEPT_NAMES files only the sums are known."""
    total = int(was["rows"] - is_["rows"])
    before: Mapping[str, int] = was["names"]
    now: Mapping[str, int] = is_["names"]
    if not isinstance(before, Mapping) or max(was["files"], is_["files"]) > KEPT_NAMES:
        return total
    lost = sum(max(0, rows - now.get(name, 0)) for name, rows in before.items())
    return lost - sum(rows for name, rows in now.items() if name not in before)


def _some(names: Sequence[str]) -> str:
    return "; ".join(names[:NAMED]) + (f"; and {len(names) - NAMED} more" if len(names) > NAMED else "")
