"""The ledger of a pipeline: every decision on a release, in order, and what it looked at. It only grows.

Each record holds the digest of the one before it, so that a line that was changed, dropped or moved is found, but for
the last ones: whoever keeps a ledger keeps its `head` elsewhere too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dpo_assets.artifact import Number, without_nan
from dpo_assets.checks.evidence.spending import ALPHA, Budget, budget_after
from dpo_assets.errors import ConfigError

Decision = Literal["promote", "first_publication", "hold", "reject", "insufficient_evidence"]
RELEASED: frozenset[str] = frozenset({"promote", "first_publication"})
FIRST = "0" * 64


class Primary(BaseModel):
    """A primary comparison as one decision saw it. `adjusted` is its p after Holm over all that the decision saw."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    difference: Number
    low: Number
    high: Number
    p_better: Number
    adjusted: Number
    pairs: int
    prompts: int


class Override(BaseModel):
    """A decision that a person made against the rules, or without them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    decision: Literal["promote", "hold", "rollback"]
    reason: str = Field(min_length=10, description="Why; the record and the card show it.")


class Record(BaseModel):
    """One decision.

    `found` says whether the rules released the challenger on their own, `decision` what counts after an override. A
    decision that looked at no primary spent nothing, and its `level` is None. A `rollback` makes an earlier release
    live again, by override; its `challenger` is that release.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    number: int = Field(ge=1)
    before: str = Field(description="Digest of the record before it.")
    decided_at: str = Field(description="ISO 8601, UTC.")
    inputs: Mapping[str, str] = Field(description="Name and digest of everything the decision stands on.")
    champion: str | None = Field(description="What was live; None: nothing was.")
    challenger: str
    primaries: Mapping[str, Primary]
    level: float | None = Field(description="One-sided level of the test; None: no primary was looked at.")
    saw: tuple[str, ...] = Field(description="Prompts whose scores were looked at.")
    known: tuple[str, ...] = Field(default=(), description="Of a release: all held-out prompts there were then.")
    decision: Decision | Literal["rollback"]
    found: bool
    reason: str
    override: Override | None = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if (self.level is None) != (not self.primaries):
            raise ValueError("a level is spent exactly where a primary was looked at")
        if self.found and self.level is None:
            raise ValueError("nothing is found without a test")
        if self.decision == "first_publication" and self.champion is not None:
            raise ValueError("`first_publication` is for a pipeline without a champion")
        if self.decision == "promote" and self.champion is None:
            raise ValueError("`promote` is for a challenger of a champion")
        by_override = self.override is not None and self.override.decision == "rollback"
        if (self.decision == "rollback") != by_override or (by_override and self.level is not None):
            raise ValueError("a rollback is made by override, with its reason, and looks at no primary")
        return self

    @property
    def goes_live(self) -> bool:
        """Whether its challenger is live from here on."""
        return self.decision in RELEASED or self.decision == "rollback"

    @property
    def line(self) -> str:
        """The record as a line of JSON: equal records give equal bytes."""
        return json.dumps(
            without_nan(self.model_dump(mode="json")), sort_keys=True, ensure_ascii=False, allow_nan=False
        )

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.line.encode()).hexdigest()


class Ledger(BaseModel):
    """All records of a pipeline, oldest first.

    Raises:
        ValueError: a record does not follow the one before it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    records: tuple[Record, ...] = ()

    @model_validator(mode="after")
    def _is_one_chain(self) -> Self:
        before, champion, released = FIRST, None, set[str]()
        for number, record in enumerate(self.records, start=1):
            if (record.number, record.before) != (number, before):
                raise ValueError(f"record {record.number} does not follow the one before it: the ledger was changed")
            if record.champion != champion:
                raise ValueError(f"record {number} names {record.champion} as the champion, the ledger {champion}")
            if record.decision == "rollback" and record.challenger not in released:
                raise ValueError(f"record {number} goes back to {record.challenger}, which was no release")
            if record.decision in RELEASED:
                released.add(record.challenger)
            before, champion = record.digest, record.challenger if record.goes_live else champion
        return self

    @property
    def head(self) -> str:
        """Digest of the last record, which the next one holds."""
        return self.records[-1].digest if self.records else FIRST

    @property
    def champion(self) -> str | None:
        """What is live; None before the first release."""
        return next((record.challenger for record in reversed(self.records) if record.goes_live), None)

    def budget(self, alpha: float = ALPHA) -> Budget:
        """What is spent of `alpha`, and the level of the next test.

        A release by override spends its level like a hold: its test found nothing.
        """
        return budget_after((record.found for record in self.records if record.level is not None), alpha)

    def fresh(self, held_out: Iterable[str]) -> frozenset[str]:
        """Of the held-out prompts, those that are evidence: new since the champion's cut, and seen by no decision."""
        cut = next((record.known for record in reversed(self.records) if record.goes_live), ())
        return frozenset(held_out).difference(cut, *(record.saw for record in self.records))

    def append(self, record: Record) -> Ledger:
        """A ledger with one more record.

        Raises:
            ValueError: it does not follow the last one (`head`, `champion`, number).
        """
        return Ledger(records=(*self.records, record))

    def rollback(self, to: str, reason: str, decided_at: str) -> Ledger:
        """A ledger in which an earlier release is live again, with the cut that it had.

        Raises:
            ValueError: `to` was no release, or the reason is too short to be one.
        """
        known = next((one.known for one in reversed(self.records) if one.challenger == to and one.goes_live), ())
        record = Record(
            number=len(self.records) + 1,
            before=self.head,
            decided_at=decided_at,
            inputs={},
            champion=self.champion,
            challenger=to,
            primaries={},
            level=None,
            saw=(),
            known=known,
            decision="rollback",
            found=False,
            reason=reason,
            override=Override(decision="rollback", reason=reason),
        )
        return self.append(record)

    def lines(self) -> str:
        """JSON lines, one a record."""
        return "".join(f"{record.line}\n" for record in self.records)

    @classmethod
    def of_lines(cls, text: str) -> Ledger:
        """The ledger of a file of `lines`.

        Raises:
            ConfigError: a line is no record, or does not follow the one before it.
        """
        try:
            return cls(records=tuple(Record.model_validate_json(line) for line in text.split("\n") if line))
        except ValidationError as error:
            told = "; ".join(str(one["msg"]) for one in error.errors())
            raise ConfigError(f"the ledger of promotions does not hold: {told}; restore it from a copy") from error
