"""The ladder: engines from the fastest to the one that serves every causal model. Unsloth's loads its models itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.engines.attention import attend_as_own
from dpo_assets.training.engines.base import attach_engine
from dpo_assets.training.engines.fused.decoder import FusedDecoder, attach_fused
from dpo_assets.training.engines.recompute import recompute_lowest
from dpo_assets.training.engines.rows import OwnLogitsEngine, RowsEngine, why_not_rows
from dpo_assets.training.engines.transformers import TransformersEngine, why_not_packed
from dpo_assets.training.models.loading import compute_dtype
from dpo_assets.training.models.structure import causal_lm


def choose_kernels(model: Any, plan: TrainingPlan, first: str | None = None) -> tuple[str, str]:
    """Attaches the first engine of LADDER that says it can compute a loaded model: (its name, why not those before it).

    The planner knows the architecture; what only the worker sees (an adapter with dropout, of a kind of its own) falls
    back to the next. Whether an engine is exact is proven afterwards (`scoring.proof`).

    Args:
        first: the engine to begin with; None: the plan's, and Transformers' layers where that is Unsloth, which loads
            its models itself.
    """
    asked = first or (plan.kernels if plan.kernels in LADDER else TransformersEngine.name)
    reasons = []
    for kernels in (asked, *below(asked)):
        fitted = plan.fitted_to(kernels)
        if not (reason := _ATTACH[kernels](causal_lm(model), fitted)):
            break
        reasons.append(reason)
    if kernels != FusedDecoder.name:  # Which recomputes by itself.
        recompute_lowest(model, fitted.recomputed_layers)
    return kernels, "; ".join(reasons)


def below(kernels: str) -> tuple[str, ...]:
    """The slower engines, which compute what this one does not; none for an engine that is not on the ladder."""
    return LADDER[LADDER.index(kernels) + 1 :] if kernels in LADDER else ()


# Each lets an engine compute a model, and says why not, which is empty when it does.


def _fused(lm: Any, plan: TrainingPlan) -> str:
    return attach_fused(lm, compute_dtype(plan), plan.recomputed_layers, plan.max_length)


def _own_layers(lm: Any, plan: TrainingPlan) -> str:
    if reason := why_not_packed(lm):
        return reason
    attach_engine(lm, TransformersEngine(lm, compiled=_compiled(plan)))
    return ""


def _rows(lm: Any, plan: TrainingPlan) -> str:
    if reason := why_not_rows(lm):
        return reason
    attend_as_own(lm)
    attach_engine(lm, RowsEngine(lm, plan.token_budget, compiled=_compiled(plan)))
    return ""


def _own_logits(lm: Any, plan: TrainingPlan) -> str:
    lm.set_attn_implementation(OwnLogitsEngine.attention)
    attach_engine(lm, OwnLogitsEngine(lm, plan.token_budget, compiled=_compiled(plan)))
    return ""


def _compiled(plan: TrainingPlan) -> bool:
    return "compile" in plan.speedups


_ATTACH: dict[str, Callable[[Any, TrainingPlan], str]] = {
    FusedDecoder.name: _fused,
    TransformersEngine.name: _own_layers,
    RowsEngine.name: _rows,
    OwnLogitsEngine.name: _own_logits,
}
LADDER = tuple(_ATTACH)
