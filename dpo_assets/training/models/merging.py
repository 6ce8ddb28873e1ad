"""Base + LoRA adapter as new safetensors files, a block of rows at a time, so that no model is ever held.

LoRA (Hu et al., arXiv 2106.09685, section 4.1): W' = W + alpha / r * B A, with W [out, in], B [out, r], A [r, in].
rsLoRA (Kalajdzievski, arXiv 2312.03732): alpha / sqrt(r) in place of alpha / r.
File format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dpo_assets.artifact import read_object, write_json
from dpo_assets.errors import ConfigError, GateError
from dpo_assets.planning.precision import Compute
from dpo_assets.planning.text_part import TextPart, read_text_part
from dpo_assets.planning.weights import INDEX, SINGLE, Stored, TensorFile, read_header, weight_files

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
BLOCK = 4 * 2**20  # Stored bytes that are worked on at one time; in fp32 they are up to twice that.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
MERGEABLE = ("F32", "F16", "BF16")
# Settings of a LoraConfig that do not bear on W + scale * B A beyond what `_scale` reads. Any other that is set, also
# one of a PEFT to come, leaves the merge to PEFT.
# fmt: off
HARMLESS = frozenset((
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size",
))
# fmt: on
# Other ways to start an adapter (PiSSA, OLoRA, CorDA, LoftQ) change the base's weights too.
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


class NotStreamable(Exception):
    """This adapter is more than W + scale * B A, or its layers lie otherwise in the base's files. Says why."""


@dataclass(frozen=True)
class Update:
    """What is added to one weight: scale * B A. The factors stay on disk until they are needed."""

    module: str
    down: Stored
    up: Stored
    scale: float


@dataclass(frozen=True)
class StreamedMerge:
    """The base's files, and what becomes of the tensors that change, by their names in them.

    Attributes:
        updates: what is added to a weight, or a tensor of the same shape and format that takes its place.
    """

    files: tuple[TensorFile, ...]
    updates: Mapping[str, Update | Stored]


def plan_merge(base: Path, adapter: Path) -> StreamedMerge:
    """Finds for each LoRA pair of `adapter` its weight in the files of `base`. Reads headers only.

    Raises:
        NotStreamable: when PEFT must merge, because the adapter is not plain LoRA or its layers are stored otherwise.
        ConfigError: when a file is missing or unreadable, or the adapter holds nothing.
    """
    settings = read_object(adapter / ADAPTER_CONFIG)
    _refuse_other_kinds(settings)
    pairs = _pairs(read_header(adapter / ADAPTER_WEIGHTS))
    files = tuple(read_header(path) for path in weight_files(base))
    stored = {tensor.name: tensor for file in files for tensor in file.tensors}
    part = read_text_part(base)
    names = _names_in_base(sorted(pairs), part)
    if part.tied and (heads := [module for module in pairs if not any(p.isdigit() for p in module.split("."))]):
        raise NotStreamable(f"the adapter changes {heads[0]}, which may share its weight with another layer")
    updates: dict[str, Update | Stored] = {}
    for module, (down, up) in sorted(pairs.items()):
        weight = stored[names[module]]
        if weight.dtype not in MERGEABLE or {down.dtype, up.dtype} - set(MERGEABLE):
            raise NotStreamable(f"{weight.name} is stored as {weight.dtype}, its LoRA as {down.dtype} and {up.dtype}")
        if not _fits(weight, down, up):
            raise NotStreamable(f"{weight.name} {list(weight.shape)} is no linear layer of its LoRA pair")
        if weight.name in updates:
            raise NotStreamable(f"two LoRA pairs change {weight.name}")
        updates[weight.name] = Update(module, down, up, _scale(settings, module, rank=down.shape[0]))
    return StreamedMerge(files, updates)


def stream_merge(
    merge: StreamedMerge,
    out: Path,
    *,
    block: int = BLOCK,
    on_file: Callable[[int, int], None] = lambda done, total: None,
    keep: Callable[[Path, Callable[[Path], None]], None] = lambda path, write: write(path),
) -> None:
    """Writes the merged weights into the folder `out`, file by file as the base divides them, and their index.

    Adapted weights are computed in fp32 and rounded once to the base's stored dtype; everything else is copied byte
    for byte. Memory: a few times `block` bytes and the LoRA factors of one layer, whatever the size of the model.

    Args:
        block: bytes of a weight that are in memory at one time; at least one row is.
        on_file: told after each file how many of how many are written.
        keep: gets each file's path and what writes it there, and may know better.

    Raises:
        GateError: at the first tensor that is not finite, by name.
        ConfigError: when a file of the base ends too early.
    """
    total = len(merge.files)
    weight_map: dict[str, str] = {}
    for number, file in enumerate(merge.files, start=1):
        name = SINGLE if file.path.name == SINGLE else f"model-{number:05d}-of-{total:05d}.safetensors"
        keep(out / name, partial(_write_file, merge, file, block))
        weight_map |= {tensor.name: name for tensor in file.tensors}
        on_file(number, total)
    if list(weight_map.values()) != [SINGLE] * len(weight_map):
        size = sum(tensor.stop - tensor.start for file in merge.files for tensor in file.tensors)
        write_json(out / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _write_file(merge: StreamedMerge, file: TensorFile, block: int, path: Path) -> None:
    with file.path.open("rb") as source, path.open("wb") as sink:
        sink.write(file.head)
        for tensor in file.tensors:
            for data in _written(source, tensor, merge.updates.get(tensor.name), block):
                sink.write(data)


def _refuse_other_kinds(settings: Mapping[str, Any]) -> None:
    if settings.get("peft_type") != "LORA":
        raise NotStreamable(f"the adapter is of kind {settings.get('peft_type')}, not LoRA")
    if settings.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise NotStreamable(f"the adapter was started by {settings['init_lora_weights']}, which changes the base")
    for name, value in sorted(settings.items()):
        if name not in HARMLESS and value not in (None, False, "none", {}, []):
            raise NotStreamable(f"the adapter sets `{name}`")


def _pairs(file: TensorFile) -> dict[str, tuple[Stored, Stored]]:
    """(A, B) by the adapted module."""
    sides: dict[str, dict[str, Stored]] = {}
    for tensor in file.tensors:
        found = _FACTOR.fullmatch(tensor.name)
        if found is None:
            raise NotStreamable(f"the adapter holds {tensor.name}, which is no LoRA matrix of a linear layer")
        sides.setdefault(found["module"], {})[found["side"]] = tensor
    if not sides:
        raise ConfigError(f"{file.path} holds no tensors: there is nothing to merge; train the adapter again")
    if half := [module for module, pair in sides.items() if len(pair) != 2]:
        raise ConfigError(f"{file.path} holds only one of the two LoRA matrices of {half[0]}; train the adapter again")
    return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}


def _names_in_base(modules: list[str], part: TextPart) -> dict[str, str]:
    """The weight of each module by its name in the files.

    Among the language model's tensors alone: the same for all modules, with one prefix less, or with one more.
    """
    for names in _candidates(modules, part):
        if all(name in part.names for name in names):
            return {module: part.names[name] for module, name in zip(modules, names, strict=True)}
    raise NotStreamable(f"the base's files do not hold {part.stored_as(f'{modules[0]}.weight')} and its fellows")


def _candidates(modules: list[str], part: TextPart) -> Iterator[list[str]]:
    own = [f"{module}.weight" for module in modules]
    yield own
    prefixes = {name.removesuffix(own[0]) for name in part.names if name.endswith(f".{own[0]}")}
    if len(prefixes) == 1:
        yield [next(iter(prefixes)) + name for name in own]
    # A checkpoint of the decoder alone lacks the name that the language model gives its decoder.
    if len({name.partition(".")[0] for name in own}) == 1:
        yield [name.partition(".")[2] for name in own]


def _fits(weight: Stored, down: Stored, up: Stored) -> bool:
    if not len(weight.shape) == len(down.shape) == len(up.shape) == 2:
        return False
    return up.shape[1] == down.shape[0] and weight.shape == (up.shape[0], down.shape[1])


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r); the first pattern that a module's name ends in wins, as in PEFT."""
    alpha = float(settings["lora_alpha"])
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = float(value)
            break
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _written(source: BinaryIO, tensor: Stored, update: Update | Stored | None, block: int) -> Iterator[Any]:
    """The bytes of a tensor in the release."""
    match update:
        case Update():
            yield from _merged(source, tensor, update, block)
        case Stored():
            with update.path.open("rb") as other:
                yield from _copied(other, update, block)
        case None:
            yield from _copied(source, tensor, block)


def _copied(source: BinaryIO, tensor: Stored, block: int) -> Iterator[bytes | bytearray]:
    dtype = DTYPES.get(tensor.dtype)
    item = dtype.itemsize if dtype else 1
    step = max(item, block // item * item)
    source.seek(tensor.start)
    for start in range(tensor.start, tensor.stop, step):
        data = _read(source, tensor, min(step, tensor.stop - start))
        if dtype is not None and not _finite(torch.frombuffer(data, dtype=dtype)):
            raise _not_finite(tensor.name, "in the base model itself", "start from another base model")
        yield data


def _merged(source: BinaryIO, tensor: Stored, update: Update, block: int) -> Iterator[Any]:
    down, up = _load(update.down), _load(update.up)
    if not (_finite(down) and _finite(up)):
        raise _not_finite(f"LoRA of {update.module}", "in the adapter", "lower the learning rate and train again")
    dtype, (out, width) = DTYPES[tensor.dtype], tensor.shape
    rows = max(1, block // (width * dtype.itemsize))
    source.seek(tensor.start)
    for first in range(0, out, rows):
        part = up[first : first + rows]
        yield _sum(_read(source, tensor, len(part) * width * dtype.itemsize), tensor, part, down, update.scale)


def _sum(data: bytearray, tensor: Stored, up: Tensor, down: Tensor, scale: float) -> Any:
    """Some rows of a weight, as stored, plus scale * B A for these rows; as the bytes to store."""
    dtype = DTYPES[tensor.dtype]
    # In fp32 `float()` is the buffer itself, which nobody else reads.
    exact = torch.frombuffer(data, dtype=dtype).float().view(len(up), -1).addmm_(up, down, alpha=scale)
    if not _finite(exact):
        raise _not_finite(tensor.name, "after the merge", "look for NaN or infinity in the base model")
    rounded = exact.to(dtype)
    if not _finite(rounded):
        fix = "use a base model that is stored as bfloat16"
        raise _not_finite(tensor.name, f"beyond the range of {tensor.dtype} after the merge", fix)
    return rounded.view(torch.uint8).numpy().reshape(-1).data


def _load(tensor: Stored) -> Tensor:
    """A small tensor as fp32."""
    with tensor.path.open("rb") as handle:
        handle.seek(tensor.start)
        data = _read(handle, tensor, tensor.stop - tensor.start)
    return torch.frombuffer(data, dtype=DTYPES[tensor.dtype]).view(tensor.shape).float()


def _read(handle: BinaryIO, tensor: Stored, count: int) -> bytearray:
    data = bytearray(count)
    if handle.readinto(data) != count:  # type: ignore[attr-defined]
        raise ConfigError(f"{tensor.path} ends within {tensor.name}; download it again")
    return data


def _finite(values: Tensor) -> bool:
    wide = values.float() if values.dtype.itemsize == 1 else values
    # Extremes carry NaN with them, and unlike `isfinite` they need no memory.
    return values.numel() == 0 or all(math.isfinite(extreme) for extreme in torch.aminmax(wide))


def _not_finite(name: str, where: str, fix: str) -> GateError:
    return GateError(
        "all_finite",
        f"{name} holds NaN or infinity {where}.",
        value=f"{name}: NaN or infinity {where}",
        band="every weight finite",
        source="a NaN weight answers nothing but NaN",
        fix=fix,
    )


def stored_format(base: Path) -> Compute:
    """The format that most values of a base are stored in; bf16 where that is none that layers compute in.

    Raises:
        ConfigError: as `weight_files` and `read_header` do.
    """
    sizes = Counter[str]()
    for path in weight_files(base):
        for tensor in read_header(path).tensors:
            sizes[tensor.dtype] += math.prod(tensor.shape)
    formats: dict[str, Compute] = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
    return formats.get(next((name for name, _ in sizes.most_common(1)), ""), "bf16")
