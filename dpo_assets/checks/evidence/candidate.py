"""A challenger with its scored pairs, and how it is decided on: what the rules may look at, and no more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from dpo_assets.checks.evidence.clusters import COUNTED_BY, wins_of
from dpo_assets.checks.evidence.ledger import SCORES, Decided, Decision, Ledger, Override, RolledBack
from dpo_assets.checks.evidence.measured import Comparison
from dpo_assets.checks.evidence.paired import compare
from dpo_assets.checks.evidence.previews import Previews
from dpo_assets.checks.evidence.rules import Evidence, decided_by, judge
from dpo_assets.checks.evidence.task_guards import TaskGuard, fallen
from dpo_assets.errors import ConfigError

REWARD = "implicit reward"  # Accuracy by the log-ratio to each model's own start.
LOGP = "log-probability per token"
OF_ALL = ("policy", "sft")
OF_CHAMPION = ("champion", "champion_start")
TOKENS = ("chosen_tokens", "rejected_tokens")


@dataclass(frozen=True)
class ScoredPairs:
    """The table of an evaluation: of each pair its conversation, and the log-probabilities of both answers by each
    model.

    Attributes:
        conversations: `COUNTED_BY` of each pair: (pairs)
        columns: `policy_chosen`, `champion_start_rejected` and so on in nats, and both answers' tokens: (pairs)
    """

    conversations: Sequence[str]
    columns: Mapping[str, Sequence[float]]

    @classmethod
    def read(cls, table: Path) -> Self:
        """From `scores.parquet`.

        Raises:
            ConfigError: it is one of an earlier version, which did not name the conversations of its pairs.
        """
        import polars as pl

        there = pl.read_parquet_schema(table)
        needed = [COUNTED_BY, *TOKENS, *_columns(OF_ALL)]
        if missing := [name for name in needed if name not in there]:
            raise ConfigError(
                f"{table} is of an earlier version, without {', '.join(missing)}; materialise `eval_scores` again."
            )
        of_champion = [name for name in _columns(OF_CHAMPION) if name in there]
        if of_champion and len(of_champion) < len(_columns(OF_CHAMPION)):
            raise ConfigError(f"{table} holds {', '.join(of_champion)} alone; materialise `eval_scores` again.")
        # A champion of another base counts tokens of its own.
        of_champion += [f"champion_{name}" for name in TOKENS if f"champion_{name}" in there]
        read = pl.read_parquet(table, columns=[*needed, *of_champion])
        columns = {name: read[name].cast(pl.Float64).fill_null(math.nan).to_list() for name in read.columns[1:]}
        return cls(read[COUNTED_BY].cast(pl.String).to_list(), columns)

    @property
    def has_champion(self) -> bool:
        return all(name in self.columns for name in _columns(OF_CHAMPION))

    def of(self, conversations: frozenset[str]) -> ScoredPairs:
        """The pairs of these conversations."""
        kept = [n for n, one in enumerate(self.conversations) if one in conversations]
        columns = {name: [values[n] for n in kept] for name, values in self.columns.items()}
        return ScoredPairs([self.conversations[n] for n in kept], columns)

    def faults(self) -> dict[str, str]:
        """What makes the challenger's scores none, by name: a hard guard that failed.

        A champion whose scores are none is no fault of the challenger: nothing is better than NaN, so it is held.
        """
        bad = [name for name in (*_columns(OF_ALL), *TOKENS) if not all(map(math.isfinite, self.columns[name]))]
        return {"scores": f"not every score is finite: {', '.join(bad)}"} if bad else {}

    def reward_margins(self, policy: str = "policy", start: str = "sft") -> list[float]:
        """Log-ratio of a policy to its start, of the chosen answer less the rejected one, in nats."""
        of = self.columns
        gaps = zip(
            of[f"{policy}_chosen"],
            of[f"{start}_chosen"],
            of[f"{policy}_rejected"],
            of[f"{start}_rejected"],
            strict=True,
        )
        return [(chosen - was) - (rejected - before) for chosen, was, rejected, before in gaps]

    def reward_wins(self, policy: str = "policy", start: str = "sft") -> list[float]:
        """1 where the log-ratio of a policy to its start is higher for the chosen answer; 0.5 for a tie."""
        return wins_of(self.reward_margins(policy, start))

    def reward_wins_per_token(self, policy: str = "policy", start: str = "sft") -> list[float]:
        """1 where the log-ratio of a policy to its start is higher per token for the chosen answer; 0.5 for a tie.

        The difference is told in nats of an answer of the two's mean length, so that a tie is what it is elsewhere.
        """
        of = self.columns
        ratios = [
            [own - was for own, was in zip(of[f"{policy}_{answer}"], of[f"{start}_{answer}"], strict=True)]
            for answer in ("chosen", "rejected")
        ]
        both = zip(*ratios, *self._tokens(policy), strict=True)
        return wins_of([(c / long - r / short) * (long + short) / 2 for c, r, long, short in both])

    def _tokens(self, model: str) -> tuple[Sequence[float], Sequence[float]]:
        """Of both answers, as the model counts them."""
        chosen, rejected = (self.columns.get(f"{model}_{name}", self.columns[name]) for name in TOKENS)
        return chosen, rejected

    def logp_gaps(self, model: str = "policy") -> list[float]:
        """Log-probability per token of the model's own, of the chosen answer less the rejected one, in nats."""
        of, (chosen_tokens, rejected_tokens) = self.columns, self._tokens(model)
        both = zip(of[f"{model}_chosen"], chosen_tokens, of[f"{model}_rejected"], rejected_tokens, strict=True)
        return [chosen / long - rejected / short for chosen, long, rejected, short in both]

    def logp_wins(self, model: str = "policy") -> list[float]:
        """1 where the chosen answer is more likely per token; 0.5 for a tie."""
        return wins_of(self.logp_gaps(model))

    def against_champion(self) -> dict[str, Comparison]:
        """Policy less champion, paired: each by its own start, and by log-probability, where none needs a reference."""
        champion, start = OF_CHAMPION
        return {
            REWARD: compare(self.reward_wins(), self.reward_wins(champion, start), self.conversations),
            LOGP: compare(self.logp_wins(), self.logp_wins(champion), self.conversations),
        }

    def against_chance(self) -> Comparison:
        """Policy by implicit reward, less one half."""
        return compare(self.reward_wins(), [0.5] * len(self.conversations), self.conversations)

    def against_start(self) -> Comparison:
        """Policy less SFT by log-probability."""
        return compare(self.logp_wins(), self.logp_wins("sft"), self.conversations)


def _columns(models: Sequence[str]) -> list[str]:
    return [f"{model}_{answer}" for model in models for answer in ("chosen", "rejected")]


@dataclass(frozen=True)
class Candidate:
    """A challenger as an evaluation scored it.

    Attributes:
        name: as the ledger calls it.
        opponent: the champion that was scored beside it; None: none was.
        inputs: digests by name of all that the decision stands on, that of the scores among them.
        fewest: conversations that a test needs.
        tasks: metrics of tasks and benchmarks that guard, against the opponent.
        previews: what dry runs looked at so far, of this challenger and of others.
    """

    name: str
    opponent: str | None
    inputs: Mapping[str, str]
    pairs: ScoredPairs
    fewest: int
    failures: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, TaskGuard] = field(default_factory=dict)
    previews: Previews = field(default_factory=Previews)

    @property
    def held_out(self) -> frozenset[str]:
        return frozenset(self.pairs.conversations)

    def faults(self) -> dict[str, str]:
        """The hard guards that failed, by name."""
        return {**self.failures, **self.pairs.faults()}

    def evidence(self, ledger: Ledger) -> Evidence:
        """What a decision by this ledger may look at.

        Against a champion, fresh conversations are the primary evidence, and all others guard what is known already.
        Where nothing is live, the bar is the policy's own start: chance by implicit reward, and no loss by
        log-probability.
        """
        failures = self.faults()
        fresh = ledger.fresh(self.held_out)
        new, look = self.pairs.of(fresh), self.previews.number(self.name, fresh)
        if self.opponent is None:
            start = {LOGP: new.against_start()}
            return Evidence({REWARD: new.against_chance()}, start, failures, self.tasks, self.fewest, look)
        known = self.pairs.of(self.held_out - fresh)
        return Evidence(new.against_champion(), known.against_champion(), failures, self.tasks, self.fewest, look)

    def decide(self, ledger: Ledger, override: Override | None, at: str) -> tuple[Ledger, Decided]:
        """The ledger with the decision on this challenger in it, and that decision.

        Where a hard guard fails, that is what is decided, whatever was before, but on what is live. Otherwise one that
        is there stays: these scores were looked at, or its challenger may be released by it, or is live. It
        is decided again, without another look, where an override says otherwise, where its model went live and was
        taken back since, and where a task has fallen that did not guard then, or was not compared.

        Raises:
            ConfigError: the champion of the ledger is not the one that was scored; the override would hold what is
                live.
        """
        if (needed := ledger.opponent(self.name)) != self.opponent:
            raise ConfigError(
                f"`eval_scores` held the challenger against {_shown(self.opponent)}, and the champion is "
                f"{_shown(needed)}; materialise `eval_scores` again."
            )
        prior = self._prior(ledger)
        spoilt = self.name != ledger.champion and bool(self.faults())
        if spoilt or prior is None or (prior.decision == "insufficient_evidence" and prior.override is None):
            return self._judged(ledger, override, at, prior)
        if self.name == ledger.champion:
            if override is not None and override.decision == "hold":
                raise ConfigError("an override holds a challenger, and this model is live: go back by the rollback job")
            return ledger, prior
        if override is not None and override != prior.override:
            return self._by_word(ledger, prior, override, at)
        if prior.releases and not ledger.may_release(prior):
            return self._taken_back(ledger, prior, at)
        if prior.releases and prior.override is None and fallen(self.tasks):
            return self._guarded_since(ledger, prior, at)
        return ledger, prior

    def _prior(self, ledger: Ledger) -> Decided | None:
        """The decision that is there: of what is live, the one that released it; of another challenger the last word on
        it, if it stands on these scores, still carries a release, or is a person's: a hold by override, and a model
        that was taken back. New scores are no reason to undo what a person decided."""
        if self.name == ledger.champion:
            return ledger.live_decision
        words = [one for one in ledger.decisions if one.challenger == self.name]
        on_these = any(one.inputs.get(SCORES) == self.inputs[SCORES] for one in words)
        if not words:
            return None
        last = words[-1]
        stopped = last.override is not None and last.override.decision == "hold"
        stays = on_these or stopped or ledger.may_release(last) or ledger.taken_back(self.name) is not None
        return last if stays else None

    def _judged(
        self, ledger: Ledger, override: Override | None, at: str, prior: Decided | None
    ) -> tuple[Ledger, Decided]:
        evidence = self.evidence(ledger)
        outcome = judge(evidence, ledger, override)
        saw = ledger.fresh(self.held_out)
        line = decided_by(outcome, evidence, ledger, challenger=self.name, inputs=self.inputs, saw=saw, at=at)
        if prior is not None and (line.decision, line.reason) == (prior.decision, prior.reason):
            return ledger, prior
        return ledger.append(line), line

    def _by_word(self, ledger: Ledger, prior: Decided, override: Override, at: str) -> tuple[Ledger, Decided]:
        """A decision by override on what was decided already. It looks at nothing."""
        if self.evidence(ledger).failures:
            return ledger, prior  # No override lifts a hard guard.
        decision: Decision = "hold"
        if override.decision == "promote":
            decision = "first_publication" if ledger.champion is None else "promote"
        told = f"by override ({override.reason}); decision {prior.number} said {prior.decision}: {prior.reason}"
        return self._unseeing(ledger, decision, told, at, override)

    def _taken_back(self, ledger: Ledger, prior: Decided, at: str) -> tuple[Ledger, Decided]:
        """A hold of what was to be released, or was live: since then something else went live, or an earlier release
        again, and the next refresh must not undo that."""
        live = ledger.live
        assert live is not None, "a decision lapses when something else goes live"
        why = f" ({live.reason})" if isinstance(live, RolledBack) else ""
        told = (
            f"line {prior.number} said {prior.decision}; since line {live.number}{why} release {live.release} is live"
        )
        return self._unseeing(ledger, "hold", told, at, None)

    def _guarded_since(self, ledger: Ledger, prior: Decided, at: str) -> tuple[Ledger, Decided]:
        """A hold of what was to be released by the rules: a guard fell that they did not have then."""
        told = "; ".join(f"{name} {self.tasks[name].shown}" for name in fallen(self.tasks))
        than = "its start" if ledger.champion is None else "the champion"
        said = f"line {prior.number} said {prior.decision}; by now it is worse than {than} on tasks: {told}"
        return self._unseeing(ledger, "hold", said, at, None)

    def _unseeing(
        self, ledger: Ledger, decision: Decision, reason: str, at: str, override: Override | None
    ) -> tuple[Ledger, Decided]:
        line = Decided(
            number=len(ledger.lines) + 1,
            before=ledger.head,
            at=at,
            champion=ledger.champion,
            challenger=self.name,
            inputs=dict(self.inputs),
            primaries={},
            level=None,
            saw=(),
            decision=decision,
            found=False,
            reason=reason,
            override=override,
        )
        return ledger.append(line), line


def _shown(name: str | None) -> str:
    return "nothing" if name is None else name[:12]
