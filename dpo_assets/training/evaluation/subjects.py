"""The models that are compared on held-out pairs: each asked the same in its own tokens, all by one engine."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dpo_assets.contract import Progress
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.models.chat_format import ChatFormat
from dpo_assets.training.models.loading import autocast_of
from dpo_assets.training.policy import load_scored
from dpo_assets.training.reporting import Reporter
from dpo_assets.training.resuming.parts import Parts
from dpo_assets.training.scoring.cache import ScoreCache, Scores, computed_by, kept_scores, pair_key, score_key
from dpo_assets.training.scoring.divergence import own_answers
from dpo_assets.training.scoring.generation import Answers, generate
from dpo_assets.training.scoring.logprobs import score_groups
from dpo_assets.training.scoring.proof import Settled, alike, settle_engine

PART = 1024  # Fewest pairs that are scored and kept together: in 16 bit small parts round otherwise than large ones.


@dataclass(frozen=True)
class Reading:
    """What a tokenizer with its chat template makes of all that is asked.

    Held-out `pairs`, `prompts` to be answered greedily, neutral `texts`, prompts to be answered at temperature 1, and
    `instructions` to be followed.
    """

    chat: ChatFormat
    pairs: Sequence[Group]
    prompts: list[list[int]]
    texts: Sequence[Group] = ()
    sampled: Sequence[list[int]] = ()
    instructions: Sequence[list[int]] = ()


def as_groups(texts: Sequence[str], chat: ChatFormat, longest: int) -> list[Group]:
    """Texts as they are, without a template, cut to `longest` tokens.

    What begins a text is given: its beginning-of-sequence token, or its first where the tokenizer has none. A text of
    nothing else has no score, and is left out.
    """
    begin = chat.tokenizer.bos_token_id
    rows: list[list[int]] = chat.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    whole = [([] if begin is None else [begin]) + row for row in rows]
    return [Group(row[:1], (row[1:longest],)) for row in whole if len(row) > 1]


@dataclass(frozen=True)
class Subject:
    """A model under judgement.

    `digests` are those of the artefacts it is loaded from, by kind: what its kept scores are known by. Without any,
    nothing is kept.
    """

    name: str
    folder: Path
    adapter: Path | None
    reading: Reading
    digests: Mapping[str, str]
    draws: bool = False  # Whether it answers the sampled prompts at temperature 1.
    hears: tuple[str, ...] = ()  # Whose drawn answers it scores: its own, or those of subjects before it.


@dataclass(frozen=True)
class Measured:
    """What a subject said: summed log-probabilities in nats, and answers.

    `logps` has (chosen, rejected) a pair, `texts` one a neutral text, `heard` one an answer that was drawn, by who drew
    it. `instructed` are the answers to instructions. `known` counts the pairs whose scores were kept from an earlier
    time.
    """

    logps: Scores
    texts: list[float]
    drawn: list[Group]
    heard: dict[str, list[float]]
    answers: list[dict[str, Any]]
    instructed: list[dict[str, Any]]
    known: int


@dataclass(frozen=True)
class Bench:
    """How every subject is measured.

    Scores of pairs are kept from one evaluation to the next, as long as the model stays. All else is kept for a try
    that follows one that was ended.
    """

    plan: TrainingPlan
    max_new_tokens: int
    seed: int  # Of the answers that are drawn.
    reporter: Reporter
    parts: Parts = field(default_factory=lambda: Parts(None, {}))
    kept: Path | None = None  # The file of scores from earlier times.

    def measure(self, subjects: Sequence[Subject]) -> tuple[Settled, list[Measured]]:
        """Scores and answers of every subject, one loaded at a time, all computed by one engine."""
        drawn: dict[str, list[Group]] = {}
        asked = [partial(self._one, subject, (n, len(subjects)), drawn) for n, subject in enumerate(subjects, start=1)]
        results = alike(asked)
        return results[0][0], [measured for _, measured in results]

    def _one(
        self, subject: Subject, place: tuple[int, int], drawn: dict[str, list[Group]], first: str | None
    ) -> tuple[Settled, Measured]:
        """By a model that is loaded for it and let go.

        Args:
            drawn: answers by who drew them, to which its own are added.
            first: the engine to begin with.
        """
        model = load_scored(subject.folder, self.plan, subject.adapter)
        settled, measured = self._ask(model, subject, drawn, first)
        done, total = place
        self.reporter.log(Progress(stage="evaluate", done=done, total=total, note=f"{subject.name} done").line())
        del model
        gc.collect()
        return settled, measured

    def _ask(
        self, model: Any, subject: Subject, drawn: dict[str, list[Group]], first: str | None
    ) -> tuple[Settled, Measured]:
        plan, who, pairs, texts = self.plan, subject.name, subject.reading.pairs, subject.reading.texts
        settled = settle_engine(model, plan, max([*pairs, *texts], key=lambda group: group.longest_row), first)
        if settled.note:
            self._log(f"{who} computed by {settled.kernels}, not by {first or plan.kernels}: {settled.note}")

        def score(part: Sequence[Group]) -> Scores:
            logps, _ = score_groups(model, part, plan.token_budget)
            return list(zip(logps[::2], logps[1::2], strict=True))

        with autocast_of(plan):
            cache = self._cache(subject, settled.kernels)
            logps, known = kept_scores(pairs, cache, score, PART)
            if cache and cache.damage:
                self._log(f"{cache.damage}; they were scored again")
            before = f", {known} of them before" if known else ""
            self._log(f"{len(pairs)} held-out pairs scored by the {who}{before}")
            asked = _Asked(self, model, subject, settled.kernels)
            of_texts = asked.scores(texts)
            own = own_answers(subject.reading.sampled, asked.draw()) if subject.draws else []
            drawn[who] = own
            heard = {one: asked.scores(drawn[one]) for one in subject.hears}
            greedy = subject.reading.prompts
            answers = asked.answers([*greedy, *subject.reading.instructions])
        said, instructed = answers[: len(greedy)], answers[len(greedy) :]
        return settled, Measured(logps, of_texts, own, heard, said, instructed, known)

    def _cache(self, subject: Subject, kernels: str) -> ScoreCache | None:
        if self.kept is None or not subject.digests or not all(subject.digests.values()):
            return None
        return ScoreCache(self.kept, score_key(**subject.digests, **computed_by(self.plan, kernels)))

    def _log(self, said: str) -> None:
        self.reporter.log(f"evaluate: {said}")


@dataclass(frozen=True)
class _Asked:
    """A loaded subject: what it says is computed part by part, or taken from a try before."""

    bench: Bench
    model: Any
    subject: Subject
    kernels: str

    def scores(self, groups: Sequence[Group]) -> list[float]:
        """Summed log-probabilities of groups of one completion."""
        logps: list[float] = []
        for start in range(0, len(groups), PART):
            chunk = groups[start : start + PART]
            score = partial(_logps, self.model, chunk, self.bench.plan.token_budget)
            logps += self._part(score, scored=[pair_key(group) for group in chunk])
        return logps

    def draw(self) -> Answers:
        """Its answers to the prompts that are answered at temperature 1."""
        return self.answers(list(self.subject.reading.sampled), self.bench.seed)

    def answers(self, prompts: list[list[int]], seed: int | None = None) -> Answers:
        """Greedy answers, or sampled ones."""
        longest, chat, number = self.bench.max_new_tokens, self.subject.reading.chat, iter(range(len(prompts)))

        def keep(batch: list[list[int]], answer: Callable[[], Answers]) -> Answers:
            made: Answers = self._part(answer, answered=batch, longest=longest, seed=seed, batch=next(number))
            return made

        said: Answers = generate(self.model, prompts, chat, longest, seed=seed, keep=keep)
        return said

    def _part(self, make: Callable[[], Any], **facts: Any) -> Any:
        subject, plan = self.subject, self.bench.plan
        known = {"subject": subject.name, **subject.digests, **computed_by(plan, self.kernels)}
        return self.bench.parts.value(make, **facts, **known, budget=plan.token_budget)


def _logps(model: Any, groups: Sequence[Group], budget: int) -> list[float]:
    logps, _ = score_groups(model, groups, budget)
    return logps
