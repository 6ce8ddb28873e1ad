"""Safetensors files of zeros, written without torch."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_assets.planning.weights import INDEX, ITEMSIZE


def save_tensors(path: Path, shapes: Mapping[str, Sequence[int]], *, dtype: str = "F32") -> Path:
    """A file with these tensors, all zero."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    size = 0
    for name, shape in shapes.items():
        stop = size + math.prod(shape) * ITEMSIZE[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [size, stop]}
        size = stop
    return save_raw(path, json.dumps(header).encode(), data=bytes(size))


def save_raw(path: Path, header: bytes, *, length: int | None = None, data: bytes = b"") -> Path:
    """A file with these bytes as its header; `length` is what its first eight bytes say instead of the truth."""
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def save_index(folder: Path, weight_map: Mapping[str, str]) -> Path:
    path = folder / INDEX
    path.write_text(json.dumps({"metadata": {}, "weight_map": dict(weight_map)}))
    return path
