"""The packed DPO trainer: TRL's DPOTrainer on packed batches, for every loss of the family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import trl
from peft import PeftModel
from torch import Tensor
from transformers import Trainer

from dpo_assets.training.batches.batch import PackedBatch
from dpo_assets.training.engines.head import TokenScores
from dpo_assets.training.engines.transformers import engine_of
from dpo_assets.training.guard.finite import check_first_loss
from dpo_assets.training.guard.sampling import AdapterState
from dpo_assets.training.private.trl import REFERENCE_ADAPTER, check_adapters, check_hooks, check_prepared
from dpo_assets.training.scoring.logprobs import score_tokens, sequence_logps
from dpo_assets.training.snapshot import Snapshot
from dpo_assets.training.trainers.losses import DpoLoss, PairScores
from dpo_assets.training.trainers.packed import PackedSteps
from dpo_assets.training.trainers.step import Coupled, Forward, Step

# Scores a packed batch by the reference: [pairs, 2] summed log-probabilities of chosen and rejected.
StepReference = Callable[[PackedBatch], Tensor]


@contextmanager
def made_by_trl(trainer: trl.DPOTrainer, model: Any) -> Iterator[None]:
    """Around the `__init__` that TRL's trainer has of its own: what is trained stays in fp32.

    TRL turns the adapter of a quantised base into bf16, where a step of 5e-6 rounds to nothing.

    Raises:
        ConfigError: when TRL is not as it was read.
    """
    check_hooks()
    factors = [(p, p.data) for p in model.parameters() if p.requires_grad]
    adapters = tuple(getattr(model, "peft_config", ()))
    yield
    check_adapters(trainer, adapters)
    for parameter, data in factors:
        parameter.data = data


class PackedDPOTrainer(PackedSteps, trl.DPOTrainer):
    """TRL's DPOTrainer on packed batches.

    Takes a dataset that is tokenized (`prompt_ids`, `chosen_ids`, `rejected_ids`) and carries the reference's
    log-probabilities (`ref_chosen_logps`, `ref_rejected_logps`), unless `step_reference` computes them at every step.
    Metrics have TRL's names. Losses equal TRL's too, but that `loss` is without the balancing loss of mixtures of
    experts, which is trained on beside it and logged as `aux_loss`.

    Args:
        loss: what is minimised; sigmoid with the arguments' beta by default.
        reference: `sft` or `base`, for the advice of a failed first loss.
        step_reference: scores a batch by the reference, for strategies that keep it in memory.
        router_balance: what the routers' balancing loss is multiplied by.
        keep_reference_adapter: keep TRL's frozen copy of the starting adapter, which `step_reference` then uses.
    """

    def __init__(
        self,
        model: Any,
        *args: Any,
        loss: DpoLoss | None = None,
        reference: str = "sft",
        step_reference: StepReference | None = None,
        router_balance: float = 0.0,
        keep_reference_adapter: bool = False,
        **kwargs: Any,
    ) -> None:
        self._taken_as_prepared = False
        with made_by_trl(self, model):
            super().__init__(model, *args, **kwargs)
        check_prepared(self, self._taken_as_prepared)
        self._loss = loss or DpoLoss(beta=self.beta)
        self._reference, self._step_reference = reference, step_reference
        self.router_balance = router_balance
        self._tokens = 0
        self._first: list[PairScores] = []
        self._at_reference: AdapterState | None = None
        self.loss_at_reference: float | None = None  # Of the first step, where training does not start there.
        self.expected_first_loss = float("nan")
        self.first_loss_tokens = 0.0  # Mean tokens of a pair's answers in the first step, in 16 bit.
        # With cached scores the clone that TRL makes of a PEFT policy is memory, and a wrong file when saved.
        copied = isinstance(self.model, PeftModel) and REFERENCE_ADAPTER in self.model.peft_config
        if copied and not keep_reference_adapter:
            self.model.delete_adapter(REFERENCE_ADAPTER)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        self._taken_as_prepared = True
        return dataset

    def go_on_from_elsewhere(self, reference: AdapterState) -> None:
        """The policy will start from another adapter than the reference's, which is told, so its first loss is not the
        one at zero margin: the first batch is scored by the reference's adapter too, and that loss must be."""
        self._at_reference = reference

    def snapshot(self) -> Snapshot:
        """With what only the first step tells: its loss is checked once, by the try that took it."""
        sums = super().snapshot()
        first = {
            "tokens": self._tokens,
            "expected": self.expected_first_loss,
            "answers": self.first_loss_tokens,
            "at_reference": self.loss_at_reference,
        }
        return Snapshot(sums.tensors, sums.values | first)

    def take_up(self, snapshot: Snapshot) -> None:
        super().take_up(snapshot)
        self._tokens = snapshot.values["tokens"]
        self.expected_first_loss, self.first_loss_tokens = snapshot.values["expected"], snapshot.values["answers"]
        self.loss_at_reference = snapshot.values["at_reference"]

    def begin_step(self, model: Any, step: Step) -> Step:
        """With reference scores of every forward; and, for a loss that couples pairs across forwards, its slopes."""
        forwards = step.forwards
        if self._step_reference is not None:
            with torch.no_grad():
                forwards = tuple(replace(each, reference=self._step_reference(each.batch)) for each in forwards)
        if self._at_reference is not None and self.state.global_step == 0:
            self._check_reference(model, forwards, self._at_reference)
        if self._loss.coupled and len(forwards) > 1:
            forwards = self._coupled(model, forwards)
        return replace(step, forwards=forwards)

    def _check_reference(self, model: Any, forwards: tuple[Forward, ...], reference: AdapterState) -> None:
        """Holds the reference's scores of the first batch against what the policy scores with its adapter."""
        lm = self.accelerator.unwrap_model(model)
        with torch.no_grad(), reference.in_place(lm):
            engine_of(lm).renew()
            scored = PairScores.joined([self._beforehand(model, forward) for forward in forwards])
        engine_of(lm).renew()
        self.loss_at_reference = float(self._loss.of_batch(scored))
        self._check_first(self.loss_at_reference, scored)

    def _coupled(self, model: Any, forwards: tuple[Forward, ...]) -> tuple[Forward, ...]:
        """Scores all pairs of the step first: a loss that sorts over them needs them all before any gradient."""
        with torch.no_grad():
            parts = [self._beforehand(model, forward) for forward in forwards]
        loss, by_chosen, by_rejected = self._loss.gradient(PairScores.joined(parts))
        slopes = torch.stack([by_chosen, by_rejected], dim=1)
        by_forward = slopes.split([len(part.chosen) for part in parts])
        return tuple(
            replace(forward, coupled=Coupled(own, share=loss / len(parts)))
            for forward, own in zip(forwards, by_forward, strict=True)
        )

    def forward_loss(self, model: Any, forward: Forward, step: Step) -> tuple[Tensor, Tensor]:
        scores, balance = self.scored(model, forward, step)
        pairs = self._pair_scores(scores, forward)
        self._count(scores, forward.batch, pairs)
        if self.state.global_step == 0:
            self._first.append(pairs.detached())
        if (coupled := forward.coupled) is not None:
            by_chosen, by_rejected = coupled.slopes.unbind(1)
            return (by_chosen * pairs.chosen + by_rejected * pairs.rejected).sum() + balance, coupled.share
        if self._loss.coupled:
            loss = self._loss.of_batch(pairs)
        else:
            loss = self._loss.per_pair(pairs, step.first_targets / step.pairs).sum() / step.pairs
        return loss + balance, loss

    def _beforehand(self, model: Any, forward: Forward) -> PairScores:
        """What `forward_loss` will score, by the same graph: where gradients decide which, they are thrown away."""
        lm = self.accelerator.unwrap_model(model)
        with engine_of(lm).as_the_policy():
            return self._pair_scores(score_tokens(lm, forward.batch, self.accelerator.autocast()), forward).detached()

    def _pair_scores(self, scores: TokenScores, forward: Forward) -> PairScores:
        assert forward.reference is not None, "the collator takes it from the rows, or `step_reference` scores it"
        logps = sequence_logps(scores, forward.batch).view(-1, 2)
        reference, lengths = forward.reference.to(logps), forward.batch.scored.lengths.view(-1, 2)
        return PairScores(*logps.unbind(1), *reference.unbind(1), *lengths.unbind(1))

    def after_step_loss(self, loss: Tensor) -> None:
        if self.state.global_step == 0:
            first = PairScores.joined(self._first)
            self._first.clear()
            if self._at_reference is None:
                self._check_first(float(loss), first)

    def _check_first(self, loss: float, first: PairScores) -> None:
        self.expected_first_loss = float(self._loss.of_batch(first.at_reference()))
        if self.args.bf16 or self.args.fp16:
            self.first_loss_tokens = float((first.chosen_tokens + first.rejected_tokens).double().mean())
        check_first_loss(loss, self.expected_first_loss, self._reference, self.first_loss_tokens)

    def _count(self, scores: TokenScores, batch: PackedBatch, pairs: PairScores) -> None:
        """TRL's metrics under TRL's names, weighted by pairs and tokens. Nothing here waits for the device."""
        chosen_token = batch.scored.owner % 2 == 0
        count, number = len(scores.logps), len(pairs.chosen)
        chosen_count = chosen_token.sum()
        rewards_chosen = self.beta * (pairs.chosen - pairs.ref_chosen).detach()
        rewards_rejected = self.beta * (pairs.rejected - pairs.ref_rejected).detach()
        add = self._means.add
        add("entropy", scores.entropy.sum(), count)
        add("logits/chosen", (scores.mean_logits * chosen_token).sum(), chosen_count)
        add("logits/rejected", (scores.mean_logits * ~chosen_token).sum(), count - chosen_count)
        add("mean_token_accuracy", (scores.top1 & chosen_token).sum(), chosen_count)
        add("rewards/chosen", rewards_chosen.sum(), number)
        add("rewards/rejected", rewards_rejected.sum(), number)
        add("rewards/accuracies", (rewards_chosen > rewards_rejected).sum(), number)
        add("rewards/margins", (rewards_chosen - rewards_rejected).sum(), number)
        # Ratios of sums: a mean of ratios would let the shortest answers decide.
        add("nll_ratio", pairs.chosen.sum(), pairs.ref_chosen.sum())
        add("chosen_nats_per_token", (pairs.chosen - pairs.ref_chosen).sum(), chosen_count)
        add("rejected_nats_per_token", (pairs.rejected - pairs.ref_rejected).sum(), count - chosen_count)
        add("logps/chosen", pairs.chosen.sum(), number)
        add("logps/rejected", pairs.rejected.sum(), number)
        self._tokens += sum(batch.row_lengths)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        means = self._means.take()
        if means:
            means["num_tokens"] = float(self._tokens)
        Trainer.log(self, logs | means, start_time)
