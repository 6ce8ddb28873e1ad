"""A pair that a kept model was trained on stays in train when the split's fraction or seed changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from dpo_assets.artifact import ArtifactTree, fingerprint, write_json
from dpo_assets.assets import kept_models
from dpo_assets.assets.kept_models import bound_by_models, forget_splits
from dpo_assets.errors import ConfigError
from dpo_assets.feedback.dataset import read_split
from dpo_assets.feedback.splits import in_eval_split
from dpo_assets.feedback.trained import TRAINED_GROUPS, write_trained_groups
from dpo_assets_tests.pipelines import failures, materialize, metadata, trl_feedback, trl_recipe


def train_on(tree: ArtifactTree, dataset: dict[str, Any], kind: str = "dpo_adapter") -> Path:
    """A model of the store as far as splits know it: what the worker leaves of what it was trained on."""

    def work(folder: Path) -> None:
        write_trained_groups(Path(dataset["path"]), folder)

    inputs = {"dpo_dataset": dataset["digest"]}
    return tree.find_or_build(kind, fingerprint(kind, {}, inputs), work, inputs)[0].path


def groups(dataset: dict[str, Any], side: str) -> set[str]:
    return set(read_split(Path(dataset["path"]), "eval" if side == "eval" else "train", ["group_id"])["group_id"])


def test_a_new_seed_and_fraction_hold_out_nothing_that_a_kept_model_was_trained_on(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    path = trl_feedback(tmp_path / "votes.jsonl", pairs=150)

    def dataset(*others: str, **split: Any) -> dict[str, Any]:
        result = materialize(trl_recipe(path, eval_fraction=0.3, **split), instance, [*others, "dpo_dataset"])
        assert result.success, failures(result)
        return metadata(result, "dpo_dataset")

    first = dataset("base_model", "raw_preferences")
    untrained = dataset(seed=1)
    assert groups(untrained, "eval") & groups(first, "train"), "nothing was trained yet, so every group may move"

    tree = ArtifactTree(Path(instance.storage_directory()) / "dpo_assets" / "demo")
    train_on(tree, first)
    assert dataset()["digest"] == first["digest"]
    moved = dataset(seed=1)
    stayed = groups(first, "train") & groups(untrained, "eval")
    assert groups(moved, "eval") == groups(untrained, "eval") - stayed
    assert groups(moved, "train") == groups(untrained, "train") | stayed
    assert moved["kept_in_train"].startswith(f"{len(stayed)} pairs that this eval_fraction and seed would hold out")
    assert moved["digest"] != untrained["digest"]

    train_on(tree, moved)
    again = dataset(seed=1)
    assert again["reused"] != "no", "a training on it makes no new dataset"
    assert again["digest"] == moved["digest"]
    # The first seed again: what the second model saw of its held-out pairs stays in train now.
    assert not groups(dataset(), "eval") & groups(moved, "train")


@pytest.fixture
def tree(tmp_path: Path) -> ArtifactTree:
    return ArtifactTree(tmp_path / "store")


def kept_dataset(tree: ArtifactTree, count: int = 40) -> dict[str, Any]:
    def fill(folder: Path) -> None:
        pl.DataFrame({"group_id": [f"{n:032x}" for n in range(count)]}).write_parquet(folder / "train.parquet")

    made, _ = tree.find_or_build("dpo_dataset", fingerprint("dpo_dataset", count, {}), fill, {})
    return {"path": str(made.path), "digest": made.digest}


def drawn(count: int, fraction: float, seed: int) -> set[str]:
    return {group for n in range(count) if in_eval_split(group := f"{n:032x}", fraction, seed)}


@pytest.mark.parametrize("kind", ["sft_checkpoint", "dpo_adapter"])
def test_every_kind_of_trained_model_binds_its_pairs(tree: ArtifactTree, kind: str) -> None:
    train_on(tree, kept_dataset(tree), kind)
    assert bound_by_models(tree, 0.3, 0) == drawn(40, 0.3, 0)


def test_an_adopted_base_binds_nothing(tree: ArtifactTree) -> None:
    kept_dataset(tree)
    tree.find_or_build("sft_checkpoint", "0" * 32, lambda f: write_json(f / "report.json", {}), {"base_model": "b"})
    assert bound_by_models(tree, 0.3, 0) == frozenset()


def test_a_model_outlives_its_dataset(tree: ArtifactTree) -> None:
    dataset = kept_dataset(tree)
    train_on(tree, dataset)
    Path(dataset["path"]).rename(tree.root / "gone")
    assert bound_by_models(tree, 0.3, 0) == drawn(40, 0.3, 0)


def test_a_model_without_a_record_is_known_by_its_dataset_and_without_either_it_is_named(tree: ArtifactTree) -> None:
    dataset = kept_dataset(tree)
    inputs = {"dpo_dataset": dataset["digest"]}
    model, _ = tree.find_or_build("dpo_adapter", "0" * 32, lambda f: write_json(f / "report.json", {}), inputs)
    assert not (model.path / TRAINED_GROUPS).exists()
    assert bound_by_models(tree, 0.3, 0) == drawn(40, 0.3, 0)
    Path(dataset["path"]).rename(tree.root / "gone")
    with pytest.raises(ConfigError, match=f"{model.path} holds a model without a record .* Move the folder out"):
        bound_by_models(tree, 0.3, 0)


def test_a_refresh_with_the_same_split_reads_no_training_set_again(
    tree: ArtifactTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in (40, 50):
        train_on(tree, kept_dataset(tree, count))
    first = bound_by_models(tree, 0.3, 0)
    monkeypatch.setattr(kept_models, "trained_groups", lambda table: pytest.fail(f"{table} was read again"))
    assert bound_by_models(tree, 0.3, 0) == first == drawn(50, 0.3, 0)
    assert len(list((tree.root / "cache" / "splits").iterdir())) == 2
    assert all(json.loads(file.read_text()) for file in (tree.root / "cache" / "splits").iterdir())


@pytest.mark.parametrize("damage", ["cut", "a group less", "of an earlier version"])
def test_a_damaged_list_of_groups_is_worked_out_again(tree: ArtifactTree, damage: str) -> None:
    """A group that is missing there could be held out, though a model was trained on it."""
    train_on(tree, kept_dataset(tree))
    assert bound_by_models(tree, 0.3, 0) == drawn(40, 0.3, 0)
    [known] = (tree.root / "cache" / "splits").iterdir()
    text, kept = known.read_text(), json.loads(known.read_text())
    changed = {
        "cut": text[: len(text) // 2],
        "a group less": json.dumps(kept | {"groups": kept["groups"][1:]}),
        "of an earlier version": json.dumps(kept["groups"][1:]),
    }
    known.write_text(changed[damage])
    assert bound_by_models(tree, 0.3, 0) == drawn(40, 0.3, 0)
    assert known.read_text() == text


def test_what_was_worked_out_for_a_model_goes_once_the_model_is_gone(tmp_path: Path) -> None:
    tree, paths = ArtifactTree(tmp_path), []
    for n in range(2):
        dataset = tmp_path / "datasets" / str(n)
        dataset.mkdir(parents=True)
        pl.DataFrame({"group_id": [f"{n:032x}"]}).write_parquet(dataset / "train.parquet")
        paths.append(train_on(tree, {"path": str(dataset), "digest": str(n)}))
    bound = bound_by_models(tree, 0.99, 0)
    assert forget_splits(tree) == 0
    shutil.rmtree(paths[0])
    assert forget_splits(tree) == 1
    [kept] = (tmp_path / kept_models.KEPT_SPLITS).glob("*.json")
    assert set(json.loads(kept.read_text(encoding="utf-8"))["groups"]) == bound_by_models(tree, 0.99, 0) < bound
