"""Stage `merge`: base + adapter as one safetensors model, and the proof that it still is the same policy."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch

from dpo_assets.artifact import VOLATILE, write_json
from dpo_assets.checks.reports import MergeReport
from dpo_assets.contract import MergeSpec, Progress
from dpo_assets.errors import ConfigError, GateError
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.planning.weights import listed
from dpo_assets.training.batches.data import dpo_group, load_split
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.models.carrying import OtherLayout, compared, names_compared, put_back
from dpo_assets.training.models.loading import attach_adapter, autocast_of, load_base, load_causal_lm, random_rates
from dpo_assets.training.models.merging import NotStreamable, StreamedMerge, plan_merge, stored_format, stream_merge
from dpo_assets.training.models.release_files import write_companions, write_config
from dpo_assets.training.policy import load_scored
from dpo_assets.training.reporting import Reporter
from dpo_assets.training.resuming.parts import Parts
from dpo_assets.training.scoring.logprobs import score_groups
from dpo_assets.training.scoring.proof import Settled, alike, settle_engine


def run(spec: MergeSpec, reporter: Reporter) -> None:
    """Writes `model/` (weights, tokenizer) and `report.json`.

    Raises:
        GateError: when a weight is not finite; named by the tensor.
        ConfigError: when base or adapter cannot be read.
    """
    started = time.perf_counter()
    plan = spec.working_plan
    folder = spec.output_dir / "model"
    folder.mkdir()

    def on_file(done: int, total: int) -> None:
        reporter.log(Progress(stage="merge", done=done, total=total, note="files").line())

    method: Literal["streamed", "peft"] = "streamed"
    merge: StreamedMerge | None
    try:
        merge = plan_merge(spec.base_model, spec.adapter)
    except NotStreamable as why:
        reporter.log(f"merge: {why}, so PEFT merges it with the whole model in memory")
        method = "peft"
        merge = merge_in_memory(spec, folder, reporter)
    if merge is not None:
        parts = Parts(spec.parts, {"inputs": spec.inputs, "method": method})
        with parts.forgotten_on_a_full_disk():
            stream_merge(
                merge, folder, on_file=on_file, keep=lambda path, write: parts.file(path, write, name=path.name)
            )
        if parts.told:
            reporter.log(f"merge: {parts.told}")
    # Tensors in a layout of their own are read by the config that was saved with them.
    write_config(folder if merge is None else spec.base_model, folder)
    write_companions(spec.base_model, folder, spec.template)
    if merge is not None:
        carried = compared(spec.base_model, folder, frozenset(merge.updates))
    else:
        carried = names_compared(spec.base_model, folder)

    held_out = load_split(spec.dataset, "eval")
    to_group = partial(dpo_group, max_length=plan.max_length)
    groups = [to_group(row) for row in held_out.select(range(min(spec.probe_pairs, len(held_out))))]
    score = partial(_scored, plan=plan, groups=groups)
    (settled, adapted), (_, merged) = alike(
        [partial(score, spec.base_model, spec.adapter), partial(score, folder, None)]  # As written, to be released.
    )
    if settled.note:
        reporter.log(f"merge: proven by {settled.kernels}, not by {plan.kernels} kernels: {settled.note}")
    both = zip(adapted.logps, merged.logps, adapted.lengths, strict=True)
    differences = [abs(a - b) / max(1, n) for a, b, n in both]
    report = MergeReport(
        mean_difference_per_token=fmean(differences),
        max_difference_per_token=max(differences),
        probe_pairs=len(groups),
        not_finite=merged.weights.not_finite,
        parameters=merged.weights.parameters,
        method=method,
        carried=carried,
        proven_in=f"{plan.compute} on {plan.device}",
        kernels=settled.kernels,
        kernels_note=settled.note,
    )
    report.write(spec.output_dir)
    write_json(spec.output_dir / VOLATILE, {"seconds": time.perf_counter() - started})
    reporter.log(f"merge: adapter and merged model differ by {report.mean_difference_per_token:.2g} nats per token")


def merge_in_memory(spec: MergeSpec, folder: Path, reporter: Reporter) -> StreamedMerge | None:
    """PEFT's own merge, for adapters that are more than LoRA on linear layers; on the CPU, in the base's own format.

    What a card computes in has no say: a base in bf16 that was trained on a card without it is released in bf16.

    Returns:
        the merge as changes to the base's files; None where it has another layout than these (layers added), and was
        written into `folder` whole.

    Raises:
        GateError: when a merged weight is not finite.
        ConfigError: when it has another layout, and would leave behind a tensor of the base: a tower, a head for
            further tokens.
    """
    stored = stored_format(spec.base_model)
    plan = spec.plan.model_copy(update={"device": "cpu", "precision": stored})
    base = load_base(spec.base_model, plan)
    rates = random_rates(base.config)
    model = attach_adapter(base, plan, spec.adapter, seed=0, dropout=0.0)
    model.eval()
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        if "NaN" not in str(error):
            raise
        raise _not_finite("an adapted weight") from None
    for name, tensor in merged.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise _not_finite(name)
    merged.config.update(rates)  # The release is trained on as its base was.
    whole = spec.scratch / "merged"
    merged.save_pretrained(whole, safe_serialization=True)
    del model, merged
    _free()
    _, unused = load_causal_lm(spec.base_model, device_map={"": "meta"})
    try:
        return put_back(spec.base_model, whole, unused)
    except OtherLayout as why:
        if why.lost:
            raise ConfigError(
                f"this adapter cannot be merged into {spec.base_model}: {why}, and the release would lose "
                f"{listed(list(why.lost))}. An adapter on linear layers and experts alone (lora.target_modules, "
                "lora.target_parameters) is merged into the base's own files."
            ) from None
        reporter.log(f"merge: {why}, so the release is stored as PEFT and Transformers write it")
        for path in whole.iterdir():
            path.rename(folder / path.name)
        return None


@dataclass(frozen=True)
class Released:
    """What was seen of the weights that were written, once they were loaded again."""

    parameters: int
    not_finite: tuple[str, ...]

    @classmethod
    def of(cls, model: torch.nn.Module) -> Released:
        bad = tuple(name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all()))
        return cls(sum(p.numel() for p in model.parameters()), bad)


@dataclass(frozen=True)
class _Scored:
    logps: list[float]
    lengths: list[int]
    weights: Released


def _scored(
    folder: Path, adapter: Path | None, first: str | None, *, plan: TrainingPlan, groups: list[Group]
) -> tuple[Settled, _Scored]:
    """Scores by a model that is loaded for it and let go."""
    model = load_scored(folder, plan, adapter)
    weights = Released.of(model)
    settled = settle_engine(model, plan, max(groups, key=lambda group: group.longest_row), first)
    with autocast_of(plan):
        logps, lengths = score_groups(model, groups, plan.token_budget)
    del model
    _free()
    return settled, _Scored(logps, lengths, weights)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _not_finite(name: str) -> GateError:
    return GateError(
        "all_finite",
        f"{name} holds NaN or infinity after the merge.",
        value=f"{name}: NaN or infinity",
        band="every weight finite",
        source="a NaN weight answers nothing but NaN",
        fix="lower the learning rate and train again",
    )
