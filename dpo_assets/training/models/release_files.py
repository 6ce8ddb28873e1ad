"""What a merged release holds beside its weights: the base's own files, and what others could not read of them anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_assets.artifact import read_object, rewrite_json
from dpo_assets.contract import TemplateSettings
from dpo_assets.planning.companions import GENERATION, copy_files, is_released
from dpo_assets.planning.model_folder import CONFIG
from dpo_assets.training.models.chat_format import load_chat_format, write_tokenizer

IDS = ("bos_token_id", "pad_token_id")  # Of config.json, for a base without generation defaults.
ROTARY = ("rope_theta", "partial_rotary_factor")  # Of `rope_parameters`; Transformers 4 has them beside `rope_scaling`.


def write_config(base: Path, folder: Path) -> None:
    """The base's own config.json, byte for byte, but for two things.

    It does not tell where the base once lay on someone's machine. And where Transformers 5 saved it, it says the rotary
    base also under the names of 4.57, which else takes the default one without a word: the model would be another.
    """
    path = base / CONFIG
    (folder / CONFIG).write_bytes(path.read_bytes())
    config = _object(path)
    written = {name: value for name, value in config.items() if name != "_name_or_path"} | _rotary(config)
    if isinstance(text := config.get("text_config"), dict):
        written["text_config"] = text | _rotary(text)
    if written != config:
        rewrite_json(folder / CONFIG, written)


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `rope_parameters` says, by the names that Transformers had before 5, where config.json lacks them.

    One that has an entry a kind of layer is left: 4 had a name of its own for each family that does so.
    """
    stated = config.get("rope_parameters")
    if not isinstance(stated, dict) or "rope_theta" not in stated:
        return {}
    earlier = {name: stated[name] for name in ROTARY if name in stated}
    scaling = {name: value for name, value in stated.items() if name not in ROTARY}
    if scaling.keys() - {"rope_type"} or scaling.get("rope_type", "default") != "default":
        earlier["rope_scaling"] = scaling
    return {name: value for name, value in earlier.items() if config.get(name) is None}


def write_companions(base: Path, folder: Path, template: TemplateSettings) -> None:
    """The base's own files beside the weights, byte for byte: tokenizer, chat templates, processor, licence, notices.

    Its generation defaults too, unless they let the policy go on where it was taught to stop.

    Raises:
        ConfigError: as `write_tokenizer` and `load_chat_format`.
    """
    (folder / GENERATION).unlink(missing_ok=True)  # As PEFT's merge wrote it, of what Transformers made of the base's.
    copy_files(base, folder, is_released)
    write_tokenizer(base, folder)
    ends = sorted(load_chat_format(base, template).ends)
    values = _object(folder / GENERATION) or _generation_of(_object(base / "config.json"))
    if _listed(values.get("eos_token_id")) != ends:
        values.pop("_from_model_config", None)  # Transformers would take that for leave to make them anew.
        rewrite_json(folder / GENERATION, values | {"eos_token_id": ends})


def _generation_of(config: dict[str, Any]) -> dict[str, Any]:
    """The ids that config.json names; those of a model of more than text may stand in its text part. 0 is one too."""
    text = config.get("text_config") or {}
    named = {name: config.get(name) if config.get(name) is not None else text.get(name) for name in IDS}
    return {name: value for name, value in named.items() if value is not None}


def _listed(ids: int | list[int] | None) -> list[int]:
    return sorted(ids) if isinstance(ids, list) else [] if ids is None else [ids]


def _object(path: Path) -> dict[str, Any]:
    """What it holds; nothing where it is not there."""
    return read_object(path) if path.is_file() else {}
