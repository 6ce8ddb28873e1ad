"""A model with random weights, its tokenizer, a corpus and its arithmetic, in one folder that every arm loads.

python -m benchmarks.throughput.models 8b FOLDER
"""

from __future__ import annotations

import json
import struct
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.throughput.arithmetic import Arithmetic
from benchmarks.throughput.data import CORPUS_FILE
from benchmarks.throughput.shapes import LORA_RANK, SHAPES, Shape

SEED = 1234
CORPUS_CHARACTERS = 600_000
TOKENS = 4_096
COMPLETE = "complete"  # Written last: a folder without it is built again.
SHARD_BYTES, WRITERS = 2**30, 12
DTYPES = {"torch.bfloat16": "BF16", "torch.float32": "F32"}


def build(name: str, folder: Path) -> None:
    """Writes the model of a shape: bf16 on a GPU, fp32 elsewhere."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    folder.mkdir(parents=True, exist_ok=True)
    _tokenizer(folder)
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    config = configuration(SHAPES[name])
    torch.manual_seed(SEED)
    with torch.device("cuda" if cuda else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.save_pretrained(folder)
    # Under the names that a published checkpoint has, experts one by one for example.
    write_weights(revert_weight_conversion(model, model.state_dict()), folder)
    read_off(SHAPES[name], model).write(folder)
    (folder / COMPLETE).touch()


def configuration(shape: Shape) -> Any:
    """The shape's configuration, of its class in Transformers."""
    from transformers import AutoConfig

    return AutoConfig.for_model(shape.model_type, **shape.config())


def read_off(shape: Shape, model: Any) -> Arithmetic:
    """What a token costs in a model, from its modules; weights may be on the meta device."""
    import torch

    config, body, adapter, states = model.config, 0, 0, 0
    experts = getattr(config, "num_local_experts", None)
    for name, parameter in model.named_parameters():
        if "layers." not in name or parameter.dim() < 2 or name.endswith("bias"):
            continue
        routed = experts and parameter.dim() == 3 and parameter.shape[0] == experts
        body += parameter.numel() * config.num_experts_per_tok // experts if routed else parameter.numel()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in shape.targets:
            adapter += LORA_RANK * (module.in_features + module.out_features)
        if hasattr(module, "head_k_dim"):
            states += module.num_v_heads * module.head_k_dim * module.head_v_dim
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    window = getattr(config, "sliding_window", None)
    # Where layers are not told apart, a window is that of all (Mistral, Phi-3).
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    windows = {"full_attention": None, "sliding_attention": window}
    return Arithmetic(
        body, adapter, config.hidden_size, config.vocab_size,
        tuple((width, windows[kind]) for kind in kinds if kind in windows), states,
    )  # fmt: skip


def write_weights(weights: Mapping[str, Any], folder: Path) -> None:
    """Safetensors shards, copied from the device straight into their files by several threads.

    `save_pretrained` copies through one thread, which takes as long as all arms need to load.
    """
    shards = list(_shards(weights))
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(_write_shard, [folder / name for name in names], shards))
    placed = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(value.nbytes for shard in shards for value in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _shards(weights: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    shard: dict[str, Any] = {}
    for name, value in _once(weights.items()):
        if shard and sum(kept.nbytes for kept in shard.values()) + value.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = value
    yield shard


def _once(weights: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Each tensor under its first name: a tied head is the embedding, and no file holds it twice."""
    seen = set()
    for name, value in weights:
        key = (value.data_ptr(), value.shape)
        if key not in seen:
            seen.add(key)
            yield name, value


def _write_shard(path: Path, shard: Mapping[str, Any]) -> None:
    import numpy as np
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, value in shard.items():
        offsets = [at, at + value.nbytes]
        header[name] = {"dtype": DTYPES[str(value.dtype)], "shape": list(value.shape), "data_offsets": offsets}
        at += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    content = np.memmap(path, dtype=np.uint8, mode="r+", offset=8 + len(text), shape=(at,))
    for name, value in shard.items():
        start, end = header[name]["data_offsets"]
        torch.from_numpy(content[start:end]).view(value.dtype).view(value.shape).copy_(value)
    content.flush()


def _tokenizer(folder: Path) -> None:
    """A byte-level BPE of the standard library's sources, and their token ids: real text that needs no download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="ignore"))
        if sum(map(len, texts)) > CORPUS_CHARACTERS:
            break
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(
        folder
    )
    ids = [token for text in texts for token in bpe.encode(text, add_special_tokens=False).ids]
    (folder / CORPUS_FILE).write_text(json.dumps(ids), encoding="utf-8")


if __name__ == "__main__":
    build(sys.argv[1], Path(sys.argv[2]))
