"""Adapters on architectures that name their layers otherwise: what is covered, what is measured, what is merged.

Tiny random models with the built-in tokenizer, read, planned for, trained and merged by the project's own rooms.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Glm4MoeConfig,
    GlmConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Starcoder2Config,
)

from dpo_assets.checks.reports import AdapterNorm
from dpo_assets.contract import MergeSpec
from dpo_assets.errors import ConfigError
from dpo_assets.planning.matrices import read_matrices
from dpo_assets.planning.model_folder import inspect_model
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.planning.targets import (
    EXPERTS_ALONE,
    EXPERTS_ALONE_IN,
    OUTPUT_UNCALLED,
    OUTPUT_UNCALLED_IN,
    planned_coverage,
    resolve_targets,
)
from dpo_assets.recipe import ALL_LINEAR, LoraSection
from dpo_assets.training.guard.aftermath import adapter_norm
from dpo_assets.training.guard.sampling import AdapterState
from dpo_assets.training.models.loading import ADAPTER_NAME, attach_adapter, load_base, save_adapter
from dpo_assets.training.models.targets import coverage, peft_targets, places_of
from dpo_assets.training.stages import merge
from dpo_assets_tests.training.conftest import MAX_LENGTH, Log, PlanMaker
from dpo_assets_tests.training.dpo_runs import run_dpo, short_plan, write_pairs

SMALL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "phi3": lambda: Phi3Config(**SMALL),
    "starcoder2": lambda: Starcoder2Config(**SMALL),
    "glm": lambda: GlmConfig(**SMALL, head_dim=8),
    "gpt_neox": lambda: GPTNeoXConfig(**SMALL),
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=3),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SMALL, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
    # Its first layer is dense, its second has experts beside a shared one.
    "glm4_moe": lambda: Glm4MoeConfig(
        **SMALL,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
    "falcon_h1": lambda: FalconH1Config(
        **SMALL, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8
    ),
}
Made = tuple[Path, TrainingPlan]


@pytest.fixture(scope="module")
def base_of(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random model."""
    root = tmp_path_factory.mktemp("bases")

    def make(name: str) -> Path:
        folder = root / name
        if not folder.is_dir():
            shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(CONFIGS[name]()).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def made(base_of: Callable[[str], Path], plan_for: PlanMaker) -> Callable[..., Made]:
    """(folder, plan) of a base, its targets resolved as the planner resolves them."""

    def make(name: str, **lora: Any) -> Made:
        folder = base_of(name)
        shape = inspect_model(folder).shape
        shape = shape.with_matrices(read_matrices(folder, shape.layers))
        section = resolve_targets(LoraSection(rank=2, alpha=4, **lora), shape)
        plan = short_plan(plan_for, {}, steps=2, kernels="transformers")
        return folder, plan.model_copy(update={"lora": section, "coverage": planned_coverage(section, shape)})

    return make


def attached(folder: Path, plan: TrainingPlan) -> PeftModel:
    return attach_adapter(load_base(folder, plan), plan, None, seed=1, dropout=0.0)


@pytest.mark.parametrize(
    ("name", "lora", "share"),
    [
        ("phi3", {}, 1.0),
        ("starcoder2", {}, 1.0),
        ("glm", {}, 1.0),
        ("gpt_neox", {}, 1.0),
        ("mixtral", {}, None),
        ("mixtral", {"target_parameters": EXPERTS}, 1.0),
        ("mixtral", {"target_parameters": EXPERTS[1:], "target_modules": ["k_proj"]}, None),
        ("qwen2_moe", {"target_parameters": EXPERTS}, 1.0),
        ("glm4_moe", {}, None),
        ("glm4_moe", {"target_parameters": EXPERTS}, None),
        ("starcoder2", {"target_modules": ["mlp.c_fc", "q_proj"]}, None),
    ],
)
def test_the_model_has_adapters_where_the_plan_says(
    name: str, lora: dict[str, Any], share: float | None, made: Callable[..., Made]
) -> None:
    """Counted twice: in the base's files by the planner, and on the loaded model by what PEFT made of it."""
    folder, plan = made(name, **lora)
    measured = coverage(attached(folder, plan), ADAPTER_NAME)
    assert measured.share == pytest.approx(plan.coverage.share)
    assert (measured.share == 1.0) == (share == 1.0) == (measured.frozen == ())
    assert sum(kind.adapted for kind in measured.kinds) == sum(kind.adapted for kind in plan.coverage.kinds)


@pytest.mark.parametrize(
    ("name", "lora", "said"),
    [
        ("phi3", {"target_modules": ["qkv_proj", "up_proj"]}, r"`up_proj` match.*Phi3ForCausalLM.*self_attn\.qkv_proj"),
        ("mixtral", {"target_modules": ["w1"]}, r"`w1` match.*as in \[experts\.gate_up_proj"),
        ("mixtral", {"target_parameters": ["experts.w1"]}, r"has: mlp\.experts\.gate_up_proj, mlp\.experts\.down_proj"),
        ("phi3", {"target_parameters": EXPERTS}, "Phi3ForCausalLM, which has no experts"),
    ],
)
def test_a_name_that_the_loaded_model_does_not_have_is_refused(
    name: str, lora: dict[str, Any], said: str, made: Callable[..., Made]
) -> None:
    folder, plan = made(name)
    wrong = plan.model_copy(update={"lora": LoraSection(rank=2, **lora)})
    with pytest.raises(ConfigError, match=said):
        attached(folder, wrong)


def test_names_that_peft_takes_for_experts_are_left_out_by_the_plan_and_refused_by_the_worker(
    made: Callable[..., Made],
) -> None:
    """Experts would be trained, and the shared expert and the dense MLP frozen: the reverse of what was asked for."""
    folder, plan = made("glm4_moe")
    assert plan.lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert "mlp.shared_experts.gate_proj" in plan.coverage.out_of_reach
    with pytest.raises(ConfigError, match="PEFT takes `gate_proj` for the experts of a glm4_moe"):
        made("glm4_moe", target_modules=["q_proj", "gate_proj"])
    forced = plan.model_copy(update={"lora": LoraSection(rank=2, target_modules=list(ALL_LINEAR))})
    said = r"mlp\.experts\.down_proj, .* would be adapted, and .*mlp\.shared_experts\.up_proj, .* would stay frozen"
    with pytest.raises(ConfigError, match=said):
        attached(folder, forced)


def test_a_projection_that_mambas_kernels_never_call_is_left_out_by_the_plan_and_refused_by_name(
    made: Callable[..., Made],
) -> None:
    folder, plan = made("falcon_h1")
    assert "out_proj" not in plan.lora.target_modules
    assert "in_proj" in plan.lora.target_modules
    assert plan.coverage.out_of_reach == ("mamba.out_proj",)
    adapted = attach_adapter(AutoModelForCausalLM.from_pretrained(folder), plan, None, seed=1, dropout=0.0)
    assert "mamba.out_proj" in coverage(adapted, ADAPTER_NAME).frozen
    with pytest.raises(ConfigError, match="PEFT puts no adapter on `out_proj` of a falcon_h1"):
        made("falcon_h1", target_modules=["q_proj", "out_proj"])


@pytest.mark.parametrize("model_type", ["llama", *sorted(OUTPUT_UNCALLED_IN)])
def test_peft_refuses_what_is_kept_out_of_reach(model_type: str) -> None:
    """Of its own list, which it keeps inside a function."""

    class Model(torch.nn.Module):
        config = LlamaConfig(**SMALL)

        def __init__(self) -> None:
            super().__init__()
            self.config.model_type = model_type
            self.out_proj = torch.nn.Linear(4, 4)

    config = LoraConfig(r=2, target_modules=list(OUTPUT_UNCALLED))
    if model_type in OUTPUT_UNCALLED_IN:
        with pytest.raises(ValueError, match="incompatible with Mamba"):
            get_peft_model(Model(), config)
    else:
        get_peft_model(Model(), config)


def test_the_model_types_that_peft_rewrites_are_all_known() -> None:
    from peft.utils import transformers_weight_conversion as peft_conversion

    pattern, names = peft_conversion._MODEL_TO_CONVERSION_PATTERN, peft_conversion._MOE_TARGET_MODULE_MAPPING
    assert {model_type for model_type, like in pattern.items() if like == "qwen2_moe"} == EXPERTS_ALONE_IN
    assert names["qwen2_moe"].keys() - {"gate"} == EXPERTS_ALONE
    assert names.keys() == {"qwen2_moe", "mixtral"}, "another family is rewritten"


def test_a_decoder_that_is_the_whole_model_is_searched_for_its_layers(model_folder: Path, plan_for: PlanMaker) -> None:
    """Llama 4 answers so when it is asked for its decoder."""
    model = load_base(model_folder, plan_for())
    wanted = [place.full for place in places_of(model)]
    model.get_decoder = lambda: model
    assert [place.full for place in places_of(model)] == wanted
    model.config.num_hidden_layers += 1
    with pytest.raises(ConfigError, match="one list of its 6 decoder layers, and has none"):
        list(places_of(model))


def test_a_name_that_also_means_something_elsewhere_is_written_out(model_folder: Path, plan_for: PlanMaker) -> None:
    """As the vision tower of a multimodal model: it would be trained along."""
    plan = plan_for()
    model = load_base(model_folder, plan)
    names = list(plan.lora.target_modules)
    assert peft_targets(model, plan.lora) == {"target_modules": names, "target_parameters": None}
    model.vision_tower = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
    written = peft_targets(model, plan.lora)["target_modules"]
    assert written is not None
    assert len(written) == 7 * model.config.num_hidden_layers
    assert all(name.startswith("model.layers.") for name in written)
    trained = {
        n for n, p in attach_adapter(model, plan, None, seed=1, dropout=0.0).named_parameters() if p.requires_grad
    }
    assert trained
    assert not any("vision_tower" in name for name in trained)


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_leaves_head_and_embeddings_alone(tied: bool, model_folder: Path, plan_for: PlanMaker) -> None:
    plan = plan_for()
    section = LoraSection(rank=2)
    model = load_base(model_folder, plan)
    if not tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
    assert peft_targets(model, section) == peft_targets(model, plan.lora)


def test_adapters_of_the_seven_of_llama_are_written_as_ever(
    model_folder: Path, plan_for: PlanMaker, tmp_path: Path
) -> None:
    save_adapter(attached(model_folder, plan_for()), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == sorted(plan_for().lora.target_modules)
    assert len(config["target_modules"]) == 7
    assert config["target_parameters"] is None


@pytest.mark.parametrize(
    ("name", "lora", "method"), [("phi3", {}, "streamed"), ("mixtral", {"target_parameters": EXPERTS}, "peft")]
)
def test_a_run_on_other_layers_trains_them_all_and_merges_exactly(
    name: str, lora: dict[str, Any], method: str, made: Callable[..., Made], train_spec: Callable[..., Any],
    prepared: Any, dataset: Path, tmp_path: Path,
) -> None:  # fmt: skip
    folder, plan = made(name, **lora)
    run = run_dpo(train_spec(plan, tmp_path / "dpo", base_model=folder, dataset=write_pairs(prepared[0], tmp_path)))
    assert run.report["lora_coverage"]["kinds"]
    assert run.report["lora_planned"] == plan.coverage.model_dump(mode="json")
    # Two steps: every B has left zero, and so have those of the experts.
    factors = {key: value for key, value in run.adapter.items() if "lora_B" in key}
    assert all(bool(value.abs().max() > 0) for value in factors.values())
    # Larger, so that a merge that lost a part would show.
    large = tmp_path / "large"
    shutil.copytree(run.folder / "adapter", large)
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), large)
    with torch.no_grad():
        for key, value in policy.named_parameters():
            if "lora_B" in key:
                value.normal_(std=0.3)
    policy.save_pretrained(str(large))
    out, plan = tmp_path / "merged", plan.model_copy(update={"max_length": MAX_LENGTH})
    out.mkdir()
    spec = MergeSpec(
        output_dir=out, fingerprint="f" * 32, inputs={}, base_model=folder, adapter=large, dataset=dataset, plan=plan
    )
    merge.run(spec, Log())
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["method"] == method
    assert report["max_difference_per_token"] < 1e-4
    # The files have the base's own names, each expert by itself, and every adapted one of them moved.
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    still = [
        key for key in before if ".layers." in key and before[key].dim() == 2 and torch.equal(before[key], after[key])
    ]
    assert all(key.endswith("gate.weight") for key in still)


def test_the_norm_of_an_adapter_on_experts_is_that_of_each_expert(made: Callable[..., Made]) -> None:
    """PEFT keeps the factors of all experts in one matrix; against the change of each expert, computed in full."""
    folder, plan = made("mixtral", target_parameters=EXPERTS, target_modules=["q_proj"])
    model = attached(folder, plan)
    start = AdapterState(model)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.05 if "experts" in name else 1e-6)
    found = adapter_norm(model, start)
    largest = 0.0
    for layer in model.modules():
        if hasattr(layer, "parameter_name"):
            change, weight = layer.get_delta_weight(ADAPTER_NAME), layer.get_param()
            largest = max(largest, *(float(c.norm() / w.norm()) for c, w in zip(change, weight, strict=True)))
    assert largest > 0
    assert isinstance(found, AdapterNorm)
    assert found.largest == pytest.approx(largest, rel=1e-4)
    assert "experts" in found.layer
