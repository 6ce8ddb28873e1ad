"""The merge: equal to PEFT's, rounded once, byte for byte elsewhere, in little memory, and by name where it cannot."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo_assets.checks.bands import default_bands
from dpo_assets.checks.reports import MergeReport
from dpo_assets.checks.training import merge_verdicts
from dpo_assets.contract import MergeSpec
from dpo_assets.errors import ConfigError, GateError
from dpo_assets.publishing.commit import ALLOWED
from dpo_assets.training.models import merging
from dpo_assets.training.models.merging import NotStreamable, plan_merge, stream_merge
from dpo_assets.training.stages import merge
from dpo_assets_tests.training.bases import rewrite
from dpo_assets_tests.training.conftest import EVAL_PAIRS, Log, PlanMaker

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Q0 = "model.layers.0.self_attn.q_proj"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def base_in(model_folder: Path, target: Path, dtype: str = "fp32", shard: str = "5GB") -> Path:
    """The built-in model in another dtype or more files."""
    shutil.copytree(model_folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    load(model_folder).to(DTYPES[dtype]).save_pretrained(target, max_shard_size=shard)
    return target


def make_adapter(base: Path, target: Path, config: Any = None, **settings: Any) -> Path:
    """An adapter whose every trained value is far from its start, as PEFT saves it."""
    torch.manual_seed(0)
    config = config or LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR} | settings)
    model = get_peft_model(load(base), config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad and "modules_to_save" not in name:
                value.add_(torch.randn_like(value) * 0.05)
    model.save_pretrained(str(target))
    return target


def merged_by_peft(base: Path, adapter: Path) -> dict[str, Tensor]:
    """PEFT's merge in fp32, whatever the base is stored in."""
    model = PeftModel.from_pretrained(load(base), str(adapter))
    return dict(model.merge_and_unload(safe_merge=True).state_dict())


def streamed(base: Path, adapter: Path, out: Path, **options: Any) -> dict[str, Tensor]:
    out.mkdir(parents=True)
    stream_merge(plan_merge(base, adapter), out, **options)
    return weights(out)


@pytest.fixture(scope="module")
def adapter(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(model_folder, tmp_path_factory.mktemp("adapter"))


# --- equal to PEFT's merge -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, r"layers\.[01]\.mlp\.up_proj": 8}},
        {"alpha_pattern": {"k_proj": 32, "model.layers.3.mlp.down_proj": 1}},
        {"use_rslora": True, "rank_pattern": {"v_proj": 1}, "alpha_pattern": {r"layers\.\d+\.self_attn\.v_proj": 3}},
        {"target_modules": r".*\.layers\.[13]\..*(q_proj|down_proj)", "init_lora_weights": "gaussian"},
        {"target_modules": ["o_proj"], "layers_to_transform": [2], "lora_dropout": 0.3, "task_type": "CAUSAL_LM"},
    ],
    ids=lambda settings: ", ".join(settings) or "plain",
)
def test_an_fp32_merge_equals_pefts(model_folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter = make_adapter(model_folder, tmp_path / "adapter", **settings)
    ours, theirs = streamed(model_folder, adapter, tmp_path / "out"), merged_by_peft(model_folder, adapter)
    base = weights(model_folder)
    assert ours.keys() == base.keys()
    for name, value in ours.items():
        # Both sum r products in fp32, in another order.
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6, msg=name)
    moved = {name for name in ours if not torch.equal(ours[name], base[name])}
    pairs = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in weights(adapter)}
    assert moved == {f"{module}.weight" for module in pairs}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_16_bit_merge_is_pefts_fp32_merge_rounded_once(model_folder: Path, tmp_path: Path, dtype: str) -> None:
    base = base_in(model_folder, tmp_path / "base", dtype)
    adapter = make_adapter(base, tmp_path / "adapter")
    ours, theirs = streamed(base, adapter, tmp_path / "out"), merged_by_peft(base, adapter)
    equal = total = 0
    for name, value in ours.items():
        assert value.dtype == DTYPES[dtype]
        wanted = theirs[name].to(DTYPES[dtype])
        # A sum that fp32 leaves on the other side of a rounding border differs by one step of the stored dtype.
        torch.testing.assert_close(value, wanted, rtol=torch.finfo(DTYPES[dtype]).eps, atol=1e-6, msg=name)
        equal, total = equal + int((value == wanted).sum()), total + value.numel()
    assert equal / total > 0.999


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 40),
    width=st.integers(1, 40),
    rank=st.integers(1, 9),
    dtype=st.sampled_from(sorted(DTYPES)),
    factor=st.sampled_from(sorted(DTYPES)),
    block=st.integers(1, 2000),
    alpha=st.sampled_from([1, 7, 64]),
    seed=st.integers(0, 2**16),
)
def test_every_weight_is_the_exact_sum_rounded_once_whatever_the_block(
    tmp_path_factory: pytest.TempPathFactory,
    model_folder: Path,
    out: int,
    width: int,
    rank: int,
    dtype: str,
    factor: str,
    block: int,
    alpha: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    folder = tmp_path_factory.mktemp("any")
    weight = torch.randn(out, width).to(DTYPES[dtype])
    down, up = torch.randn(rank, width).to(DTYPES[factor]), torch.randn(out, rank).to(DTYPES[factor])
    base = synthetic(folder / "base", model_folder, [{f"{Q0}.weight": weight, "other": torch.randn(7).bfloat16()}])
    adapter = synthetic_adapter(folder / "adapter", {Q0: (down, up)}, r=rank, lora_alpha=alpha)
    result = streamed(base, adapter, folder / "out", block=block)[f"{Q0}.weight"]
    change = alpha / rank * up.double() @ down.double()
    exact = weight.double() + change
    size = weight.double().abs() + alpha / rank * up.double().abs() @ down.double().abs()
    # Half a step of the stored dtype, and what fp32 loses in a sum of `rank` products; fp16 has coarser steps at zero.
    once = torch.finfo(DTYPES[dtype]).eps / 2 * exact.abs() + (rank + 4) * torch.finfo(torch.float32).eps * size
    assert bool(((result.double() - exact).abs() <= once + 2**-25).all())


def synthetic(folder: Path, model_folder: Path, files: list[dict[str, Tensor]]) -> Path:
    """A model folder with these weights and the built-in model's config."""
    folder.mkdir()
    shutil.copyfile(model_folder / "config.json", folder / "config.json")
    names = ["model.safetensors"] if len(files) == 1 else [f"part-{n}.safetensors" for n in range(len(files))]
    for name, tensors in zip(names, files, strict=True):
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(files) > 1:
        weight_map = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def synthetic_adapter(folder: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], **settings: Any) -> Path:
    folder.mkdir()
    given = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | settings
    (folder / "adapter_config.json").write_text(json.dumps(given))
    save_file(
        {
            f"base_model.model.{module}.lora_{side}.weight": value
            for module, pair in pairs.items()
            for side, value in zip("AB", pair, strict=True)
        },
        folder / "adapter_model.safetensors",
    )
    return folder


# --- what is written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_shards_keep_their_tensors_and_what_has_no_adapter_keeps_its_bytes(
    model_folder: Path, tmp_path: Path, dtype: str
) -> None:
    base = base_in(model_folder, tmp_path / "base", dtype, shard="150KB")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], layers_to_transform=[1])
    told: list[tuple[int, int]] = []
    streamed(base, adapter, tmp_path / "out", on_file=lambda *done: told.append(done))
    files = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == files
    assert told == [(n, len(files)) for n in range(1, len(files) + 1)]
    changed = [name for name in files if (base / name).read_bytes() != (tmp_path / "out" / name).read_bytes()]
    [index, indexed] = [json.loads((f / "model.safetensors.index.json").read_text()) for f in (base, tmp_path / "out")]
    assert changed == [index["weight_map"]["model.layers.1.self_attn.q_proj.weight"]]
    assert indexed["weight_map"] == index["weight_map"]
    assert indexed["metadata"]["total_size"] == index["metadata"]["total_size"]
    before, after = load_file(base / changed[0]), load_file(tmp_path / "out" / changed[0])
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        "model.layers.1.self_attn.q_proj.weight"
    ]


def test_tensors_of_any_dtype_are_copied(model_folder: Path, tmp_path: Path) -> None:
    others = {
        "ids": torch.arange(9),
        "mask": torch.tensor([True, False]),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "fp8": torch.randn(5, 3).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.0, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
    }
    base = synthetic(tmp_path / "base", model_folder, [{f"{Q0}.weight": torch.randn(8, 6)} | others])
    adapter = synthetic_adapter(tmp_path / "adapter", {Q0: (torch.randn(4, 6), torch.randn(8, 4))})
    after = streamed(base, adapter, tmp_path / "out", block=64)
    for name, value in others.items():
        assert (after[name].dtype, after[name].shape) == (value.dtype, value.shape)
        assert torch.equal(after[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name
    assert not torch.equal(after[f"{Q0}.weight"], weights(base)[f"{Q0}.weight"])


def test_files_get_names_that_a_release_takes(model_folder: Path, tmp_path: Path) -> None:
    files = [{f"{Q0}.weight": torch.randn(8, 6)}, {"lm_head.weight": torch.randn(3, 3)}]
    base = synthetic(tmp_path / "base", model_folder, files)
    assert not any(fnmatch("part-0.safetensors", pattern) for pattern in ALLOWED)
    streamed(base, synthetic_adapter(tmp_path / "a", {Q0: (torch.ones(4, 6), torch.ones(8, 4))}), tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert all(any(fnmatch(name, pattern) for pattern in ALLOWED) for name in names)


def test_two_merges_are_equal_bytes(model_folder: Path, adapter: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        streamed(model_folder, adapter, tmp_path / name)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("change", ["without the model's prefix", "with a prefix more"])
def test_a_base_with_other_prefixes_is_found(model_folder: Path, adapter: Path, tmp_path: Path, change: str) -> None:
    def renamed(name: str) -> str:
        return name.removeprefix("model.") if change.startswith("without") else f"language_model.{name}"

    shutil.copytree(model_folder, tmp_path / "base")
    base = weights(model_folder)
    # A second tower whose names end alike must not be taken for it.
    tower = {"vision.layers.0.self_attn.q_proj.weight": torch.ones(2, 2)}
    save_file({renamed(n): v for n, v in base.items()} | tower, tmp_path / "base" / "model.safetensors")
    result = streamed(tmp_path / "base", adapter, tmp_path / "out")
    plain = streamed(model_folder, adapter, tmp_path / "plain")
    assert torch.equal(result.pop("vision.layers.0.self_attn.q_proj.weight"), torch.ones(2, 2))
    assert result.keys() == {renamed(name) for name in plain}
    assert all(torch.equal(result[renamed(name)], plain[name]) for name in plain)


# --- memory --------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
from safetensors.torch import load_file
from dpo_assets.training.models.merging import plan_merge, stream_merge


def status(field):
    # Not getrusage: a child's ru_maxrss starts at the resident size of the process that started it.
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024

base, adapter, out = map(Path, sys.argv[1:])
plan = plan_merge(base, adapter)
for folder in (out / "warm", out / "measured"):
    folder.mkdir(parents=True)
    # The first time loads code, which the second finds in memory. The 5 makes the kernel forget the peak so far.
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    stream_merge(plan, folder)
    print(status("VmHWM") - before)
held = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
total = sum(float(t.float().sum()) for part in held for t in part.values())
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not tell the peak memory here")
def test_the_memory_of_a_merge_is_bounded_by_one_shard_and_not_by_the_model(model_folder: Path, tmp_path: Path) -> None:
    shards, size, shape = 8, 40, (2048, 5120)  # Two matrices of 20 MiB in bf16 make a shard.
    torch.manual_seed(0)
    pairs, files = {}, []
    for n in range(shards):
        shard = {f"model.layers.{n}.mlp.{kind}_proj.weight": torch.randn(*shape).bfloat16() for kind in ("up", "gate")}
        files.append(shard)
        for name in shard:
            pairs[name.removesuffix(".weight")] = (torch.randn(4, shape[1]), torch.randn(shape[0], 4))
    base = synthetic(tmp_path / "base", model_folder, files)
    rewrite(base / "config.json", num_hidden_layers=shards)
    adapter = synthetic_adapter(tmp_path / "adapter", pairs)
    del files, shard
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(base), str(adapter), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second, everything = map(float, done.stdout.split())
    assert everything > shards * size * 0.9  # The gauge sees a model that is held.
    assert (first < 3 * size, second < size) == (True, True), done.stdout


# --- what cannot be streamed goes through PEFT ---------------------------------------------------------------------

OTHER_KINDS: dict[str, Callable[[], Any]] = {
    "dora": lambda: LoraConfig(r=4, target_modules=["q_proj"], use_dora=True),
    "bias": lambda: LoraConfig(r=4, target_modules=["q_proj"], bias="all"),
    "modules_to_save": lambda: LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"]),
    "embeddings": lambda: LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "tied head": lambda: LoraConfig(r=4, target_modules=["lm_head", "q_proj"]),
    "trainable tokens": lambda: LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 7]),
    "replicated layers": lambda: LoraConfig(r=4, target_modules=["q_proj"], layer_replication=[[0, 3], [1, 5]]),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_another_kind_of_adapter_is_left_to_peft(model_folder: Path, tmp_path: Path, kind: str) -> None:
    adapter = make_adapter(model_folder, tmp_path / "adapter", OTHER_KINDS[kind]())
    with pytest.raises(NotStreamable):
        plan_merge(model_folder, adapter)


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq", "corda", "one_to_come"])
def test_an_adapter_that_changed_its_base_at_the_start_is_left_to_peft(
    model_folder: Path, tmp_path: Path, start: str
) -> None:
    pair = {Q0: (torch.ones(4, 64), torch.ones(64, 4))}
    adapter = synthetic_adapter(tmp_path / "adapter", pair, init_lora_weights=start)
    with pytest.raises(NotStreamable, match=start):
        plan_merge(model_folder, adapter)


def test_a_setting_that_nobody_here_knows_is_left_to_peft(model_folder: Path, tmp_path: Path) -> None:
    pair = {Q0: (torch.ones(4, 64), torch.ones(64, 4))}
    plan_merge(model_folder, synthetic_adapter(tmp_path / "off", pair, use_something_new=False))
    with pytest.raises(NotStreamable, match="use_something_new"):
        plan_merge(model_folder, synthetic_adapter(tmp_path / "on", pair, use_something_new=True))


def test_every_setting_of_a_plain_adapter_is_known(model_folder: Path, tmp_path: Path) -> None:
    """PEFT writes all its settings down; one that is on by default would send every adapter through memory."""
    settings = json.loads((make_adapter(model_folder, tmp_path / "adapter") / "adapter_config.json").read_text())
    known = {name for name, value in settings.items() if value not in (None, False, "none", {}, [])}
    assert known <= merging.HARMLESS


def test_layers_that_lie_otherwise_in_the_files_are_left_to_peft(model_folder: Path, tmp_path: Path) -> None:
    tensors = {name.replace(".q_proj", ".query"): value for name, value in weights(model_folder).items()}
    base = synthetic(tmp_path / "base", model_folder, [tensors])
    pairs = {Q0: (torch.ones(4, 64), torch.ones(64, 4))}
    with pytest.raises(NotStreamable, match=r"q_proj\.weight"):
        plan_merge(base, synthetic_adapter(tmp_path / "adapter", pairs))


@pytest.mark.parametrize("weight", [torch.ones(6, 8), torch.ones(8, 6, 1), torch.ones(8, 6).to(torch.float8_e4m3fn)])
def test_a_weight_that_is_no_float_matrix_of_the_pair_is_left_to_peft(
    model_folder: Path, tmp_path: Path, weight: Tensor
) -> None:
    base = synthetic(tmp_path / "base", model_folder, [{f"{Q0}.weight": weight}])
    adapter = synthetic_adapter(tmp_path / "adapter", {Q0: (torch.ones(4, 6), torch.ones(8, 4))})
    with pytest.raises(NotStreamable, match=r"q_proj\.weight"):
        plan_merge(base, adapter)


# --- faults are named ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [f"{Q0}.weight", "other", "small"])
def test_a_base_that_is_not_finite_is_named(model_folder: Path, tmp_path: Path, name: str, value: float) -> None:
    tensors = {f"{Q0}.weight": torch.ones(8, 6), "other": torch.ones(700).bfloat16(), "small": torch.ones(3)}
    tensors["small"] = tensors["small"].to(torch.float8_e5m2)
    flat = tensors[name].float().reshape(-1)
    flat[-1] = value
    tensors[name] = flat.view(tensors[name].shape).to(tensors[name].dtype)
    base = synthetic(tmp_path / "base", model_folder, [tensors])
    adapter = synthetic_adapter(tmp_path / "adapter", {Q0: (torch.ones(4, 6), torch.ones(8, 4))})
    with pytest.raises(GateError, match=f"{name} holds NaN or infinity") as stopped:
        streamed(base, adapter, tmp_path / "out", block=64)
    assert (stopped.value.check, str(stopped.value.value).split(":")[0]) == ("all_finite", name)


def test_an_adapter_that_is_not_finite_is_named(model_folder: Path, tmp_path: Path) -> None:
    base = synthetic(tmp_path / "base", model_folder, [{f"{Q0}.weight": torch.ones(8, 6)}])
    up = torch.zeros(8, 4)
    up[3, 1] = math.nan
    adapter = synthetic_adapter(tmp_path / "adapter", {Q0: (torch.ones(4, 6), up)})
    with pytest.raises(GateError, match=f"LoRA of {Q0} holds NaN or infinity in the adapter"):
        streamed(base, adapter, tmp_path / "out")


def test_a_sum_beyond_the_range_of_fp16_is_named(model_folder: Path, tmp_path: Path) -> None:
    base = synthetic(tmp_path / "base", model_folder, [{f"{Q0}.weight": torch.full((8, 6), 6e4).half()}])
    adapter = synthetic_adapter(tmp_path / "adapter", {Q0: (torch.ones(4, 6), torch.full((8, 4), 5e3))})
    with pytest.raises(GateError, match=f"{Q0}.weight holds NaN or infinity beyond the range of F16"):
        streamed(base, adapter, tmp_path / "out")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda base, _: cut(base / "model.safetensors"), r"model\.safetensors has \d+ bytes, its header describes"),
        (lambda base, _: (base / "model.safetensors").write_bytes(b"{}"), "not a readable safetensors file"),
        (lambda base, _: (base / "model.safetensors").unlink(), "holds neither"),
        (lambda _, adapter: cut(adapter / "adapter_model.safetensors"), "its header describes"),
        (lambda _, adapter: (adapter / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors is missing"),
        (lambda _, adapter: (adapter / "adapter_config.json").unlink(), r"adapter_config\.json is missing"),
        (lambda _, adapter: (adapter / "adapter_config.json").write_text("[1]"), "not a JSON object"),
        (lambda _, adapter: save_file({}, adapter / "adapter_model.safetensors"), "nothing to merge"),
    ],
)
def test_a_damaged_file_is_named(
    model_folder: Path, adapter: Path, tmp_path: Path, damage: Callable[[Path, Path], Any], message: str
) -> None:
    base, broken = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(model_folder, base)
    shutil.copytree(adapter, broken)
    damage(base, broken)
    with pytest.raises(ConfigError, match=message):
        plan_merge(base, broken)


def test_a_pair_that_lost_a_side_is_named(model_folder: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "half")
    tensors = weights(adapter)
    del tensors[f"base_model.model.{Q0}.lora_B.weight"]
    save_file(tensors, tmp_path / "half" / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=f"only one of the two LoRA matrices of {Q0}"):
        plan_merge(model_folder, tmp_path / "half")


def test_an_index_that_points_outside_its_folder_is_refused(model_folder: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "other.safetensors")
    index = {"weight_map": {"model.norm.weight": "../other.safetensors"}}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="not a file beside it"):
        plan_merge(tmp_path / "base", adapter)


# --- the stage -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run_stage(plan_for: PlanMaker, dataset: Path, tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Any], Log]]:
    """(model folder, report, log) of the stage."""

    def run(base: Path, adapter: Path, name: str = "merged", **plan: Any) -> tuple[Path, dict[str, Any], Log]:
        out = tmp_path / name
        out.mkdir()
        log = Log()
        merge.run(
            MergeSpec(
                output_dir=out,
                fingerprint="f" * 32,
                inputs={},
                base_model=base,
                adapter=adapter,
                dataset=dataset,
                plan=plan_for(**plan),
            ),
            log,
        )
        return out / "model", json.loads((out / "report.json").read_text()), log

    return run


def test_the_stage_streams_and_proves_itself(run_stage: Any, model_folder: Path, adapter: Path) -> None:
    model, report, log = run_stage(model_folder, adapter)
    assert (report["method"], report["finite"], report["probe_pairs"]) == ("streamed", True, EVAL_PAIRS)
    assert report["mean_difference_per_token"] <= report["max_difference_per_token"] < 1e-4
    loaded = load(model)
    assert report["parameters"] == sum(p.numel() for p in loaded.parameters())
    # The head is tied and not stored: the merged model must tie it again.
    assert "lm_head.weight" not in weights(model)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert log.messages[0] == "[progress] merge 1/1 files"
    assert {path.name for path in model.iterdir()} == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }


@pytest.mark.parametrize("kind", ["dora", "modules_to_save", "bias"])
def test_what_peft_merges_is_the_same_policy_too(run_stage: Any, model_folder: Path, tmp_path: Path, kind: str) -> None:
    adapter = make_adapter(model_folder, tmp_path / "adapter", OTHER_KINDS[kind]())
    _, report, log = run_stage(model_folder, adapter)
    assert (report["method"], report["finite"]) == ("peft", True)
    assert report["max_difference_per_token"] < 1e-4
    assert "so PEFT merges it" in log.messages[0]


def test_a_head_that_shares_the_changed_embeddings_does_not_pass_as_the_same_policy(
    run_stage: Any, model_folder: Path, tmp_path: Path
) -> None:
    """PEFT merges into the shared weight, so the head changes too, which the adapter had left alone."""
    tied = make_adapter(model_folder, tmp_path / "tied", OTHER_KINDS["embeddings"]())
    _, report, _ = run_stage(model_folder, tied, "of-tied")
    verdicts = merge_verdicts(MergeReport.model_validate(report), default_bands())
    assert [verdict.level for verdict in verdicts if verdict.check == "fidelity"] == ["error"]
    own = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, tie_word_embeddings=False)
    own.lm_head.weight.data = own.model.embed_tokens.weight.data.clone()
    shutil.copytree(model_folder, tmp_path / "base")
    own.save_pretrained(tmp_path / "base")
    untied = make_adapter(tmp_path / "base", tmp_path / "untied", OTHER_KINDS["embeddings"]())
    _, report, _ = run_stage(tmp_path / "base", untied, "of-untied")
    assert report["max_difference_per_token"] < 1e-4


def test_what_peft_writes_in_a_layout_of_its_own_is_read_by_4_as_well(
    run_stage: Any, model_folder: Path, tmp_path: Path
) -> None:
    """A head of its own where the base shares one. Transformers 5 alone reads the rotary base where it writes it."""
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    values = json.loads((base / "config.json").read_text())
    values.pop("rope_parameters", None)
    (base / "config.json").write_text(json.dumps(values | {"rope_theta": 50_000.0}))
    own_head = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapter = make_adapter(base, tmp_path / "adapter", own_head)
    model, report, log = run_stage(base, adapter)
    assert any("as PEFT and Transformers write it" in said for said in log.messages)
    written = json.loads((model / "config.json").read_text())
    assert (written["rope_theta"], written["tie_word_embeddings"]) == (50_000.0, False)
    assert "_name_or_path" not in written
    assert report["max_difference_per_token"] < 1e-4


def test_peft_weights_that_are_not_finite_fail_the_check(run_stage: Any, model_folder: Path, tmp_path: Path) -> None:
    adapter = make_adapter(model_folder, tmp_path / "adapter", OTHER_KINDS["modules_to_save"]())
    tensors = weights(adapter)
    [name] = [name for name in tensors if name.endswith("model.norm.weight")]
    tensors[name][0] = math.nan
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(GateError, match=r"model\.norm\.weight holds NaN or infinity"):
        run_stage(model_folder, adapter)


@pytest.mark.parametrize("precision", ["4bit", "8bit", "fp8"])
def test_a_plan_of_a_quantised_base_merges_into_the_16_bit_weights(
    run_stage: Any, model_folder: Path, tmp_path: Path, precision: Any
) -> None:
    base = base_in(model_folder, tmp_path / "base", "bf16")
    adapter = make_adapter(base, tmp_path / "adapter")
    model, report, _ = run_stage(base, adapter, precision=precision)
    assert (model / "model.safetensors").read_bytes() == (
        streamed(base, adapter, tmp_path / "out") and (tmp_path / "out" / "model.safetensors").read_bytes()
    )
    assert {value.dtype for value in weights(model).values()} == {torch.bfloat16}
    assert report["mean_difference_per_token"] < 0.1


def test_a_policy_that_the_files_do_not_hold_shows_in_the_proof(
    run_stage: Any, model_folder: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merged scores come from the files: weights lost on the way must not go unseen."""

    def lose(plan: merging.StreamedMerge, out: Path, **_: Any) -> None:
        shutil.copyfile(model_folder / "model.safetensors", out / "model.safetensors")

    monkeypatch.setattr(merge, "stream_merge", lose)
    _, report, _ = run_stage(model_folder, adapter)
    assert report["mean_difference_per_token"] > 0.1


def test_nan_in_the_weights_as_written_turns_the_check_red(
    run_stage: Any, model_folder: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is judged is the release as it loads, whoever wrote the file, and not that nobody complained before."""
    name = "model.layers.2.mlp.up_proj.weight"

    def damage(plan: merging.StreamedMerge, out: Path, **_: Any) -> None:
        tensors = weights(model_folder)
        tensors[name][3, 5] = math.nan
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(merge, "stream_merge", damage)
    _, report, _ = run_stage(model_folder, adapter)
    assert (report["finite"], report["not_finite"]) == (False, [name])
    verdicts = {
        verdict.check: verdict for verdict in merge_verdicts(MergeReport.model_validate(report), default_bands())
    }
    assert verdicts["all_finite"].level == "error"
    assert name in str(verdicts["all_finite"].value)


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_a_merge_of_a_quantised_plan_is_proven_in_the_16_bit_of_its_card(
    run_stage: Any, model_folder: Path, adapter: Path, half: str
) -> None:
    """A card before Ampere computes no bf16."""
    _, report, _ = run_stage(model_folder, adapter, precision="4bit", half=half)
    assert report["proven_in"] == f"{half} on cpu"


def test_what_peft_merges_keeps_the_format_of_the_base(run_stage: Any, model_folder: Path, tmp_path: Path) -> None:
    """The precision of the run, fp32 on this CPU, must not decide what a release is stored in."""
    base = base_in(model_folder, tmp_path / "base", "bf16")
    adapter = make_adapter(base, tmp_path / "adapter", OTHER_KINDS["dora"]())
    model, report, _ = run_stage(base, adapter)
    assert (report["method"], report["proven_in"]) == ("peft", "fp32 on cpu")
    assert {value.dtype for value in weights(model).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("given", "ends"), [(7, [1, 2, 7]), ([9, 1], [1, 2, 9]), (None, [1, 2])], ids=["one", "several", "no file"]
)
def test_generation_ends_where_any_file_of_the_base_ends_an_answer(
    run_stage: Any, model_folder: Path, adapter: Path, tmp_path: Path, given: Any, ends: list[int]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    path = base / "generation_config.json"
    if given is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": given, "top_k": 7}))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/someone/model"}))
    model, _, _ = run_stage(base, adapter)
    generation = load(model).generation_config
    assert generation.eos_token_id == ends
    if given is not None:
        assert generation.top_k == 7
    assert json.loads((model / "config.json").read_text()) == config | {"rope_theta": 10000.0}
