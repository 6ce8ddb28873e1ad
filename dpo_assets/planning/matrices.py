"""The weight matrices of a model's decoder layers, by kind, from the names and shapes in its files.

A kind is what has one name in every layer, such as `self_attn.q_proj`. Experts of one kind are counted together, stored
one by one (`experts.0.w1`, Mixtral) or as one tensor of three dimensions (`input_linear`, Granite).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from dpo_assets.planning.decoder import Decoder, Experts, Layer
from dpo_assets.planning.weights import FLOATS, read_weights

Role = Literal["linear", "experts", "router"]
_LAYER = re.compile(r"(?P<list>(?P<before>(?:[^.]+\.)*?)(?:layers|h|blocks))\.(?P<number>\d+)\.(?P<rest>.+)")
# Towers beside the language model of a multimodal checkpoint.
_TOWERS = re.compile(r"vision|visual|audio|speech|image|encoder|siglip|clip|(^|\.)vit", re.IGNORECASE)
# Qwen2-MoE gates its shared expert; Hunyuan's router is a layer of its gate. MiniMax's `output_gate` is attention's.
_ROUTERS = ("gate", "router", "shared_expert_gate", "gate.wg")
# Buffers, biases and norms may have two or three dimensions too (Cohere's norms of queries: heads times width).
_NO_MATRIX = re.compile(r"(norm|bias|mask|freq)(\.weight)?$")


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

    @property
    def last(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    def answers_to(self, name: str) -> bool:
        """Whether `name` means this kind: its whole name, or the end of it after a dot."""
        return f".{self.name}".endswith(f".{name}")


def role_of(name: str) -> Role:
    """What a matrix does, by its name in the layer."""
    if any(f".{name}".endswith(f".{router}") for router in _ROUTERS) or "router" in name:
        return "router"
    return "experts" if ".experts." in f".{name}" else "linear"


def is_stack(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of a layer is the matrices of all its experts. A convolution over time has 1 in the middle."""
    return len(shape) == 3 and shape[1] > 1 and _NO_MATRIX.search(name) is None


def decoder_list(names: Iterable[str], layers: int) -> str:
    """What stands before the numbers of the decoder's layers (`model.layers`); empty where no layers are found.

    Checkpoints may hold more lists than the decoder's (a tower's, a resampler's, `mtp` for predicting further tokens):
    the decoder's is the one that has the most of the model's layers, then the most tensors.

    Args:
        names: of all tensors.
        layers: decoder layers of the model.
    """
    lists: dict[str, list[int]] = defaultdict(list)
    for name in names:
        found = _LAYER.fullmatch(name)
        if found is not None and int(found["number"]) < layers and not _TOWERS.search(found["before"]):
            lists[found["list"]].append(int(found["number"]))
    return max(lists, key=lambda name: (len({*lists[name]}), len(lists[name])), default="")


def matrices_of(tensors: Iterable[tuple[str, Sequence[int]]], layers: int) -> tuple[Matrices, ...]:
    """The kinds among (name, shape) of stored tensors, in the order of the first layer that has each.

    Args:
        layers: decoder layers of the model. Its list may hold more of them (DeepSeek-V3).
    """
    held = list(tensors)
    decoder = decoder_list((name for name, _ in held), layers)
    shapes: dict[str, list[tuple[int, int]]] = {}
    roles: dict[str, Role] = {}
    for name, shape in held:
        found = _LAYER.fullmatch(name)
        if found is None or found["list"] != decoder or int(found["number"]) >= layers:
            continue
        rest = found["rest"]
        kind = re.sub(r"\.experts\.\d+\.", ".experts.", f".{rest}")[1:]
        stacked = is_stack(kind, shape)
        if not stacked and not (len(shape) == 2 and kind.endswith(".weight") and not _NO_MATRIX.search(kind)):
            continue
        kind = kind.removesuffix(".weight")
        roles.setdefault(kind, "experts" if stacked else role_of(kind))
        rows, columns = shape[-2:]
        shapes.setdefault(kind, []).extend([(rows, columns)] * (shape[0] if stacked else 1))
    return tuple(Matrices.of(kind, roles[kind], found) for kind, found in shapes.items())


@lru_cache(maxsize=64)
def described_matrices(decoder: Decoder) -> tuple[Matrices, ...]:
    """The kinds of a decoder that is described whole, experts as the loaded model has them: one parameter for all.

    Kept, because a memory estimate asks for every size of a forward.
    """
    shapes: dict[tuple[str, Role], list[tuple[int, int]]] = {}
    for layer in decoder.layers:
        for name, sides, count in _described(layer, decoder.hidden):
            shapes.setdefault((name, role_of(name)), []).extend([sides] * count)
    return tuple(Matrices.of(name, role, found) for (name, role), found in shapes.items())


def _described(layer: Layer, hidden: int) -> Iterator[tuple[str, tuple[int, int], int]]:
    """(name, rows and columns, how many) of a layer's matrices."""
    for name, rows, columns in layer.linears(hidden):
        yield name, (rows, columns), 1
    if isinstance(mlp := layer.mlp, Experts):
        yield f"{mlp.module}.{mlp.router}", (mlp.count, hidden), 1
        yield f"{mlp.module}.experts.gate_up_proj", (2 * mlp.width, hidden), mlp.count
        yield f"{mlp.module}.experts.down_proj", (hidden, mlp.width), mlp.count


def read_matrices(folder: Path, layers: int) -> tuple[Matrices, ...]:
    """The kinds of matrices in the files that a model folder is loaded from. Headers only.

    Raises:
        ConfigError: as `read_weights`.
    """
    stored = read_weights(folder).tensors.values()
    return matrices_of(((tensor.name, tensor.shape) for tensor in stored if tensor.dtype in FLOATS), layers)
