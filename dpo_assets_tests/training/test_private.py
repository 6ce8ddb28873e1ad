"""Private names of other libraries: each is there and takes what it is given, or is refused with the way out.

And all of them are in one place.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft.tuners.lora.layer as lora_module
import pytest
import torch
import transformers
import trl as trl_module
from torch import nn

import dpo_assets
from dpo_assets.errors import ConfigError
from dpo_assets.training.models.text_part import with_head
from dpo_assets.training.private import bitsandbytes, fla, liger, peft, trl, unsloth
from dpo_assets.training.private import torch as pytorch
from dpo_assets.training.private import transformers as ours
from dpo_assets.training.private.library import Library
from dpo_assets.training.stages.sft import PackedSFTTrainer
from dpo_assets.training.trainers.classic import ClassicDPOTrainer
from dpo_assets.training.trainers.dpo import PackedDPOTrainer

FILES = (bitsandbytes, fla, liger, peft, ours, trl, unsloth, pytorch)
ENTRIES = {
    f"{module.__name__.rpartition('.')[2]}.{name}": found
    for module in FILES
    for name, found in vars(module).items()
    if hasattr(found, "cache_clear") and found.__module__ == module.__name__
}


@pytest.fixture(autouse=True)
def first_use() -> Iterator[None]:
    """Every name as if it was not yet looked for, and none that a test made up afterwards."""
    for entry in ENTRIES.values():
        entry.cache_clear()
    yield
    for entry in ENTRIES.values():
        entry.cache_clear()


@pytest.fixture
def at_99(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.1.0")


def module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """A module in place of one of a package that runs on a GPU alone, or is not installed everywhere."""
    made: Any = ModuleType(name)
    vars(made).update(content)
    parents = name.split(".")[:-1]
    for n in range(len(parents)):
        monkeypatch.setitem(sys.modules, ".".join(parents[: n + 1]), ModuleType(parents[n]))
    monkeypatch.setitem(sys.modules, name, made)


# ---- what is read of packages that need a GPU, with the signatures of the versions that were read


def apply_liger(model: Any, **kwargs: Any) -> None: ...


def causal_conv1d(
    x: Any, weight: Any = None, bias: Any = None, residual: Any = None, initial_state: Any = None,
    output_final_state: bool = False, activation: Any = None, backend: Any = "triton", cu_seqlens: Any = None,
    cu_seqlens_cpu: Any = None, **kwargs: Any,
) -> None: ...  # fmt: skip


def chunk_gated_delta_rule(
    q: Any, k: Any, v: Any, g: Any, beta: Any, scale: Any = None, initial_state: Any = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Any = None,
    cu_seqlens_cpu: Any = None, **kwargs: Any,
) -> None: ...  # fmt: skip


def rms_norm_gated(
    x: Any, g: Any, weight: Any, bias: Any, activation: str = "swish", residual: Any = None, prenorm: bool = False,
    residual_in_fp32: bool = False, eps: float = 1e-6,
) -> None: ...  # fmt: skip


def build_seg_info_multigroup(group_specs: Any, device: Any) -> tuple[Any, Any]:
    return group_specs, device


def resolve_prefix_seg_info(kwargs: Any, past_key_value: Any, attention_mask: Any) -> Any:
    return kwargs.get("prefix_seg_info", None)


def with_gpu_packages(monkeypatch: pytest.MonkeyPatch, **other: Any) -> None:
    """Stand-ins of Liger, fla and Unsloth; `other` takes the place of a part."""

    def part(value: Any) -> Any:
        return other.get(value.__name__, value)

    patches = {"MODEL_TYPE_TO_APPLY_LIGER_FN": {}, "_apply_liger_kernel_to_instance": part(apply_liger)}
    module(monkeypatch, liger.MODULE, **patches)
    module(monkeypatch, "fla.modules.norm.fused_norm_gate", rms_norm_gated=part(rms_norm_gated))
    module(monkeypatch, "fla.modules.causal_conv1d", causal_conv1d=part(causal_conv1d))
    module(monkeypatch, "fla.ops.gated_delta_rule", chunk_gated_delta_rule=part(chunk_gated_delta_rule))
    context = SimpleNamespace(__dataclass_fields__=other.get("fields", {"prefix_seg_info": None}))
    asked = {"resolve_prefix_seg_info": part(resolve_prefix_seg_info), "AttentionContext": context}
    kernel = {"build_seg_info_multigroup": part(build_seg_info_multigroup)}
    module(monkeypatch, "unsloth.utils.prefix_grouper_kernel", **kernel)
    attention: Any = ModuleType("attention_dispatch")
    vars(attention).update(asked)
    monkeypatch.setitem(sys.modules, "unsloth.utils.attention_dispatch", attention)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_what_is_installed_has_every_name(entry: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu_packages(monkeypatch)
    before = torch.get_rng_state()
    first = entry()
    assert entry() is first
    assert torch.equal(torch.get_rng_state(), before)


def test_libraries_whose_names_are_looked_for() -> None:
    libraries = {name.partition(".")[0] for name in ENTRIES}
    assert libraries == {"fla", "liger", "peft", "transformers", "trl", "unsloth", "torch"}


# ---- a version that is otherwise


def other(*args: Any, **kwargs: Any) -> None:
    """A function that swallows everything, and so says nothing of what it takes."""


def without(target: Any, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.delattr(target, name)


def swallowing(target: Any, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(target, name, other)


def gpu_package(**parts: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: with_gpu_packages(patch, **parts)


def schema(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """The operator with the schema of another."""
    fake = SimpleNamespace(default=torch.ops.aten.mm.default, Scalar=torch.ops.aten.mm.default)
    fake.dtype_out = fake._schema = torch.ops.aten.mm.default._schema
    return lambda patch: patch.setattr(torch.ops.aten, name, fake)


def addmm_of_another_schema(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.ops.aten, "addmm", SimpleNamespace(dtype_out=torch.ops.aten.mm.default))


def registry_without(name: str, entry: str) -> Callable[[pytest.MonkeyPatch], None]:
    place = sys.modules["transformers.modeling_utils" if "ATTENTION" in name else "transformers.integrations.moe"]
    fake = type("Registry", (dict,), {"register": dict.__setitem__})({entry: other})
    return lambda patch: patch.setattr(place, name, fake)


def lora_without(*names: str) -> Callable[[pytest.MonkeyPatch], None]:
    kept = {name: 0 for name in vars(lora_module.LoraLayer(nn.Linear(1, 1))) if name not in names}
    bare = type("LoraLayer", (), {"__init__": lambda self, base: vars(self).update(kept)})
    return lambda patch: patch.setattr("peft.tuners.lora.LoraLayer", bare)


QWEN = "transformers.models.qwen3_next.modeling_qwen3_next"
FAULTS: dict[str, tuple[Callable[[], Any], str, str, Callable[[pytest.MonkeyPatch], None]]] = {
    "no flash attention": (
        pytorch.flash_attention,
        "torch",
        "has no torch.ops.aten._flash_attention_forward",
        lambda patch: patch.setattr(torch.ops, "aten", SimpleNamespace()),
    ),
    "flash forward": (
        pytorch.flash_attention,
        "torch",
        "has _flash_attention_forward as aten::mm",
        schema("_flash_attention_forward"),
    ),
    "flash backward": (
        pytorch.flash_attention,
        "torch",
        "has _flash_attention_backward as",
        schema("_flash_attention_backward"),
    ),
    "addmm": (pytorch.addmm_in_place, "torch", "has addmm.dtype_out as aten::mm", addmm_of_another_schema),
    "foreach copy": (pytorch.for_each, "torch", "has no torch._foreach_copy_", without(torch, "_foreach_copy_")),
    "foreach mul": (pytorch.for_each, "torch", "has _foreach_mul as", schema("_foreach_mul")),
    "version": (
        pytorch.version_of,
        "torch",
        "has no _version on Tensor",
        lambda patch: patch.setattr(pytorch, "Tensor", object),
    ),
    "sdpa": (
        ours.attention_functions,
        "transformers",
        r"has the attention `sdpa`\(\*args, \*\*kwargs\)",
        registry_without("ALL_ATTENTION_FUNCTIONS", "sdpa"),
    ),
    "experts": (
        ours.experts_functions,
        "transformers",
        r"has the experts `grouped_mm`",
        registry_without("ALL_EXPERTS_FUNCTIONS", "grouped_mm"),
    ),
    "gate of experts": (
        ours.experts_functions,
        "transformers",
        "has no is_transposed, has_bias, _apply_gate on experts",
        lambda patch: patch.setattr("transformers.integrations.moe.use_experts_implementation", _without_marks),
    ),
    "attention's name": (
        ours._check_attention_name,
        "transformers",
        "has no _attn_implementation on PreTrainedConfig",
        without(transformers.PreTrainedConfig, "_attn_implementation"),
    ),
    "checkpointing layer": (
        ours.checkpointing_layer,
        "transformers",
        "has no transformers.modeling_layers.GradientCheckpointingLayer",
        without(sys.modules["transformers.modeling_layers"], "GradientCheckpointingLayer"),
    ),
    "delta rule": (
        ours.chunk_gated_delta_rule,
        "transformers",
        r"torch_chunk_gated_delta_rule\(\*args",
        lambda patch: patch.setattr(f"{QWEN}.torch_chunk_gated_delta_rule", other),
    ),
    "activations": (
        ours._activations,
        "transformers",
        "has no transformers.activations.ACT2FN",
        without(sys.modules["transformers.activations"], "ACT2FN"),
    ),
    "tied weights": (
        ours.check_tied_weights,
        "transformers",
        "has no get_expanded_tied_weights_keys on PreTrainedModel",
        without(transformers.PreTrainedModel, "get_expanded_tied_weights_keys"),
    ),
    "ignored names": (
        ours.adjusting_unexpected,
        "transformers",
        "has no _adjust_missing_and_unexpected_keys on PreTrainedModel",
        without(transformers.PreTrainedModel, "_adjust_missing_and_unexpected_keys"),
    ),
    "loss between logs": (
        ours.check_running_loss,
        "transformers",
        "has no _tr_loss, _total_loss_scalar, _globalstep_last_logged in Trainer._inner_training_loop",
        lambda patch: patch.setattr(transformers.Trainer, "_inner_training_loop", other),
    ),
    "loading a checkpoint": (
        ours.check_running_loss,
        "transformers",
        r"has _load_from_checkpoint\(\*args",
        swallowing(transformers.Trainer, "_load_from_checkpoint"),
    ),
    "TRL's release": (
        trl.check_hooks,
        "trl",
        "may differ in what DPOTrainer calls its own methods for",
        lambda patch: None,
    ),
    "use_adapter": (
        trl._use_adapter,
        "trl",
        r"has use_adapter\(\*args",
        lambda patch: patch.setattr("trl.trainer.utils.use_adapter", other),
    ),
    "LoraLayer": (
        peft.lora_layer,
        "peft",
        "has no scaling, active_adapters",
        lora_without("scaling", "_active_adapter"),
    ),
    "ParamWrapper": (
        peft._parameter_wrapper,
        "peft",
        "ParamWrapper that is made otherwise .*get_param",
        without(lora_module.ParamWrapper, "get_param"),
    ),
    "dequantize": (
        peft._dequantize,
        "peft",
        "dequantize_module_weight",
        lambda patch: patch.setattr("peft.utils.integrations.dequantize_module_weight", other),
    ),
    "Liger": (
        liger.patches,
        "liger-kernel",
        r"_apply_liger_kernel_to_instance\(lm\)",
        gpu_package(apply_liger=lambda lm: None),
    ),
    "convolution": (fla.convolution, "fla-core", r"has causal_conv1d\(\*args", gpu_package(causal_conv1d=other)),
    "fla's delta rule": (
        fla.delta_rule,
        "fla-core",
        r"chunk_gated_delta_rule\(q, k, v, g, beta, \*\*kwargs\)",
        gpu_package(chunk_gated_delta_rule=lambda q, k, v, g, beta, **kwargs: None),
    ),
    "gated norm": (
        fla.gated_norm,
        "fla-core",
        r"rms_norm_gated\(x, weight",
        gpu_package(rms_norm_gated=lambda x, weight, g, bias, eps: None),
    ),
    "Unsloth's table": (
        unsloth.shared_prefix_table,
        "unsloth",
        r"build_seg_info_multigroup\(group_specs, device, layout\)",
        gpu_package(build_seg_info_multigroup=lambda group_specs, device, layout: None),
    ),
    "Unsloth's argument": (
        unsloth.shared_prefix_table,
        "unsloth",
        "does not ask for `prefix_seg_info`",
        gpu_package(resolve_prefix_seg_info=lambda kwargs, cache, mask: kwargs.get("segments")),
    ),
    "Unsloth's attention": (
        unsloth.shared_prefix_table,
        "unsloth",
        "has no prefix_seg_info in AttentionContext",
        gpu_package(fields={}),
    ),
}


def _without_marks(cls: type[nn.Module]) -> type[nn.Module]:
    return cls


@pytest.mark.usefixtures("at_99")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_version_that_is_otherwise_is_refused_with_the_way_out(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, package, says, patch = FAULTS[fault]
    patch(monkeypatch)
    with pytest.raises(ConfigError, match=says) as raised:
        entry()
    message = str(raised.value)
    assert message.startswith(f"{package} 99.1.0 ")
    assert f"Known to work: {package} " in message
    assert "pip install" in message


def test_every_name_has_a_fault_that_is_seen() -> None:
    tried = {id(entry) for entry, *_ in FAULTS.values()}
    assert [name for name, entry in ENTRIES.items() if id(entry) not in tried] == []


def test_a_package_that_is_not_there_is_said_to_be_of_no_known_version() -> None:
    library = Library("no-such-package", "1.0", "Install it.")
    with pytest.raises(ConfigError, match=r"no-such-package \(of no known version\) does not let no_such be imported"):
        library.find("no_such", "name")


# ---- what is read of objects


def test_quantised_weights_of_another_make_are_refused() -> None:
    whole = {"shape": (4, 4), "code": 0, "absmax": 0, "blocksize": 64, "offset": 0, "nested": False, "state2": None}
    assert bitsandbytes.four_bit_state(SimpleNamespace(quant_state=SimpleNamespace(**whole))).shape == (4, 4)
    for name in whole:
        lacking = SimpleNamespace(**{key: value for key, value in whole.items() if key != name})
        with pytest.raises(ConfigError, match=f"bitsandbytes .* has no {name} on QuantState"):
            bitsandbytes.four_bit_state(SimpleNamespace(quant_state=lacking))
    nested = SimpleNamespace(**whole | {"nested": True, "state2": SimpleNamespace(code=0, absmax=0)})
    with pytest.raises(ConfigError, match="has no blocksize on the nested QuantState"):
        bitsandbytes.four_bit_state(SimpleNamespace(quant_state=nested))
    with pytest.raises(ConfigError, match="has no quant_state on Params4bit"):
        bitsandbytes.four_bit_state(SimpleNamespace())


def test_scales_of_eight_bit_weights_are_the_weights_or_the_layers() -> None:
    scales = torch.ones(2)
    layer: Any = SimpleNamespace(weight=SimpleNamespace(SCB=scales), state=SimpleNamespace(SCB=None))
    assert bitsandbytes.row_scales(layer) is scales
    layer = SimpleNamespace(weight=SimpleNamespace(SCB=None), state=SimpleNamespace(SCB=scales))
    assert bitsandbytes.row_scales(layer) is scales
    layer.state = SimpleNamespace()
    with pytest.raises(ConfigError, match=r"has no SCB on Linear8bitLt\.state"):
        bitsandbytes.row_scales(layer)
    layer.weight = SimpleNamespace()
    with pytest.raises(ConfigError, match="has no SCB on Int8Params"):
        bitsandbytes.row_scales(layer)


def test_a_trainer_of_another_make_is_refused() -> None:
    whole = SimpleNamespace(model=SimpleNamespace(peft_config={"default": 0, "ref": 0}), train_dataset=[])
    trl.check_adapters(whole, ["default"])
    trl.check_prepared(whole, called=True)
    trl.check_prepared(SimpleNamespace(train_dataset=None), called=False)
    whole.model.peft_config["reference"] = 0
    with pytest.raises(ConfigError, match="makes an adapter reference of its own"):
        trl.check_adapters(whole, ["default"])
    with pytest.raises(ConfigError, match=r"prepares a dataset elsewhere than in DPOTrainer\._prepare_dataset"):
        trl.check_prepared(whole, called=False)
    with pytest.raises(ConfigError, match="has no aux_loss_enabled, router_aux_loss_coef, _metrics on DPOTrainer"):
        trl.check_balance(whole)
    with pytest.raises(ConfigError, match="has no precompute_ref_logps on DPOTrainer"):
        trl.reference_in_batch(whole)
    with pytest.raises(ConfigError, match="returns no log_probs from a model with fused_lm_head=True"):
        trl.token_logps(lambda **inputs: SimpleNamespace(), {}, torch.zeros(1, 1))
    with pytest.raises(ConfigError, match="has no _created_lr_scheduler on Trainer"):
        ours.mark_schedule_made(whole)


@pytest.mark.usefixtures("at_99")
@pytest.mark.parametrize("make", [PackedDPOTrainer, lambda model: ClassicDPOTrainer(model=model, check_first=print)])
def test_trainers_look_for_what_they_override_before_they_begin(make: Callable[[Any], Any]) -> None:
    with pytest.raises(ConfigError, match=r"trl 99\.1\.0 may differ"):
        make(SimpleNamespace())


@pytest.mark.usefixtures("at_99")
def test_a_head_of_this_project_looks_for_tied_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(transformers.PreTrainedModel, "_tied_weights_keys")
    with pytest.raises(ConfigError, match=r"transformers 99\.1\.0 has no _tied_weights_keys"):
        with_head.__wrapped__(transformers.LlamaModel)


def test_the_words_of_a_failed_conversion_are_those_of_transformers() -> None:
    source = Path(inspect.getfile(transformers)).with_name("utils") / "loading_report.py"
    told = re.findall(r'raise RuntimeError\(\s*"([^"]*)"', source.read_text("utf-8"))
    assert [ours.cannot_convert(RuntimeError(text)) for text in told].count(True) == 1


# ---- in one place

ROOT = Path(dpo_assets.__file__).parent
PRIVATE = ROOT / "training" / "private"
# Modules of libraries that their documentation does not tell anyone to import from.
UNDOCUMENTED = (
    *("transformers." + name for name in ("modeling_utils", "modeling_layers", "integrations", "models", "utils")),
    *("transformers.activations", "trl.trainer", "peft.tuners", "peft.utils", "liger_kernel"),
    *("unsloth.utils", "unsloth.models", "unsloth_zoo", "fla", "bitsandbytes", "torch.ops"),
)
# Names without an underscore that are as private: attributes, arguments, keys.
WORDS = frozenset(
    (
        *("quant_state", "SCB", "is_loaded_in_4bit", "is_loaded_in_8bit", "parameter_name", "get_param", "__wrapped__"),
        *("fused_lm_head", "precompute_ref_logps", "aux_loss_enabled", "completion_mask"),
        *("prefix_seg_info", "UNSLOTH_COMPILE_LOCATION"),
    )
)
DOCUMENTED = {"_replace"}  # Of a named tuple.
# (file, name) of what cannot move: it says why.
ALLOWED = {
    ("training/trainers/classic.py", "super()._compute_loss"),  # The method that it overrides.
    ("feedback/sources/streams.py", "_typeshed.WriteableBuffer"),  # Of the type checker, which documents it.
    ("training/trainers/classic.py", "completion_mask"),  # A column of the batch that TRL's collator made.
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def is_undocumented(path: str) -> bool:
    """Whether a dotted path leads through a private name, or begins in a module that no documentation tells of."""
    return any(map(is_private, path.split("."))) or f"{path}.".startswith(tuple(f"{name}." for name in UNDOCUMENTED))


def defined_in(tree: ast.Module) -> Iterator[str]:
    """Names that a module's own classes and functions have, or give their instances."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                yield name


LOOKED_AT = (ast.Import, ast.ImportFrom, ast.Attribute, ast.keyword, ast.Constant, ast.Call)


def private_uses(tree: ast.Module, own: frozenset[str]) -> Iterator[tuple[int, str]]:
    """(line, name) of everything private in a module that the package itself does not define."""
    for node in ast.walk(tree):
        if not isinstance(node, LOOKED_AT):
            continue
        found: list[str] = []
        match node:
            case ast.Import(names=names):
                found = [alias.name for alias in names if is_undocumented(alias.name)]
            case ast.ImportFrom(module=str(source), names=names) if not source.startswith(("dpo_assets", "__")):
                found = list(filter(is_undocumented, (f"{source}.{alias.name}" for alias in names)))
            case ast.Attribute(value=value, attr=name):
                found = list(filter(None, [_of_attribute(value, name, own)]))
            case ast.keyword(arg=str(name)) if name in WORDS:
                found = [name]
            case ast.Constant(value=str(text)) if text in WORDS:
                found = [text]
            case ast.Call(func=ast.Name(id=called), args=[_, ast.Constant(value=str(text)), *_]):
                asks = called in ("getattr", "setattr", "hasattr")
                found = [text] if asks and is_private(text) and text not in own else []
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(text)), *_]):
                found = [text] if is_undocumented(text) else []
        for name in found:
            yield getattr(node, "lineno", 0), name


def _of_attribute(value: ast.expr, name: str, own: frozenset[str]) -> str | None:
    match value:
        case ast.Call(func=ast.Name(id="super")) if is_private(name):
            return f"super().{name}"
        case ast.Name(id="torch") if name == "ops":
            return "torch.ops"
    return name if name in WORDS or (is_private(name) and name not in own | DOCUMENTED) else None


def parsed() -> dict[str, ast.Module]:
    files = [path for path in sorted(ROOT.rglob("*.py")) if PRIVATE not in path.parents]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text("utf-8")) for path in files}


def test_private_names_of_other_libraries_are_in_one_place() -> None:
    modules = parsed()
    own = frozenset(name for tree in modules.values() for name in defined_in(tree))
    uses = [(file, name, line) for file, tree in modules.items() for line, name in private_uses(tree, own)]
    assert [f"{file}:{line}: {name}" for file, name, line in uses if (file, name) not in ALLOWED] == []
    assert {(file, name) for file, name, _ in uses} == ALLOWED


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo",
        "from torch._C import x",
        "from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding",
        "from trl.trainer.utils import pad",
        "from torch import _foreach_add",
        "x = model._tp_plan",
        "x = self._metrics",
        "super()._save(x)",
        "torch.ops.aten.mm(a, b)",
        "getattr(config, '_attn_implementation', None)",
        "importlib.import_module('liger_kernel.transformers')",
        "model(x, fused_lm_head=True)",
        "weight.quant_state",
    ],
)
def test_a_private_name_elsewhere_is_seen(line: str) -> None:
    assert len(list(private_uses(ast.parse(line), frozenset({"_own"})))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "from __future__ import annotations",
        "from dpo_assets.recipe.whole import _absolute_source",
        "from transformers import Trainer",
        "self._own = x._own",
        "pair._replace(a=1)",
        "x.__dict__",
    ],
)
def test_own_and_documented_names_are_not(line: str) -> None:
    assert list(private_uses(ast.parse(line), frozenset({"_own"}))) == []


@pytest.mark.parametrize(
    ("cls", "overridden"),
    [
        (PackedDPOTrainer, {"_load_from_checkpoint", "_prepare_dataset"}),
        (ClassicDPOTrainer, {"_compute_loss"}),
        (PackedSFTTrainer, {"_load_from_checkpoint"}),
    ],
)
def test_subclasses_override_what_is_listed_and_nothing_by_accident(cls: type[Any], overridden: set[str]) -> None:
    """A private attribute of ours that a base class has too would be written over, or write over it."""
    ours_, theirs = set[str](), set[str]()
    for part in cls.__mro__[:-1]:
        if part.__module__.startswith("dpo_assets"):
            ours_ |= {name for name in defined_in(ast.parse(inspect.getsource(part))) if is_private(name)}
        elif part.__module__.startswith(("trl", "transformers")):
            theirs |= set(re.findall(r"\bself\.(_[a-z]\w*)", inspect.getsource(part))) | set(vars(part))
    assert ours_ & theirs == overridden


def test_the_listed_overrides_are_those_of_the_documentation() -> None:
    text = sys.modules[Library.__module__.rpartition(".")[0]].__doc__ or ""
    listed = set(re.findall(r"`(\w+)\.(_\w+)`", text))
    assert listed == {
        ("PackedDPOTrainer", "_prepare_dataset"),
        ("ClassicDPOTrainer", "_compute_loss"),
        ("TextForCausalLM", "_tied_weights_keys"),
    }
    assert trl_module.DPOTrainer._compute_loss is not ClassicDPOTrainer._compute_loss
