"""Stage `verify`: whether a base's files are one whole model, and load here as they are written.

It costs no memory: the model is built on torch's meta device, where tensors have a shape and no values.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import product
from pathlib import Path

import torch
from safetensors import safe_open

from dpo_assets.artifact import write_json
from dpo_assets.contract import VERIFIED, VerifiedBase, VerifySpec
from dpo_assets.errors import ConfigError
from dpo_assets.planning.model_folder import EMBEDDINGS, HEAD_WEIGHT
from dpo_assets.planning.text_part import read_text_part
from dpo_assets.planning.weights import Stored, read_weights
from dpo_assets.training.models.chat_format import load_chat_format
from dpo_assets.training.models.loading import load_causal_lm
from dpo_assets.training.models.targets import places_of
from dpo_assets.training.reporting import Reporter

ROWS = 4096  # Of two embeddings, compared at one time.


def run(spec: VerifySpec, reporter: Reporter) -> None:
    """Writes `verified.json`.

    Raises:
        ConfigError: naming what is missing, stored in another shape, stored twice and differently, or read otherwise
            than it is written; where no decoder layers are found that could be adapted.
    """
    chat = load_chat_format(spec.base_model, spec.template)
    model, unused = load_causal_lm(spec.base_model, device_map={"": "meta"})
    refuse_two_heads(spec.base_model, model, unused)
    if not any(places_of(model)):
        raise ConfigError(f"{type(model).__name__} in {spec.base_model} has no linear layers that could be adapted")
    found = VerifiedBase(
        unused_tensors=tuple(unused),
        ends=tuple(chat.tokenizer.convert_ids_to_tokens(sorted(chat.ends))),
    )
    write_json(spec.output_dir / VERIFIED, found.model_dump(mode="json"))
    reporter.log(f"verify: every tensor of {type(model).__name__} is there; a turn ends at {', '.join(found.ends)}")


def refuse_two_heads(folder: Path, model: torch.nn.Module, unused: Collection[str]) -> None:
    """A head that config.json ties to the embedding, while the files hold another one beside it.

    Transformers 5 takes the stored head then, others the embedding: no release could be the same model everywhere.

    Args:
        unused: tensors of the files that the model has no place for; layers that predict further tokens have an
            embedding and a head of their own.

    Raises:
        ConfigError: naming both tensors.
    """
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    stored = read_weights(folder).tensors
    own = [stored[name] for name in read_text_part(folder).names.values() if name not in unused]
    heads = [tensor for tensor in own if f".{tensor.name}".endswith(f".{HEAD_WEIGHT}")]
    embeddings = [tensor for tensor in own if f".{tensor.name}".endswith(tuple(f".{name}" for name in EMBEDDINGS))]
    for head, embedding in product(heads, embeddings):
        if _equal(head, embedding):
            continue
        raise ConfigError(
            f"config.json in {folder} says tie_word_embeddings, but {head.name} differs from {embedding.name}: set it "
            "to false if the head is meant, or take the head out of the files"
        )


def _equal(one: Stored, other: Stored) -> bool:
    with safe_open(one.path, framework="pt") as left, safe_open(other.path, framework="pt") as right:
        parts = (left.get_slice(one.name), right.get_slice(other.name))
        return one.shape == other.shape and all(
            torch.equal(*(part[start : start + ROWS] for part in parts)) for start in range(0, one.shape[0], ROWS)
        )
