"""The DPO family on sequence log-probabilities, as pure functions of the pairs of one optimizer step.

Values equal those of TRL 1.15 (`DPOTrainer._compute_loss`) on the same log-probabilities, with two additions: `cdpo`,
which TRL does not have, and a form of `discopop` that does not overflow. Each formula names its paper.

Notation: r = log pi(y|x) - log pi_ref(y|x) is the log-ratio of an answer, summed over its tokens; h = f'(exp r) is its
score under the f-divergence (h = r for reverse KL); m = h_chosen - h_rejected is the margin; eps is label smoothing.
No loss keeps state between steps: TRL 1.15 dropped the running mean that `bco_pair` once had.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_assets.checks.config import loss_faults
from dpo_assets.checks.losses import LOSSES
from dpo_assets.errors import ConfigError
from dpo_assets.recipe import DpoSection, FDivergence

LARGEST_EXPONENT = 80.0  # exp() of it is still a number in float32; TRL clamps the alpha divergence there too.
ALPHA_IS_ONE = 1e-6


@dataclass(frozen=True)
class PairScores:
    """Log-probabilities of pairs, each [pairs], summed over an answer's tokens, and the numbers of those tokens."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def at_reference(self) -> PairScores:
        """The same pairs with the policy equal to the reference: their loss is what a first loss must be."""
        return replace(self, chosen=self.ref_chosen, rejected=self.ref_rejected)

    def detached(self) -> PairScores:
        """The same without their graph."""
        return PairScores(*(getattr(self, f.name).detach() for f in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence[PairScores]) -> PairScores:
        """The pairs of several forwards as one batch."""
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))


@dataclass(frozen=True)
class _Terms:
    """What the formulas are written in, each [pairs]: log-ratios r, margins m and answers' scores h per token."""

    scores: PairScores
    chosen: Tensor
    rejected: Tensor
    margin: Tensor
    margin_per_token: Tensor
    mean_chosen_tokens: Tensor | float


@dataclass(frozen=True)
class DpoLoss:
    """A weighted sum of losses of the family, with what they take.

    `beta` is the strength of the pull towards the reference (tau for `ipo`), `label_smoothing` the eps of `cdpo`,
    `robust`, `exo_pair`, `aot` and `aot_unpaired`, `alpha` the coefficient of the alpha divergence, `discopop_tau` the
    temperature of `discopop`. Weights are 1 where none are given.

    Raises:
        ConfigError: for a name that does not exist, weights of another number than names, or a beta of 0 where a loss
            divides by it. `of` also refuses what would act on no loss.
    """

    names: tuple[str, ...] = ("sigmoid",)
    weights: tuple[float, ...] = ()
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence: FDivergence = "reverse_kl"
    alpha: float = 0.5
    discopop_tau: float = 0.05

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in _FORMULAS]
        if unknown or not self.names:
            raise ConfigError(f"there is no loss {unknown or '[]'}; losses: {', '.join(_FORMULAS)}")
        if self.weights and len(self.weights) != len(self.names):
            raise ConfigError(f"{len(self.names)} losses need as many weights, not {len(self.weights)}")
        if self.beta == 0 and {"ipo", "sppo_hard"} & set(self.names):
            raise ConfigError("the losses ipo and sppo_hard aim at a gap of 1 / (2 beta): beta must be above 0")

    @classmethod
    def of(cls, section: DpoSection) -> DpoLoss:
        """The loss that a recipe asks for.

        Raises:
            ConfigError: for settings that the check `loss_supported` calls an error, with its words.
        """
        faults = loss_faults(section)
        if faults:
            raise ConfigError("\n".join(f"{fault.value}: {fault.fix}" for fault in faults))
        return cls(
            names=section.losses,
            weights=tuple(section.loss_weights),
            beta=section.beta,
            label_smoothing=section.label_smoothing,
            f_divergence=section.f_divergence,
            alpha=section.alpha,
            discopop_tau=section.discopop_tau,
        )

    @property
    def coupled(self) -> bool:
        """Whether a loss sorts over the pairs of a step, so that the step is no mean of one value per pair."""
        return any(LOSSES[name].coupled for name in self.names)

    @property
    def needs_step_tokens(self) -> bool:
        """Whether `per_pair` must be told the mean number of chosen tokens of the whole step."""
        return "sft" in self.names

    def per_pair(self, scores: PairScores, mean_chosen_tokens: Tensor | float | None = None) -> Tensor:
        """Loss of each pair [pairs]; their mean over all pairs of a step is the step's loss.

        `mean_chosen_tokens` is the number of chosen tokens per pair over the whole step. Only the `sft` term needs it:
        it is a mean over tokens, and a step may be cut into several forwards.

        Raises:
            ValueError: for a coupled loss, and for an `sft` term without `mean_chosen_tokens`.
        """
        if self.coupled:
            raise ValueError(f"{' + '.join(self.names)} couples the pairs of a step: use of_batch or gradient")
        if mean_chosen_tokens is None and self.needs_step_tokens:
            raise ValueError("the sft term is a mean over the tokens of the whole step: give mean_chosen_tokens")
        return self._weighted(scores, math.nan if mean_chosen_tokens is None else mean_chosen_tokens)

    def of_batch(self, scores: PairScores) -> Tensor:
        """Loss of a whole optimizer step, a scalar, from all of its pairs. Differentiable in every log-probability."""
        return self._weighted(scores, scores.chosen_tokens.to(scores.chosen).mean()).mean()

    def gradient(self, scores: PairScores) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, d loss / d chosen [pairs], d loss / d rejected [pairs]) of a whole step, detached.

        With it a step that is cut into several forwards can be differentiated exactly: the sum over its forwards of
        `(d_chosen * chosen + d_rejected * rejected).sum()` has the gradient of `of_batch`.
        """
        chosen, rejected = (x.detach().requires_grad_() for x in (scores.chosen, scores.rejected))
        with torch.enable_grad():
            loss = self.of_batch(replace(scores, chosen=chosen, rejected=rejected))
        by_chosen, by_rejected = torch.autograd.grad(loss, (chosen, rejected), materialize_grads=True)
        return loss.detach(), by_chosen, by_rejected

    def at_zero_margin(self) -> float | None:
        """The loss when policy and reference are equal; None with an `sft` term, which depends on the data.

        For those, `of_batch(scores.at_reference())` is the same number on given pairs.
        """
        if "sft" in self.names:
            return None
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        return float(self.of_batch(PairScores(zero, zero, zero, zero, one, one)))

    def _weighted(self, scores: PairScores, mean_chosen_tokens: Tensor | float) -> Tensor:
        terms = self._terms(scores, mean_chosen_tokens)
        weights = self.weights or (1.0,) * len(self.names)
        total = torch.zeros_like(terms.margin)
        for name, weight in zip(self.names, weights, strict=True):
            total = total + weight * _FORMULAS[name](terms, self)
        return total

    def _terms(self, scores: PairScores, mean_chosen_tokens: Tensor | float) -> _Terms:
        chosen, rejected = scores.chosen - scores.ref_chosen, scores.rejected - scores.ref_rejected
        by_chosen, by_rejected = (divergence_score(r, self.f_divergence, self.alpha) for r in (chosen, rejected))
        return _Terms(
            scores=scores,
            chosen=chosen,
            rejected=rejected,
            margin=by_chosen - by_rejected,
            margin_per_token=by_chosen / scores.chosen_tokens.clamp(min=1)
            - by_rejected / scores.rejected_tokens.clamp(min=1),
            mean_chosen_tokens=mean_chosen_tokens,
        )


def divergence_score(log_ratio: Tensor, divergence: FDivergence, alpha: float) -> Tensor:
    """h = f'(t) of t = exp(log_ratio), any shape, zero at policy = reference.

    f-DPO, arXiv 2309.16240, table 1, in TRL's form: reverse KL log t, forward KL 1 - 1/t, Jensen-Shannon
    log(2t / (t + 1)), alpha divergence (t^(alpha - 1) - 1) / (alpha - 1), which is forward KL at alpha 0 and reverse KL
    at alpha 1.
    """
    if divergence == "forward_kl":
        return -torch.expm1(-log_ratio)
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(log_ratio)
    if divergence == "alpha_divergence" and abs(alpha - 1) >= ALPHA_IS_ONE:
        return torch.expm1(((alpha - 1) * log_ratio).clamp(max=LARGEST_EXPONENT)) / (alpha - 1)
    return log_ratio


def _sigmoid(t: _Terms, loss: DpoLoss) -> Tensor:
    """-log sigmoid(beta m): DPO, Rafailov et al., arXiv 2305.18290, equation 7."""
    return -F.logsigmoid(loss.beta * t.margin)


def _smoothed(logits: Tensor, eps: float) -> Tensor:
    """-(1 - eps) log sigmoid(logits) - eps log sigmoid(-logits)."""
    return -(1 - eps) * F.logsigmoid(logits) - eps * F.logsigmoid(-logits)


def _cdpo(t: _Terms, loss: DpoLoss) -> Tensor:
    """Conservative DPO: the cross-entropy when a share eps of the labels is wrong (Mitchell, 'A note on DPO with noisy
    preferences', 2023; `label_smoothing` of the DPO repository). The margin stops at log((1 - eps) / eps) / beta."""
    return _smoothed(loss.beta * t.margin, loss.label_smoothing)


def _robust(t: _Terms, loss: DpoLoss) -> Tensor:
    """Unbiased under label noise eps: (-(1 - eps) log sigmoid(beta m) + eps log sigmoid(-beta m)) / (1 - 2 eps),
    arXiv 2403.00409, section 3.1. It has no lower bound, unlike `cdpo`."""
    logits, eps = loss.beta * t.margin, loss.label_smoothing
    return (eps * F.logsigmoid(-logits) - (1 - eps) * F.logsigmoid(logits)) / (1 - 2 * eps)


def _hinge(t: _Terms, loss: DpoLoss) -> Tensor:
    """max(0, 1 - beta m): SLiC, arXiv 2305.10425, normalised by the reference as in RSO, arXiv 2309.06657."""
    return torch.relu(1 - loss.beta * t.margin)


def _ipo(t: _Terms, loss: DpoLoss) -> Tensor:
    """(m per token - 1 / (2 beta))^2: IPO, arXiv 2310.12036, equation 17, on scores averaged over tokens."""
    return (t.margin_per_token - 1 / (2 * loss.beta)) ** 2


def _exo_pair(t: _Terms, loss: DpoLoss) -> Tensor:
    """KL of (sigmoid(beta m), sigmoid(-beta m)) from (1 - eps, eps): EXO-pref, arXiv 2402.00856, equation 16."""
    logits, eps = loss.beta * t.margin, loss.label_smoothing
    wins = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-eps))
    return wins + torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(eps))


def _nca_pair(t: _Terms, loss: DpoLoss) -> Tensor:
    """-log s(beta r_c) - (log s(-beta r_c) + log s(-beta r_r)) / 2 with the sigmoid s: NCA, arXiv 2402.05369, 4.1."""
    chosen, rejected = loss.beta * t.chosen, loss.beta * t.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _bco_pair(t: _Terms, loss: DpoLoss) -> Tensor:
    """-log s(beta r_c) - log s(-beta r_r): binary classifier, arXiv 2404.04656, section 4, without reward shift."""
    return -F.logsigmoid(loss.beta * t.chosen) - F.logsigmoid(-loss.beta * t.rejected)


def _sppo_hard(t: _Terms, loss: DpoLoss) -> Tensor:
    """(r_c - 1 / (2 beta))^2 + (r_r + 1 / (2 beta))^2: SPPO, arXiv 2405.00675, equation 4.7 with hard labels."""
    aim = 0.5 / loss.beta
    return (t.chosen - aim) ** 2 + (t.rejected + aim) ** 2


def _aot(t: _Terms, loss: DpoLoss) -> Tensor:
    """Smoothed sigmoid loss between the sorted margins of policy and reference over the step: quantile against quantile
    (AOT for paired data, arXiv 2406.05882, section 3)."""
    policy = (t.scores.chosen - t.scores.rejected).sort().values
    reference = (t.scores.ref_chosen - t.scores.ref_rejected).sort().values
    return _smoothed(loss.beta * (policy - reference), loss.label_smoothing)


def _aot_unpaired(t: _Terms, loss: DpoLoss) -> Tensor:
    """Smoothed sigmoid loss between the sorted log-ratios of chosen and of rejected answers over the step
    (AOT for unpaired data, arXiv 2406.05882, section 3)."""
    return _smoothed(loss.beta * (t.chosen.sort().values - t.rejected.sort().values), loss.label_smoothing)


def _apo_zero(t: _Terms, loss: DpoLoss) -> Tensor:
    """1 - s(beta r_c) + s(beta r_r): APO-zero, arXiv 2408.06266, equation 7."""
    return 1 - torch.sigmoid(loss.beta * t.chosen) + torch.sigmoid(loss.beta * t.rejected)


def _apo_down(t: _Terms, loss: DpoLoss) -> Tensor:
    """s(beta r_c) + 1 - s(beta (r_c - r_r)): APO-down, arXiv 2408.06266, equation 8."""
    return torch.sigmoid(loss.beta * t.chosen) + 1 - torch.sigmoid(loss.beta * (t.chosen - t.rejected))


def _discopop(t: _Terms, loss: DpoLoss) -> Tensor:
    """(1 - w) (-log s(x)) + w exp(-x) with x = beta m and w = s(x / tau): DiscoPOP, arXiv 2406.08414, equation 5.

    w exp(-x) is computed as one exponential. As a product it is 0 * infinity, so NaN, for a margin far below zero.
    """
    logits = loss.beta * t.margin
    blend = logits / loss.discopop_tau
    return -F.logsigmoid(logits) * torch.sigmoid(-blend) + torch.exp(F.logsigmoid(blend) - logits)


def _sigmoid_norm(t: _Terms, loss: DpoLoss) -> Tensor:
    """-log sigmoid(beta m per token): the length-normalised DPO of Tulu 3, arXiv 2411.15124, section 5."""
    return -F.logsigmoid(loss.beta * t.margin_per_token)


def _sft(t: _Terms, loss: DpoLoss) -> Tensor:
    """Negative log-likelihood of the chosen answers, a mean over the tokens of the step: the term that RPO,
    arXiv 2404.19733, adds to DPO."""
    return -t.scores.chosen / t.mean_chosen_tokens


_FORMULAS: dict[str, Callable[[_Terms, DpoLoss], Tensor]] = {
    "sigmoid": _sigmoid,
    "cdpo": _cdpo,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid_norm,
    "sft": _sft,
}
