"""The weight matrices of a model's decoder layers, by kind, from the names and shapes in its files.

A kind is what has one name in every layer, such as `self_attn.q_proj`. Experts of one kind are counted together, stored
one by one (`experts.0.w1`, Mixtral) or as one tensor of three dimensions (`input_linear`, Granite).
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from dpo_assets.errors import ConfigError

Role = Literal["linear", "experts", "router"]
_LAYER = re.compile(r"(?P<before>(?:[^.]+\.)*?)(?:layers|h|blocks)\.(?P<number>\d+)\.(?P<rest>.+)")
# Towers beside the language model of a multimodal checkpoint.
_TOWERS = re.compile(r"vision|visual|audio|image|encoder", re.IGNORECASE)
_ROUTERS = frozenset({"gate", "router"})  # Qwen2-MoE's gate on its shared expert ends in `_gate`.


class Matrices(BaseModel):
    """All matrices of one kind."""

    model_config = ConfigDict(frozen=True)
    name: str
    role: Role = "linear"
    count: int = Field(description="Matrices, over all layers and experts.")
    weights: int = Field(description="Values in them.")
    sides: int = Field(description="Rows plus columns, added up: LoRA of rank r trains r times as many values.")
    smallest_side: int

    @classmethod
    def of(cls, name: str, role: Role, shapes: Sequence[tuple[int, int]]) -> Matrices:
        """A kind of the given (rows, columns)."""
        return cls(
            name=name,
            role=role,
            count=len(shapes),
            weights=sum(rows * columns for rows, columns in shapes),
            sides=sum(rows + columns for rows, columns in shapes),
            smallest_side=min(min(shape) for shape in shapes),
        )

    def answers_to(self, name: str) -> bool:
        """Whether `name` means this kind: its whole name, or the end of it after a dot."""
        return f".{self.name}".endswith(f".{name}")


def role_of(name: str) -> Role:
    """What a matrix does, by its name in the layer."""
    last = name.rpartition(".")[2]
    if last in _ROUTERS or last.endswith("_gate") or "router" in name:
        return "router"
    return "experts" if ".experts." in f".{name}" else "linear"


def matrices_of(tensors: Iterable[tuple[str, Sequence[int]]], layers: int) -> tuple[Matrices, ...]:
    """The kinds among (name, shape) of stored tensors, in the order of the first layer that has each.

    Args:
        layers: decoder layers of the model; checkpoints may hold more, for predicting further tokens (DeepSeek-V3).
    """
    shapes: dict[str, list[tuple[int, int]]] = {}
    roles: dict[str, Role] = {}
    for name, shape in tensors:
        found = _LAYER.fullmatch(name)
        if found is None or int(found["number"]) >= layers or _TOWERS.search(found["before"]):
            continue
        kind = re.sub(r"\.experts\.\d+\.", ".experts.", f".{found['rest']}")[1:]
        stacked = len(shape) == 3 and shape[1] > 1  # A convolution over time has 1 there.
        if not stacked and not (len(shape) == 2 and kind.endswith(".weight")):
            continue
        kind = kind.removesuffix(".weight")
        roles.setdefault(kind, "experts" if stacked else role_of(kind))
        rows, columns = shape[-2:]
        shapes.setdefault(kind, []).extend([(rows, columns)] * (shape[0] if stacked else 1))
    return tuple(Matrices.of(kind, roles[kind], found) for kind, found in shapes.items())


def read_matrices(folder: Path, layers: int) -> tuple[Matrices, ...]:
    """The kinds of matrices in the safetensors files of a model folder. Headers only.

    Raises:
        ConfigError: when a file cannot be read.
    """
    single = folder / "model.safetensors"
    paths = [single] if single.is_file() else sorted(folder.glob("model-*.safetensors"))
    return matrices_of((entry for path in paths for entry in _shapes(path)), layers)


def _shapes(path: Path) -> list[tuple[str, list[int]]]:
    try:
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(min(length, 100_000_000)))
        return [(name, entry["shape"]) for name, entry in header.items() if name != "__metadata__"]
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path} is not a readable safetensors file; download it again") from None
