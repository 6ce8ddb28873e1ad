"""Releases to their feedback and back, from the manifests of a store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import polars as pl
import pytest

from dpo_assets.artifact import Artifact, ArtifactTree
from dpo_assets.cli import main
from dpo_assets.errors import ConfigError
from dpo_assets.publishing.trace import Trace


class Store:
    """A pipeline's folder with artefacts of nothing but their lineage."""

    def __init__(self, folder: Path) -> None:
        self.tree, self._made = ArtifactTree(folder), 0

    def add(self, kind: str, inputs: Mapping[str, Artifact | str], files: Mapping[str, pl.DataFrame] = {}) -> Artifact:
        self._made += 1

        def build(into: Path) -> None:
            (into / "number").write_text(str(self._made))
            for name, table in files.items():
                table.write_parquet(into / name)

        digests = {name: one if isinstance(one, str) else one.digest for name, one in inputs.items()}
        return self.tree.find_or_build(kind, f"{self._made:032x}", build, digests)[0]

    def dataset(self, train: list[str], held_out: list[str]) -> Artifact:
        return self.add("dpo_dataset", {}, {"train.parquet": pairs(train), "eval.parquet": pairs(held_out)})

    def released(self, dataset: Artifact, sft: Artifact | None = None) -> Artifact:
        inputs = {"dpo_dataset": dataset, "dpo_plan": "a part of a plan"}
        adapter = self.add("dpo_adapter", inputs | ({"sft_checkpoint": sft} if sft else {}))
        merged = self.add("merged_model", {"dpo_adapter": adapter})
        return self.add("published_model", {"merged_model": merged, "dpo_adapter": adapter})


def pairs(names: list[str]) -> pl.DataFrame:
    rows = [
        {"pair_id": f"pair-{name}", "source": f"{name[0]}.jsonl", "row": name, "line": 1, "row_hash": f"hash-{name}"}
        for name in names
    ]
    return pl.DataFrame(rows).with_columns(prompt=pl.lit("more columns"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "pipeline")


def used(rows: pl.DataFrame) -> set[tuple[str, str]]:
    return set(rows.select("row", "use").iter_rows())


def test_a_release_goes_back_to_every_row_of_its_dataset_and_of_its_sft_checkpoints(store: Store) -> None:
    earlier, dataset = store.dataset(["a1", "b1"], ["b2"]), store.dataset(["a1", "a2"], ["b2"])
    sft = store.add("sft_checkpoint", {"dpo_dataset": earlier})
    release = store.released(dataset, sft)
    found = Trace.of(store.tree.root).release(release.fingerprint)
    assert set(found.datasets) == {earlier.digest, dataset.digest}
    assert used(found.rows) == {
        ("a1", "trained on"), ("a2", "trained on"), ("b1", "trained on"), ("b2", "held out")
    }  # fmt: skip
    assert found.rows.height == 4
    assert found.gone == ()


@pytest.mark.parametrize("name", ["pair-a1", "hash-a1", "a1"])
def test_a_row_is_found_in_every_release_that_it_touched_and_in_no_other(store: Store, name: str) -> None:
    first, second = store.released(store.dataset(["a1", "b1"], ["a2"])), store.released(store.dataset(["b1"], ["a1"]))
    store.released(store.dataset(["b1"], ["a2"]))
    touched = {r.name: used(found) for r in Trace.of(store.tree.root).releases if (found := r.touched_by(name)).height}
    assert touched == {first.fingerprint: {("a1", "trained on")}, second.fingerprint: {("a1", "held out")}}


def test_a_source_names_all_its_rows(store: Store) -> None:
    store.released(store.dataset(["a1", "b1"], ["a2"]))
    [release] = Trace.of(store.tree.root).releases
    assert used(release.touched_by("a.jsonl")) == {("a1", "trained on"), ("a2", "held out")}


def test_a_dataset_that_is_gone_is_said_and_not_passed_over(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    release = store.released(store.dataset(["a1"], ["a2"]))
    folder = next((store.tree.root / "dpo_dataset").glob("*/manifest.json")).parent
    folder.rename(store.tree.root.parent / "elsewhere")
    found = Trace.of(store.tree.root).release(release.fingerprint)
    assert len(found.gone) == 1
    assert found.rows.height == 0
    for asked in (["--release", release.fingerprint], ["--row", "a1"]):
        assert main(["provenance", str(store.tree.root), *asked]) == 1
        assert "not in the store any more" in capsys.readouterr().out


def test_a_name_of_no_release_or_of_several_is_refused_with_those_that_there_are(store: Store) -> None:
    one, two = (store.released(store.dataset([name], ["b1"])) for name in ("a1", "a2"))
    trace = Trace.of(store.tree.root)
    for name, number in (("f", 0), ("0", 2)):
        with pytest.raises(ConfigError, match=f"^{number} releases are called {name}") as refused:
            trace.release(name)
        assert one.fingerprint in str(refused.value)
        assert two.fingerprint in str(refused.value)


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_that_is_no_store_of_a_pipeline_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no artefact"):
        Trace.of(tmp_path / name)


def test_the_command_lists_releases_their_rows_and_the_releases_of_a_row(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    release = store.released(store.dataset(["a1", "b1"], ["a2"]))
    folder = str(store.tree.root)
    assert main(["provenance", folder]) == 0
    assert release.fingerprint in capsys.readouterr().out
    assert main(["provenance", folder, "--release", release.fingerprint]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("a1", "b1", "a2", "trained on", "held out"))
    assert main(["provenance", folder, "--row", "hash-b1"]) == 0
    assert release.fingerprint in capsys.readouterr().out
    assert main(["provenance", folder, "--row", "unheard of"]) == 0
    assert "touched no release" in capsys.readouterr().out
