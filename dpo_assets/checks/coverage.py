"""Verdicts on what the adapter changes: by the plan, and as it was attached to the loaded model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set

from dpo_assets.checks.aftermath import OLDER
from dpo_assets.checks.bands import Bands
from dpo_assets.checks.reports import DpoReport
from dpo_assets.checks.verdict import Level, Verdict
from dpo_assets.planning.targets import EXPERT_PARAMETERS, LoraCoverage
from dpo_assets.recipe import EVERY_LINEAR
from dpo_assets.untrusted import in_cell

SAME = 1e-3  # Of the share: no kind of layer is as small, and files may hold a padded row that the model has not.
NAMED = 6  # Kinds that a verdict lists.


def lora_coverage(coverage: LoraCoverage, rank: int, bands: Bands) -> Verdict:
    """Whether every matrix of the decoder layers gets an adapter, and none that is wider than its layer."""
    name, limit = "lora_coverage", bands.limit("lora_coverage")
    band = "every linear layer and expert of the decoder layers, at a rank no larger than its sides"
    if not coverage.kinds:
        fix = "materialise dpo_plan again: it was made without the base's files"
        return Verdict(name, "warn", "not known", band, limit.source, fix)
    faults, level = [], "pass"  # type: tuple[list[str], Level]
    ways = []
    if coverage.frozen_experts:
        ways.append(f"set lora.target_parameters to [{', '.join(EXPERT_PARAMETERS)}]")
    partly = [kind.name for kind in coverage.kinds if kind.role == "linear" and kind.adapted < kind.weights]
    if any(name not in coverage.out_of_reach for name in partly):
        ways.append(f"{'' if ways else 'set '}lora.target_modules to {EVERY_LINEAR}")
    if ways:
        faults.append(", and ".join(ways))
    if coverage.out_of_reach:
        faults.append(f"PEFT cannot put an adapter on {_some(coverage.out_of_reach)}, so no setting adapts these")
    if coverage.wider_than_layer:
        faults.append(f"lower lora.rank: {rank} is more than a side of {_some(coverage.wider_than_layer)}")
    if faults:
        level = "warn" if coverage.share > 0 else "error"
    still = f"; frozen: {_some(coverage.frozen)}" if coverage.frozen else ""
    return Verdict(
        name,
        level,
        f"adapters on {100 * coverage.share:.3g}% of the layers' weights{still}",
        band,
        limit.source,
        "; ".join(faults),
        shown={"kinds": coverage_table(coverage)},
    )


def adapter_attached(report: DpoReport, bands: Bands) -> Verdict:
    """What the trained model was measured to have an adapter on, against what the plan promised."""
    name, source = "adapter_attached", bands.limit("lora_coverage").source
    band = "the share of the layers' weights that the plan says"
    measured, planned = report.lora_coverage, report.lora_planned
    if measured is None:
        return Verdict(name, "warn", f"not measured: {OLDER}", band, source, "materialise dpo_adapter again")
    share, promised = measured.share, planned.share if planned.kinds else measured.share
    less, more = _moved(planned, measured) if planned.kinds else ([], [])
    faults = [f"less of {', '.join(less)} than planned"] if less else []
    faults += [f"more of {', '.join(more)} than planned"] if more else []
    level: Level = "error" if share == 0 or faults else "pass" if abs(share - promised) <= SAME else "warn"
    return Verdict(
        name,
        level,
        f"{100 * share:.3g}% of {100 * promised:.3g}%" + (f": {'; '.join(faults)}" if faults else ""),
        band,
        source,
        ""
        if level == "pass"
        else "compare the kinds below with those of dpo_plan, and name them in lora.target_modules",
        shown={"kinds": coverage_table(measured)},
    )


def _moved(planned: LoraCoverage, measured: LoraCoverage) -> tuple[list[str], list[str]]:
    """Of what less, and of what more, has an adapter than planned.

    Compared kind by kind; by role where the files name a kind otherwise than the model (experts stored one by one).
    """
    known = {kind.name for kind in planned.kinds} & {kind.name for kind in measured.kinds}
    before, now = _shares(planned, known), _shares(measured, known)
    changes = {name: now.get(name, 0.0) - before.get(name, 0.0) for name in [*before, *now]}
    return [name for name, by in changes.items() if by < -SAME], [name for name, by in changes.items() if by > SAME]


def _shares(coverage: LoraCoverage, known: Set[str]) -> dict[str, float]:
    """The adapted share of each kind that is known by its name, and of the others by role."""
    weights, adapted = Counter[str](), Counter[str]()
    for kind in coverage.kinds:
        name = kind.name if kind.name in known else kind.role
        weights[name] += kind.weights
        adapted[name] += kind.adapted
    return {name: adapted[name] / max(1, held) for name, held in weights.items()}


def coverage_table(coverage: LoraCoverage) -> str:
    """Each kind of matrix with the share of its weights that has an adapter, as Markdown."""
    rows = "\n".join(
        f"| {in_cell(kind.name)} | {kind.role} | {kind.weights:,} | {100 * kind.adapted / max(1, kind.weights):.3g}% |"
        for kind in coverage.kinds
    )
    return f"| matrix | is | weights | adapted |\n|---|---|---|---|\n{rows}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
