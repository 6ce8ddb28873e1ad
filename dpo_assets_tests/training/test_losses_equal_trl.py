"""Every loss against TRL's own `DPOTrainer._compute_loss`: real pairs, ours on the log-probabilities it used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from torch import Tensor

from dpo_assets.checks.losses import LOSSES, TRL_LACKS
from dpo_assets.recipe import FDivergence
from dpo_assets.training.batches.data import load_split
from dpo_assets.training.models.loading import attach_adapter, load_base
from dpo_assets.training.stages.dpo import dpo_arguments
from dpo_assets.training.trainers.losses import DpoLoss, PairScores
from dpo_assets_tests.training.conftest import PlanMaker
from dpo_assets_tests.training.trl_dense_scoring import dense_scoring

TOLERANCE = 1e-6
DIVERGENCES: list[tuple[FDivergence, float]] = [
    ("forward_kl", 0.5),
    ("js_divergence", 0.5),
    ("alpha_divergence", 0.5),
    ("alpha_divergence", 0.2),
    ("alpha_divergence", 1.0),
]
SMOOTHED = {"robust": 0.1, "exo_pair": 1e-3, "aot": 0.1, "aot_unpaired": 0.1}

SINGLE = [
    DpoLoss((name,), beta=beta, label_smoothing=eps)
    for name in LOSSES
    if name not in TRL_LACKS
    for beta in (0.01, 0.1, 5.0 if name == "sigmoid_norm" else 0.5)
    for eps in ((0.0, SMOOTHED[name]) if name in ("robust", "aot", "aot_unpaired") else (SMOOTHED.get(name, 0.0),))
]
DIVERGENT = [
    DpoLoss((name,), beta=0.1, label_smoothing=SMOOTHED.get(name, 0.0), f_divergence=divergence, alpha=alpha)
    for name, facts in LOSSES.items()
    if facts.f_divergence and name not in TRL_LACKS
    for divergence, alpha in DIVERGENCES
]
MIXED = [
    DpoLoss(("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.0)),
    DpoLoss(("sigmoid", "sft")),
    DpoLoss(("aot", "sft", "ipo"), (0.5, 0.25, 2.0)),
    DpoLoss(("hinge", "exo_pair", "robust"), (1.0, 3.0, 0.5), label_smoothing=0.2, f_divergence="js_divergence"),
    DpoLoss(("discopop",), (2.0,), discopop_tau=0.5),
    DpoLoss(("discopop", "apo_down"), discopop_tau=0.01),
]


@dataclass
class Yardstick:
    """TRL's trainer, one real batch and what its model said about it."""

    trainer: trl.DPOTrainer
    inputs: dict[str, Any]
    outputs: Any
    tokens: Tensor  # [2 * pairs, positions]: which positions belong to an answer; chosen rows first.

    def scores(self) -> PairScores:
        chosen, rejected = self.outputs.log_probs.sum(1).chunk(2)
        chosen_tokens, rejected_tokens = self.tokens.sum(1).chunk(2)
        references = self.inputs["ref_chosen_logps"], self.inputs["ref_rejected_logps"]
        return PairScores(chosen, rejected, *references, chosen_tokens, rejected_tokens)

    def loss(self, loss: DpoLoss) -> tuple[Tensor, Tensor]:
        """(TRL's loss, its gradient by the log-probability of each token [2 * pairs, positions])."""
        trainer, logps = self.trainer, self.outputs.log_probs.clone().requires_grad_()
        trainer.loss_types, trainer.loss_weights = list(loss.names), list(loss.weights) or [1.0] * len(loss.names)
        trainer.beta, trainer.label_smoothing = loss.beta, loss.label_smoothing
        trainer.f_divergence_type, trainer.f_alpha_divergence_coef = loss.f_divergence, loss.alpha
        trainer.args.discopop_tau = loss.discopop_tau
        said = SimpleNamespace(**{**dict(self.outputs), "log_probs": logps})
        value = trainer._compute_loss(lambda **_: said, self.inputs, False)
        [gradient] = torch.autograd.grad(value, logps)
        return value.detach(), gradient


@pytest.fixture(scope="module")
def yardstick(
    model_folder: Path,
    dataset: Path,
    sft_adapter: Path,
    tokenizer: Any,
    plan_for: PlanMaker,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Yardstick]:
    """A policy that SFT trained, against its base as the reference: margins of many nats, of both signs."""
    plan = plan_for()
    model = attach_adapter(load_base(model_folder, plan), plan, sft_adapter, seed=1, dropout=0.0)
    with dense_scoring():
        trainer = trl.DPOTrainer(
            model=model,
            args=dpo_arguments(plan, tmp_path_factory.mktemp("yardstick")),
            train_dataset=load_split(dataset, "train", ["prompt", "chosen", "rejected"]),
            processing_class=tokenizer,
        )
        inputs = trainer.data_collator([trainer.train_dataset[n] for n in range(12)])
        mask = inputs["completion_mask"]
        asked = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        asked |= {"labels": inputs["input_ids"].masked_fill(mask == 0, -100), "use_cache": False, "fused_lm_head": True}
        with torch.no_grad():
            outputs = trainer.model(**asked)
            with trainer.model.disable_adapter():
                reference = trainer.model(**asked).log_probs.sum(1)
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = reference.chunk(2)
        trainer.precompute_ref_logps = True
        trainer.model.train()
        yield Yardstick(trainer, inputs, outputs, mask[:, 1:])


def named(loss: DpoLoss) -> str:
    parts = ["+".join(loss.names), f"beta {loss.beta:g}"]
    parts += [f"eps {loss.label_smoothing:g}"] if loss.label_smoothing else []
    parts += [loss.f_divergence] if loss.f_divergence != "reverse_kl" else []
    parts += [f"alpha {loss.alpha:g}"] if loss.f_divergence == "alpha_divergence" else []
    parts += [f"tau {loss.discopop_tau:g}"] if loss.discopop_tau != DpoLoss.discopop_tau else []
    return " ".join(parts)


def test_the_batch_has_margins_of_both_signs_and_answers_of_several_lengths(yardstick: Yardstick) -> None:
    scores = yardstick.scores()
    margin = scores.chosen - scores.ref_chosen - (scores.rejected - scores.ref_rejected)
    assert margin.min() < -1
    assert margin.max() > 1
    assert len(set(scores.chosen_tokens.tolist() + scores.rejected_tokens.tolist())) > 5
    assert (yardstick.outputs.log_probs[yardstick.tokens == 0] == 0).all()


@pytest.mark.parametrize("loss", SINGLE + DIVERGENT + MIXED, ids=named)
def test_value_and_gradient_equal_those_of_trl_on_the_same_batch(yardstick: Yardstick, loss: DpoLoss) -> None:
    theirs, by_token = yardstick.loss(loss)
    value, *gradients = loss.gradient(yardstick.scores())
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(theirs), rel=TOLERANCE, abs=TOLERANCE)
    # TRL's loss sees a sum over tokens, so every token of an answer has the gradient of the answer.
    ours = torch.cat(gradients)[:, None].expand_as(by_token)
    answer = yardstick.tokens.bool()
    torch.testing.assert_close(ours[answer], by_token[answer], rtol=1e-5, atol=1e-8)
    assert by_token[answer].abs().max() > 0


@pytest.mark.parametrize("loss", [x for x in SINGLE + DIVERGENT + MIXED if not x.coupled], ids=named)
def test_a_step_cut_into_forwards_adds_up_to_the_loss_of_trl(yardstick: Yardstick, loss: DpoLoss) -> None:
    scores = yardstick.scores()
    pairs, tokens = len(scores.chosen), scores.chosen_tokens.float().mean()
    cuts = [slice(0, 5), slice(5, 6), slice(6, pairs)]
    parts = [PairScores(**{name: values[cut] for name, values in vars(scores).items()}) for cut in cuts]
    total = sum(loss.per_pair(part, tokens).sum() for part in parts) / pairs
    assert float(total) == pytest.approx(float(yardstick.loss(loss)[0]), rel=2 * TOLERANCE, abs=2 * TOLERANCE)


def test_discopop_is_a_number_where_that_of_trl_overflows(yardstick: Yardstick) -> None:
    loss, scores = DpoLoss(("discopop",), beta=5.0), yardstick.scores()
    assert yardstick.loss(loss)[0].isnan()
    logits = loss.beta * (scores.chosen - scores.ref_chosen - scores.rejected + scores.ref_rejected).double()
    blend = torch.sigmoid(logits / loss.discopop_tau)
    exact = -torch.nn.functional.logsigmoid(logits) * (1 - blend) + blend * torch.exp(-logits)
    assert loss.of_batch(scores).item() == pytest.approx(exact.mean().item(), rel=TOLERANCE)
    assert all(part.isfinite().all() for part in loss.gradient(scores))


def test_every_loss_of_trl_is_known_here(yardstick: Yardstick) -> None:
    yardstick.trainer.loss_types, yardstick.trainer.loss_weights = ["nothing"], [1.0]
    said = SimpleNamespace(**dict(yardstick.outputs))
    with pytest.raises(ValueError, match="Unknown loss type") as refused:
        yardstick.trainer._compute_loss(lambda **_: said, yardstick.inputs, False)
    assert set(names_in(refused.value)) == set(LOSSES) - TRL_LACKS


# The last one: a second trainer resets what accelerate keeps for the whole process.
def test_trl_takes_divergences_with_the_same_losses(
    yardstick: Yardstick, model_folder: Path, plan_for: PlanMaker, tokenizer: Any, tmp_path: Path
) -> None:
    plan, divergence = plan_for(), "js_divergence"
    model = attach_adapter(load_base(model_folder, plan), plan, None, seed=1, dropout=0.0)
    args = dpo_arguments(plan, tmp_path)
    args.loss_type, args.f_divergence_type = ["aot"], divergence
    with pytest.raises(ValueError, match="is only supported for the following loss types") as refused:
        trl.DPOTrainer(
            model=model, args=args, train_dataset=yardstick.trainer.train_dataset, processing_class=tokenizer
        )
    taken = {name for name, facts in LOSSES.items() if facts.f_divergence}
    assert set(names_in(refused.value)) == taken - TRL_LACKS


def names_in(error: BaseException) -> list[str]:
    """The names in the first list of a message."""
    return str(error).split("[")[1].split("]")[0].replace("'", "").split(", ")
