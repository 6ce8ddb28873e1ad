"""The safetensors files of a model folder: which of them a model is loaded from, and what they hold. Headers only.

File format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from dpo_assets.errors import ConfigError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # Bytes; the limit of the safetensors library.
ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
NAMED = 8  # Names that a message lists before it counts the rest.


NAMES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64"}  # As plans say it.
FLOATS = tuple(NAMES)  # Numbers that weights are stored in as they are.


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file; `start` and `stop` are byte positions in the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file: its first bytes as they stand, and its tensors in the order of their data."""

    path: Path
    head: bytes
    tensors: tuple[Stored, ...]


@dataclass(frozen=True)
class Weights:
    """The files that a model is loaded from."""

    files: tuple[TensorFile, ...]

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """Every tensor by its name in the files."""
        return {tensor.name: tensor for file in self.files for tensor in file.tensors}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(file.path.name for file in self.files)

    def only(self, names: Collection[str]) -> Weights:
        """The tensors of these names, in the same files."""
        return Weights(
            tuple(replace(file, tensors=tuple(t for t in file.tensors if t.name in names)) for file in self.files)
        )

    @property
    def parameters(self) -> int:
        """Values in all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def format(self) -> str:
        """The format of most values, as plans say it; empty where there are none."""
        held = Counter[str]()
        for tensor in self.tensors.values():
            held[tensor.dtype] += math.prod(tensor.shape)
        return next((NAMES.get(dtype, dtype) for dtype, _ in held.most_common(1)), "")


def read_weights(folder: Path) -> Weights:
    """The weights of a model folder, each tensor from exactly one file. A folder without safetensors holds none.

    Raises:
        ConfigError: naming the file or tensor: a file of the index is missing or damaged, lacks a tensor that the index
            says it holds, or two files hold the same tensor; safetensors files lie there that nothing loads.
    """
    if not (folder / SINGLE).is_file() and not (folder / INDEX).is_file():
        if others := unused_files(folder, ()):
            raise ConfigError(
                f"{folder} holds {listed(others)}, but neither {SINGLE} nor {INDEX}, and nothing loads weights under "
                "another name. Save the model again: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)."
            )
        return Weights(())
    paths = weight_files(folder)
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ConfigError(
            f"{folder / INDEX} names {listed(missing)}, which {_is(missing)} not in {folder}; download the model again"
        )
    weights = Weights(tuple(read_header(path) for path in paths))
    _refuse_copies(weights)
    if len(paths) > 1 or paths[0].name != SINGLE:
        _refuse_false_index(folder / INDEX, weights)
    return weights


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder as Transformers chooses them: the single one, or those of the index.

    Raises:
        ConfigError: when there is neither, or the index names a file outside the folder.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise ConfigError(f"{folder} holds neither {SINGLE} nor {INDEX}; save the base model as safetensors")
    names = sorted(set(_weight_map(folder / INDEX).values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ConfigError(f"{folder / INDEX} names {outside[0]}, which is not a file beside it")
    return [folder / name for name in names]


def unused_files(folder: Path, used: tuple[str, ...]) -> list[str]:
    """Safetensors files that no model is loaded from: `consolidated.safetensors` is a second copy in another layout."""
    return sorted(path.name for path in folder.glob("*.safetensors") if path.name not in used)


def read_header(path: Path) -> TensorFile:
    """What a safetensors file holds, without its data.

    Raises:
        ConfigError: when the file is missing, or its header does not describe its bytes.
    """
    try:
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            text = handle.read(min(length, LONGEST_HEADER))
        header = json.loads(text)
        first = 8 + len(text)
        tensors = sorted(
            (
                Stored(path, name, entry["dtype"], tuple(entry["shape"]), *(first + o for o in entry["data_offsets"]))
                for name, entry in header.items()
                if name != "__metadata__"
            ),
            key=lambda tensor: (tensor.start, tensor.stop),
        )
        sizes = [int(math.prod(t.shape)) * ITEMSIZE[t.dtype] if t.dtype in ITEMSIZE else None for t in tensors]
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing") from None
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"{path} is not a readable safetensors file; write or download it again") from None
    position = first
    for tensor, size in zip(tensors, sizes, strict=True):
        if tensor.start != position or (size is not None and tensor.stop - tensor.start != size):
            raise ConfigError(f"{path}: the header does not describe the bytes of {tensor.name}; download it again")
        position = tensor.stop
    if position != path.stat().st_size:
        raise ConfigError(f"{path} has {path.stat().st_size} bytes, its header describes {position}; download it again")
    return TensorFile(path, struct.pack("<Q", length) + text, tuple(tensors))


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _refuse_copies(weights: Weights) -> None:
    places: dict[str, str] = {}
    for file in weights.files:
        for tensor in file.tensors:
            if tensor.name in places:
                raise ConfigError(
                    f"{tensor.name} is in {places[tensor.name]} and in {file.path.name}: which of the two is meant, "
                    "nothing says. Download the model again."
                )
            places[tensor.name] = file.path.name


def _refuse_false_index(index: Path, weights: Weights) -> None:
    stated = _weight_map(index)
    if absent := sorted(name for name in stated if name not in weights.tensors):
        raise ConfigError(f"{index} names {listed(absent)}, but no file holds {_it(absent)}; download the model again")


def _it(names: list[str]) -> str:
    return "it" if len(names) == 1 else "them"


def _weight_map(index: Path) -> dict[str, str]:
    try:
        value = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{index} is not JSON: {error}") from None
    found = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"{index} has no `weight_map`; download the base model again")
    return {str(name): str(file) for name, file in found.items()}
