"""Langfuse's blob storage export: scores, joined with the observations that they judge.

The export is the file of scores (`scores/`); the companion is the file of observations as JSONL (`observations_v2/`, or
the older `observations/` and `traces/` as one file). Names in snake_case (files) and camelCase (API) are both read.
Under `fields`:

- `question`: the name of the scores that count; needed where the file has scores of several names, because a score of
  helpfulness says nothing beside a score of politeness.
- `choice:<category>`: what a category is worth. Langfuse numbers categories in the order of their definition, which is
  no order of merit.
- `prompt`, `answer`: the key of an input or an output that is an object of the application's own.

A score of a trace judges its root observation. A CORRECTION becomes an edit: the corrected text is chosen, the logged
output rejected. BOOLEAN is a thumb, NUMERIC and CATEGORICAL are ratings; scores of the source EVAL are a judge's.
TEXT scores are comments. A score that was changed is a later version of one id.

Kept until the end of the file, on disk: the scores, and of each observation its input and output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_assets.feedback.pair import JudgedAnswer, LabelKind, Pair, named
from dpo_assets.feedback.readers import Format, Item, Place, ReadOptions, Row, RowFault, keys_of
from dpo_assets.feedback.readers.choices import choice_score
from dpo_assets.feedback.readers.logged import answer_of, prompt_of, tools_in
from dpo_assets.feedback.readers.store import Companion, GroupedReader, Identity, Stored
from dpo_assets.feedback.readers.values import identifier, number, timestamp, version

_TYPES = ("NUMERIC", "CATEGORICAL", "BOOLEAN", "TEXT", "CORRECTION")


def _get(row: Row, name: str) -> Any:
    """The value of a snake_case name, or of the same name in camelCase."""
    if row.get(name) is not None:
        return row[name]
    head, *rest = name.split("_")
    return row.get(head + "".join(word.capitalize() for word in rest))


class ScoreReader(GroupedReader):
    """Reads the scores of one file.

    Raises:
        ConfigError: when the companion file is not there.
    """

    def __init__(self, options: ReadOptions) -> None:
        super().__init__(_identify, self._read_group, options)
        self._observations = Companion(options.companion, _observation)
        self._names: set[str] = set()

    def read(self, row: Row, place: Place) -> Iterator[tuple[Place, Item]]:
        """Keeps the score, and its name when it is one that rates."""
        name = row.get("name")
        if isinstance(name, str) and _get(row, "data_type") in ("NUMERIC", "CATEGORICAL", "BOOLEAN"):
            self._names.add(name)
        return super().read(row, place)

    def _read_group(self, rows: Sequence[Stored], options: ReadOptions) -> Iterator[tuple[Place, Item]]:
        for stored in rows:
            row_id = stored.place.row_id(stored.row.get("id"))
            try:
                yield stored.place, self._item(stored, row_id, options)
            except RowFault as fault:
                yield stored.place, RowFault(fault.reason, fault.message, row_id)

    def _item(self, stored: Stored, row_id: str, options: ReadOptions) -> Pair | JudgedAnswer:
        row, place = stored.row, stored.place
        kind, name = _get(row, "data_type"), row.get("name")
        if kind not in _TYPES:
            raise RowFault("wrong_shape", f"no known `data_type` of a score; the row has: {keys_of(row)}")
        if kind == "TEXT":
            raise RowFault("no_feedback", "a TEXT score is a comment, not a verdict")
        if kind != "CORRECTION":
            self._check_name(name, options)
        observation = self._observed(row)
        prompt = prompt_of(observation["input"], options.fields.get("prompt"))
        answer = answer_of(observation["output"], options.fields.get("answer"))
        tools = tools_in(observation["input"])
        about = {"score": name, "model": observation["model"], "observation": observation["id"]}
        when = timestamp(_get(row, "updated_at"), row.get("timestamp"), _get(row, "created_at"))
        user = named(identifier(_get(row, "author_user_id")))
        if kind == "CORRECTION":
            corrected = answer_of(_corrected(row), options.fields.get("answer"))
            return Pair(
                prompt=prompt,
                chosen=corrected,
                rejected=answer,
                source=place.source,
                row=row_id,
                line=place.line,
                label_kind="edit",
                meta=about,
                created_at=when,
                user=user,
                tools=tools,
            )
        score, label = _score(row, kind, options)
        return JudgedAnswer(
            prompt, answer, score, place.source, row_id, place.line, label, about, when, user, tools=tools
        )

    def _check_name(self, name: Any, options: ReadOptions) -> None:
        wanted = options.fields.get("question")
        if wanted is not None and name != wanted:
            raise RowFault("other_question", f"this score is {str(name)[:80]!r}, the recipe asks for {wanted!r}")
        if wanted is None and len(self._names) > 1:
            several = ", ".join(sorted(self._names)[:10])
            raise RowFault("several_questions", f"scores are {several}; say which counts: `fields: {{question: ...}}`")

    def _observed(self, row: Row) -> dict[str, Any]:
        """The observation that a score judges."""
        observation, trace = identifier(_get(row, "observation_id")), identifier(_get(row, "trace_id"))
        if observation is not None:
            found = self._observations.find(observation)
            if found is None:
                raise self._observations.absent(f"observation {observation}")
            return found
        if trace is None:
            raise RowFault("no_counterpart", "the score judges a session or a dataset run, not one answer")
        # A file of traces has the trace itself; a file of observations has its root.
        found = self._observations.find(trace) or self._observations.only(trace)
        if found is None:
            raise self._observations.absent(f"trace {trace}, or one root observation of it,")
        return found


def _identify(row: Row) -> Identity:
    written = version(_get(row, "updated_at"), row.get("timestamp"), _get(row, "created_at"))
    return Identity(identifier(row.get("id")), written)


def _observation(row: Row) -> Mapping[str, Any] | None:
    """What is kept of an observation or a trace; None for another shape."""
    if identifier(row.get("id")) is None or ("input" not in row and "output" not in row):
        return None
    model = _get(row, "provided_model_name") or row.get("model")
    return {
        "id": identifier(row.get("id")),
        "group": identifier(_get(row, "trace_id")),
        "top": not _get(row, "parent_observation_id"),
        "input": row.get("input"),
        "output": row.get("output"),
        "model": model if isinstance(model, str) else None,
    }


def _corrected(row: Row) -> Any:
    for name in ("string_value", "long_string_value", "value"):
        if isinstance(value := _get(row, name), str) and value.strip():
            return value
    raise RowFault("missing_text", f"a CORRECTION without text; the row has: {keys_of(row)}")


def _score(row: Row, kind: str, options: ReadOptions) -> tuple[float, LabelKind]:
    judge = row.get("source") == "EVAL"
    value, written = row.get("value"), _get(row, "string_value")
    if kind == "CATEGORICAL":
        category = written if isinstance(written, str) else value
        if not isinstance(category, str):
            raise RowFault("missing_field", f"a CATEGORICAL score without a category; the row has: {keys_of(row)}")
        return choice_score(options, category), "judge_rating" if judge else "human_rating"
    score = number(value)
    if kind == "BOOLEAN":
        score = float(value) if isinstance(value, bool) else score
        if score is None and isinstance(written, str) and written.lower() in ("true", "false"):
            score = float(written.lower() == "true")
        if score not in (0.0, 1.0):
            raise RowFault("wrong_type", f"a BOOLEAN score is {str(value)[:40]!r}, expected 0 or 1")
        return 1.0 if score else -1.0, "judge_rating" if judge else "human_thumb"
    if score is None:
        raise RowFault("wrong_type", f"a NUMERIC score is {str(value)[:40]!r}, expected a number")
    return score, "judge_rating" if judge else "human_rating"


def _fits(row: Row) -> float:
    if _get(row, "data_type") not in _TYPES or "name" not in row or "source" not in row:
        return 0.0
    return 1.0 if "trace_id" in row or "traceId" in row else 0.5


FORMAT = Format(
    name="langfuse",
    title="Langfuse scores and corrections",
    example='{"id": "...", "trace_id": "...", "name": "helpful", "value": 1, "data_type": "BOOLEAN", ...}',
    documented="Langfuse, Blob storage export field reference, scores and observations_v2; Corrected outputs",
    fits=_fits,
    open=ScoreReader,
    companion="the observations of the scores, a JSONL file",
)
