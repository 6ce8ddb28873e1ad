"""The ledger of a pipeline: every decision on a release, every release, every rollback, in order. It only grows.

A decision spends error and uses conversations up; a release, after the Hub's copy was read back, makes its challenger
the champion; a rollback makes an earlier release live again. So what ends between a decision and its release leaves the
old champion where it was.

Each line holds the digest of the one before it, so that a line that was changed, dropped or moved is found, but for
the last ones: whoever keeps a ledger keeps its `head` elsewhere too (`refuse_lost`, `ledger_file`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from dpo_assets.artifact import Number, without_nan
from dpo_assets.checks.evidence.spending import ALPHA, Budget, budget_after
from dpo_assets.errors import ConfigError

Decision = Literal["promote", "first_publication", "hold", "reject", "insufficient_evidence"]
RELEASED: frozenset[str] = frozenset({"promote", "first_publication"})
FIRST = "0" * 64
SHORTEST_COMMIT = 7  # Digits by which a commit is named, as git shortens them.
SCORES = "eval_scores"  # The input by whose digest a decision is found again.


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

    decision: Literal["promote", "hold"]
    reason: str = Field(min_length=10, description="Why; the ledger and the card show it.")


class _Line(BaseModel):
    """What every line says. `challenger` names a policy: the digest of its merged model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    number: int = Field(ge=1)
    before: str = Field(description="Digest of the line before it.")
    at: str = Field(description="ISO 8601, UTC.")
    champion: str | None = Field(description="What was live until then; None: nothing was.")
    challenger: str

    @property
    def text(self) -> str:
        """The line as JSON: equal ones give equal bytes."""
        return json.dumps(
            without_nan(self.model_dump(mode="json")), sort_keys=True, ensure_ascii=False, allow_nan=False
        )

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


class Decided(_Line):
    """One decision on a challenger. Nothing goes live by it.

    `found` says whether the rules released the challenger on their own, `decision` what counts after an override. A
    decision that looked at no primary spent nothing, and its `level` is None.
    """

    kind: Literal["decision"] = "decision"
    inputs: Mapping[str, str] = Field(description="Name and digest of everything the decision stands on.")
    primaries: Mapping[str, Primary]
    level: float | None = Field(description="One-sided level of the test; None: no primary was looked at.")
    saw: tuple[str, ...] = Field(description="Conversations whose scores were looked at.")
    decision: Decision
    found: bool
    reason: str
    override: Override | None = None

    @property
    def releases(self) -> bool:
        """Whether its challenger may be released."""
        return self.decision in RELEASED

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
        return self


class _Live(_Line):
    """Its challenger is live from here on, as a commit of a repository of the Hub that was read back."""

    release: int = Field(ge=1, description="Number of the release among those of the pipeline.")
    repo_id: str
    commit: str
    tag: str = Field(description="Tag of the content.")
    artefact: str = Field(description="Fingerprint of the `published_model` that was sent.")
    known: tuple[str, ...] = Field(description="All held-out conversations when it was decided: its cut.")


class Released(_Live):
    """A release by the decision of this number."""

    kind: Literal["release"] = "release"
    decision: int = Field(ge=1)


class RolledBack(_Live):
    """The release of this number is live again."""

    kind: Literal["rollback"] = "rollback"
    reason: str = Field(min_length=10, description="Why; the ledger shows it.")


Line = Annotated[Decided | Released | RolledBack, Field(discriminator="kind")]
_LINE: TypeAdapter[Decided | Released | RolledBack] = TypeAdapter(Line)


class Ledger(BaseModel):
    """All lines of a pipeline, oldest first.

    Raises:
        ValueError: a line does not follow from those before it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    lines: tuple[Line, ...] = ()

    @model_validator(mode="after")
    def _is_one_chain(self) -> Self:
        before = FIRST
        for number, line in enumerate(self.lines, start=1):
            if (line.number, line.before) != (number, before):
                raise ValueError(f"line {line.number} does not follow the one before it: the ledger was changed")
            so_far = Ledger.model_construct(lines=self.lines[: number - 1])
            if line.champion != so_far.champion:
                raise ValueError(f"line {number} names {line.champion} as the champion, the ledger {so_far.champion}")
            if isinstance(line, Released):
                so_far._refuse_release(line)
            if isinstance(line, RolledBack):
                so_far._refuse_rollback(line)
            before = line.digest
        return self

    def _refuse_release(self, line: Released) -> None:
        of = next((one for one in self.decisions if one.number == line.decision), None)
        if of is None or of.challenger != line.challenger or not self.may_release(of):
            raise ValueError(f"line {line.number} releases {line.challenger}, and no decision carries that")
        if line.release != self.number_of(of):
            raise ValueError(f"line {line.number} is called release {line.release}, and is {self.number_of(of)}")

    def _refuse_rollback(self, line: RolledBack) -> None:
        if not any((one.release, one.challenger) == (line.release, line.challenger) for one in self.releases):
            raise ValueError(f"line {line.number} goes back to {line.challenger}, which was no release")

    @property
    def head(self) -> str:
        """Digest of the last line, which the next one holds."""
        return self.lines[-1].digest if self.lines else FIRST

    @property
    def decisions(self) -> tuple[Decided, ...]:
        return tuple(line for line in self.lines if isinstance(line, Decided))

    @property
    def releases(self) -> tuple[Released, ...]:
        return tuple(line for line in self.lines if isinstance(line, Released))

    @property
    def live(self) -> Released | RolledBack | None:
        """The line by which the champion is live; None before the first release."""
        return next((line for line in reversed(self.lines) if not isinstance(line, Decided)), None)

    @property
    def champion(self) -> str | None:
        """What is live; None before the first release."""
        return self.live.challenger if self.live is not None else None

    def release(self, number: int) -> Released:
        """The release of that number, as it was sent last; there must be one."""
        return next(one for one in reversed(self.releases) if one.release == number)

    def to_send_again(self, to: str = "") -> Released:
        """The release of that number, tag or commit; empty: the one before what is live.

        What is live can be named too: the Hub may have lost it, or hold the half of another release.

        Raises:
            ConfigError: there is none.
        """
        if self.live is None:
            raise ConfigError("nothing of this pipeline is live, so there is nothing to go back from")
        latest = {one.release: one for one in self.releases}
        if not to:
            others = [number for number, one in latest.items() if one.challenger != self.live.challenger]
            before = max((number for number in others if number < self.live.release), default=None)
            if before is None:
                raise ConfigError(
                    f"there is no release before release {self.live.release}, which is live. {self.known_releases()}"
                )
            return latest[before]
        found = [one for one in latest.values() if to in (str(one.release), one.tag)]
        if not found and len(to) >= SHORTEST_COMMIT:
            sent = [line for line in self.lines if not isinstance(line, Decided) and line.commit.startswith(to)]
            found = [latest[line.release] for line in sent[-1:]]
        if not found:
            raise ConfigError(f"`to: {to}` is no release of this pipeline. {self.known_releases()}")
        return found[0]

    def known_releases(self) -> str:
        """What can be named to be sent again, for a message."""
        live = self.live.release if self.live is not None else None
        latest = {one.release: one for one in self.releases}
        told = "; ".join(
            f"{number}: {one.tag}, commit {one.commit[:12]} of {one.repo_id}, {one.at}"
            + (", live" if number == live else "")
            for number, one in sorted(latest.items())
        )
        return f"To send again, by number, tag or commit: {told}"

    def number_of(self, decided: Decided) -> int:
        """The number of the release by a decision, whether it was made or would be the next one. The same model sent
        again, with another card or to another place, is the same release."""
        numbers = {one.decision: one.release for one in self.releases}
        return numbers.get(decided.number, len(numbers) + 1)

    @property
    def live_decision(self) -> Decided | None:
        """The decision by which the champion was released."""
        if self.live is None:
            return None
        decided = self.lines[self.release(self.live.release).decision - 1]
        assert isinstance(decided, Decided), "a release names a decision"
        return decided

    @property
    def waiting(self) -> tuple[Decided, ...]:
        """Decisions that may go live by `may_release`, and never did."""
        done = {one.decision for one in self.releases}
        return tuple(one for one in self.decisions if one.number not in done and self.may_release(one))

    def may_release(self, decided: Decided) -> bool:
        """Whether what was decided may go live now: it is the last word on its challenger, and nothing went live since
        but by itself. After another release, or a rollback, it was decided about another world."""
        words = [one for one in self.decisions if one.challenger == decided.challenger]
        last = bool(words) and words[-1] == decided
        since = self.live is None or self.live.number < decided.number
        return decided.releases and ((last and since) or decided == self.live_decision)

    def taken_back(self, challenger: str) -> RolledBack | None:
        """The rollback that ended a challenger's being live; None: it never was, is again, or was replaced."""
        for line in reversed(self.lines):
            if isinstance(line, Decided) or challenger not in (line.challenger, line.champion):
                continue
            return line if isinstance(line, RolledBack) and line.challenger != challenger else None
        return None

    def opponent(self, challenger: str) -> str | None:
        """Whom a challenger is held against: the champion; and of the champion itself, the one it was held against."""
        if challenger != self.champion or self.live_decision is None:
            return self.champion
        return self.live_decision.champion

    def budget(self, alpha: float = ALPHA) -> Budget:
        """What is spent of `alpha`, and the level of the next test.

        A release by override spends its level like a hold: its test found nothing.
        """
        return budget_after((one.found for one in self.decisions if one.level is not None), alpha)

    def fresh(self, held_out: Iterable[str]) -> frozenset[str]:
        """Of the held-out conversations those that are evidence: new since the champion's cut, seen by no decision."""
        cut = self.live.known if self.live is not None else ()
        return frozenset(held_out).difference(cut, *(one.saw for one in self.decisions))

    def append(self, line: Decided | Released | RolledBack) -> Ledger:
        """A ledger with one more line.

        Raises:
            ValueError: it does not follow from those before it.
        """
        return Ledger(lines=(*self.lines, line))

    def released(
        self, decided: Decided, *, at: str, repo_id: str, commit: str, tag: str, artefact: str, known: Iterable[str]
    ) -> Ledger:
        """A ledger in which what was decided is live. One that says so already stays as it is.

        A release that is sent again keeps the cut that it was decided with: `known` are the held-out prompts of now,
        and those that came since are evidence still.

        Raises:
            ValueError: the decision does not carry a release, or not any more.
        """
        first = next((one for one in self.releases if one.decision == decided.number), None)
        line = Released(
            number=len(self.lines) + 1,
            before=self.head,
            at=at,
            champion=self.champion,
            challenger=decided.challenger,
            release=self.number_of(decided),
            repo_id=repo_id,
            commit=commit,
            tag=tag,
            artefact=artefact,
            known=first.known if first is not None else tuple(sorted(known)),
            decision=decided.number,
        )
        where = {"challenger", "repo_id", "commit", "artefact"}
        if self.live is not None and self.live.model_dump(include=where) == line.model_dump(include=where):
            return self
        return self.append(line)

    def rolled_back(self, to: Released, *, at: str, repo_id: str, commit: str, reason: str) -> Ledger:
        """A ledger in which a release is live again, with the cut that it had. It may be the one that is live: what was
        decided before, and is not released, lapses then as after every other rollback.

        Raises:
            ValueError: `to` is no release of this ledger, or the reason is too short to be one.
        """
        line = RolledBack(
            number=len(self.lines) + 1,
            before=self.head,
            at=at,
            champion=self.champion,
            repo_id=repo_id,
            commit=commit,
            reason=reason,
            **to.model_dump(include={"challenger", "release", "tag", "artefact", "known"}),
        )
        return self.append(line)

    def refuse_lost(self, kept: Mapping[str, str]) -> None:
        """Holds the ledger against heads that it had, and that were kept elsewhere.

        Args:
            kept: digest of a line, and where it was kept.

        Raises:
            ConfigError: it does not hold one of them: lines at its end were lost, or all of it was.
        """
        known = {FIRST, *(line.digest for line in self.lines)}
        lost = {where for head, where in kept.items() if head not in known}
        if lost:
            raise ConfigError(
                f"the ledger of promotions has lost lines: it holds {len(self.lines)}, and not all that were there "
                f"when {', '.join(sorted(lost))} was written. Put ledger/promotions.jsonl back from "
                "ledger/promotions.bak.jsonl, the copy that is kept beside it, where that holds these lines, and else "
                "the whole folder from a backup; without these lines, error that was spent would be spent again, and "
                "a model that is live would be forgotten"
            )

    @property
    def text(self) -> str:
        """JSON lines."""
        return "".join(f"{line.text}\n" for line in self.lines)

    @classmethod
    def of_text(cls, text: str) -> Ledger:
        """The ledger of a file of JSON lines.

        Raises:
            ConfigError: a line is none of a ledger, or does not follow from those before it.
        """
        try:
            return cls(lines=tuple(_LINE.validate_json(line) for line in text.split("\n") if line))
        except ValidationError as error:
            told = "; ".join(str(one["msg"]) for one in error.errors())
            raise ConfigError(f"the ledger of promotions does not hold: {told}") from error
