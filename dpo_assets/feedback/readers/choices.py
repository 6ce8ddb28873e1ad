"""What a recipe says under `fields` of an export whose names are its owner's."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_assets.feedback.readers import ReadOptions, Row, RowFault, keys_of
from dpo_assets.feedback.readers.values import number


def chosen_field(options: ReadOptions, name: str, row: Row, usual: Sequence[str]) -> str:
    """The key of `row` that plays the part `name`: as the recipe says, or the first of `usual` that is there.

    Raises:
        RowFault: `missing_field`, with the keys that were found and what to write.
    """
    given = options.fields.get(name)
    if given is not None:
        if given in row:
            return given
        raise RowFault("missing_field", f"no `{given}`, which `fields` names as {name}; there are: {keys_of(row)}")
    for key in usual:
        if key in row:
            return key
    raise RowFault(
        "missing_field", f"which of these is the {name}: {keys_of(row)}? Say it as `fields: {{{name}: ...}}`"
    )


def entries(options: ReadOptions, name: str) -> list[str]:
    """A comma-separated list of `fields`; empty where it is not given."""
    return [entry.strip() for entry in options.fields.get(name, "").split(",") if entry.strip()]


def choice_score(options: ReadOptions, choice: str) -> float:
    """What a category is worth, as the recipe says: `fields: {"choice:good": "1"}`.

    A category has no order of its own, so none is assumed.

    Raises:
        RowFault: `unknown_choice`, with what to write.
    """
    worth = number(options.fields.get(f"choice:{choice}"))
    if worth is None:
        raise RowFault("unknown_choice", f'what is {choice!r} worth? Say it as `fields: {{"choice:{choice}": "1"}}`')
    return worth
