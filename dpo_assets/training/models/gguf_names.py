"""A GGUF file's tensors against the files of the merged model, one at a time, where no library loads all of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from gguf import MODEL_ARCH_NAMES, TensorNameMap, dequantize, get_tensor_name_map
from safetensors import safe_open
from torch import Tensor

from dpo_assets.checks.reports import GgufNames, NotMeasured
from dpo_assets.planning.text_part import read_text_part
from dpo_assets.planning.weights import read_weights
from dpo_assets.recipe import GgufType
from dpo_assets.training.models.gguf_rounding import rounding

SUFFIXES = (".weight", ".bias")
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")
_Found = Literal["same", "resorted", "others", "unplaced"]


def compare_by_name(
    reader: Any, architecture: str, blocks: int, folder: Path, type_: GgufType
) -> GgufNames | NotMeasured:
    """Which tensors of the merged model stand in the file with the same values, by llama.cpp's map of names.

    Values are compared in their order, and else in order of size: the converter sorts rows of queries and keys anew for
    some architectures, and sorting two lists never moves their values further apart than they are. A norm's may be
    larger by one (Gemma). What the converter computes anew beyond that is told as another one.

    Args:
        reader: a GGUFReader.
        blocks: decoder layers, as the file counts them.
    """
    known = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        return NotMeasured(not_measured=f"the package gguf does not know {architecture}")
    names = get_tensor_name_map(known[architecture], blocks)
    held = {tensor.name: tensor for tensor in reader.tensors}
    seen: set[str] = set()
    stored = read_weights(folder).tensors
    found: dict[_Found, list[str]] = {kind: [] for kind in get_args(_Found)}
    for name, in_file in read_text_part(folder).names.items():
        place, part = _place(name, names, held)
        if place is None:
            found["unplaced"].append(name)
            continue
        seen.add(place)
        with safe_open(stored[in_file].path, framework="pt") as file:
            ours = file.get_tensor(in_file).float()
        data = held[place].data if part is None else held[place].data[part]
        theirs = torch.from_numpy(dequantize(data, held[place].tensor_type).copy()).float()
        found[_compared(ours, theirs, type_)].append(name)
    return GgufNames(
        same=len(found["same"]) + len(found["resorted"]),
        resorted=tuple(found["resorted"]),
        others=tuple(found["others"]),
        unplaced=tuple(found["unplaced"]),
        beyond=tuple(name for name in held if name not in seen),
    )


def _place(name: str, names: TensorNameMap, held: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """The file's tensor for one of the merged model, and which part of it that is: experts are stacked to one."""
    place = names.get_name(name, try_suffixes=SUFFIXES)
    if place in held:
        return place, None
    if (expert := EXPERT.fullmatch(name)) is None:
        return None, None
    place = names.get_name(f"{expert[1]}.{expert[3]}", try_suffixes=SUFFIXES)
    return (place, int(expert[2])) if place in held else (None, None)


def _compared(ours: Tensor, theirs: Tensor, type_: GgufType) -> _Found:
    if ours.shape != theirs.shape:
        return "others"
    forms = (ours, ours + 1) if ours.dim() == 1 else (ours,)
    if any(bool(((form - theirs).abs() <= rounding(form, type_)).all()) for form in forms):
        return "same"
    gap = (ours.flatten().sort().values - theirs.flatten().sort().values).abs()
    return "resorted" if bool((gap <= rounding(ours, type_).max()).all()) else "others"
