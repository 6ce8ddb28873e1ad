"""Which files belong to a model beside its weights: by their names alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_assets.planning.companions import (
    NAMED_TEMPLATES,
    copy_files,
    found,
    is_kept,
    is_licence_file,
    is_released,
    is_tokenizer_file,
)

# As repositories of well-known models have them.
TERMS = [
    "LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "license", "LICENSE-CODE", "LICENSE-MODEL", "LICENSE-2.0",
    "MODEL_LICENSE", "NOTICE", "Notice.txt", "Third_Party_Notices.md", "USE_POLICY.md", "USAGE_POLICY",
    "ACCEPTABLE_USE_POLICY.txt", "COPYING", "COPYRIGHT", "TERMS_OF_USE.html", "Tongyi Qianwen LICENSE AGREEMENT",
    "Community License for Baichuan2 Model.pdf",
]  # fmt: skip
NO_TERMS = [
    "README.md", "license.py", "LICENSE.bin", "notices.safetensors", "licensed.txt", "unnoticed.md", "terms.txt",
    "docs/LICENSE", "config.json", "use_cache.txt", "license.json",
]  # fmt: skip


@pytest.mark.parametrize("name", TERMS)
def test_a_text_of_terms_goes_with_the_model_whatever_it_is_called(name: str) -> None:
    assert is_licence_file(name)
    assert is_released(name)
    assert is_kept(name)


@pytest.mark.parametrize("name", NO_TERMS)
def test_what_only_sounds_like_terms_is_no_licence_file(name: str) -> None:
    assert not is_licence_file(name)


@given(name=st.sampled_from(TERMS), upper=st.booleans())
def test_the_case_of_a_name_decides_nothing(name: str, upper: bool) -> None:
    assert is_licence_file(name.upper() if upper else name.lower())


@given(
    ending=st.sampled_from([".bin", ".pt", ".pth", ".pkl", ".ckpt", ".joblib", ".py", ".so", ".exe", ".gguf"]),
    name=st.sampled_from([*TERMS, "tokenizer", "tokenizer.model.v3", f"{NAMED_TEMPLATES}/tool_use"]),
)
def test_nothing_that_could_run_is_released(name: str, ending: str) -> None:
    assert not is_released(f"{name}{ending}")


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [
        ("tokenizer.json", True),
        ("tokenizer.model", True),
        ("tokenizer.model.v11", True),
        ("qwen.tiktoken", True),
        (f"{NAMED_TEMPLATES}/tool_use.jinja", True),
        (f"{NAMED_TEMPLATES}/deeper/tool_use.jinja", False),
        ("other/tokenizer.json", False),
        ("generation_config.json", False),
        ("model.model", False),
    ],
)
def test_a_file_of_the_tokenizer_is_told_by_its_whole_path(name: str, tokenizer: bool) -> None:
    assert is_tokenizer_file(name) is tokenizer


def test_files_are_found_and_copied_as_the_hubs_cache_has_them(tmp_path: Path) -> None:
    """There every file is a link to one elsewhere, named by its digest."""
    source, target = tmp_path / "snapshot", tmp_path / "copied"
    (source / NAMED_TEMPLATES).mkdir(parents=True)
    target.mkdir()
    for n, name in enumerate(("LICENSE", f"{NAMED_TEMPLATES}/tool_use.jinja", "model.py")):
        (tmp_path / f"blob-{n}").write_bytes(name.encode())
        (source / name).symlink_to(tmp_path / f"blob-{n}")
    (source / "NOTICE").mkdir()  # A folder is no file.
    assert found(source, is_released) == ["LICENSE", f"{NAMED_TEMPLATES}/tool_use.jinja"]
    copy_files(source, target, is_released)
    assert found(target, lambda _: True) == found(source, is_released)
    assert (target / "LICENSE").read_bytes() == b"LICENSE"
    assert not (target / "LICENSE").is_symlink()
