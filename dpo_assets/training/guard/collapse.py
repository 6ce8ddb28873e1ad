"""Watches a DPO run, and stops it before it ruins its model: the callback around `checks.collapse`.

A stop is no failure of the stage. The last healthy adapter is put back and becomes the artefact, the report says which
rule fired, and the asset's check `collapse` blocks what comes after it.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Mapping
from dataclasses import asdict
from statistics import median
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpo_assets.checks import collapse as rules
from dpo_assets.checks.collapse import Trigger, healthy, trigger_at
from dpo_assets.checks.reports import Stop
from dpo_assets.checks.tasks import Task, compared
from dpo_assets.contract import GuardSpec
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.guard.sampling import AdapterState, Answer, Watched
from dpo_assets.training.reporting import Reporter
from dpo_assets.training.scoring.generation import generation_health
from dpo_assets.training.snapshot import Snapshot

COMPARED_PAIRS, COMPARED_TOKENS = 32, 512  # Of the data, to say whether its pairs are near-identical.


class CollapseGuard(TrainerCallback):
    """Completes the metric log, probes the policy, keeps the last healthy adapter, and ends a run that collapses.

    Args:
        watched: the policy with its start, on the model what training begins with.
        guard: limits, and how often to probe.
        prompts: token ids of the probe's prompts; none switches the sampled probe off.
        tasks: the user's tasks, with the token ids of their prompts.
        mean_tokens: mean tokens of chosen and rejected answers, for a trainer that logs sums alone.
    """

    def __init__(
        self,
        watched: Watched,
        guard: GuardSpec,
        reporter: Reporter,
        prompts: list[list[int]],
        tasks: list[tuple[Task, list[int]]],
        mean_tokens: tuple[float, float],
    ) -> None:
        self.watched, self.guard, self.reporter = watched, guard, reporter
        self.prompts, self.tasks, self.mean_tokens = prompts, tasks, mean_tokens
        self.rows: list[dict[str, float]] = []
        self.first: Trigger | None = None
        # The start; or the release that the policy goes on from, which is then on the model already.
        self.begun = AdapterState(watched.model)
        self.kept, self.kept_step, self.stopped_step = self.begun, 0, 0
        self.seconds = 0.0  # That probes took.
        self._probed: dict[str, float] = {}
        self._due = False
        self._reference: dict[str, float] = {}
        self._reference_tasks: list[Answer] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What the reference answers, which is not the policy that goes on from a release. `take_up` knows it in a run
        that is gone on with."""
        self.rows = [row for row in state.log_history if "loss" in row]
        if state.global_step:
            return
        if self.prompts:
            self._reference = generation_health(self._of_reference(self.prompts, self._seed))
        if self.tasks:
            self._reference_tasks = self._of_reference([ids for _, ids in self.tasks], None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        every = max(1, round(self.guard.probe_every * state.max_steps))
        # After the last step the whole adapter is measured anyway.
        self._due = state.global_step % every == 0 and state.global_step < state.max_steps
        if self._due:
            started = time.perf_counter()
            self._probed = self._probe()
            self.seconds += time.perf_counter() - started
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        row = state.log_history[-1]
        row |= self._from_sums(row) | self._probed
        self._probed = {}
        self.rows.append(row)
        found = trigger_at(self.rows, self.guard.limits)
        if found is not None and self.first is None:
            self.first = found
            said = f"dpo: step {found.step}: {found.metric} is {found.value:.4g}; {found.band}"
            if self.guard.stops:
                control.should_training_stop = True
                self.stopped_step = state.global_step
                self.kept.put_into(self.watched.model)
                said += f". Stopped; the adapter of step {self.kept_step} is kept"
            self.reporter.log(said)
        elif self._due and self.first is None and healthy(self.rows, self.guard.limits):
            self.kept, self.kept_step = AdapterState(self.watched.model), state.global_step
        self._due = False

    def snapshot(self) -> Snapshot:
        """What a process that goes on with the run cannot see in its log."""
        return Snapshot(
            dict(self.kept.factors) if self.kept_step else {},
            {
                "kept_step": self.kept_step,
                "first": self.first and asdict(self.first),
                "seconds": self.seconds,
                "reference": self._reference,
                "reference_tasks": self._reference_tasks,
            },
        )

    def take_up(self, snapshot: Snapshot) -> None:
        """Where the run began stays what it was: it was copied before anything of the run was put back."""
        values = snapshot.values
        self.kept_step, self.seconds = values["kept_step"], values["seconds"]
        self.kept = AdapterState.of(snapshot.tensors) if self.kept_step else self.begun
        self.first = values["first"] and Trigger(**values["first"])
        self._reference, self._reference_tasks = values["reference"], values["reference_tasks"]

    @property
    def stopped(self) -> bool:
        return self.stopped_step > 0

    @property
    def _seed(self) -> int:
        return self.watched.plan.dpo.seed

    def _answers(self, prompts: list[list[int]], seed: int | None) -> list[Answer]:
        return self.watched.answers(prompts, self.guard.probe_tokens, seed)

    def _of_reference(self, prompts: list[list[int]], seed: int | None) -> list[Answer]:
        return self.watched.reference_answers(prompts, self.guard.probe_tokens, seed)

    def _from_sums(self, row: Mapping[str, float]) -> dict[str, float]:
        """What TRL's own trainer does not log, from what it does; per token by the mean length of the data's answers.

        TRL logs rewards as beta times the summed log-ratio, whatever the loss.
        """
        beta = self.watched.plan.dpo.beta
        if rules.NLL in row or not beta or "logps/chosen" not in row:
            return {}
        chosen, rejected = row["rewards/chosen"] / beta, row["rewards/rejected"] / beta
        reference = row["logps/chosen"] - chosen
        per_chosen, per_rejected = self.mean_tokens
        return ({rules.NLL: row["logps/chosen"] / reference} if reference else {}) | {
            rules.NATS: chosen / per_chosen,
            "rejected_nats_per_token": rejected / per_rejected,
        }

    def _probe(self) -> dict[str, float]:
        """Answers of the policy as it is now, at about the cost of a step."""
        row: dict[str, float] = {}
        if self.prompts:
            answers = self._answers(self.prompts, self._seed)
            health = generation_health(answers)
            row = {
                f"probe/{name}": health[name]
                for name in ("answers", "repetition", "no_eos", "mean_tokens", "distinct_2")
            }
            row |= {f"probe/reference_{name}": self._reference[name] for name in ("repetition", "no_eos")}
            if not self.watched.why_no_scores:
                parts = self.watched.divergence(self.prompts, answers)
                row[rules.KL] = sum(ratio for ratio, _ in parts) / max(1, sum(n for _, n in parts))
        if self.tasks:
            now = self._answers([ids for _, ids in self.tasks], None)
            texts = [[a["text"] for a in answers] for answers in (self._reference_tasks, now)]
            said = compared([task for task, _ in self.tasks], *texts)
            row |= {rules.CAPABILITY: said["policy"], rules.TASKS: said["tasks"]}
            row |= {rules.LOST: said["lost"], rules.GAINED: said["gained"]}
        return row

    def record(self, rows: Any) -> Stop | None:
        """What the report says of the first trigger, or None where there was none.

        Args:
            rows: the training pairs with their token ids, to name the likely knob.
        """
        if self.first is None:
            return None
        plan = self.watched.plan
        return Stop(
            **asdict(self.first),
            source=self.guard.source,
            fix=advice(plan, self.guard, near_identical(rows, self.guard.limits.near_identical)),
            kept_step=self.kept_step if self.stopped else plan.dpo_steps,
            steps_saved=plan.dpo_steps - self.stopped_step if self.stopped else 0,
            of_steps=plan.dpo_steps,
        )


def near_identical(rows: Any, limit: float) -> bool:
    """Whether the share of tokens in which chosen and rejected answers differ is below `limit`, in the median.

    DPO lowers the chosen answers of such pairs (Smaug, arXiv 2402.13228).
    """
    few = rows.select(range(min(COMPARED_PAIRS, len(rows))))
    if not {"chosen_ids", "rejected_ids"} <= set(few.column_names) or not len(few):
        return False
    distances = [
        1 - difflib.SequenceMatcher(None, c[:COMPARED_TOKENS], r[:COMPARED_TOKENS], autojunk=False).ratio()
        for c, r in zip(few["chosen_ids"], few["rejected_ids"], strict=True)
    ]
    return median(distances) < limit


def advice(plan: TrainingPlan, guard: GuardSpec, similar_pairs: bool) -> str:
    """The likely knobs of a collapse, most likely first."""
    dpo, ways = plan.dpo, []
    rate, reference = dpo.learning_rate, guard.reference_rate
    if reference and rate > reference:
        ways.append(f"lower dpo.learning_rate from {rate:g} to {reference:g} or below (the reference of its band)")
    if guard.usual_beta:
        ways.append(f"raise dpo.beta from {dpo.beta:g} to {guard.usual_beta:g}: the restraint is weak")
    if similar_pairs and "sft" not in dpo.losses:
        ways.append(
            "set dpo.loss to [sigmoid, sft]: chosen and rejected answers are near-identical, and DPO lowers both"
        )
    if not ways:
        ways.append(f"lower dpo.learning_rate 5 to 10 times, to {rate / 10:g} to {rate / 5:g}")
        if "sft" not in dpo.losses:
            ways.append("set dpo.loss to [sigmoid, sft], which holds on to the chosen answers")
    return "; or ".join(ways)
