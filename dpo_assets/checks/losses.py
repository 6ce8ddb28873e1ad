"""What each loss takes, and what to write instead of a name that is none. Facts of TRL's source, not bands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LossFacts:
    """What a loss takes. `coupled`: it sorts over the pairs of a step, so it is no mean of one value per pair."""

    smoothing: Literal["ignored", "optional", "needed"] = "ignored"
    f_divergence: bool = False
    coupled: bool = False


# As in TRL 1.15 (`DPOTrainer.__init__` and `_compute_loss`), and `cdpo`, which TRL does not have.
LOSSES: dict[str, LossFacts] = {
    "sigmoid": LossFacts(f_divergence=True),
    "cdpo": LossFacts("optional", f_divergence=True),
    "robust": LossFacts("optional", f_divergence=True),
    "hinge": LossFacts(f_divergence=True),
    "ipo": LossFacts(f_divergence=True),
    "exo_pair": LossFacts("needed", f_divergence=True),
    "nca_pair": LossFacts(),
    "bco_pair": LossFacts(),
    "sppo_hard": LossFacts(),
    "aot": LossFacts("optional", coupled=True),
    "aot_unpaired": LossFacts("optional", coupled=True),
    "apo_zero": LossFacts(),
    "apo_down": LossFacts(),
    "discopop": LossFacts(f_divergence=True),
    "sigmoid_norm": LossFacts(f_divergence=True),
    "sft": LossFacts(f_divergence=True),
}
SUPPORTED_LOSSES: tuple[str, ...] = tuple(LOSSES)
TRL_LACKS: frozenset[str] = frozenset({"cdpo"})
_KTO = (
    "TRL removed kto_pair (its author: 'simplified, does not work as well', TRL 1387); use sigmoid here, apo_zero or "
    "bco_pair for a loss that also judges each answer by itself, or TRL's KTOTrainer on unpaired labels"
)
_NO_REFERENCE = "it has no reference model, which this pipeline is built on; use sigmoid here, or TRL's"
LOSS_ADVICE: dict[str, str] = {
    "kto_pair": _KTO,
    "kto": _KTO,
    "dpo": "set dpo.loss to sigmoid: it is the loss of the DPO paper",
    "rpo": "set dpo.loss to [sigmoid, sft], and rpo_alpha as the second of dpo.loss_weights",
    "mpo": "set dpo.loss to [sigmoid, bco_pair, sft] and dpo.loss_weights to [0.8, 0.2, 1.0] (arXiv 2411.10442)",
    "simpo": f"{_NO_REFERENCE} CPOTrainer; sigmoid_norm is the length-normalised loss with a reference",
    "cpo": f"{_NO_REFERENCE} CPOTrainer",
    "orpo": f"{_NO_REFERENCE} ORPOTrainer",
    "aot_pair": "TRL 1.15 calls this loss aot_unpaired, and the one for paired data aot; set dpo.loss to one of them",
    "slic": "set dpo.loss to hinge",
    "rso": "set dpo.loss to hinge",
    "exo": "set dpo.loss to exo_pair",
    "nca": "set dpo.loss to nca_pair",
    "bco": "set dpo.loss to bco_pair",
    "apo": "set dpo.loss to apo_zero, or to apo_down where the policy is better than the chosen answers",
    "sppo": "set dpo.loss to sppo_hard",
    "rdpo": "set dpo.loss to robust",
}
LOSS_SOURCE = "TRL 1.15 source, DPOTrainer._compute_loss; cdpo: the DPO repository's conservative DPO"
SMOOTHING_SOURCE = "TRL 1.15 source: label_smoothing is used by robust, exo_pair and aot only"
F_DIVERGENCE_SOURCE = "f-DPO, arXiv 2309.16240: its normaliser cancels only in the difference of two rewards"
EXO_SMOOTHING, NOISE = "1e-3 (arXiv 2402.00856)", "0.1 (arXiv 2403.00409)"
