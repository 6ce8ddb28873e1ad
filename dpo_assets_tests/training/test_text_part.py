"""Checkpoints with more than text: the text part is what is loaded, planned for and trained; the rest is released."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from dpo_assets.checks.bands import default_bands
from dpo_assets.checks.training import merge_verdicts
from dpo_assets.contract import VERIFIED, MergeSpec, VerifiedBase, VerifySpec
from dpo_assets.errors import ConfigError
from dpo_assets.planning.matrices import read_matrices
from dpo_assets.planning.model_folder import PROCESSOR_FILES, inspect_model
from dpo_assets.planning.text_part import TextPart, read_text_part
from dpo_assets.publishing.commit import stage
from dpo_assets.training.models.carrying import compared
from dpo_assets.training.models.loading import load_causal_lm
from dpo_assets.training.models.merging import plan_merge, stream_merge
from dpo_assets.training.models.targets import places_of
from dpo_assets.training.stages import merge, verify
from dpo_assets_tests.training.bases import copy_of, retensor, rewrite
from dpo_assets_tests.training.composites import KINDS, Kind, save, tensors_of
from dpo_assets_tests.training.conftest import Log, PlanMaker

IDS = torch.tensor([[1, *range(20, 60)]])
Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The folder of a kind, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = save(KINDS[name], tmp_path_factory.mktemp("composite"), model_folder)
        return made[name]

    return make


def whole(kind: Kind, folder: Path) -> Any:
    """The folder as the class that its config.json names."""
    return kind.wrapper_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def text_of(folder: Path) -> Any:
    model, _ = load_causal_lm(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def adapter_on(folder: Path, target: Path, **settings: Any) -> Path:
    """An adapter on the folder's text part, whose every value is far from its start."""
    torch.manual_seed(1)
    targets = {"target_modules": ["q_proj", "v_proj", "o_proj"]} | settings
    model = get_peft_model(text_of(folder), LoraConfig(r=4, lora_alpha=8, **targets))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.add_(torch.randn_like(value), alpha=0.05)
    model.save_pretrained(str(target))
    return target


@pytest.mark.parametrize("name", KINDS)
def test_the_text_part_is_loaded_alone_and_computes_what_the_whole_model_does(name: str, saved: Saved) -> None:
    """From every file layout, on the meta device too, also where AutoModelForCausalLM does not know the class."""
    folder, kind = saved(name), KINDS[name]
    model, unused = load_causal_lm(folder, dtype=torch.float32, attn_implementation="eager")
    assert torch.equal(logits(model.eval()), logits(whole(kind, folder)))
    stored = tensors_of(folder)
    assert set(kind.extra) < set(unused) or not kind.extra
    assert set(unused) == {n for n in stored if not n.startswith(kind.decoder) and not n.endswith("lm_head.weight")}
    on_meta, again = load_causal_lm(folder, device_map={"": "meta"})
    assert (type(on_meta), again) == (type(model), unused)


@pytest.mark.parametrize("name", KINDS)
def test_only_the_text_part_is_planned_for(name: str, saved: Saved) -> None:
    """A tower's linear layers are no targets, and its bytes are not in memory."""
    folder = saved(name)
    model, shape = text_of(folder), inspect_model(folder).shape
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.model_type == model.config.model_type
    assert shape.tied == (model.lm_head.weight is model.get_input_embeddings().weight)
    planned = {kind.name: kind.weights for kind in read_matrices(folder, shape.layers)}
    loaded: dict[str, int] = {}
    for place in places_of(model):
        loaded[place.kind.name] = loaded.get(place.kind.name, 0) + place.kind.weights
    assert planned == loaded


@pytest.mark.parametrize("name", KINDS)
def test_a_merge_changes_the_text_part_and_keeps_every_other_tensor(name: str, saved: Saved, tmp_path: Path) -> None:
    folder, kind = saved(name), KINDS[name]
    adapter, out = adapter_on(folder, tmp_path / "adapter"), tmp_path / "out"
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    plan = plan_merge(folder, adapter)
    stream_merge(plan, out)
    pairs = len(tensors_of(adapter)) // 2
    before, after = tensors_of(folder), tensors_of(out)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == set(plan.updates)
    assert len(moved) == pairs
    assert all(n.startswith(kind.decoder) for n in moved)
    carried = compared(folder, out, moved)
    assert (carried.whole, carried.tensors, carried.adapted) == (True, len(before), pairs)
    assert carried.beside == len(load_causal_lm(folder, device_map={"": "meta"})[1])
    # The release is of the base's class, and says with its whole model what the adapter says on the text part.
    by_adapter = logits(PeftModel.from_pretrained(text_of(folder), str(adapter)))
    torch.testing.assert_close(logits(whole(kind, out)), by_adapter, rtol=0, atol=1e-5)
    assert (by_adapter - logits(text_of(folder))).abs().max() > 1e-2
    if kind.causal:
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
        torch.testing.assert_close(logits(loaded), by_adapter, rtol=0, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            AutoModelForCausalLM.from_pretrained(out)


@pytest.fixture
def run_merge(plan_for: PlanMaker, dataset: Path, tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """(model folder, report) of the stage."""

    def run(base: Path, adapter: Path) -> tuple[Path, dict[str, Any]]:
        out = tmp_path / "merged"
        out.mkdir()
        common: dict[str, Any] = {"fingerprint": "f" * 32, "inputs": {}, "base_model": base, "dataset": dataset}
        merge.run(MergeSpec(output_dir=out, adapter=adapter, plan=plan_for(), probe_pairs=2, **common), Log())
        return out / "model", json.loads((out / "report.json").read_text())

    return run
