"""Layers that predict further tokens, in checkpoints of text alone: not loaded, not trained, and released all the same.

Transformers ignores them by name and says nothing of it.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo_assets.checks.bands import default_bands
from dpo_assets.checks.reports import MergeReport
from dpo_assets.checks.training import merge_verdicts
from dpo_assets.contract import VERIFIED, MergeSpec, VerifiedBase, VerifySpec
from dpo_assets.errors import ConfigError
from dpo_assets.planning.model_folder import inspect_model
from dpo_assets.training.models.loading import load_causal_lm
from dpo_assets.training.stages import merge, verify
from dpo_assets_tests.training.bases import copy_of, retensor, rewrite
from dpo_assets_tests.training.composites import TOKENIZER, VOCABULARY, tensors_of
from dpo_assets_tests.training.conftest import Log, PlanMaker
from dpo_assets_tests.training.tiny_models import tiny_config

# Names as published checkpoints have them.
MTP = ("mtp.fc.weight", "mtp.layers.0.mlp.experts.0.gate_proj.weight", "mtp.layers.0.mlp.gate.weight")
FURTHER = {
    "qwen3_next": MTP,
    "qwen3_5_moe_text": (*MTP, "mtp.embed_tokens.weight"),
    "deepseek_v3": ("model.layers.2.eh_proj.weight", "model.layers.2.mlp.experts.0.up_proj.weight"),
}
EXPERTS = {"target_modules": ["o_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def base_of(name: str, folder: Path, tokenizer: Path, **changes: Any) -> Path:
    """A folder of an architecture, with layers beside its own."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name, vocab_size=VOCABULARY, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    rows = {further: VOCABULARY if "embed" in further else 16 for further in FURTHER[name]}
    retensor(folder, lambda tensors: tensors | {n: torch.randn(size, 32) for n, size in rows.items()})
    for file in TOKENIZER:
        shutil.copyfile(tokenizer / file, folder / file)
    return folder


@pytest.fixture(scope="module", params=FURTHER)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    return base_of(request.param, tmp_path_factory.mktemp(request.param) / "base", model_folder)


def further(base: Path) -> list[str]:
    return sorted(FURTHER[json.loads((base / "config.json").read_text())["model_type"]])


def verified(base: Path, out: Path) -> VerifiedBase:
    out.mkdir()
    verify.run(VerifySpec(output_dir=out, fingerprint="f" * 32, inputs={}, base_model=base), Log())
    return VerifiedBase.model_validate_json((out / VERIFIED).read_bytes())


def test_they_are_told_and_not_counted(base: Path, tmp_path: Path) -> None:
    model, unused = load_causal_lm(base, device_map={"": "meta"})
    assert unused == further(base)
    assert list(verified(base, tmp_path / "out").unused_tensors) == further(base)
    shape, beside = inspect_model(base).shape, [tensors_of(base)[name] for name in further(base)]
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters()) + buffers(model)
    assert shape.beside == sum(map(torch.numel, beside))
    assert not shape.more_than_text


def buffers(model: Any) -> int:
    """Values of buffers that are stored with the weights (the router's bias)."""
    stored = set(model.state_dict()) - {name for name, _ in model.named_parameters()} - {"lm_head.weight"}
    return sum(math.prod(model.state_dict()[name].shape) for name in stored)


def merged(base: Path, adapter: Path, out: Path, dataset: Path, plan_for: PlanMaker) -> tuple[Path, MergeReport]:
    out.mkdir()
    common: dict[str, Any] = {"fingerprint": "f" * 32, "inputs": {}, "base_model": base, "dataset": dataset}
    merge.run(MergeSpec(output_dir=out, adapter=adapter, plan=plan_for(), probe_pairs=2, **common), Log())
    return out / "model", MergeReport.model_validate_json((out / "report.json").read_bytes())


def adapter_on(base: Path, target: Path, **settings: Any) -> Path:
    torch.manual_seed(1)
    model: PeftModel = get_peft_model(load_causal_lm(base, dtype=torch.float32)[0], LoraConfig(r=2, **settings))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                value.add_(torch.randn_like(value), alpha=0.05)
    model.save_pretrained(str(target))
    return target


def test_a_merge_by_peft_leaves_them_as_they_were(
    base: Path, tmp_path: Path, dataset: Path, plan_for: PlanMaker
) -> None:
    adapter = adapter_on(base, tmp_path / "adapter", **EXPERTS)
    model, report = merged(base, adapter, tmp_path / "out", dataset, plan_for)
    before, after = tensors_of(base), tensors_of(model)
    assert report.method == "peft"
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in further(base))
    assert [verdict.level for verdict in merge_verdicts(report, default_bands())] == ["pass"] * 3


def test_a_merge_in_another_layout_is_refused_where_it_would_lose_them(
    tmp_path: Path, model_folder: Path, dataset: Path, plan_for: PlanMaker
) -> None:
    """A head of its own has no place in the files of a base that ties it to the embedding."""
    base = base_of("qwen3_next", tmp_path / "base", model_folder, tie_word_embeddings=True)
    adapter = adapter_on(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match=r"would lose mtp\.fc\.weight.*lora\.target_modules"):
        merged(base, adapter, tmp_path / "out", dataset, plan_for)


def test_a_merge_in_another_layout_that_loses_nothing_is_released_and_told(
    tmp_path: Path, model_folder: Path, dataset: Path, plan_for: PlanMaker
) -> None:
    adapter = adapter_on(model_folder, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    _, report = merged(model_folder, adapter, tmp_path / "out", dataset, plan_for)
    assert report.carried is not None
    assert (report.carried.by_name_alone, report.carried.lost) == (True, ())
    verdict = merge_verdicts(report, default_bands())[2]
    assert (verdict.check, verdict.level) == ("tensors_kept", "warn")
    assert "added: lm_head.weight" in str(verdict.value)
    gone = report.carried.model_copy(update={"lost": ("model.norm.weight",)})
    assert merge_verdicts(report.model_copy(update={"carried": gone}), default_bands())[2].level == "error"


def test_an_embedding_of_theirs_hides_no_second_head(tmp_path: Path, model_folder: Path) -> None:
    base = base_of("qwen3_5_moe_text", tmp_path / "base", model_folder, tie_word_embeddings=True)

    def add_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {"lm_head.weight": torch.randn(VOCABULARY, 32)}

    retensor(base, add_head)
    rewrite(base / "config.json", tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        verified(base, tmp_path / "out")


def test_a_buffer_of_an_earlier_version_is_told_and_kept_too(
    model_folder: Path, tmp_path: Path, dataset: Path, plan_for: PlanMaker
) -> None:
    """Transformers leaves it out of what it says it did not expect; a merge by PEFT would have lost it."""
    base, buffer = copy_of(model_folder, tmp_path / "base"), "model.layers.0.self_attn.rotary_emb.inv_freq"
    retensor(base, lambda tensors: tensors | {buffer: torch.ones(4)})
    assert verified(base, tmp_path / "verified").unused_tensors == (buffer,)
    adapter = adapter_on(base, tmp_path / "adapter", target_modules=["q_proj"], use_dora=True)
    model, report = merged(base, adapter, tmp_path / "out", dataset, plan_for)
    assert report.method == "peft"
    assert tensors_of(model).keys() == tensors_of(base).keys()
