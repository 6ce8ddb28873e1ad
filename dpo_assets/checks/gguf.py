"""Whether a GGUF file is the model that it was made of."""

from __future__ import annotations

from dpo_assets.checks.reports import GgufNames, GgufReport, GgufWeights, NotMeasured
from dpo_assets.checks.verdict import Verdict

# Ten times the mean KL(FP16 || Q8_0) that llama.cpp measured of Llama 3 8B (tools/perplexity/README.md: 0.001355).
MOST_KL = 0.0136
NAMED = 5  # Tensors that a verdict names.


def gguf_verdicts(report: GgufReport) -> list[Verdict]:
    """All checks of `gguf_model`."""
    faults, doubts = _faults(report), list(report.serving)
    if isinstance(report.weights, NotMeasured):
        doubts.append(
            f"the weights were not loaded ({report.weights.not_measured}): ask file and merged model the same thing "
            "before it is used"
        )
        doubts += _by_name(report.names)
    return [
        Verdict(
            "gguf_loads",
            "error" if faults else "warn" if doubts else "pass",
            "; ".join(faults) or _seen(report),
            f"every weight as the type rounds it, KL at most {MOST_KL:g} nats per token, the same settings, tokens and "
            "chat template",
            "llama.cpp, tools/perplexity/README.md: mean KL of Q8_0 for Llama 3 8B is 0.00136",
            _way_out(faults, doubts),
            f"{report.architecture}, written by {report.converter}",
        )
    ]


def _faults(report: GgufReport) -> list[str]:
    faults = []
    if report.not_finite:
        faults.append(f"NaN or infinity in {_named(report.not_finite)}")
    if isinstance(report.weights, GgufWeights):
        if report.weights.differing:
            faults.append(f"other weights than the merged model's in {_named(report.weights.differing)}")
        if not report.weights.kl_per_token <= MOST_KL:
            faults.append(f"KL {report.weights.kl_per_token:.3g} nats per token")
    elif report.values < report.model_values:
        faults.append(f"{report.model_values - report.values:,} of {report.model_values:,} values are left out")
    return [*faults, *report.settings, *report.tokenizer]


def _by_name(names: GgufNames | NotMeasured | None) -> list[str]:
    """What comparing tensors by their names leaves open. Some architectures' are computed anew, which is no fault."""
    if names is None:
        return []
    if isinstance(names, NotMeasured):
        return [names.not_measured]
    left = (("hold other values", names.others), ("have no name in llama.cpp's map", names.unplaced))
    return [f"{_named(held)} {what}" for what, held in left if held]


def _named(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _seen(report: GgufReport) -> str:
    if isinstance(report.weights, NotMeasured):
        seen = f"{report.tensors} tensors of {report.values:,} values, all finite"
        if not isinstance(report.names, GgufNames):
            return f"{seen}; weights not compared"
        names = report.names
        every = names.same + len(names.others) + len(names.unplaced)
        return (
            f"{seen}; {names.same} of {every} hold the merged model's values as {report.type} rounds them, in any order"
        )
    weights = report.weights
    return (
        f"{weights.tensors} tensors as {report.type} rounds them, KL {weights.kl_per_token:.2g} nats per token, "
        f"{weights.agreement:.1%} of {weights.positions} next tokens the same"
    )


def _way_out(faults: list[str], doubts: list[str]) -> str:
    if faults:
        return (
            "do not use the file: set publishing.gguf.type to bf16 or f32 if values are too large for it, or "
            "publishing.gguf.converter to a newer llama.cpp"
        )
    return "; ".join(doubts)
