"""Label Studio's JSON export: tasks with their annotations. Comparisons, ratings and choices.

Names in a task are the labelling configuration's own, so a recipe may have to say what they mean, under `fields`:

- `prompt`, `left`, `right`: keys of `data`. Unsaid, `prompt` (or `instruction`, `question`, `text`) and, for the sides,
  the objects that the Pairwise tag names in `toName` where these are keys of `data`, else `answer1` and `answer2`.
- `answer`: the key of the one answer that is rated; unsaid, the object that the Rating or Choices tag names.
- `question`: the name (`from_name`) of the tag that counts, where a task has several.
- `choice:<choice>`: what a choice means: `left`, `right` or `tie` between two answers, a number for one.

Cancelled annotations are left out, and of one annotator's the latest counts. Of several annotators the majority
decides a comparison, with their agreement (the share of them who chose so) as margin; their ratings are averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_assets.feedback.pair import JudgedAnswer, Message, Pair, named
from dpo_assets.feedback.readers import Format, Item, Place, ReadOptions, Row, RowFault, keys_of
from dpo_assets.feedback.readers.choices import choice_score, chosen_field
from dpo_assets.feedback.readers.conversations import spoken
from dpo_assets.feedback.readers.logged import conversation
from dpo_assets.feedback.readers.modality import refuse_media, tools_text, with_tools
from dpo_assets.feedback.readers.values import identifier, number, section, timestamp, version
from dpo_assets.feedback.readers.votes import majority

_PROMPTS = ("prompt", "instruction", "question", "text")
_SIDES = ("left", "right")


@dataclass(frozen=True)
class _Verdict:
    """One annotator's result of one tag."""

    tag: str
    target: str
    kind: str
    value: Mapping[str, Any]
    annotation: Mapping[str, Any]


def read(row: Row, place: Place, options: ReadOptions) -> Iterator[Item]:
    """A task to one pair, or to one judged answer for each answer rated; at least one item for each task."""
    row_id = place.row_id(row.get("id"))
    try:
        data = section(row, "data")
        refuse_media(data, "data.")
        verdicts = _verdicts(row, options)
        key = chosen_field(options, "prompt", data, _PROMPTS)
        prompt = conversation(data[key], f"`data.{key}`")
        if verdicts[0].kind == "pairwise" or (verdicts[0].kind == "choices" and _compares(verdicts, data, options)):
            items: Iterable[Item] = [_pair(verdicts, data, prompt, row_id, place, options)]
        else:
            items = _judged(verdicts, data, prompt, row_id, place, options)
        yield from with_tools(items, tools_text(data.get("tools"), "data.tools"))
    except RowFault as fault:
        yield RowFault(fault.reason, fault.message, row_id)


def _verdicts(row: Row, options: ReadOptions) -> list[_Verdict]:
    """The verdicts that count, of one kind of tag, the latest of each annotator."""
    annotations = row.get("annotations")
    if not isinstance(annotations, list):
        raise RowFault("wrong_shape", f"no list of `annotations`; the task has: {keys_of(row)}")
    given = [a for a in annotations if isinstance(a, Mapping)]
    if len(given) != len(annotations):
        raise RowFault("wrong_type", "`annotations` holds something that is not an annotation")
    counted = [a for a in given if not a.get("was_cancelled")]
    if not counted:
        raise RowFault(
            "cancelled" if given else "no_feedback", "every annotation was cancelled" if given else "no annotation"
        )
    latest: dict[str, Mapping[str, Any]] = {}
    for n, annotation in enumerate(counted):
        who = _annotator(annotation) or f"?{n}"
        if who not in latest or _age(annotation) >= _age(latest[who]):
            latest[who] = annotation
    found = [v for annotation in latest.values() for v in _results(annotation, options)]
    kinds = list(dict.fromkeys(v.kind for v in found))
    if len(kinds) > 1:
        tags = ", ".join(dict.fromkeys(f"{v.tag} ({v.kind})" for v in found))
        raise RowFault(
            "several_questions", f"the task asks several: {tags}; say which counts: `fields: {{question: ...}}`"
        )
    if not found:
        raise RowFault("no_feedback", "no annotation holds a comparison, rating or choice" + _of_question(options))
    return found


def _of_question(options: ReadOptions) -> str:
    return f" of `{options.fields['question']}`" if "question" in options.fields else ""


def _results(annotation: Mapping[str, Any], options: ReadOptions) -> Iterator[_Verdict]:
    results = annotation.get("result")
    for result in results if isinstance(results, list) else ():
        if not isinstance(result, Mapping) or not isinstance(value := result.get("value"), Mapping):
            continue
        kind, tag, target = result.get("type"), result.get("from_name"), result.get("to_name")
        if kind in ("pairwise", "rating", "choices") and options.fields.get("question", tag) == tag:
            yield _Verdict(str(tag), target if isinstance(target, str) else "", str(kind), value, annotation)


def _annotator(annotation: Mapping[str, Any]) -> str | None:
    who = annotation.get("completed_by")
    return identifier(who.get("id") or who.get("email")) if isinstance(who, Mapping) else identifier(who)


def _age(annotation: Mapping[str, Any]) -> float:
    return version(annotation.get("updated_at"), annotation.get("created_at"))


def _sides(verdicts: Sequence[_Verdict], data: Row, options: ReadOptions) -> list[str]:
    """The keys of the left and the right answer."""
    named = [name.strip() for name in verdicts[0].target.split(",")]
    usual = named if len(named) == 2 and all(name in data for name in named) else ["answer1", "answer2"]
    return [chosen_field(options, side, data, (key,)) for side, key in zip(_SIDES, usual, strict=True)]


def _chosen(verdict: _Verdict) -> str:
    choices = verdict.value.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], str):
        raise RowFault("wrong_shape", f"`{verdict.tag}` holds {str(choices)[:60]}, expected one choice")
    return choices[0]


def _side_of(verdict: _Verdict, sides: Sequence[str], options: ReadOptions) -> str | None:
    """`left`, `right` or `tie`; None for a choice that means something else."""
    if verdict.kind == "pairwise":
        selected = verdict.value.get("selected")
        if selected is None or selected == "none":
            return "tie"
        if selected not in _SIDES:
            raise RowFault("wrong_shape", f"`{verdict.tag}` selects {str(selected)[:60]!r}, expected left or right")
        return str(selected)
    choice = _chosen(verdict)
    meant = options.fields.get(f"choice:{choice}", choice).lower()
    if meant in (*_SIDES, "tie"):
        return meant
    return _SIDES[sides.index(choice)] if choice in sides else None


def _compares(verdicts: Sequence[_Verdict], data: Row, options: ReadOptions) -> bool:
    """Whether the choices are between two answers."""
    try:
        return _side_of(verdicts[0], _sides(verdicts, data, options), options) is not None
    except RowFault:
        return False


def _pair(
    verdicts: Sequence[_Verdict], data: Row, prompt: list[Message], row_id: str, place: Place, options: ReadOptions
) -> Pair:
    tags = list(dict.fromkeys(v.tag for v in verdicts))
    if len(tags) > 1:
        raise RowFault(
            "several_questions", f"the task compares by {', '.join(tags)}; say which: `fields: {{question: ...}}`"
        )
    sides = _sides(verdicts, data, options)
    votes = []
    for verdict in verdicts:
        if (side := _side_of(verdict, sides, options)) is None:
            raise RowFault("unknown_choice", f"choice {_chosen(verdict)!r} is neither left, right nor tie")
        votes.append(side)
    winner, agreement = majority(votes)
    if winner == "tie":
        raise RowFault("tie", "most annotators found neither answer better")
    left, right = ([spoken("assistant", data[key], f"`data.{key}`")] for key in sides)
    chosen, rejected = (left, right) if winner == "left" else (right, left)
    return Pair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        source=place.source,
        row=row_id,
        line=place.line,
        margin=agreement,
        meta={"annotators": len(votes), "tag": tags[0]},
        created_at=_when(verdicts),
        user=_user(verdicts),
    )


def _judged(
    verdicts: Sequence[_Verdict], data: Row, prompt: list[Message], row_id: str, place: Place, options: ReadOptions
) -> Iterator[JudgedAnswer]:
    by_answer: dict[str, list[_Verdict]] = {}
    for verdict in verdicts:
        usual = (verdict.target, "answer", "response", "completion")
        by_answer.setdefault(chosen_field(options, "answer", data, usual), []).append(verdict)
    for key, given in by_answer.items():
        tags = list(dict.fromkeys(v.tag for v in given))
        if len(tags) > 1:
            message = f"`{key}` is judged by {', '.join(tags)}; say which counts: `fields: {{question: ...}}`"
            raise RowFault("several_questions", message)
        scores = [_score(verdict, options) for verdict in given]
        yield JudgedAnswer(
            prompt=prompt,
            answer=[spoken("assistant", data[key], f"`data.{key}`")],
            score=sum(score / len(scores) for score in scores),  # A sum first could overflow.
            source=place.source,
            row=f"{row_id}:{key}",
            line=place.line,
            label_kind="human_rating",
            meta={"annotators": len(scores), "tag": tags[0]},
            created_at=_when(given),
            user=_user(given),
        )


def _score(verdict: _Verdict, options: ReadOptions) -> float:
    if verdict.kind == "choices":
        return choice_score(options, _chosen(verdict))
    rating = number(verdict.value.get("rating"))
    if rating is None:
        raise RowFault(
            "wrong_type", f"`{verdict.tag}` rates {str(verdict.value.get('rating'))[:40]!r}, expected a number"
        )
    return rating


def _when(verdicts: Sequence[_Verdict]) -> str | None:
    last = max((v.annotation for v in verdicts), key=_age)
    return timestamp(last.get("updated_at"), last.get("created_at"))


def _user(verdicts: Sequence[_Verdict]) -> str | None:
    who = {_annotator(v.annotation) for v in verdicts}
    return named(who.pop()) if len(who) == 1 else None


def _fits(row: Row) -> float:
    annotations = row.get("annotations")
    if not isinstance(row.get("data"), Mapping) or not isinstance(annotations, list):
        return 0.0
    return 1.0 if all(isinstance(a, Mapping) and "result" in a for a in annotations) else 0.5


FORMAT = Format(
    name="label_studio",
    title="Label Studio comparisons, ratings and choices",
    example='{"id": 1, "data": {"prompt": ..., "answer1": ..., "answer2": ...}, "annotations": [{"result": [...]}]}',
    documented="Label Studio guide, Task format (JSON export), and the tags Pairwise, Rating and Choices",
    fits=_fits,
    read=read,
)
