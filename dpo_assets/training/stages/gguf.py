"""Stage `gguf`: a model as one GGUF file for llama.cpp and Ollama, read back; or a rehearsal that writes none."""

from __future__ import annotations

import time
from pathlib import Path

from dpo_assets.artifact import VOLATILE, write_json
from dpo_assets.checks.reports import GgufReport, NotMeasured
from dpo_assets.contract import GGUF_FOLDER, GGUF_REHEARSED, MODELFILE, GgufSpec
from dpo_assets.planning.companions import copy_files, is_licence_file
from dpo_assets.publishing.ollama import NotSayable, OllamaTemplate, Render, modelfile, ollama_template
from dpo_assets.training.models.chat_format import ChatFormat, load_chat_format
from dpo_assets.training.models.gguf_conversion import Converter, convert, find_converter
from dpo_assets.training.models.gguf_tokens import write_scores
from dpo_assets.training.models.loading import load_causal_lm
from dpo_assets.training.reporting import Reporter


def run(spec: GgufSpec, reporter: Reporter) -> None:
    """Writes `gguf/` (the file, a Modelfile, the model's terms) and `report.json`; in a rehearsal `rehearsed.json`.

    Raises:
        ConfigError: no converter is there, or it refuses the model.
    """
    started = time.perf_counter()
    converter = find_converter(spec.converter)
    folder = spec.output_dir / GGUF_FOLDER
    file = folder / f"{spec.name}-{spec.type.upper()}.gguf"
    if not spec.rehearsal:
        folder.mkdir()
        copy_files(spec.base_model, folder, is_licence_file)
    convert(
        converter,
        spec.base_model,
        file,
        name=spec.name,
        type_=spec.type,
        scratch=spec.scratch,
        writes=not spec.rehearsal,
    )
    if spec.rehearsal:
        write_json(spec.output_dir / GGUF_REHEARSED, {"converter": converter.origin})
        reporter.log(f"gguf: {converter.origin} converts this model")
        return
    if write_scores(file, spec.base_model):
        reporter.log("gguf: the converter knew no scores of this vocabulary; they are those of tokenizer.json's merges")
    report = read_back(file, spec, converter)
    report.write(spec.output_dir)
    write_json(spec.output_dir / VOLATILE, {"seconds": time.perf_counter() - started})
    reporter.log(f"gguf: {file.name} holds {report.tensors} tensors and was read back")


def read_back(file: Path, spec: GgufSpec, converter: Converter) -> GgufReport:
    """What the file holds, against the model; the Modelfile is written beside it."""
    from dpo_assets.training.models.gguf_reading import GgufFile, compare_weights, renderer

    read, chat = GgufFile.open(file), load_chat_format(spec.base_model, spec.template)
    outline, _ = load_causal_lm(spec.base_model, device_map={"": "meta"})
    values = sum(parameter.numel() for parameter in outline.parameters())
    template = _template(chat, renderer(chat), read.adds_bos)
    stops = [str(chat.tokenizer.convert_ids_to_tokens(end)) for end in sorted(chat.ends)]
    (file.parent / MODELFILE).write_text(modelfile(spec.name, file.name, template, stops), encoding="utf-8")
    settings = read.settings(outline.config.get_text_config())
    weights = compare_weights(file, spec.base_model, spec.type, chat, values)
    return GgufReport(
        file=file.name,
        type=spec.type,
        architecture=read.architecture,
        converter=converter.origin,
        tensors=len(read.reader.tensors),
        values=read.values,
        model_values=values,
        not_finite=read.not_finite(),
        settings=settings.differ(),
        tokenizer=read.tokens_that_differ(chat, spec.base_model),
        serving=(*read.serving_differs(chat), *settings.doubts()),
        weights=weights,
        names=read.names_compared(spec.base_model, spec.type) if isinstance(weights, NotMeasured) else None,
        template=template if isinstance(template, str) else "",
    )


def _template(chat: ChatFormat, render: Render, adds_bos: bool) -> OllamaTemplate | str:
    try:
        return ollama_template(render, chat.tokenizer.bos_token or "", adds_bos)
    except NotSayable as why:
        return str(why)
    except ValueError as error:
        return f"the chat template refuses a plain conversation: {error}"
