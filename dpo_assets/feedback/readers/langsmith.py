"""LangSmith feedback, joined with the runs that it judges: scores, corrections, pairwise comparisons.

The export is the feedback, one row each; the companion is the runs as JSONL, each with `id`, `inputs`, `outputs` (and,
for comparative experiments, `reference_example_id`). Under `fields`:

- `question`: the `key` of the feedback that counts; needed where the file has feedback of several keys.
- `choice:<value>`: what a category is worth.
- `prompt`, `answer`: the key of an input or an output that is an object of the application's own.

Rows that share `feedback_group_id`, or a comparative experiment and its example, are one comparison: the higher score
wins, equal scores are a tie. The pair stands on the winner's row; a row of which it is the other side says so. A
`correction` that holds text becomes an edit; one that holds a score corrects the score, and is then a person's.
Feedback that was changed is a later version of one id.

Kept until the end of the file, on disk: the feedback, and of each run its inputs and outputs; in memory the rows of one
comparison at a time.
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
from dpo_assets.feedback.readers.votes import compared

_MACHINES = ("model", "auto_eval")


class FeedbackReader(GroupedReader):
    """Reads the feedback of one file.

    Raises:
        ConfigError: when the companion file is not there.
    """

    def __init__(self, options: ReadOptions) -> None:
        self._runs = Companion(options.companion, _run)
        self._keys: set[str] = set()
        super().__init__(self._identify, self._read_group, options)

    def read(self, row: Row, place: Place) -> Iterator[tuple[Place, Item]]:
        """Keeps the feedback, and its key when it is one that scores."""
        if isinstance(key := row.get("key"), str) and (row.get("score") is not None or row.get("value") is not None):
            self._keys.add(key)
        return super().read(row, place)

    def _identify(self, row: Row) -> Identity:
        written = version(row.get("modified_at"), row.get("created_at"))
        return Identity(identifier(row.get("id")), written, self._comparison(row))

    def _comparison(self, row: Row) -> str | None:
        """What joins the rows of one comparison."""
        key = str(row.get("key"))
        if (group := identifier(row.get("feedback_group_id"))) is not None:
            return f"group\n{group}\n{key}"
        experiment, run_id = identifier(row.get("comparative_experiment_id")), identifier(row.get("run_id"))
        run = self._runs.find(run_id) if experiment is not None and run_id is not None else None
        return None if run is None or run["example"] is None else f"example\n{experiment}\n{run['example']}\n{key}"

    def _read_group(self, rows: Sequence[Stored], options: ReadOptions) -> Iterator[tuple[Place, Item]]:
        scores = [stored for stored in rows if _edited(stored.row.get("correction")) is None]
        # A group id alone is no comparison: an evaluator may write several scores of one run together.
        if len({str(stored.row.get("run_id")) for stored in scores}) > 1:
            yield from self._compared(scores, options)
            rows = [stored for stored in rows if _edited(stored.row.get("correction")) is not None]
        for stored in rows:
            row_id = stored.place.row_id(stored.row.get("id"))
            try:
                yield stored.place, self._single(stored, row_id, options)
            except RowFault as fault:
                yield stored.place, RowFault(fault.reason, fault.message, row_id)

    def _single(self, stored: Stored, row_id: str, options: ReadOptions) -> Pair | JudgedAnswer:
        row, place = stored.row, stored.place
        correction = row.get("correction")
        edited = _edited(correction)
        if edited is None:
            if row.get("comparative_experiment_id") is not None:
                raise RowFault("no_comparison", "the other side of this comparison is not in this file")
            self._check_key(row, options)
            score, label = _score(row, options)
        run = self._judged(row)
        prompt = prompt_of(run["inputs"], options.fields.get("prompt"))
        answer = answer_of(run["outputs"], options.fields.get("answer"))
        tools = _tools(run)
        when, user = _when(row), _user(row)
        about = {"key": row.get("key"), "run": run["id"]}
        if edited is not None:
            return Pair(
                prompt=prompt,
                chosen=answer_of(edited, options.fields.get("answer")),
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
        return JudgedAnswer(
            prompt, answer, score, place.source, row_id, place.line, label, about, when, user, tools=tools
        )

    def _compared(self, rows: Sequence[Stored], options: ReadOptions) -> Iterator[tuple[Place, Item]]:
        """One comparison of two or more runs."""
        scored: list[tuple[float, Stored]] = []
        for stored in rows:
            try:
                self._check_key(stored.row, options)
                scored.append((_score(stored.row, options)[0], stored))
            except RowFault as fault:
                row_id = stored.place.row_id(stored.row.get("id"))
                yield stored.place, RowFault(fault.reason, fault.message, row_id)
        scored.sort(key=lambda entry: (-entry[0], entry[1].place.line))
        if len(scored) == 1:
            place, row_id = scored[0][1].place, scored[0][1].place.row_id(scored[0][1].row.get("id"))
            yield place, RowFault("no_comparison", "no other row of its comparison can be used", row_id)
        if len(scored) < 2:
            return
        spoken = set()
        for better, worse in compared(scored, options.pairing):
            spoken.add(better[1].place.line)
            yield better[1].place, self._pair(better, worse, options)
        for _, stored in scored:
            if stored.place.line not in spoken:
                message = f"part of the comparison on line {scored[0][1].place.line}"
                yield stored.place, RowFault("other_side", message, stored.place.row_id(stored.row.get("id")))

    def _pair(self, better: tuple[float, Stored], worse: tuple[float, Stored], options: ReadOptions) -> Item:
        (high, winner), (low, loser) = better, worse
        row, place = winner.row, winner.place
        row_id = f"{place.row_id(row.get('id'))}>{loser.place.row_id(loser.row.get('id'))}"
        if high == low:
            return RowFault("tie", f"both runs have the score {high:g}", row_id)
        try:
            runs = [self._judged(row), self._judged(loser.row)]
            prompt, other = (prompt_of(run["inputs"], options.fields.get("prompt")) for run in runs)
            tools, others = map(_tools, runs)
            if (prompt, tools) != (other, others):
                raise RowFault("no_shared_prompt", "the two runs were given different inputs")
            chosen, rejected = (answer_of(run["outputs"], options.fields.get("answer")) for run in runs)
        except RowFault as fault:
            return RowFault(fault.reason, fault.message, row_id)
        return Pair(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            source=place.source,
            row=row_id,
            line=place.line,
            label_kind="judge_rating" if _by_machine(row) else "human_pair",
            margin=high - low if high - low < float("inf") else None,
            meta={"key": row.get("key"), "runs": [run["id"] for run in runs]},
            created_at=_when(row),
            user=_user(row),
            tools=tools,
        )

    def _check_key(self, row: Row, options: ReadOptions) -> None:
        key, wanted = row.get("key"), options.fields.get("question")
        if wanted is not None and key != wanted:
            raise RowFault("other_question", f"this feedback is {str(key)[:80]!r}, the recipe asks for {wanted!r}")
        if wanted is None and len(self._keys) > 1:
            several = ", ".join(sorted(self._keys)[:10])
            raise RowFault("several_questions", f"keys are {several}; say which counts: `fields: {{question: ...}}`")

    def _judged(self, row: Row) -> dict[str, Any]:
        run_id = identifier(row.get("run_id"))
        if run_id is None:
            raise RowFault("wrong_shape", f"no `run_id` of a judged run; the row has: {keys_of(row)}")
        run = self._runs.find(run_id)
        if run is None:
            raise self._runs.absent(f"run {run_id}")
        return run


def _run(row: Row) -> Mapping[str, Any] | None:
    """What is kept of a run; None for another shape."""
    if identifier(row.get("id")) is None or ("inputs" not in row and "outputs" not in row):
        return None
    return {
        "id": identifier(row.get("id")),
        "inputs": row.get("inputs"),
        "outputs": row.get("outputs"),
        "example": identifier(row.get("reference_example_id")),
        "tools": _given_tools(row),
    }


def _given_tools(row: Row) -> Any:
    """What a model was told of tools, which LangSmith keeps apart from its inputs."""
    extra = row.get("extra")
    parameters = extra.get("invocation_params") if isinstance(extra, Mapping) else None
    return parameters.get("tools") or parameters.get("functions") if isinstance(parameters, Mapping) else None


def _tools(run: Row) -> str:
    return tools_in(run["inputs"]) or tools_in({"tools": run["tools"]})


def _edited(correction: Any) -> Any:
    """The corrected output; None where the correction is of a score, or there is none."""
    if isinstance(correction, Mapping):
        return correction if set(correction) - {"score", "value", "comment", "explanation"} else None
    return correction if isinstance(correction, str) and correction.strip() else None


def _score(row: Row, options: ReadOptions) -> tuple[float, LabelKind]:
    """The score, as a person corrected it where one did."""
    correction = row.get("correction")
    corrected = correction if isinstance(correction, Mapping) else {}
    person = corrected.get("score") is not None
    score = corrected.get("score") if person else row.get("score")
    machine = _by_machine(row) and not person
    if isinstance(score, bool):
        return 1.0 if score else -1.0, "judge_rating" if machine else "human_thumb"
    worth = number(score)
    if worth is None and isinstance(category := corrected.get("value") or row.get("value"), str):
        worth = choice_score(options, category)
    if worth is None:
        found = f"`score` is {str(score)[:40]!r}" if score is not None else f"no `score`; the row has: {keys_of(row)}"
        raise RowFault("no_feedback" if "score" in row and score is None else "wrong_shape", found)
    return worth, "judge_rating" if machine else "human_rating"


def _origin(row: Row) -> Row:
    source = row.get("feedback_source")
    return source if isinstance(source, Mapping) else {}


def _by_machine(row: Row) -> bool:
    return _origin(row).get("type") in _MACHINES


def _user(row: Row) -> str | None:
    return named(identifier(_origin(row).get("user_id")))


def _when(row: Row) -> str | None:
    return timestamp(row.get("modified_at"), row.get("created_at"))


def _fits(row: Row) -> float:
    if not {"run_id", "key", "score"} <= set(row):
        return 0.0
    return 1.0 if "feedback_source" in row or "correction" in row else 0.6


FORMAT = Format(
    name="langsmith",
    title="LangSmith feedback, corrections and pairwise annotations",
    example='{"id": "...", "run_id": "...", "key": "correctness", "score": 1, "correction": null, ...}',
    documented="LangSmith, Feedback data format; Pairwise annotation queues; Audit evaluator scores",
    fits=_fits,
    open=FeedbackReader,
    companion="the runs of the feedback, a JSONL file",
)
