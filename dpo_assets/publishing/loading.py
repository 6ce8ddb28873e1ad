"""How a release is loaded and served: lines that can be run as they stand."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

Base = tuple[str, str | None]  # Source and revision of the base that an adapter is put on.
# The ranks that vLLM takes for `--max-lora-rank` (its config `MaxLoRARanks`).
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
QUESTION = "Why is the sky blue?"


def load_snippet(
    release: str, base: Base | None, *, beyond_text: bool = False, template_arguments: Mapping[str, Any] | None = None
) -> str:
    """Python that loads a release, asks it one thing and prints its answer; it chooses no token at random.

    Args:
        release: repository or folder.
        base: of an adapter; None for a merged model.
        beyond_text: whether the model reads more than text.
    """
    auto = "AutoModelForImageTextToText" if beyond_text else "AutoModelForCausalLM"
    if base is None:
        load = [f'model = {auto}.from_pretrained(release, dtype="auto")']
    else:
        revision = f", revision={json.dumps(base[1])}" if base[1] else ""
        load = [
            f'base = {auto}.from_pretrained({json.dumps(base[0])}{revision}, dtype="auto")',
            "model = PeftModel.from_pretrained(base, release)",
        ]
    arguments = "".join(f", {name}={value!r}" for name, value in sorted((template_arguments or {}).items()))
    return "\n".join(
        [
            *(["from peft import PeftModel"] if base else []),
            f"from transformers import {auto}, AutoTokenizer",
            "",
            f"release = {json.dumps(release)}",
            "tokenizer = AutoTokenizer.from_pretrained(release)",
            *load,
            f'messages = [{{"role": "user", "content": {json.dumps(QUESTION)}}}]',
            "inputs = tokenizer.apply_chat_template(",
            f'    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{arguments}',
            ")",
            'ids = inputs["input_ids"]',
            'answer = model.generate(ids, attention_mask=inputs["attention_mask"], max_new_tokens=64, do_sample=False)',
            "print(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))",
        ]
    )


def serve_line(release: str, base: Base | None, rank: int, template_arguments: Mapping[str, Any] | None = None) -> str:
    """The shell line by which vLLM serves a release; an adapter through its own tokenizer and chat template.

    Args:
        rank: of the adapter.
        template_arguments: what the chat template was given in training; requests that say nothing get the same.
    """
    rendered = ["--default-chat-template-kwargs", json.dumps(dict(template_arguments))] if template_arguments else []
    if base is None:
        return shlex.join(["vllm", "serve", release, *rendered])
    source, revision = base
    room = next((known for known in VLLM_RANKS if known >= rank), rank)
    of_base = [source, *(["--revision", revision] if revision else []), "--tokenizer", release]
    adapter = ["--enable-lora", "--max-lora-rank", str(room), "--lora-modules", f"{release.split('/')[-1]}={release}"]
    return shlex.join(["vllm", "serve", *of_base, *adapter, *rendered])


def llama_server_line(file: str, template_arguments: Mapping[str, Any] | None = None) -> str:
    """The shell line by which llama.cpp serves a GGUF file, through the chat template in it."""
    arguments = ["--chat-template-kwargs", json.dumps(dict(template_arguments))] if template_arguments else []
    return shlex.join(["llama-server", "--model", file, "--jinja", *arguments])


def ollama_line(name: str, modelfile: str) -> str:
    """The shell line by which Ollama takes a GGUF file in."""
    return shlex.join(["ollama", "create", name, "-f", modelfile])


def gguf_upload_line(release: str, folder: str) -> str:
    """The shell line that uploads GGUF files: into a repository of their own, where the next release is not in the way.

    Args:
        release: the repository of the release that they were made of.
    """
    return shlex.join(["hf", "upload", f"{release}-GGUF", folder, ".", "--private"])
