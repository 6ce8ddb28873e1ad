"""Which matrices get an adapter, from the names and shapes in a model's files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from dpo_assets.checks.bands import default_bands
from dpo_assets.checks.coverage import lora_coverage
from dpo_assets.errors import ConfigError
from dpo_assets.planning.matrices import Matrices, matrices_of, read_matrices, role_of
from dpo_assets.planning.memory import adapter_bytes, body_parameters
from dpo_assets.planning.model_folder import inspect_model
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.planning.shape import ModelShape
from dpo_assets.planning.sizes import find_model
from dpo_assets.planning.targets import resolve_targets
from dpo_assets.recipe import ALL_LINEAR, LoraSection
from dpo_assets_tests.planning.cases import CPU, EIGHT_B, H200, RTX_4090, TINY, planned
from dpo_assets_tests.planning.weights import save_index, save_tensors
from dpo_assets_tests.samples import recipe

LAYERS, H, WIDE, E = 2, 64, 128, 4
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
Tensors = dict[str, tuple[int, ...]]


def layers(prefix: str, **shapes: tuple[int, ...]) -> Tensors:
    """`self_attn__q_proj=(64, 64)` in each of two layers."""
    return {
        f"{prefix}{n}.{name.replace('__', '.')}.weight": shape for n in range(LAYERS) for name, shape in shapes.items()
    }


ATTENTION: Tensors = layers(
    "model.layers.", self_attn__q_proj=(H, H), self_attn__k_proj=(32, H), self_attn__v_proj=(32, H),
    self_attn__o_proj=(H, H),
)  # fmt: skip
AROUND: Tensors = {
    "model.embed_tokens.weight": (512, H),
    "lm_head.weight": (512, H),
    "model.norm.weight": (H,),
} | layers("model.layers.", input_layernorm=(H,))
LLAMA = (
    AROUND
    | ATTENTION
    | layers("model.layers.", mlp__gate_proj=(WIDE, H), mlp__up_proj=(WIDE, H), mlp__down_proj=(H, WIDE))
)
PHI3 = AROUND | layers(
    "model.layers.", self_attn__qkv_proj=(128, H), self_attn__o_proj=(H, H), mlp__gate_up_proj=(256, H),
    mlp__down_proj=(H, WIDE),
)  # fmt: skip
STARCODER2 = AROUND | ATTENTION | layers("model.layers.", mlp__c_fc=(WIDE, H), mlp__c_proj=(H, WIDE))
PHI = AROUND | layers(
    "model.layers.", self_attn__q_proj=(H, H), self_attn__dense=(H, H), mlp__fc1=(WIDE, H), mlp__fc2=(H, WIDE)
)
NEOX = layers(
    "gpt_neox.layers.", attention__query_key_value=(192, H), attention__dense=(H, H), mlp__dense_h_to_4h=(WIDE, H),
    mlp__dense_4h_to_h=(H, WIDE), attention__bias=(1, 1, 8, 8),
)  # fmt: skip
MIXTRAL = AROUND | ATTENTION | layers("model.layers.", block_sparse_moe__gate=(E, H))
for expert in range(E):
    part = f"block_sparse_moe__experts__{expert}__"
    MIXTRAL |= layers("model.layers.", **{f"{part}w1": (WIDE, H), f"{part}w2": (H, WIDE), f"{part}w3": (WIDE, H)})
GRANITE_MOE = AROUND | ATTENTION | layers(
    "model.layers.", block_sparse_moe__input_linear=(E, 256, H), block_sparse_moe__output_linear=(E, H, WIDE),
    block_sparse_moe__router__layer=(E, H),
)  # fmt: skip


def shape_of(tensors: Tensors, architecture: str = "SomeForCausalLM") -> ModelShape:
    found = TINY.model_copy(update={"architecture": architecture, "decoder": None, "layers": LAYERS})
    return found.with_matrices(matrices_of(tensors.items(), LAYERS))


def plan(tensors: Tensors, **lora: Any) -> TrainingPlan:
    return planned(shape_of(tensors), CPU, lora={"rank": 4, **lora})


@pytest.mark.parametrize(
    ("tensors", "names"),
    [
        (LLAMA, list(ALL_LINEAR)),
        (PHI3, ["o_proj", "down_proj", "gate_up_proj", "qkv_proj"]),
        (STARCODER2, ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"]),
        (PHI, ["q_proj", "dense", "fc1", "fc2"]),
        (NEOX, ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]),
    ],
    ids=["llama", "phi3", "starcoder2", "phi", "gpt_neox"],
)
def test_all_linear_is_every_linear_layer_whatever_a_base_calls_it(tensors: Tensors, names: list[str]) -> None:
    made = plan(tensors)
    assert made.lora.target_modules == names
    assert (made.coverage.share, made.coverage.frozen) == (1.0, ())
    assert lora_coverage(made.coverage, 4, default_bands()).level == "pass"


@pytest.mark.parametrize("tensors", [MIXTRAL, GRANITE_MOE], ids=["one by one", "stacked"])
def test_experts_are_counted_and_named_as_frozen_until_the_recipe_names_them(tensors: Tensors) -> None:
    some = plan(tensors)
    assert some.lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    attention = LAYERS * (2 * H * H + 2 * 32 * H)
    assert some.coverage.share == pytest.approx(attention / (attention + LAYERS * E * 3 * H * WIDE))
    verdict = lora_coverage(some.coverage, 4, default_bands())
    assert verdict.level == "warn"
    assert "set lora.target_parameters to [experts.gate_up_proj, experts.down_proj]" in verdict.fix
    assert all(name in str(verdict.value) for name in some.coverage.frozen)
    # A router is frozen by intent, and does not count.
    assert not any(name.rpartition(".")[2] == "gate" or "router" in name for name in some.coverage.frozen)
    every = plan(tensors, target_parameters=EXPERTS)
    assert (every.coverage.share, every.coverage.frozen) == (1.0, ())
    assert len(plan(tensors, target_parameters=EXPERTS[1:]).coverage.frozen) == len(some.coverage.frozen) - 1


@pytest.mark.parametrize(
    ("tensors", "lora", "said"),
    [
        (PHI3, {"target_modules": list(ALL_LINEAR)}, "`q_proj`, `k_proj`, `v_proj`, `gate_proj`, `up_proj` match"),
        (PHI3, {"target_modules": ["q_proj"]}, "which have: self_attn.qkv_proj, self_attn.o_proj, mlp.gate_up_proj"),
        (LLAMA, {"target_modules": ["q_proj", "proj"]}, "`proj` matches nothing"),
        (LLAMA, {"target_modules": ["norm"]}, "`norm` matches nothing"),
        (MIXTRAL, {"target_modules": ["gate_proj"]}, r"target_parameters, as in \[experts.gate_up_proj, experts"),
        (LLAMA, {"target_parameters": EXPERTS}, "matches nothing in SomeForCausalLM, which has no experts"),
        (MIXTRAL, {"target_parameters": ["experts.gate_proj"]}, "has: experts.gate_up_proj, experts.down_proj"),
        # Names in the files, which the loaded model does not have.
        (MIXTRAL, {"target_modules": ["q_proj", "w1"]}, "`w1` match"),
        (MIXTRAL, {"target_parameters": ["experts.w1"]}, "has: experts.gate_up_proj, experts.down_proj"),
        (AROUND, {}, "has no linear layers"),
    ],
)  # fmt: skip
def test_a_target_that_the_base_does_not_have_is_refused_with_what_it_has(
    tensors: Tensors, lora: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(tensors, **lora)


def test_a_part_that_is_named_is_adapted_and_the_rest_is_told() -> None:
    made = plan(LLAMA, target_modules=["self_attn.q_proj", "v_proj"])
    assert made.lora.target_modules == ["self_attn.q_proj", "v_proj"]
    frozen = ("self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert made.coverage.frozen == frozen
    assert "set lora.target_modules to all-linear" in lora_coverage(made.coverage, 4, default_bands()).fix


def test_a_rank_above_a_side_of_a_layer_is_warned_of() -> None:
    verdicts = {rank: lora_coverage(plan(LLAMA, rank=rank).coverage, rank, default_bands()) for rank in (32, 33)}
    assert {rank: verdict.level for rank, verdict in verdicts.items()} == {32: "pass", 33: "warn"}
    assert "33 is more than a side of self_attn.k_proj, self_attn.v_proj" in verdicts[33].fix


def test_a_plan_that_knows_no_matrices_does_not_pass() -> None:
    made = plan(LLAMA).model_copy(update={"coverage": TrainingPlan.model_fields["coverage"].default})
    assert lora_coverage(made.coverage, 4, default_bands()).level == "warn"


def test_only_the_decoder_layers_that_the_model_has_are_counted() -> None:
    """Not a vision tower, not layers for predicting further tokens, not a convolution over time, a norm or a buffer."""
    more: Tensors = {
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight": (H, H),
        "visual.blocks.0.attn.qkv.weight": (192, H),
        f"model.layers.{LAYERS}.self_attn.q_proj.weight": (H, H),
        "model.layers.0.linear_attn.conv1d.weight": (H, 1, 4),
        "mtp.layers.0.self_attn.q_proj.weight": (H, H),
        "model.resampler.layers.0.attn.weight": (H, H),
        "model.layers.0.self_attn.q_norm.weight": (4, 16),
        "model.layers.0.self_attn.mask": (1, 8, 8),
        "model.layers.0.self_attn.bias": (4, 8, 8),
        "model.layers.0.mixer.A_log": (H, 16),
    }
    assert matrices_of((LLAMA | more).items(), LAYERS) == matrices_of(LLAMA.items(), LAYERS)
    wrapped = {name.replace("model.", "model.language_model.", 1): shape for name, shape in LLAMA.items()}
    assert matrices_of(wrapped.items(), LAYERS) == matrices_of(LLAMA.items(), LAYERS)


def test_memory_follows_what_is_adapted() -> None:
    full, fused, experts = plan(LLAMA), plan(PHI3), plan(MIXTRAL, target_parameters=EXPERTS)
    sides = {"llama": 2 * (128 + 96 + 96 + 128 + 3 * 192), "phi3": 2 * (192 + 128 + 320 + 192)}
    assert adapter_bytes(shape_of(LLAMA), full.lora) == 18 * 4 * sides["llama"]
    assert adapter_bytes(shape_of(PHI3), fused.lora) == 18 * 4 * sides["phi3"]
    attention = 2 * (128 + 96 + 96 + 128)
    assert adapter_bytes(shape_of(MIXTRAL), experts.lora) == 18 * 4 * (attention + 2 * E * 3 * (H + WIDE))
    # Experts are no linear layers, so quantising leaves them in 16 bit.
    assert body_parameters(shape_of(MIXTRAL)) == LAYERS * (2 * H * H + 2 * 32 * H)
    assert full.memory_parts["adapter and optimizer"] == adapter_bytes(shape_of(LLAMA), full.lora) / 2**30


def test_files_and_widths_agree_on_the_built_in_model(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "dpo_assets" / "data" / "stories260k"
    shape = inspect_model(folder).shape
    read = shape.with_matrices(read_matrices(folder, shape.layers))
    lora = LoraSection(rank=4)
    assert resolve_targets(lora, read) == resolve_targets(lora, shape)
    assert adapter_bytes(read, resolve_targets(lora, read)) == adapter_bytes(shape, resolve_targets(lora, shape))
    assert body_parameters(read) == body_parameters(shape)


def test_matrices_are_read_from_the_files_of_the_index_whatever_their_names(tmp_path: Path) -> None:
    """Qwen3.5 names its parts otherwise; a second copy in another layout lies beside them."""
    names = list(LLAMA)
    parts = {f"model.safetensors-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    for file, held in parts.items():
        save_tensors(tmp_path / file, {name: LLAMA[name] for name in held})
    save_index(tmp_path, {name: file for file, held in parts.items() for name in held})
    save_tensors(tmp_path / "model-00001-of-00001.safetensors", {"model.layers.0.attention.wq.weight": (H, H)})
    read = {kind.name: kind for kind in read_matrices(tmp_path, LAYERS)}
    assert read == {kind.name: kind for kind in matrices_of(LLAMA.items(), LAYERS)}


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("mlp.gate.wg", "router"), ("mlp.gate", "router"), ("mlp.shared_expert_gate", "router"),
        ("block_sparse_moe.router.layer", "router"), ("self_attn.output_gate", "linear"), ("mlp.gate_proj", "linear"),
        ("mlp.experts.w1", "experts"), ("mlp.shared_experts.gate_proj", "linear"),
    ],
)  # fmt: skip
def test_a_router_is_told_from_a_gate(name: str, role: str) -> None:
    assert role_of(name) == role


def test_a_file_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 4) + json.dumps([1])[:4].encode())
    with pytest.raises(ConfigError, match=r"model\.safetensors is not a readable safetensors file"):
        read_matrices(tmp_path, 1)


def test_a_family_whose_files_are_not_read_is_left_to_the_worker() -> None:
    unknown = EIGHT_B.model_copy(update={"decoder": None})
    assert planned(unknown, RTX_4090).lora.target_modules == "all-linear"


@pytest.mark.parametrize(
    "lora", [{"target_parameters": EXPERTS}, {"target_modules": ["qkv_proj"]}], ids=["experts", "fused projections"]
)
def test_unsloth_is_not_asked_for_targets_that_it_does_not_know(lora: dict[str, Any]) -> None:
    tensors = MIXTRAL if "target_parameters" in lora else PHI3
    with pytest.raises(ConfigError, match="kernels `unsloth` adapts q_proj"):
        planned(shape_of(tensors), RTX_4090, lora=lora, hardware={"kernels": "unsloth"})


def test_unsloth_is_not_asked_for_a_checkpoint_of_more_than_text() -> None:
    """It would load the towers too, and save an adapter under names that no release has."""
    beside = EIGHT_B.model_copy(update={"more_than_text": True, "architecture": "Gemma3ForConditionalGeneration"})
    with pytest.raises(ConfigError, match=r"`unsloth` .*it loads Gemma3ForConditionalGeneration whole"):
        planned(beside, RTX_4090, hardware={"kernels": "unsloth"})
    assert planned(beside, RTX_4090).kernels != "unsloth"


def test_experts_are_refused_where_they_cannot_be_trained_or_joined() -> None:
    with pytest.raises(ConfigError, match="cannot be trained with dropout"):
        recipe(lora={"target_parameters": EXPERTS, "dropout": 0.1})
    with pytest.raises(ConfigError, match="`merged` joins two adapters into one"):
        recipe(lora={"target_parameters": EXPERTS}, dpo={"reference_strategy": "merged"})


def test_targets_are_spelled_in_one_way() -> None:
    for given, kept in (
        ("all-linear", "all-linear"), (["all-linear"], "all-linear"), ("q_proj", ["q_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]), (["q_proj"], ["q_proj"]),
    ):  # fmt: skip
        assert recipe(lora={"target_modules": given}).lora.target_modules == kept


def test_a_kind_answers_to_the_end_of_its_name_alone() -> None:
    kind = Matrices.of("mlp.gate_up_proj", "linear", [(2, 2)])
    assert [kind.answers_to(n) for n in ("mlp.gate_up_proj", "gate_up_proj", "up_proj", "mlp")] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("size", "names"),
    [
        ("qwen3-8b", list(ALL_LINEAR)),
        ("phi4-mini", ["o_proj", "down_proj", "gate_up_proj", "qkv_proj"]),
        ("qwen3.5-9b", [*ALL_LINEAR, "in_proj_a", "in_proj_b", "in_proj_qkv", "in_proj_z", "out_proj"]),
        ("gpt-oss-20b", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    ],
)
def test_all_linear_of_a_model_that_is_only_described_is_spelled_out(size: str, names: list[str]) -> None:
    made = planned(find_model(size).shape, H200)
    assert made.lora.target_modules == names
    experts = [kind.name for kind in made.coverage.kinds if kind.role == "experts"]
    assert made.coverage.frozen == tuple(experts)
    assert (made.coverage.share == 1.0) is not bool(experts)


def test_experts_of_a_model_that_is_only_described_are_adapted_by_their_own_names() -> None:
    shape = find_model("qwen3-30b-a3b").shape
    made = planned(shape, H200, lora={"rank": 4, "target_parameters": EXPERTS})
    assert (made.coverage.share, made.coverage.frozen_experts) == (1.0, False)
    sides = 48 * 128 * ((2 * 768 + 2_048) + (2_048 + 768))
    attention = 48 * (2 * (4_096 + 2_048) + 2 * (512 + 2_048))
    assert adapter_bytes(shape, made.lora) == 18 * 4 * (sides + attention)
