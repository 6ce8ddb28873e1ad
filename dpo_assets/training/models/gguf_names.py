"""A GGUF file's tensors against the files of the merged model, one at a time, where no library loads all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH_NAMES, dequantize, get_tensor_name_map
from safetensors import safe_open
from torch import Tensor

from dpo_assets.checks.reports import GgufNames, NotMeasured
from dpo_assets.planning.text_part import read_text_part
from dpo_assets.planning.weights import read_weights
from dpo_assets.recipe import GgufType
from dpo_assets.training.models.gguf_rounding import rounding

SUFFIXES = (".weight", ".bias")


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
    stored = read_weights(folder).tensors
    same, others, unplaced = 0, [], []
    for name, in_file in read_text_part(folder).names.items():
        tensor = held.pop(names.get_name(name, try_suffixes=SUFFIXES) or "", None)
        if tensor is None:
            unplaced.append(name)
            continue
        with safe_open(stored[in_file].path, framework="pt") as file:
            ours = file.get_tensor(in_file).float()
        theirs = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if _same(ours, theirs, type_):
            same += 1
        else:
            others.append(name)
    return GgufNames(same=same, others=tuple(others), unplaced=tuple(unplaced), beyond=tuple(held))


def _same(ours: Tensor, theirs: Tensor, type_: GgufType) -> bool:
    if ours.shape != theirs.shape:
        return False
    forms = (ours, ours + 1) if ours.dim() == 1 else (ours,)
    if any(bool(((form - theirs).abs() <= rounding(form, type_)).all()) for form in forms):
        return True
    gap = (ours.flatten().sort().values - theirs.flatten().sort().values).abs()
    return bool((gap <= rounding(ours, type_).max()).all())
