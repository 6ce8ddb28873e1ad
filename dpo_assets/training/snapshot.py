"""What a part of a run keeps for the process that goes on with it, as tensors and plain values: no pickle.

safetensors holds the tensors and JSON the rest, whose floats read back as they were.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS, VALUES = "state.safetensors", "state.json"


@dataclass
class Snapshot:
    """Tensors by name, and plain values: a part of what a checkpoint holds."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, part: Snapshot) -> None:
        """Puts a part under a name."""
        self.tensors |= {f"{name}/{key}": tensor for key, tensor in part.tensors.items()}
        self.values[name] = part.values

    def part(self, name: str) -> Snapshot:
        """The part that was put under a name."""
        prefix = f"{name}/"
        tensors = {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}
        return Snapshot(tensors, self.values[name])

    def copied(self) -> Snapshot:
        """The same on the CPU, which nothing that trains on changes."""
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self.tensors.items()}
        return Snapshot(tensors, copy.deepcopy(self.values))

    def write(self, folder: Path) -> None:
        """A copied one into TENSORS and VALUES of a folder."""
        save_file(self.tensors, folder / TENSORS)
        (folder / VALUES).write_text(json.dumps(self.values), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Snapshot:
        """What `write` wrote. All tensors are on the CPU."""
        return cls(load_file(folder / TENSORS), json.loads((folder / VALUES).read_text(encoding="utf-8")))


class Resumable(Protocol):
    """A part of a run that has a state of its own beside model and optimizer: trainer, guard."""

    def snapshot(self) -> Snapshot: ...

    def take_up(self, snapshot: Snapshot) -> None: ...
