"""Stage `merge`: base + adapter as one safetensors model, and the proof that it still is the same policy."""

from __future__ import annotations

import time
from functools import partial
from statistics import fmean

import torch

from dpo_assets.artifact import VOLATILE, write_json
from dpo_assets.contract import MergeSpec
from dpo_assets.training.data import dpo_group, load_split
from dpo_assets.training.loading import attach_adapter, autocast_of, load_base, load_tokenizer
from dpo_assets.training.logprobs import assert_packing_is_exact, score_groups
from dpo_assets.training.reporting import Reporter


def run(spec: MergeSpec, reporter: Reporter) -> None:
    """Writes `model/` (weights, tokenizer) and `report.json`."""
    plan = spec.plan
    started = time.perf_counter()
    # The merge never goes through a quantised base: 4-bit weights would be rounded into the release.
    precise = plan.model_copy(update={"precision": "bf16"}) if plan.precision in ("4bit", "8bit") else plan
    model = attach_adapter(load_base(spec.base_model, precise), precise, spec.adapter, seed=0, dropout=0.0).eval()
    held_out = load_split(spec.dataset, "eval")
    to_group = partial(dpo_group, max_length=plan.max_length)
    groups = [to_group(row) for row in held_out.select(range(min(spec.probe_pairs, len(held_out))))]
    with autocast_of(precise):
        assert_packing_is_exact(model, max(groups, key=lambda group: group.longest_row))
        by_adapter, lengths = score_groups(model, groups, plan.token_budget)
    merged = model.merge_and_unload(safe_merge=True)
    with autocast_of(precise):
        by_merged, _ = score_groups(merged, groups, plan.token_budget)
    differences = [abs(a - b) / max(1, n) for a, b, n in zip(by_adapter, by_merged, lengths, strict=True)]
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in merged.state_dict().values())

    merged.set_attn_implementation("sdpa")  # The packed attention is ours; a release must load anywhere.
    folder = spec.output_dir / "model"
    tokenizer = load_tokenizer(spec.base_model)
    # Whoever generates with the release by its own defaults must stop where the policy was taught to stop.
    given = merged.generation_config.eos_token_id
    ends = given if isinstance(given, list) else [] if given is None else [given]
    merged.generation_config.eos_token_id = sorted({tokenizer.eos_token_id, *ends})
    merged.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    report = {
        "mean_difference_per_token": fmean(differences),
        "max_difference_per_token": max(differences),
        "probe_pairs": len(groups),
        "finite": finite,
        "parameters": sum(p.numel() for p in merged.parameters()),
    }
    write_json(spec.output_dir / "report.json", report)
    write_json(spec.output_dir / VOLATILE, {"seconds": time.perf_counter() - started})
    reporter.log(f"merge: adapter and merged model differ by {report['mean_difference_per_token']:.2g} nats per token")
