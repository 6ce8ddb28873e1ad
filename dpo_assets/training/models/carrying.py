"""What a release carries over from its base: PEFT's merge put back into the base's own files, and the proof of both."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dpo_assets.checks.reports import Carried
from dpo_assets.planning.text_part import HEAD, TextPart, read_text_part
from dpo_assets.planning.weights import Stored, listed, read_header, read_weights
from dpo_assets.training.models.merging import DTYPES, StreamedMerge

BLOCK = 4 * 2**20  # Bytes that are compared at one time.
RECAST = "recast-{}.safetensors"


class OtherLayout(Exception):
    """PEFT's merge cannot be put back into the base's files. Says which tensors keep it from that.

    Attributes:
        lost: tensors of the base that a release in PEFT's layout would not hold, or in another shape.
    """

    def __init__(self, why: str, lost: Collection[str] = ()) -> None:
        super().__init__(why)
        self.lost = tuple(sorted(lost))


def put_back(base: Path, merged: Path, unused: Collection[str]) -> StreamedMerge:
    """The base's files with the tensors that a merge by PEFT changed: all others keep their bytes, towers included.

    Args:
        merged: the merged language model as `save_pretrained` wrote it. Tensors that the base stores in another format
            are written beside it.
        unused: tensors of the base that the language model has no place for.

    Raises:
        OtherLayout: when its tensors are not those of the base's text part.
    """
    part, files = read_text_part(base), read_weights(base)
    held, found = files.tensors, read_weights(merged).tensors
    new = {_place(name, part): tensor for name, tensor in found.items()}
    if len(new) < len(found):
        raise OtherLayout("PEFT writes two tensors under one name of the base's", held.keys() - found.keys())
    head = part.names.get(f"{HEAD}weight", "")
    embedding = next((tensor for name, tensor in new.items() if name.endswith("embed_tokens.weight")), None)
    if part.tied and head and head not in new and embedding is not None:
        new[head] = embedding  # A tied head that the base stores as well is the embedding once more.
    own = frozenset(part.names.values()) - frozenset(unused)
    other = own.symmetric_difference(new) | {name for name in own & new.keys() if held[name].shape != new[name].shape}
    if other:
        lost = {name for name, tensor in held.items() if name not in new or new[name].shape != tensor.shape}
        raise OtherLayout(f"PEFT writes {listed(sorted(other))} otherwise than the base does", lost)
    changed = [name for name in sorted(own) if _differ(held[name], new[name])]
    return StreamedMerge(files.files, {name: _in_format(new[name], held[name].dtype, merged) for name in changed})


def compared(base: Path, release: Path, adapted: Collection[str]) -> Carried:
    """What became of the base's tensors, from the files as they are on disk.

    Args:
        adapted: names in the files of the tensors that the merge changes; of the others every byte is compared.
    """
    part, before, after = read_text_part(base), read_weights(base).tensors, read_weights(release).tensors
    lost = [name for name, tensor in before.items() if not _alike(tensor, after.get(name))]
    kept = [name for name in before if name not in adapted and name not in lost]
    return Carried(
        tensors=len(before),
        adapted=sum(name in adapted for name in before),
        beside=len(part.beside),
        lost=tuple(sorted(lost)),
        altered=tuple(sorted(name for name in kept if not _same_bytes(before[name], after[name]))),
        added=tuple(sorted(after.keys() - before.keys())),
    )


def names_compared(base: Path, release: Path) -> Carried:
    """What became of the base's tensors where PEFT wrote another layout: by name and shape alone.

    Which of them an adapter changes its files do not tell, so no value can be held against the base's.
    """
    part, before, after = read_text_part(base), read_weights(base).tensors, read_weights(release).tensors
    placed = {_place(name, part): tensor for name, tensor in after.items()}
    return Carried(
        tensors=len(before),
        adapted=0,
        beside=len(part.beside),
        lost=tuple(sorted(n for n, tensor in before.items() if n not in placed or placed[n].shape != tensor.shape)),
        added=tuple(sorted(placed.keys() - before.keys())),
        by_name_alone=True,
    )


def _place(name: str, part: TextPart) -> str:
    """The name in the base's files of a tensor that `save_pretrained` wrote: it may go back to them by itself."""
    return name if name in part.names.values() else part.names.get(name, name)


def _alike(one: Stored, other: Stored | None) -> bool:
    return other is not None and (one.dtype, one.shape) == (other.dtype, other.shape)


def _same_bytes(one: Stored, other: Stored) -> bool:
    with one.path.open("rb") as left, other.path.open("rb") as right:
        left.seek(one.start)
        right.seek(other.start)
        sizes = [min(BLOCK, one.stop - start) for start in range(one.start, one.stop, BLOCK)]
        return all(left.read(size) == right.read(size) for size in sizes)


def _differ(stored: Stored, merged: Stored) -> bool:
    """Whether a merged tensor is another than the base's, in the format that the merge was computed in."""
    if stored.dtype == merged.dtype:
        return not _same_bytes(stored, merged)
    return not torch.equal(_values(stored).to(DTYPES[merged.dtype]), _values(merged))


def _in_format(tensor: Stored, dtype: str, folder: Path) -> Stored:
    """A tensor in the format that the base stores it in."""
    if tensor.dtype == dtype:
        return tensor
    path = folder / RECAST.format(len(list(folder.glob(RECAST.format("*")))))
    save_file({tensor.name: _values(tensor).to(DTYPES[dtype])}, path)
    return read_header(path).tensors[0]


def _values(tensor: Stored) -> torch.Tensor:
    with safe_open(tensor.path, framework="pt") as file:
        found: torch.Tensor = file.get_tensor(tensor.name)
        return found
