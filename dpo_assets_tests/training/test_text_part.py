"""Checkpoints with more than text: the text part is what is loaded, planned for and trained; the rest is released."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from dpo_assets.checks.bands import default_bands
from dpo_assets.checks.reports import MergeReport
from dpo_assets.checks.training import merge_verdicts
from dpo_assets.contract import VERIFIED, MergeSpec, VerifiedBase, VerifySpec
from dpo_assets.errors import ConfigError
from dpo_assets.planning.companions import PROCESSOR_FILES
from dpo_assets.planning.matrices import read_matrices
from dpo_assets.planning.model_folder import inspect_model
from dpo_assets.planning.text_part import read_text_part
from dpo_assets.publishing.commit import stage
from dpo_assets.training.models.carrying import compared, put_back
from dpo_assets.training.models.loading import load_causal_lm
from dpo_assets.training.models.merging import NotStreamable, plan_merge, stream_merge
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
    values = {id(tensor): tensor.numel() for tensor in model.state_dict(keep_vars=True).values()}
    assert shape.parameters == sum(values.values())
    assert shape.model_type == model.config.model_type
    assert shape.tied == (model.lm_head.weight is model.get_input_embeddings().weight)
    # Experts may be stored one by one, and joined as they are loaded.
    planned, loaded = Counter[str](), Counter[str]()
    for kind in read_matrices(folder, shape.layers):
        planned[kind.name if kind.role == "linear" else kind.role] += kind.weights
    for place in places_of(model):
        loaded[place.kind.name if place.kind.role == "linear" else place.kind.role] += place.kind.weights
    assert dict(planned - Counter(router=planned["router"])) == dict(loaded - Counter(router=loaded["router"]))


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


@pytest.mark.parametrize("name", ["mistral3, tied, of mistral", "qwen3_5", "llama4", "gemma4", "qwen3_vl"])
def test_a_release_of_more_than_text_is_what_its_base_was(
    name: str, saved: Saved, tmp_path: Path, run_merge: Any
) -> None:
    """Through the stages: its class, its processor byte for byte, every tensor; and it loads as text once more."""
    folder, kind = saved(name), KINDS[name]
    adapter = adapter_on(folder, tmp_path / "adapter")
    model, report = run_merge(folder, adapter)
    assert report["method"] == "streamed"
    assert report["max_difference_per_token"] < 1e-4
    carried = report["carried"]
    assert (carried["beside"], carried["adapted"]) == (
        len(read_text_part(folder).beside),
        len(tensors_of(adapter)) // 2,
    )
    verdicts = merge_verdicts(MergeReport.model_validate(report), default_bands())
    assert [verdict.level for verdict in verdicts] == ["pass"] * 3
    config, released = (json.loads((f / "config.json").read_text()) for f in (folder, model))
    text, text_before = released.pop("text_config"), config.pop("text_config")
    assert released == config
    # In the names of Transformers 4 too.
    assert text.keys() - text_before.keys() <= {"rope_theta", "rope_scaling", "partial_rotary_factor"}
    assert text_before.items() <= text.items()
    (tmp_path / "staged").mkdir()
    stage(model, tmp_path / "staged", "# Card\n", {})
    for file in PROCESSOR_FILES[:3]:
        assert (tmp_path / "staged" / file).read_bytes() == (folder / file).read_bytes()
    torch.testing.assert_close(logits(text_of(tmp_path / "staged")), logits(whole(kind, tmp_path / "staged")))


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama4", EXPERTS),
        ("qwen3_5_moe", EXPERTS),
        ("mistral3", {"use_dora": True}),
        ("gemma4", {"bias": "all"}),
        ("qwen2_5_vl", {"use_dora": True}),
    ],
    ids=["experts stored as one", "experts stored one by one", "dora", "bias", "a head put on here"],
)
def test_what_peft_merges_keeps_the_rest_of_the_checkpoint_too(
    name: str, settings: dict[str, Any], saved: Saved, tmp_path: Path
) -> None:
    folder, kind = saved(name), KINDS[name]
    adapter, out = adapter_on(folder, tmp_path / "adapter", **settings), tmp_path / "out"
    with pytest.raises(NotStreamable):
        plan_merge(folder, adapter)
    _, unused = load_causal_lm(folder, device_map={"": "meta"})
    policy = PeftModel.from_pretrained(text_of(folder), str(adapter))
    by_adapter = logits(policy)
    policy.merge_and_unload().save_pretrained(tmp_path / "peft")
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    merged = put_back(folder, tmp_path / "peft", unused)
    stream_merge(merged, out)
    before, after = tensors_of(folder), tensors_of(out)
    assert {n for n in before if not torch.equal(before[n], after[n])} == set(merged.updates)
    assert all(n.startswith(kind.decoder) for n in merged.updates)
    assert compared(folder, out, merged.updates.keys()).whole
    torch.testing.assert_close(logits(whole(kind, out)), by_adapter, rtol=0, atol=1e-5)
    assert (by_adapter - logits(text_of(folder))).abs().max() > 1e-2


def test_the_stage_merges_experts_of_more_than_text_without_losing_its_tower(
    saved: Saved, tmp_path: Path, run_merge: Any, plan_for: PlanMaker
) -> None:
    folder = saved("internvl of qwen3_moe")
    model, report = run_merge(folder, adapter_on(folder, tmp_path / "adapter", **EXPERTS))
    assert report["method"] == "peft"
    assert report["max_difference_per_token"] < 1e-4
    assert [v.level for v in merge_verdicts(MergeReport.model_validate(report), default_bands())] == ["pass"] * 3
    assert tensors_of(model).keys() == tensors_of(folder).keys()


def test_an_adapter_that_would_cost_the_tower_is_refused_with_the_way_out(
    saved: Saved, tmp_path: Path, run_merge: Any
) -> None:
    """A head of its own beside the embedding that the base ties it to has no place in the base's files."""
    folder = saved("mistral3, tied, of mistral")
    adapter = adapter_on(folder, tmp_path / "adapter", modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match=r"would lose .*multi_modal_projector.*lora\.target_modules"):
        run_merge(folder, adapter)


def drop(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tensors.items() if "visual.blocks.1" not in name}


def change(tensors: dict[str, Any]) -> dict[str, Any]:
    name = "model.visual.blocks.1.attn.qkv.weight"
    return tensors | {name: tensors[name] + 2**-20}


def rename(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("language_model.", ""): value for name, value in tensors.items()}


def widen(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if name.startswith("mtp") else value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("damage", "said"),
    [(drop, "lost: model.visual.blocks.1"), (change, "1 altered"), (rename, "added: model.embed"), (widen, "2 lost")],
    ids=["a tower without a layer", "one bit of a tower", "plain names", "another format"],
)
def test_a_release_that_lacks_or_changes_a_tensor_turns_the_check_red(
    damage: Any, said: str, saved: Saved, tmp_path: Path
) -> None:
    folder = saved("qwen3_5")
    release = copy_of(folder, tmp_path / "release")
    retensor(release, damage)
    report: dict[str, Any] = {"probe_pairs": 1, "parameters": 1, "method": "streamed"}
    report |= {"mean_difference_per_token": 0.0, "max_difference_per_token": 0.0}
    report["carried"] = compared(folder, release, ()).model_dump()
    [verdict] = [
        v for v in merge_verdicts(MergeReport.model_validate(report), default_bands()) if v.check == "tensors_kept"
    ]
    assert verdict.level == "error"
    assert said in str(verdict.value)


def test_adapters_names_that_only_a_tower_has_are_not_merged_into_it(saved: Saved, tmp_path: Path) -> None:
    """Llama 4's tower has layers of the same names: `vision_model.model.layers.0.self_attn.q_proj`."""
    folder = copy_of(saved("llama4"), tmp_path / "base")
    adapter = adapter_on(folder, tmp_path / "adapter")
    retensor(folder, lambda tensors: {n: v for n, v in tensors.items() if ".layers.1.self_attn.q_proj" not in n})
    with pytest.raises(NotStreamable, match=r"language_model\.model\.layers\.0\.self_attn\.o_proj"):
        plan_merge(folder, adapter)


# ------------------------------------------------------------------------------------------------------- verification


def verified(base: Path, out: Path) -> VerifiedBase:
    out.mkdir()
    verify.run(VerifySpec(output_dir=out, fingerprint="f" * 32, inputs={}, base_model=base), Log())
    return VerifiedBase.model_validate_json((out / VERIFIED).read_bytes())


@pytest.mark.parametrize("name", ["qwen3_5", "mistral3"])
def test_a_base_of_more_than_text_is_verified_and_what_lies_beside_it_is_told(
    name: str, saved: Saved, tmp_path: Path
) -> None:
    found = verified(saved(name), tmp_path / "out")
    assert found.unused_tensors == read_text_part(saved(name)).beside
    assert "</s>" in found.ends


def test_a_tensor_that_the_text_part_lacks_is_told_by_its_name_in_the_files(saved: Saved, tmp_path: Path) -> None:
    folder = copy_of(saved("gemma3"), tmp_path / "base")
    retensor(
        folder, lambda tensors: {n: v for n, v in tensors.items() if not n.endswith("layers.1.mlp.up_proj.weight")}
    )
    with pytest.raises(ConfigError, match=r"no file holds language_model\.model\.layers\.1\.mlp\.up_proj\.weight"):
        verified(folder, tmp_path / "out")


def test_a_text_part_without_a_class_of_its_own_is_refused_by_the_name_of_both(saved: Saved, tmp_path: Path) -> None:
    folder = copy_of(saved("qwen3_5"), tmp_path / "base")
    text = json.loads((folder / "config.json").read_text())["text_config"] | {"model_type": "glm_ocr_text"}
    rewrite(folder / "config.json", model_type="glm_ocr", architectures=["GlmOcrX"], text_config=text)
    with pytest.raises(ConfigError, match=r"is a GlmOcrX, .* \(glm_ocr_text\).*Gemma 3"):
        verified(folder, tmp_path / "out")
