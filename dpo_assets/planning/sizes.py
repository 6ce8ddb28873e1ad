"""Model shapes by their usual size names, and local model folders, for plans without a pipeline."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from dpo_assets.errors import ConfigError
from dpo_assets.planning.families import describe
from dpo_assets.planning.matrices import read_matrices
from dpo_assets.planning.model_folder import inspect_model
from dpo_assets.planning.shape import ModelShape


@dataclass(frozen=True)
class Size:
    """A size name and the open model that stands for it."""

    key: str
    like: str
    shape: ModelShape


def _size(
    key: str, like: str, architecture: str, parameters: int, layers: int, hidden: int, intermediate: int,
    heads: int, kv_heads: int, head_dim: int, vocabulary: int, context: int, tied: bool = False,
) -> Size:  # fmt: skip
    model_type = {_LLAMA: "llama", _QWEN: "qwen2", _MISTRAL: "mistral"}[architecture]
    shape = ModelShape(
        parameters=parameters, layers=layers, hidden=hidden, intermediate=intermediate, vocabulary=vocabulary,
        context=context, heads=heads, kv_heads=kv_heads, head_dim=head_dim, tied=tied, architecture=architecture,
        fusable=True,
        decoder=describe({
            "model_type": model_type, "num_hidden_layers": layers, "hidden_size": hidden, "vocab_size": vocabulary,
            "intermediate_size": intermediate, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "head_dim": head_dim, "tie_word_embeddings": tied, "sliding_window": None,
        }),
        model_type=model_type,
    )  # fmt: skip
    return Size(key, like, shape)


_LLAMA, _QWEN, _MISTRAL = "LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM"
# Numbers of the published config.json files; parameters are those of the published weights.
SIZES: tuple[Size, ...] = (
    _size("135m", "SmolLM2-135M", _LLAMA, 134_515_008, 30, 576, 1_536, 9, 3, 64, 49_152, 8_192, True),
    _size("0.5b", "Qwen2.5-0.5B", _QWEN, 494_032_768, 24, 896, 4_864, 14, 2, 64, 151_936, 32_768, True),
    _size("1b", "Llama-3.2-1B", _LLAMA, 1_235_814_400, 16, 2_048, 8_192, 32, 8, 64, 128_256, 131_072, True),
    _size("1.5b", "Qwen2.5-1.5B", _QWEN, 1_543_714_304, 28, 1_536, 8_960, 12, 2, 128, 151_936, 32_768, True),
    _size("3b", "Llama-3.2-3B", _LLAMA, 3_212_749_824, 28, 3_072, 8_192, 24, 8, 128, 128_256, 131_072, True),
    _size("7b", "Mistral-7B-v0.3", _MISTRAL, 7_248_023_552, 32, 4_096, 14_336, 32, 8, 128, 32_768, 32_768),
    _size("8b", "Llama-3.1-8B", _LLAMA, 8_030_261_248, 32, 4_096, 14_336, 32, 8, 128, 128_256, 131_072),
    _size("13b", "Llama-2-13B", _LLAMA, 13_015_864_320, 40, 5_120, 13_824, 40, 40, 128, 32_000, 4_096),
    _size("14b", "Qwen2.5-14B", _QWEN, 14_770_033_664, 48, 5_120, 13_824, 40, 8, 128, 152_064, 32_768),
    _size("32b", "Qwen2.5-32B", _QWEN, 32_763_876_352, 64, 5_120, 27_648, 40, 8, 128, 152_064, 32_768),
    _size("70b", "Llama-3.1-70B", _LLAMA, 70_553_706_496, 80, 8_192, 28_672, 64, 8, 128, 128_256, 131_072),
)
_BY_KEY = {size.key: size for size in SIZES}


def find_model(name: str) -> Size:
    """The shape of a size name (`8b`, `0.5B`), or of a local model folder.

    Raises:
        ConfigError: for neither, with the nearest size; for a folder that is no readable model.
    """
    if known := _BY_KEY.get(name.strip().lower()):
        return known
    folder = Path(name).expanduser()
    if folder.is_dir():
        shape = inspect_model(folder).shape
        return Size(name, name, shape.with_matrices(read_matrices(folder, shape.layers)))
    near = _nearest(name.strip().lower())
    hint = f"did you mean `{near}`? " if near else ""
    raise ConfigError(
        f"`{name}` is neither a size nor a local model folder; {hint}Sizes: {', '.join(_BY_KEY)}. "
        "A model of the Hub is planned for by its size, or by the folder it was downloaded to."
    )


def _nearest(name: str) -> str | None:
    """The size of the nearest number of parameters; for what is no number, the nearest spelling."""
    try:
        wanted = float(name[:-1]) * {"b": 1e9, "m": 1e6}[name[-1:]]
    except (ValueError, KeyError):
        return next(iter(difflib.get_close_matches(name, _BY_KEY, n=1, cutoff=0.5)), None)
    if not 0 < wanted < 1e15:
        return None
    return min(SIZES, key=lambda size: abs(size.shape.parameters - wanted)).key
