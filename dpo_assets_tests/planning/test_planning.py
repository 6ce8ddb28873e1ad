"""Planning: precision with its reason, steps, memory, and what is read from a model folder."""

from __future__ import annotations

import json
import math
import struct
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.errors import ConfigError
from dpo_assets.planning.model_folder import card_licence, count_parameters, inspect_model
from dpo_assets.planning.plan import (
    LARGEST_BUDGET,
    DatasetStats,
    ModelShape,
    TrainingPlan,
    activation_gib_per_token,
    adapter_gib,
    make_plan,
    steps_of,
)
from dpo_assets.planning.precision import (
    BYTES_PER_WEIGHT,
    Device,
    Precision,
    choose_precision,
    weights_gib,
)
from dpo_assets_tests.samples import plan, recipe

CPU = Device("cpu", "CPU", 16.0)
T4 = Device("cuda", "Tesla T4", 15.0, (7, 5))
A100 = Device("cuda", "A100", 80.0, (8, 0))
L4 = Device("cuda", "NVIDIA L4", 22.5, (8, 9))
H200 = Device("cuda", "NVIDIA H200", 140.0, (9, 0))
TINY, ONE_B, EIGHT_B, SEVENTY_B = 260_000, 1_200_000_000, 8_000_000_000, 70_000_000_000
SHAPES = {
    TINY: ModelShape(parameters=TINY, layers=5, hidden=64, intermediate=172, vocabulary=512, context=512),
    ONE_B: ModelShape(parameters=ONE_B, layers=16, hidden=2048, intermediate=8192, vocabulary=128_256, context=8192),
    EIGHT_B: ModelShape(
        parameters=EIGHT_B, layers=32, hidden=4096, intermediate=14_336, vocabulary=128_256, context=8192
    ),
    SEVENTY_B: ModelShape(
        parameters=SEVENTY_B, layers=80, hidden=8192, intermediate=28_672, vocabulary=128_256, context=8192
    ),
}


def data(**changes: Any) -> DatasetStats:
    values: dict[str, Any] = {
        "train_pairs": 1000,
        "eval_pairs": 100,
        "max_length": 1024,
        "longest_pair": 1500,
        "mean_pair": 600.0,
    }
    return DatasetStats(**values | changes)


def planned(parameters: int, device: Device, stats: DatasetStats | None = None, **sections: Any) -> TrainingPlan:
    return make_plan(recipe(**sections), SHAPES[parameters], stats or data(), device)


# Precision


@pytest.mark.parametrize(
    ("device", "parameters", "precision", "reason"),
    [
        (CPU, TINY, "fp32", "a CPU has no fast 16-bit training"),
        (CPU, SEVENTY_B, "fp32", "a CPU"),
        (T4, ONE_B, "fp16", "loss scaling: Tesla T4 is older than Ampere"),
        (T4, EIGHT_B, "4bit", "too much beside activations on the 15 GiB of Tesla T4"),
        (L4, ONE_B, "bf16", "NVIDIA L4 supports it and it fits"),
        (L4, EIGHT_B, "4bit", "bf16 weights need 14.9 GiB"),
        (H200, EIGHT_B, "bf16", "the weights need 14.9 of 140 GiB"),
        (H200, SEVENTY_B, "4bit", "bf16 weights need 130.4 GiB"),
        (Device("cuda", "unknown card", 140.0, None), ONE_B, "fp16", "older than Ampere"),
        (A100, EIGHT_B, "bf16", "A100 supports it"),
    ],
)
def test_the_device_gets_the_fewest_compromises_that_fit_and_the_reason(
    device: Device, parameters: int, precision: Precision, reason: str
) -> None:
    choice = choose_precision(device, parameters, "auto")
    assert choice.precision == precision
    assert choice.reason.startswith(precision)
    assert reason in choice.reason


def test_sixteen_bit_is_used_up_to_half_of_the_card_and_four_bit_beyond() -> None:
    edge = int(0.55 * L4.memory_gib * 2**30 / 2)
    assert choose_precision(L4, edge, "auto").precision == "bf16"
    assert choose_precision(L4, edge + 2**20, "auto").precision == "4bit"


@pytest.mark.parametrize(
    ("device", "requested", "message"),
    [
        *((CPU, p, f"`{p}` needs a GPU; on this CPU use `fp32`") for p in ("4bit", "8bit", "fp8", "bf16", "fp16")),
        (T4, "bf16", "(capability 7.5) has no bf16; use `fp16` or `auto`"),
        (T4, "fp8", "fp8 needs capability 9.0 (Unsloth 2026.10.9); Tesla T4 has 7.5. Use `fp16`, or `4bit`"),
        (L4, "fp8", "NVIDIA L4 has 8.9"),
        (Device("cuda", "unknown card", 140.0, None), "bf16", "has no bf16"),
    ],
)
def test_a_precision_that_the_device_lacks_is_refused_with_the_nearest_one(
    device: Device, requested: Precision, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        choose_precision(device, ONE_B, requested)
    assert message in str(refused.value)


def test_the_way_out_of_a_refused_precision_is_open() -> None:
    with pytest.raises(ConfigError) as refused:
        choose_precision(T4, ONE_B, "fp8")
    assert "Use `bf16`" not in str(refused.value)


@pytest.mark.parametrize(
    ("device", "requested"),
    [
        (CPU, "fp32"),
        (T4, "fp16"),
        (T4, "4bit"),
        (T4, "fp32"),
        (A100, "bf16"),
        (L4, "8bit"),
        (H200, "fp8"),
        (H200, "fp32"),
    ],
)
def test_a_choice_in_the_recipe_wins_where_the_device_can_follow(device: Device, requested: Precision) -> None:
    choice = choose_precision(device, SEVENTY_B, requested)
    assert (choice.precision, choice.reason) == (requested, f"{requested}: chosen in the recipe")


def test_weights_take_the_bytes_of_their_precision() -> None:
    assert [weights_gib(2**30, p) for p in ("bf16", "fp16", "fp32")] == [2.0, 2.0, 4.0]
    # One byte and half a byte, plus scales and what stays in 16 bit.
    assert 1.0 < BYTES_PER_WEIGHT["8bit"] == BYTES_PER_WEIGHT["fp8"] <= 1.2
    assert 0.5 < BYTES_PER_WEIGHT["4bit"] <= 0.75


# Steps


@pytest.mark.parametrize(
    ("pairs", "batch", "epochs", "steps"),
    [
        (100, 10, 1.0, 10),
        (101, 10, 1.0, 11),
        (9, 10, 1.0, 1),
        (100, 10, 2.5, 25),
        (101, 10, 2.0, 22),
        (100, 10, 0.25, 3),
        (0, 10, 1.0, 1),
    ],
)
def test_the_last_smaller_batch_of_an_epoch_is_a_step_too(pairs: int, batch: int, epochs: float, steps: int) -> None:
    assert steps_of(pairs, batch, epochs) == steps


@settings(max_examples=60, deadline=None)
@given(pairs=st.integers(1, 10**6), batch=st.integers(1, 1024), epochs=st.floats(0.01, 20))
def test_steps_see_every_pair_of_every_epoch_and_at_most_one_batch_more(pairs: int, batch: int, epochs: float) -> None:
    steps = steps_of(pairs, batch, epochs)
    assert steps >= 1
    assert steps * batch >= pairs * epochs * (1 - 1e-12)
    assert steps < (pairs / batch + 1) * epochs + 1


# Plans


def test_a_plan_carries_the_recipe_the_dataset_and_the_device() -> None:
    made = planned(ONE_B, L4, dpo={"batch_size": 32, "epochs": 2.0}, sft={"batch_size": 10}, lora={"rank": 8})
    assert (made.device, made.device_name, made.precision, made.kernels) == (
        "cuda",
        "NVIDIA L4",
        "bf16",
        "transformers",
    )
    assert (made.train_pairs, made.eval_pairs, made.max_length, made.parameters) == (1000, 100, 1024, ONE_B)
    assert (made.dpo_steps, made.sft_steps) == (64, 100)
    assert (made.lora.rank, made.dpo.batch_size, made.sft.batch_size) == (8, 32, 10)
    assert TrainingPlan.model_validate_json(made.model_dump_json()) == made


def test_an_adopted_base_takes_no_sft_step() -> None:
    assert planned(ONE_B, L4, sft={"strategy": "adopt"}).sft_steps == 0


def test_a_precision_that_cannot_be_is_refused_before_anything_is_planned() -> None:
    with pytest.raises(ConfigError, match="no bf16"):
        planned(ONE_B, T4, hardware={"precision": "bf16"})


@pytest.mark.parametrize("device", [CPU, T4, L4, H200], ids=lambda device: device.name)
@pytest.mark.parametrize("parameters", SHAPES)
@pytest.mark.parametrize("longest", [1, 1500, 50_000])
def test_a_forward_takes_the_longest_pair_and_no_more_than_fits_beside_it(
    device: Device, parameters: int, longest: int
) -> None:
    made = planned(parameters, device, data(longest_pair=longest, mean_pair=longest / 2))
    assert made.token_budget >= longest
    assert made.token_budget <= max(longest, LARGEST_BUDGET[device.kind])
    shape, fixed = SHAPES[parameters], planned(parameters, device, data(longest_pair=0, mean_pair=0.0)).memory_gib
    assert made.memory_gib > weights_gib(parameters, made.precision) + adapter_gib(shape, made.lora)
    if made.token_budget > longest:
        # More than one pair at a time is a choice, so it has to fit.
        assert made.memory_gib <= 0.9 * device.memory_gib
    assert made.memory_gib >= fixed


def test_the_budget_of_a_small_model_ends_at_what_still_gains() -> None:
    assert planned(TINY, H200).token_budget == LARGEST_BUDGET["cuda"] == 16_384
    assert planned(TINY, CPU).token_budget == LARGEST_BUDGET["cpu"] == 4_096


def test_the_peak_is_weights_adapter_framework_and_the_tokens_of_one_forward() -> None:
    made = planned(ONE_B, L4, data(longest_pair=1500, mean_pair=100.0), dpo={"batch_size": 16})
    weights, adapter, framework = 2 * ONE_B / 2**30, adapter_gib(SHAPES[ONE_B], made.lora), 1.5
    token = 62 * 16 * 2048 / 2**30
    room = 0.9 * 22.5 - weights - adapter - framework
    assert made.gradient_checkpointing is False
    assert made.token_budget == int(room / token)
    # Sixteen pairs of a hundred tokens and one long one are fewer than the budget.
    assert made.memory_gib == pytest.approx(weights + adapter + framework + token * (16 * 100 + 1500))
    full = planned(ONE_B, L4, data(longest_pair=1500, mean_pair=1000.0))
    assert full.memory_gib == pytest.approx(weights + adapter + framework + token * full.token_budget)


def test_two_thousand_tokens_must_fit_before_checkpointing_is_left_out() -> None:
    token = activation_gib_per_token(SHAPES[ONE_B], "bf16", False)
    fixed = planned(ONE_B, L4, data(longest_pair=0, mean_pair=0.0)).memory_gib
    for tokens, checkpointing in ((2_040, True), (2_060, False)):
        card = Device("cuda", "card", (fixed + token * tokens) / 0.9, (8, 0))
        assert planned(ONE_B, card, data(longest_pair=10)).gradient_checkpointing is checkpointing


def test_checkpointing_is_used_only_where_a_pair_would_not_fit_without() -> None:
    card = Device("cuda", "card", 40.0, (8, 0))
    short, long = planned(EIGHT_B, card, data(longest_pair=1500)), planned(EIGHT_B, card, data(longest_pair=6000))
    assert (short.gradient_checkpointing, long.gradient_checkpointing) == (False, True)
    assert long.memory_gib < 40.0
    assert planned(EIGHT_B, H200, data(longest_pair=6000)).gradient_checkpointing is False


def test_the_memory_limit_of_the_recipe_lowers_what_is_available_and_never_raises_it() -> None:
    assert planned(ONE_B, L4, hardware={"memory_gib": 10.0}).memory_available_gib == 10.0
    assert planned(ONE_B, L4, hardware={"memory_gib": 1000.0}).memory_available_gib == 22.5
    assert planned(ONE_B, L4).memory_available_gib == 22.5
    limited, free = planned(ONE_B, L4, hardware={"memory_gib": 6.0}), planned(ONE_B, L4)
    assert limited.memory_gib <= 6.0 < free.memory_gib


def test_the_precision_is_chosen_for_the_memory_that_the_recipe_allows() -> None:
    limited = planned(EIGHT_B, H200, hardware={"memory_gib": 16.0})
    really = planned(EIGHT_B, Device("cuda", "card", 16.0, (9, 0)))
    assert limited.precision == really.precision == "4bit"
    assert limited.memory_gib <= 16.0


def test_activations_cost_less_with_checkpointing_and_twice_in_fp32() -> None:
    shape = SHAPES[EIGHT_B]
    plain = activation_gib_per_token(shape, "bf16", False)
    # Measured: 7.4 MiB a token without checkpointing, 0.6 MiB with it.
    assert plain * 1024 == pytest.approx(7.4, rel=0.1)
    assert activation_gib_per_token(shape, "bf16", True) * 1024 == pytest.approx(0.6, rel=0.1)
    assert activation_gib_per_token(shape, "fp32", False) == 2 * plain


def test_the_adapter_takes_weights_gradients_and_two_moments_of_every_target() -> None:
    shape = SHAPES[ONE_B]
    lora = recipe(lora={"rank": 4, "target_modules": ["q_proj"]}).lora
    assert adapter_gib(shape, lora) * 2**30 == 16 * (4 * (2048 + 2048)) * 16
    wide = recipe(lora={"rank": 4, "target_modules": ["q_proj", "up_proj"]}).lora
    assert adapter_gib(shape, wide) * 2**30 == 16 * (4 * (2048 + 2048) + 4 * (2048 + 8192)) * 16


CHANGED: dict[str, dict[str, Any]] = {
    "dpo": {"dpo": recipe(dpo={"beta": 0.3}).dpo},
    "sft": {"sft": recipe(sft={"epochs": 2.0}).sft},
    "lora": {"lora": recipe(lora={"rank": 2}).lora},
    "precision": {"precision": "4bit"},
    "checkpointing": {"gradient_checkpointing": True},
    "estimate": {"memory_gib": 1.0, "token_budget": 99, "memory_available_gib": 1.0},
}


@pytest.mark.parametrize(
    ("change", "sft", "dpo"),
    [
        ("dpo", False, True),
        ("sft", True, False),
        ("lora", True, True),
        ("precision", True, True),
        ("checkpointing", True, True),
        ("estimate", False, False),
    ],
)
def test_a_stage_is_trained_again_only_for_a_change_that_it_depends_on(change: str, sft: bool, dpo: bool) -> None:
    before, after = plan(), plan(**CHANGED[change])
    assert (before.sft_part() != after.sft_part()) is sft
    assert (before.dpo_part() != after.dpo_part()) is dpo


# Model folders


def safetensors(path: Path, header: Any, *, length: int | None = None, raw: bytes | None = None) -> Path:
    body = json.dumps(header).encode() if raw is None else raw
    path.write_bytes(struct.pack("<Q", len(body) if length is None else length) + body)
    return path


def model(folder: Path, *, config: Any = None, tokenizer: Any = None, card: str | None = None) -> Path:
    shape: Any = {"num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 16, "architectures": ["LlamaForCausalLM"]}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape if config is None else config))
    (folder / "tokenizer_config.json").write_text(json.dumps({} if tokenizer is None else tokenizer))
    safetensors(folder / "model.safetensors", {"a": {"shape": [2, 3]}, "b": {"shape": []}, "__metadata__": {"x": "y"}})
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def test_the_embedded_model_is_what_its_name_says() -> None:
    facts = inspect_model(Path(str(files("dpo_assets") / "data/stories260k")))
    assert 250_000 < facts.shape.parameters < 300_000
    assert facts.safetensors == ("model.safetensors",)
    assert facts.pickled == ()
    assert facts.has_chat_template
    assert facts.eos_token


def test_a_folder_tells_its_shape_weights_template_licence_and_eos(tmp_path: Path) -> None:
    folder = model(
        tmp_path,
        tokenizer={"eos_token": {"content": "</s>"}, "chat_template": "{{ x }}"},
        card="---\nlicense: apache-2.0\n---\n# Model\n",
    )
    (folder / "old.bin").write_bytes(b"")
    (folder / "optimizer.pt").write_bytes(b"")
    facts = inspect_model(folder)
    assert facts.shape == ModelShape(parameters=7, layers=2, hidden=8, intermediate=32, vocabulary=16, context=2**20)
    assert (facts.architecture, facts.licence, facts.eos_token) == ("LlamaForCausalLM", "apache-2.0", "</s>")
    assert (facts.safetensors, facts.pickled) == (("model.safetensors",), ("old.bin", "optimizer.pt"))
    assert facts.has_chat_template


def test_shards_are_added_up_and_a_text_config_inside_is_found(tmp_path: Path) -> None:
    inner = {
        "num_hidden_layers": 3,
        "hidden_size": 4,
        "vocab_size": 5,
        "intermediate_size": 6,
        "max_position_embeddings": 7,
    }
    folder = model(tmp_path, config={"text_config": inner})
    safetensors(folder / "model-2.safetensors", {"c": {"shape": [10]}})
    facts = inspect_model(folder)
    assert facts.safetensors == ("model-2.safetensors", "model.safetensors")
    assert facts.shape == ModelShape(parameters=17, layers=3, hidden=4, intermediate=6, vocabulary=5, context=7)
    assert (facts.architecture, facts.has_chat_template, facts.eos_token) == ("unknown", False, None)


def test_a_template_beside_the_tokenizer_counts_and_an_eos_as_text_too(tmp_path: Path) -> None:
    folder = model(tmp_path, tokenizer={"eos_token": "<|im_end|>"})
    (folder / "chat_template.jinja").write_text("{{ x }}")
    assert (inspect_model(folder).has_chat_template, inspect_model(folder).eos_token) == (True, "<|im_end|>")


Part = Literal["config.json", "tokenizer_config.json"]


@pytest.mark.parametrize("part", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is missing"), (b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"[]", "is not a JSON object")],
)
def test_a_folder_without_a_readable_file_is_refused_with_its_name(
    tmp_path: Path, part: Part, content: bytes | None, message: str
) -> None:
    folder = model(tmp_path)
    (folder / part).unlink()
    if content is not None:
        (folder / part).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as refused:
        inspect_model(folder)
    assert part in str(refused.value)


def test_a_folder_that_does_not_exist_and_a_config_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        inspect_model(tmp_path / "missing")
    with pytest.raises(ConfigError, match="has no 'num_hidden_layers': only decoder language models"):
        inspect_model(model(tmp_path, config={"hidden_size": 8, "vocab_size": 16}))


@pytest.mark.parametrize(
    "config",
    [{"num_hidden_layers": None, "hidden_size": 8, "vocab_size": 16}, {"text_config": "llama"}],
    ids=["null layers", "text_config is text"],
)
def test_a_config_of_wrong_types_is_refused_as_a_config_error(tmp_path: Path, config: Any) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        inspect_model(model(tmp_path, config=config))


@pytest.mark.parametrize(
    ("raw", "length"),
    [
        (b"", 8),
        (b"{", None),
        (b'{"a": {"shape"', None),
        (b"\xff\xff", None),
        (b'{"a": {"dtype": "F32"}}', None),
        (b'{"a": [1]}', None),
        (b'{"a": {"shape": 5}}', None),
        (b'{"a": {"shape": ["x"]}}', None),
        (b'{"a": {"shape": [1', 2**62),
    ],
)
def test_a_cut_or_broken_weight_file_is_refused(tmp_path: Path, raw: bytes, length: int | None) -> None:
    path = safetensors(tmp_path / "model.safetensors", None, raw=raw, length=length)
    with pytest.raises(ConfigError, match="not a readable safetensors file; download it again"):
        count_parameters(path)


def test_a_weight_file_of_a_few_bytes_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"1234567"):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ConfigError, match="not a readable safetensors file"):
            count_parameters(tmp_path / "model.safetensors")


@pytest.mark.parametrize("raw", [b"[]", b'"x"', b"5", b"[" * 100_000], ids=["list", "text", "number", "deep"])
def test_a_weight_file_whose_header_is_no_object_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = safetensors(tmp_path / "model.safetensors", None, raw=raw)
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        count_parameters(path)


@settings(max_examples=60, deadline=None)
@given(shapes=st.lists(st.lists(st.integers(0, 50), max_size=3), max_size=5))
def test_parameters_are_the_products_of_the_shapes(shapes: list[list[int]], tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "counted.safetensors"
    safetensors(path, {f"t{n}": {"shape": shape} for n, shape in enumerate(shapes)})
    assert count_parameters(path) == sum(math.prod(shape) for shape in shapes)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (None, None),
        ("", None),
        ("# Model\nlicense: mit\n", None),
        ("# Model\n---\nlicense: mit\n---\n", None),
        ("---", None),
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\ntags: [a]\n---\n", None),
        ("---\nlicense: [mit, apache-2.0]\n---\n", None),
        ("---\n- license\n---\n", None),
        ("---\nlicense: [mit\n---\n", None),
        ("---\nlicense: \n---\n", None),
    ],
)
def test_the_licence_is_read_from_the_front_matter_and_from_nowhere_else(
    tmp_path: Path, card: str | None, licence: str | None
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card, newline="")
    assert card_licence(tmp_path / "README.md") == licence


def test_three_dashes_inside_a_value_do_not_end_the_front_matter(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nbase_model: org/a---b\nlicense: mit\n---\n# Model\n")
    assert card_licence(tmp_path / "README.md") == "mit"
