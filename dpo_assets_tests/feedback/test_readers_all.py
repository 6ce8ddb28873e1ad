"""All formats together: which one a row looks like, and rows that no export ever had."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_assets.feedback.pair import LABEL_KINDS, JudgedAnswer, Pair
from dpo_assets.feedback.pairing import POLICIES
from dpo_assets.feedback.readers import ReadOptions, RowFault, formats
from dpo_assets.feedback.tables import pairs_frame
from dpo_assets_tests.feedback.exported import EXPORTS, PLACE, items_of, rows_of
from dpo_assets_tests.samples import assistant, user

HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}
ANSWERS = [{"message_id": n, "role": "assistant", "text": n, "rank": r, "replies": []} for r, n in enumerate("ab")]
TREE = {"message_tree_id": "t", "prompt": {"message_id": "q", "role": "prompter", "text": "q", "replies": ANSWERS}}
INLINE = {"hh_rlhf": [HH], "oasst_tree": [TREE]}
ROWS = {name: rows_of(name) for name in formats() if (EXPORTS / f"{name}.jsonl").is_file()} | INLINE
ROW_BY_ROW = sorted(name for name, format in formats().items() if format.read is not None)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_the_rows_of_an_export_fit_their_own_format_best(name: str) -> None:
    for row in ROWS[name]:
        fits = {other.name: other.fits(row) for other in formats().values()}
        own = fits.pop(name)
        assert own >= 0.9, row
        assert own > max(fits.values()), (row, fits)


def test_columns_that_trl_would_lose_make_a_row_look_like_another_format() -> None:
    """A system message beside the prompt, and scores beside the answers, are no columns of TRL's."""
    fits = {name: format.fits for name, format in formats().items()}
    plain = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert fits["trl"](plain) > fits["axolotl"](plain)
    assert fits["axolotl"](plain | {"system": "s"}) > fits["trl"](plain | {"system": "s"})
    scored = plain | {"score_chosen": 2, "score_rejected": 1}
    assert fits["ultrafeedback_binarized"](scored) > fits["trl"](scored)
    whole = {"messages": [user("q")], "chosen": assistant("a"), "rejected": assistant("b")}
    assert fits["axolotl"](whole) > fits["trl"](whole)


@pytest.mark.parametrize("name", sorted(formats()))
def test_a_row_of_nothing_fits_no_format_and_is_refused_with_its_keys(name: str) -> None:
    format = formats()[name]
    for row in ({}, {"foo": 1, "bar": None}):
        assert format.fits(row) == 0.0
        if format.read is not None:
            [fault] = items_of(name, row)
            assert isinstance(fault, RowFault)
            assert fault.reason in ("wrong_shape", "missing_field")
            assert ("bar, foo" if row else "no keys") in fault.message or name == "oasst_tree"


@pytest.mark.parametrize("name", sorted(formats()))
def test_every_format_says_where_it_is_documented_and_shows_a_row(name: str) -> None:
    format = formats()[name]
    assert format.name == name
    assert format.documented
    assert format.title
    assert format.example.startswith("{")
    assert (format.read is None) != (format.open is None)


# Rows that no export ever had

_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.just(10**400),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=6),
    st.sampled_from(
        ["user", "assistant", "system", "tool", "model_a", "tie", "leftvote", "[]", '[{"role": "user"}]', "[["]
    ),
)
_any = st.recursive(
    _scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
_KEYS = sorted({key for rows in ROWS.values() for row in rows for key in row} | {"role", "content", "other"})
_rows = st.dictionaries(st.sampled_from(_KEYS), _any, max_size=8)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, by its path."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in _places(item, (*path, key)))]


@st.composite
def damaged_rows(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """A row of an export with some values, however deep, replaced or taken out."""
    row = copy.deepcopy(draw(st.sampled_from(ROWS.get(name) or [{}])))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(_places(row)))
        if not path:
            continue
        inner: Any = row
        for key in path[:-1]:
            inner = inner[key]
        if draw(st.booleans()):
            inner[path[-1]] = draw(_any)
        else:
            del inner[path[-1]]
    return row


_options = st.builds(ReadOptions, st.sampled_from(POLICIES), min_margin=st.sampled_from([0.0, 1.0]))


def _is_sound(name: str, row: dict[str, Any], options: ReadOptions) -> None:
    before = json.dumps(row, sort_keys=True)
    assert 0.0 <= formats()[name].fits(row) <= 1.0
    items = items_of(name, row, options)
    assert items, "a row led to nothing"
    assert json.dumps(row, sort_keys=True) == before, "the reader changed the row"
    for item in items:
        assert item.row
        if isinstance(item, RowFault):
            assert item.reason
            assert item.message
            continue
        assert (item.source, item.line) == (PLACE.source, PLACE.line)
        assert item.label_kind in LABEL_KINDS
        json.dumps(item.meta)
        if isinstance(item, JudgedAnswer):
            assert isinstance(item.score, float)
            said = [*item.prompt, *item.answer]
        else:
            assert isinstance(item, Pair)
            assert pairs_frame([item])["pair_id"].to_list() == [item.pair_id]
            said = [*item.prompt, *item.chosen, *item.rejected]
        assert all(isinstance(m["role"], str) and isinstance(m["content"], str) and len(m) == 2 for m in said)


@pytest.mark.parametrize("name", ROW_BY_ROW)
@settings(max_examples=40, deadline=None)
@given(row=_rows, options=_options)
def test_arbitrary_objects_never_raise(name: str, row: dict[str, Any], options: ReadOptions) -> None:
    _is_sound(name, row, options)


@pytest.mark.parametrize("name", [name for name in sorted(ROWS) if not formats()[name].companion])
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_exports_never_raise(name: str, data: st.DataObject) -> None:
    _is_sound(name, data.draw(damaged_rows(name)), data.draw(_options))
