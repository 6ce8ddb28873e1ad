"""Argilla v2 records, as `to_list` and `to_json` export them, flat or nested: ranking, label and rating questions.

Names are the dataset's own, so a recipe may have to say what they mean, under `fields`:

- `question`: the question that counts; unsaid, the only one that has responses.
- `prompt`: the field before the answers; unsaid, `prompt`, `instruction`, `question`, `input` or `chat`.
- `candidates`: for a label question that names the better answer, the fields compared, separated by commas.
- `answer`: the field that a rating question rates, or that a number for a label is about.
- `choice:<option>`: the field that an option of the question stands for where its name is another; for a label also
  `tie`, or a number when it judges one answer.
- `edit`: a text question whose response is a corrected `answer`.
- `unstated_status: submitted`: take responses that state no status. The nested export leaves the status out, and then
  only a completed record is known to be submitted; the flat export has it.

Only submitted responses count, and of one user's the last. Several users' rankings are averaged, with the difference
of mean ranks as margin; their labels are decided by majority, with the agreement as margin; ratings are averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_assets.feedback.pair import JudgedAnswer, LabelKind, Message, Pair, named
from dpo_assets.feedback.readers import Format, Item, Place, ReadOptions, Row, RowFault, keys_of
from dpo_assets.feedback.readers.choices import choice_score, chosen_field, entries
from dpo_assets.feedback.readers.conversations import spoken
from dpo_assets.feedback.readers.logged import conversation
from dpo_assets.feedback.readers.modality import refuse_media, tools_text, with_tools
from dpo_assets.feedback.readers.values import identifier, number, timestamp
from dpo_assets.feedback.readers.votes import compared, majority, mean_ranks

HIGHEST_RANK = 10_000  # A question has a handful of options; a larger number is no rank.
_FLAT = ".responses"
_PROMPTS = ("prompt", "instruction", "question", "input", "chat")


@dataclass(frozen=True)
class _Record:
    """A record of either shape, with the submitted values of the question that counts."""

    id: str
    place: Place
    fields: Row
    question: str
    values: Sequence[Any]
    user: str | None
    when: str | None

    def said(self, key: str) -> list[Message]:
        return [spoken("assistant", self.fields[key], f"field `{key}`")]

    def pair(self, prompt: list[Message], chosen: str, rejected: str, label: LabelKind, margin: float) -> Pair:
        return Pair(
            prompt=prompt,
            chosen=self.said(chosen),
            rejected=self.said(rejected),
            source=self.place.source,
            row=f"{self.id}:{chosen}>{rejected}",
            line=self.place.line,
            label_kind=label,
            margin=margin,
            meta={"question": self.question, "annotators": len(self.values)},
            created_at=self.when,
            user=self.user,
        )


def read(row: Row, place: Place, options: ReadOptions) -> Iterator[Item]:
    """A record to pairs or to one judged answer; at least one item for each record."""
    row_id = place.row_id(row.get("id"))
    try:
        record = _record(row, row_id, place, options)
        key = chosen_field(options, "prompt", record.fields, _PROMPTS)
        prompt = conversation(record.fields[key], f"field `{key}`")
        tools = tools_text(record.fields.get("tools"), "fields.tools")
        yield from with_tools(_items(record, prompt, options), tools)
    except RowFault as fault:
        yield RowFault(fault.reason, fault.message, row_id)


def _items(record: _Record, prompt: list[Message], options: ReadOptions) -> Iterator[Item]:
    if "edit" in options.fields:
        yield _edit(record, prompt, options)
    elif all(isinstance(value, list) for value in record.values):
        yield from _ranking(record, prompt, options)
    elif all(number(value) is not None and not isinstance(value, str) for value in record.values):
        yield _rating(record, prompt, [number(value) or 0.0 for value in record.values], options)
    elif all(isinstance(value, str) for value in record.values):
        yield from _label(record, prompt, options)
    else:
        raise RowFault("wrong_type", f"responses to `{record.question}` are of several kinds")


def _record(row: Row, row_id: str, place: Place, options: ReadOptions) -> _Record:
    nested = row.get("responses")
    fields = row.get("fields") if isinstance(nested, Mapping) else row
    if not isinstance(fields, Mapping):
        raise RowFault("wrong_shape", f"`responses` without an object `fields`; the record has: {keys_of(row)}")
    refuse_media(fields, "fields.")
    if isinstance(nested, Mapping):
        names = [name for name, given in nested.items() if given]
    else:
        names = [name.removesuffix(_FLAT) for name, given in row.items() if name.endswith(_FLAT) and given]
        if not names and not any(name.endswith(_FLAT) for name in row):
            raise RowFault(
                "wrong_shape", f"no `responses` and no `<question>.responses`; the record has: {keys_of(row)}"
            )
    question = options.fields.get("edit") or options.fields.get("question")
    if question is None and len(names) > 1:
        message = f"answered are {', '.join(sorted(names))}; say which counts: `fields: {{question: ...}}`"
        raise RowFault("several_questions", message)
    question = question or (names[0] if names else None)
    if question not in names or question is None:
        raise RowFault("no_feedback", f"no response to `{question}`" if question else "no response")
    by_user: dict[str, Any] = {}
    responses = list(_nested(nested, question, row) if isinstance(nested, Mapping) else _flat(row, question))
    for n, (value, user, status) in enumerate(responses):
        if status is None and options.fields.get("unstated_status") == "submitted":
            status = "submitted"
        if status == "submitted" and value is not None:
            by_user[user or f"?{n}"] = value
    if not by_user:
        unstated = any(status is None for _, _, status in responses)
        hint = "; the export states no status: export it flat, or see `unstated_status`" if unstated else ""
        raise RowFault("unsubmitted", f"no submitted response to `{question}`{hint}")
    only = next(iter(by_user)) if len(by_user) == 1 else "?"
    user = None if only.startswith("?") else named(only)
    when = timestamp(row.get("updated_at"), row.get("inserted_at"))
    return _Record(row_id, place, fields, question, list(by_user.values()), user, when)


def _nested(nested: Row, question: str, row: Row) -> Iterator[tuple[Any, str | None, Any]]:
    given = nested[question]
    if not isinstance(given, list) or not all(isinstance(response, Mapping) for response in given):
        raise RowFault("wrong_shape", f"`responses.{question}` is not a list of responses")
    known = "submitted" if row.get("status") == "completed" else None
    for response in given:
        yield response.get("value"), identifier(response.get("user_id")), response.get("status", known)


def _flat(row: Row, question: str) -> Iterator[tuple[Any, str | None, Any]]:
    values, users, states = (row.get(f"{question}{_FLAT}{end}") for end in ("", ".users", ".status"))
    if not isinstance(values, list):
        raise RowFault("wrong_type", f"`{question}{_FLAT}` is {type(values).__name__}, expected a list")
    users, states = users or [None] * len(values), states or [None] * len(values)
    if not isinstance(users, list) or not isinstance(states, list) or not len(values) == len(users) == len(states):
        raise RowFault("wrong_shape", f"`{question}{_FLAT}`, its `.users` and its `.status` are not of one length")
    for value, user, status in zip(values, users, states, strict=True):
        yield value, identifier(user), status


def _field_of(record: _Record, option: str, options: ReadOptions) -> str:
    key = options.fields.get(f"choice:{option}", option)
    if key not in record.fields:
        hint = f'say which it stands for as `fields: {{"choice:{option}": ...}}`'
        raise RowFault("unknown_choice", f"{option!r} is none of the fields: {keys_of(record.fields)}; {hint}")
    return key


def _ranking(record: _Record, prompt: list[Message], options: ReadOptions) -> Iterator[Pair | RowFault]:
    ranks = mean_ranks([_ranks(value, record.question) for value in record.values])
    order = sorted(ranks, key=lambda name: (ranks[name], name))
    if len(order) < 2:
        raise RowFault("no_comparison", "fewer than two answers are ranked by everyone")
    for better, worse in compared(order, options.pairing):
        if ranks[better] == ranks[worse]:
            yield RowFault("tie", f"{better} and {worse} have rank {ranks[better]:g}", f"{record.id}:{better}>{worse}")
            continue
        chosen, rejected = (_field_of(record, name, options) for name in (better, worse))
        yield record.pair(prompt, chosen, rejected, "human_ranking", ranks[worse] - ranks[better])


def _ranks(value: list[Any], question: str) -> dict[str, float]:
    """A ranking by option: names in order, best first, or `{value, rank}` as the server keeps them."""
    ranks: dict[str, float] = {}
    for n, entry in enumerate(value):
        rank: float | None = n + 1.0
        if isinstance(entry, Mapping):
            rank = number(entry["rank"]) if entry.get("rank") is not None else rank
            entry = entry.get("value")
        if not isinstance(entry, str) or rank is None or not 0 <= rank <= HIGHEST_RANK or entry in ranks:
            raise RowFault("wrong_shape", f"a response to `{question}` is no ranking of options: {str(value)[:80]}")
        ranks[entry] = rank
    return ranks


def _label(record: _Record, prompt: list[Message], options: ReadOptions) -> Iterator[Pair | JudgedAnswer]:
    meant = [options.fields.get(f"choice:{label}", label) for label in record.values]
    if all(number(worth) is not None for worth in meant):
        yield _rating(record, prompt, [choice_score(options, label) for label in record.values], options)
        return
    candidates = entries(options, "candidates")
    if len(candidates) < 2:
        message = f'`{record.question}` names {meant[0]!r}; say what is compared: `fields: {{candidates: "a, b"}}`'
        raise RowFault("unknown_choice", message)
    winner, agreement = majority(meant)
    if winner == "tie":
        raise RowFault("tie", "no answer was found better")
    if winner not in candidates:
        raise RowFault("unknown_choice", f"{winner!r} is none of the candidates: {', '.join(candidates)}")
    for key in candidates:
        if key not in record.fields:
            raise RowFault("missing_field", f"no field `{key}`; there are: {keys_of(record.fields)}")
    for other in dict.fromkeys(candidates):
        if other != winner:
            yield record.pair(prompt, winner, other, "human_pair", agreement)


def _rating(record: _Record, prompt: list[Message], scores: Sequence[float], options: ReadOptions) -> JudgedAnswer:
    key = chosen_field(options, "answer", record.fields, ("response", "answer", "completion", "generation"))
    return JudgedAnswer(
        prompt=prompt,
        answer=record.said(key),
        score=sum(score / len(scores) for score in scores),  # A sum first could overflow.
        source=record.place.source,
        row=record.id,
        line=record.place.line,
        label_kind="human_rating",
        meta={"question": record.question, "annotators": len(scores)},
        created_at=record.when,
        user=record.user,
    )


def _edit(record: _Record, prompt: list[Message], options: ReadOptions) -> Pair:
    key = chosen_field(options, "answer", record.fields, ("response", "answer", "completion", "generation"))
    return Pair(
        prompt=prompt,
        chosen=[spoken("assistant", record.values[-1], f"the response to `{record.question}`")],
        rejected=record.said(key),
        source=record.place.source,
        row=record.id,
        line=record.place.line,
        label_kind="edit",
        meta={"question": record.question},
        created_at=record.when,
        user=record.user,
    )


def _fits(row: Row) -> float:
    if isinstance(row.get("fields"), Mapping) and isinstance(row.get("responses"), Mapping) and "suggestions" in row:
        return 1.0
    questions = [name.removesuffix(_FLAT) for name in row if name.endswith(_FLAT)]
    return 1.0 if any(f"{name}{_FLAT}.status" in row for name in questions) else 0.0


FORMAT = Format(
    name="argilla",
    title="Argilla rankings, labels and ratings",
    example='{"id": "...", "prompt": ..., "response_1": ..., "ranking.responses": [["response_1", ...]], ...}',
    documented="Argilla v2 reference, rg.Dataset.records to_list and to_json (flatten), and rg.Response",
    fits=_fits,
    read=read,
)
