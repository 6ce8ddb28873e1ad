"""What rows of several formats have in common: how they are read one by one, and how they compare answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from typing import Any, NamedTuple

from dpo_assets.feedback.pair import JudgedAnswer, LabelKind, Message, Pair
from dpo_assets.feedback.pairing import proposed
from dpo_assets.feedback.readers import Item, Place, Read, ReadOptions, Row, RowFault
from dpo_assets.feedback.readers.conversations import answer_in, is_whole, shared_prefix, turns
from dpo_assets.feedback.readers.values import field, number, others

Scored = tuple[list[Message], float, dict[str, Any]]  # An answer, its score (higher is better), and its meta.


class At(NamedTuple):
    """One row as its reader sees it: where it stands, what it is called, and the choices of the recipe."""

    place: Place
    row: str
    options: ReadOptions

    def pair(
        self,
        prompt: list[Message],
        chosen: list[Message],
        rejected: list[Message],
        meta: dict[str, Any],
        kind: LabelKind = "human_pair",
        margin: float | None = None,
        row: str = "",
    ) -> Pair:
        """The pair that the row holds, or one of them, which `row` then names."""
        return Pair(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            source=self.place.source,
            row=row or self.row,
            line=self.place.line,
            label_kind=kind,
            margin=margin,
            meta=meta,
        )

    def judged(
        self, prompt: list[Message], answer: list[Message], score: float, kind: LabelKind, meta: dict[str, Any]
    ) -> JudgedAnswer:
        """The one answer that the row judges. What it is held against is a policy's choice among other rows."""
        source, line = self.place.source, self.place.line
        return JudgedAnswer(prompt, answer, score, source, self.row, line, label_kind=kind, meta=meta)

    def thumb(self, prompt: list[Message], answer: list[Message], liked: bool, meta: dict[str, Any]) -> JudgedAnswer:
        return self.judged(prompt, answer, 1.0 if liked else -1.0, "human_thumb", meta)

    def ranking(
        self, prompt: list[Message], scored: Sequence[Scored], kind: LabelKind, meta: dict[str, Any]
    ) -> Iterator[Pair | RowFault]:
        """The pairs of a row that ranks several answers itself, as the recipe's policy chooses them.

        They are made here and not with other rows' answers: a rank, or a judge's score, says nothing outside its row.

        Raises:
            RowFault: `no_comparison` for fewer than two answers.
        """
        if len(scored) < 2:
            raise RowFault("no_comparison", f"{len(scored)} judged answers; a comparison needs two")
        for a, b in proposed([score for _, score, _ in scored], self.options.pairing):
            (chosen, high, of_chosen), (rejected, low, of_rejected) = scored[a], scored[b]
            row = self.row if len(scored) == 2 else f"{self.row}.{a}>{b}"
            sides = {"chosen": of_chosen, "rejected": of_rejected} if of_chosen or of_rejected else {}
            labels = kind == "human_pair"  # Which one is better, not by how much.
            if high == low:
                yield RowFault("tie", "both answers were judged alike", row)
            elif not labels and high - low < self.options.min_margin:
                yield RowFault("tie", f"the answers lie {high - low:g} apart, less than min_margin", row)
            else:
                margin = None if labels else high - low
                yield self.pair(prompt, chosen, rejected, meta | sides, kind, margin, row)


def by_row(*ids: str) -> Callable[[Callable[[Row, At], Iterable[Item]]], Read]:
    """A `read` from a generator of items that raises its faults; a row's id stands under the first of `ids` it has."""

    def decorate(body: Callable[[Row, At], Iterable[Item]]) -> Read:
        @wraps(body)
        def read(row: Row, place: Place, options: ReadOptions) -> Iterator[Item]:
            given = None
            for name in ids:
                if (given := row.get(name)) is not None:
                    break
            at = At(place, place.row_id(given), options)
            try:
                yield from body(row, at)
            except RowFault as fault:
                yield RowFault(fault.reason, fault.message, fault.row or at.row)

        return read

    return decorate


def strength(row: Row, chosen: str, rejected: str) -> float | None:
    """How much higher the chosen answer was scored, or None where a score is missing.

    Raises:
        RowFault: `tie` for equal scores, `score_contradicts` where the rejected answer has the higher one.
    """
    better, worse = number(row.get(chosen)), number(row.get(rejected))
    if better is None or worse is None:
        return None
    if better == worse:
        raise RowFault("tie", f"`{chosen}` and `{rejected}` are both {better:g}")
    if better < worse:
        raise RowFault("score_contradicts", f"`{chosen}` is {better:g}, `{rejected}` is {worse:g}")
    return better - worse


def rated_pair(row: Row, at: At, chosen_score: str, rejected_score: str, left_out: tuple[str, ...] = ()) -> Pair:
    """`chosen` and `rejected` as answers to `prompt` or as whole conversations, with a judge's score each."""
    margin = strength(row, chosen_score, rejected_score)
    chosen, rejected = answer_in(row, "chosen"), answer_in(row, "rejected")
    if is_whole(chosen) and is_whole(rejected):
        prompt, chosen, rejected = shared_prefix(chosen, rejected)
    else:
        prompt = turns(field(row, "prompt"), "prompt", "user")
    meta = others(row, "id", "prompt", "chosen", "rejected", chosen_score, rejected_score, *left_out)
    return at.pair(prompt, chosen, rejected, meta, "judge_rating", margin)


def stronger(first: Message, second: Message, told: float, name: str) -> tuple[list[Message], list[Message], float]:
    """(chosen, rejected, margin) where a negative number prefers the first answer.

    Raises:
        RowFault: `tie` for 0.
    """
    if told == 0:
        raise RowFault("tie", f"`{name}` is 0: neither response was preferred")
    return ([first], [second], -told) if told < 0 else ([second], [first], told)
