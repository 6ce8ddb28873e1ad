"""Model shapes by their usual size names, and local model folders, for plans without a pipeline."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_assets.errors import ConfigError
from dpo_assets.planning.families import describe
from dpo_assets.planning.matrices import read_matrices
from dpo_assets.planning.model_folder import inspect_model
from dpo_assets.planning.shape import ModelShape


@dataclass(frozen=True)
class Size:
    """A size name and the open model that stands for it; `config` is what its config.json says, of a folder nothing."""

    key: str
    like: str
    shape: ModelShape
    config: Mapping[str, Any] = field(default_factory=dict)


def _size(key: str, like: str, architecture: str, parameters: int, config: Mapping[str, Any]) -> Size:
    decoder = describe(config)
    assert decoder is not None
    attention = decoder.attentions[0]
    shape = ModelShape(
        parameters=parameters, layers=len(decoder.layers), hidden=decoder.hidden,
        intermediate=config["intermediate_size"], vocabulary=decoder.vocabulary,
        context=config["max_position_embeddings"], heads=attention.heads, kv_heads=attention.kv_heads,
        head_dim=attention.head_dim, tied=decoder.tied, architecture=architecture, model_type=decoder.family,
        decoder=decoder,
    )  # fmt: skip
    return Size(key, like, shape, config)


def _config(
    family: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int,
    vocabulary: int, context: int, tied: bool = False, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A config.json; Qwen2 and Mistral have their windows switched off."""
    return {
        "model_type": family, "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "vocab_size": vocabulary, "max_position_embeddings": context, "tie_word_embeddings": tied,
    } | more  # fmt: skip


_LLAMA, _QWEN2, _QWEN3 = "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
_YARN = {"rope_type": "yarn", "factor": 16.0, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16_384}
_LONGROPE = {
    "rope_type": "longrope", "original_max_position_embeddings": 4_096, "partial_rotary_factor": 0.75,
    "short_factor": [1.0] * 48, "long_factor": [1.0] * 48,  # Phi-4's own grow to 48; no size depends on them.
}  # fmt: skip
# Numbers of the published config.json files; parameters are those of the published weights, of the text part alone.
SIZES: tuple[Size, ...] = (
    _size("135m", "SmolLM2-135M", _LLAMA, 134_515_008,
          _config("llama", 30, 576, 1_536, 9, 3, 64, 49_152, 8_192, True)),
    _size("0.5b", "Qwen2.5-0.5B", _QWEN2, 494_032_768,
          _config("qwen2", 24, 896, 4_864, 14, 2, 64, 151_936, 32_768, True)),
    _size("1b", "Llama-3.2-1B", _LLAMA, 1_235_814_400,
          _config("llama", 16, 2_048, 8_192, 32, 8, 64, 128_256, 131_072, True)),
    _size("1.5b", "Qwen2.5-1.5B", _QWEN2, 1_543_714_304,
          _config("qwen2", 28, 1_536, 8_960, 12, 2, 128, 151_936, 32_768, True)),
    _size("3b", "Llama-3.2-3B", _LLAMA, 3_212_749_824,
          _config("llama", 28, 3_072, 8_192, 24, 8, 128, 128_256, 131_072, True)),
    _size("7b", "Mistral-7B-v0.3", "MistralForCausalLM", 7_248_023_552,
          _config("mistral", 32, 4_096, 14_336, 32, 8, 128, 32_768, 32_768, sliding_window=None)),
    _size("8b", "Llama-3.1-8B", _LLAMA, 8_030_261_248,
          _config("llama", 32, 4_096, 14_336, 32, 8, 128, 128_256, 131_072)),
    _size("13b", "Llama-2-13B", _LLAMA, 13_015_864_320,
          _config("llama", 40, 5_120, 13_824, 40, 40, 128, 32_000, 4_096)),
    _size("14b", "Qwen2.5-14B", _QWEN2, 14_770_033_664,
          _config("qwen2", 48, 5_120, 13_824, 40, 8, 128, 152_064, 32_768)),
    _size("32b", "Qwen2.5-32B", _QWEN2, 32_763_876_352,
          _config("qwen2", 64, 5_120, 27_648, 40, 8, 128, 152_064, 32_768)),
    _size("70b", "Llama-3.1-70B", _LLAMA, 70_553_706_496,
          _config("llama", 80, 8_192, 28_672, 64, 8, 128, 128_256, 131_072)),
    _size("qwen3-1.7b", "Qwen3-1.7B", _QWEN3, 1_720_574_976,
          _config("qwen3", 28, 2_048, 6_144, 16, 8, 128, 151_936, 40_960, True)),
    _size("qwen3-8b", "Qwen3-8B", _QWEN3, 8_190_735_360,
          _config("qwen3", 36, 4_096, 12_288, 32, 8, 128, 151_936, 40_960)),
    _size("gemma3-4b", "Gemma-3-4B", "Gemma3ForCausalLM", 3_880_263_168,
          _config("gemma3_text", 34, 2_560, 10_240, 8, 4, 256, 262_208, 131_072, True, sliding_window=1_024)),
    _size("ministral3-8b", "Ministral-3-8B", "Ministral3ForCausalLM", 8_489_553_920,
          _config("ministral3", 34, 4_096, 14_336, 32, 8, 128, 131_072, 262_144, rope_parameters=_YARN)),
    _size("phi4-mini", "Phi-4-mini", "Phi3ForCausalLM", 3_836_021_760,
          _config("phi3", 32, 3_072, 8_192, 24, 8, 128, 200_064, 131_072, True, sliding_window=262_144,
                  rope_parameters=_LONGROPE)),
    _size("olmo3-7b", "OLMo-3-7B", "Olmo3ForCausalLM", 7_298_011_136,
          _config("olmo3", 32, 4_096, 11_008, 32, 32, 128, 100_278, 65_536)),
    _size("smollm3-3b", "SmolLM3-3B", "SmolLM3ForCausalLM", 3_075_098_624,
          _config("smollm3", 36, 2_048, 11_008, 16, 4, 128, 128_256, 65_536, True)),
    _size("qwen3.5-9b", "Qwen3.5-9B", "Qwen3_5ForCausalLM", 8_953_803_264,
          _config("qwen3_5_text", 32, 4_096, 12_288, 16, 4, 256, 248_320, 262_144)),
    _size("gpt-oss-20b", "gpt-oss-20b", "GptOssForCausalLM", 20_914_757_184,
          _config("gpt_oss", 24, 2_880, 2_880, 64, 8, 64, 201_088, 131_072, num_local_experts=32)),
    _size("qwen3-30b-a3b", "Qwen3-30B-A3B", "Qwen3MoeForCausalLM", 30_532_122_624,
          _config("qwen3_moe", 48, 2_048, 6_144, 32, 4, 128, 151_936, 40_960)),
)  # fmt: skip
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
    plain = (size for size in SIZES if size.key[0].isdigit())
    return min(plain, key=lambda size: abs(size.shape.parameters - wanted)).key
