"""What a local model folder holds, read without torch: its shape, its weights' format, its template, its licence."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dpo_assets.artifact import read_object
from dpo_assets.errors import ConfigError
from dpo_assets.planning.companions import NAMED_TEMPLATES, TEMPLATE, TOKENIZER_CONFIG
from dpo_assets.planning.decoder import Decoder
from dpo_assets.planning.families import describe
from dpo_assets.planning.licence import Licence, read_licence
from dpo_assets.planning.shape import ModelShape
from dpo_assets.planning.text_part import TextPart, has_other_parts, text_config
from dpo_assets.planning.vocabulary import content, refuse_tokens_without_embedding
from dpo_assets.planning.weights import FLOATS, Stored, Weights, listed, read_weights, unused_files

PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
CONFIG = "config.json"
HEAD_WEIGHT = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "tok_embeddings.weight")
ADAPTER = "adapter_config.json"
USUAL_NAMES = {
    "n_layer": "num_hidden_layers", "n_layers": "num_hidden_layers", "num_layers": "num_hidden_layers",
    "n_embd": "hidden_size", "n_embed": "hidden_size", "d_model": "hidden_size", "n_head": "num_attention_heads",
    "n_heads": "num_attention_heads", "n_positions": "max_position_embeddings", "n_inner": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
}  # fmt: skip


@dataclass(frozen=True)
class ModelFolder:
    """Facts of a model folder.

    `safetensors` are the files that the model is loaded from, `unused` those beside them that nothing loads.
    `chat_template` is the template as text, of several named ones all; empty where there is none.
    """

    shape: ModelShape
    architecture: str
    safetensors: tuple[str, ...]
    unused: tuple[str, ...]
    pickled: tuple[str, ...]
    licence: Licence | None
    chat_template: str
    eos_token: str | None

    @property
    def prints_date(self) -> bool:
        """Whether the chat template asks for today's date (Llama 3.2, SmolLM3 and Granite do)."""
        return "strftime_now" in self.chat_template


def inspect_model(folder: Path) -> ModelFolder:
    """Reads a folder.

    Raises:
        ConfigError: when the folder, its config.json, its tokenizer or its weights are missing or unreadable, or do not
            belong together.
    """
    if not folder.is_dir():
        raise ConfigError(f"base_model.source: there is no folder {folder}; a Hub id looks like `org/name`.")
    if (folder / ADAPTER).is_file():
        raise ConfigError(f"{folder} holds {ADAPTER}: merge the adapter into its base first, and start from the result")
    config = read_object(folder / CONFIG, "a model folder needs it")
    tokenizer = read_object(folder / TOKENIZER_CONFIG, "the tokenizer is missing")
    _refuse_quantised(folder, config)
    weights = read_weights(folder)
    _refuse_foreign_numbers(folder, weights)
    shape = _shape(folder, config, weights)
    templates = _templates(folder, tokenizer)
    refuse_tokens_without_embedding(folder, tokenizer, templates, shape.vocabulary)
    return ModelFolder(
        shape=shape,
        architecture=shape.architecture,
        safetensors=weights.names,
        unused=tuple(unused_files(folder, weights.names)),
        pickled=tuple(sorted(p.name for pattern in PICKLED for p in folder.glob(pattern))),
        licence=read_licence(folder),
        chat_template=templates,
        eos_token=content(tokenizer.get("eos_token")),
    )


def _shape(folder: Path, config: Mapping[str, Any], weights: Weights) -> ModelShape:
    """The shape of the language model: what else a checkpoint holds is neither loaded nor trained."""
    decoder = _described(folder, config)
    text = _named_as_usual(text_config(config))
    architecture = ", ".join(config.get("architectures") or ["unknown"])
    try:
        part = TextPart.of(config, weights.tensors)
        every, weights = weights, weights.only(frozenset(part.names.values()))
        heads, kv_heads, head_dim = _attention(decoder, text, weights)
        hidden = decoder.hidden if decoder else text["hidden_size"]
        # A tied head that is stored as well is the embedding once more.
        twice = weights.tensors.get(part.names.get(HEAD_WEIGHT, "")) if part.tied else None
        return ModelShape(
            parameters=weights.parameters - (math.prod(twice.shape) if twice else 0),
            layers=len(decoder.layers) if decoder else text["num_hidden_layers"],
            hidden=hidden,
            intermediate=text.get("intermediate_size") or 4 * hidden,
            vocabulary=_embedding_rows(weights) or (decoder.vocabulary if decoder else text["vocab_size"]),
            context=text.get("max_position_embeddings") or 2**20,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            tied=part.tied if weights.files or decoder is None else decoder.tied,
            architecture=architecture,
            model_type=text.get("model_type") or config.get("model_type") or "",
            stored=weights.format,
            beside=every.parameters - weights.parameters,
            more_than_text=has_other_parts(config),
            decoder=decoder,
        )
    except KeyError as error:
        raise ConfigError(f"{folder / CONFIG} has no {error}: only decoder language models are supported") from None
    except (ValidationError, TypeError, AttributeError):
        raise ConfigError(f"{folder / CONFIG} holds a value of the wrong type; download it again") from None


def read_description(folder: Path) -> Decoder | None:
    """The decoder that a model folder's config.json describes; None where no family is known.

    Raises:
        ConfigError: for a config.json that is missing, or that its own class would not read.
    """
    return _described(folder, read_object(folder / CONFIG, "a model folder needs it"))


def _described(folder: Path, config: Mapping[str, Any]) -> Decoder | None:
    try:
        return describe(config)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ConfigError(
            f"{folder / CONFIG} holds a value that its own architecture could not be built with "
            f"({type(error).__name__}: {error}); download it again"
        ) from None


def _embedding_rows(weights: Weights) -> int:
    """Rows of the stored embedding of tokens; 0 where none is found. A config may leave the number to its class."""
    tables = [t.shape for t in weights.tensors.values() if t.name.endswith(EMBEDDINGS) and len(t.shape) == 2]
    return max((rows for rows, _ in tables), default=0)


def _named_as_usual(text: Mapping[str, Any]) -> Mapping[str, Any]:
    """Sizes under their usual names, where a family has others for them (Bloom, MPT)."""
    return {USUAL_NAMES[key]: value for key, value in text.items() if key in USUAL_NAMES} | dict(text)


def _attention(decoder: Decoder | None, text: Mapping[str, Any], weights: Weights) -> tuple[int, int, int]:
    """(heads, heads of keys and values, their width) by the description, else by the config; where that leaves them to
    its class, by the shapes of a layer. Zeros where neither tells."""
    if decoder is not None and decoder.attentions:
        first = decoder.attentions[0]
        return first.heads, first.kv_heads, first.head_dim
    if heads := text.get("num_attention_heads"):
        return heads, text.get("num_key_value_heads") or heads, text.get("head_dim") or text["hidden_size"] // heads
    rows = {
        part: next((t.shape[0] for t in weights.tensors.values() if t.name.endswith(f"layers.0.self_attn.{part}")), 0)
        for part in ("q_proj.weight", "k_proj.weight", "q_norm.weight")
    }
    queries, keys, norm = rows.values()
    # Without a norm of its own width, keys of one head: their width is what counts.
    width = text.get("head_dim") or norm or keys
    return (queries // width, keys // width, width) if width else (0, 0, 0)


# gpt-oss was published in MXFP4 alone. Transformers makes 16 bit of it on any machine; its 5.17 would write the experts
# of all layers under one name, though, if it were not told to leave its names as they are.
WRITE_16_BIT = (
    "; write one by transformers: AutoModelForCausalLM.from_pretrained(folder, dtype='bfloat16', "
    "quantization_config=Mxfp4Config(dequantize=True)).save_pretrained(other_folder, save_original_format=False)"
)


def _refuse_quantised(folder: Path, config: Mapping[str, Any]) -> None:
    """A quantised base can be neither merged nor released in 16 bit."""
    text = config.get("text_config")
    stated = [part.get("quantization_config") for part in (config, text) if isinstance(part, Mapping)]
    for quantised in (value for value in stated if isinstance(value, Mapping)):
        raise ConfigError(
            f"the weights in {folder} are quantised already ({quantised.get('quant_method', 'quantization_config')} in "
            f"{CONFIG}): take the 16-bit base, and let `hardware.precision` quantise it while it trains"
            + (WRITE_16_BIT if quantised.get("quant_method") == "mxfp4" else "")
        )


def _refuse_foreign_numbers(folder: Path, weights: Weights) -> None:
    """Weights in 8 bit or in whole numbers need scales that nothing here would multiply them by."""
    foreign = [f"{t.name} ({t.dtype})" for t in weights.tensors.values() if _is_weight(t) and t.dtype not in FLOATS]
    if foreign:
        raise ConfigError(f"{folder} stores {listed(foreign)}; take the base in {', '.join(FLOATS)}")


def _is_weight(tensor: Stored) -> bool:
    return tensor.name.endswith(".weight")


def refuse_as_reward_model(folder: Path, *, called: str = "", weighed: bool | None = None) -> None:
    """Whether a folder can be a reward model, by what its JSON files and names say.

    Args:
        called: what a message names it; empty: the folder.
        weighed: whether it has safetensors weights, where the folder is all of a model but these; None: it is looked.

    Raises:
        ConfigError: it is not there, has no safetensors weights, more outputs than one, or no chat template.
    """
    if not folder.is_dir():
        raise ConfigError(f"evaluation.reward_model: there is no folder {folder}; a Hub id looks like `org/name`.")
    name = called or str(folder)
    config = read_object(folder / CONFIG, f"{name} needs it, as every model folder does")
    tokenizer = read_object(folder / TOKENIZER_CONFIG, f"the tokenizer of {name} is missing")
    kinds = [str(kind) for kind in config.get("architectures") or []]
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ConfigError(
            f"evaluation.reward_model: {name} holds {', '.join(kinds) or 'no named architecture'}, and a reward "
            "model is a sequence classifier (`...ForSequenceClassification`), as TRL's RewardTrainer saves it"
        )
    outputs = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
    if outputs != 1:
        raise ConfigError(f"evaluation.reward_model: {name} has {outputs} outputs (`id2label`), a reward model has one")
    if not (read_weights(folder).names if weighed is None else weighed):
        raise ConfigError(f"evaluation.reward_model: {name} holds no safetensors weights; save it once more as those")
    if not _templates(folder, tokenizer):
        raise ConfigError(
            f"evaluation.reward_model: {name} has no chat template; put the one that it was trained with there, as "
            f"{TEMPLATE}"
        )


def _templates(folder: Path, tokenizer: Mapping[str, Any]) -> str:
    """The chat templates as Transformers chooses them, one after the other: the files, else the tokenizer's."""
    files = [
        path for path in (folder / TEMPLATE, *sorted((folder / NAMED_TEMPLATES).glob("*.jinja"))) if path.is_file()
    ]
    if files:
        return "\n".join(path.read_text(encoding="utf-8") for path in files)
    stated = tokenizer.get("chat_template")
    if isinstance(stated, list):
        return "\n".join(str(entry.get("template", "")) for entry in stated if isinstance(entry, Mapping))
    return stated if isinstance(stated, str) else ""


def uses_name(template: str, name: str) -> bool:
    """Whether a chat template speaks of a variable of this name."""
    return re.search(rf"\b{re.escape(name)}\b", template) is not None
