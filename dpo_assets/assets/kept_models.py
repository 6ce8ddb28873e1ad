"""What the models in a pipeline's store were trained on, and what of it a split must leave in train."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from dpo_assets.artifact import Artifact, ArtifactTree, write_json
from dpo_assets.errors import ConfigError
from dpo_assets.feedback.trained import TRAIN_SPLIT, TRAINED_GROUPS, bound_to_train, groups_digest, trained_groups

TRAINED_KINDS = ("sft_checkpoint", "dpo_adapter")
KEPT_SPLITS = Path("cache") / "splits"


def bound_by_models(tree: ArtifactTree, fraction: float, seed: int) -> frozenset[str]:
    """The groups that this split would hold out, and that any kept model, green or red, was trained on.

    Raises:
        ConfigError: where a model is kept whose training pairs nobody can name any more.
    """
    # Many models share one training set: by digest, each is looked at once.
    return frozenset().union(*(_bound(tree, *one, fraction, seed) for one in _training_sets(tree).items()))


def forget_splits(tree: ArtifactTree) -> int:
    """Deletes what was worked out for models that are gone, and returns how many files that were."""
    try:
        needed = _training_sets(tree)
    except ConfigError:  # Of a model that the next dataset will complain about.
        return 0
    gone = [path for path in (tree.root / KEPT_SPLITS).glob("*.json") if path.name.partition("-")[0] not in needed]
    for path in gone:
        path.unlink(missing_ok=True)
    return len(gone)


def _training_sets(tree: ArtifactTree) -> dict[str, Path]:
    return dict(
        found for kind in TRAINED_KINDS for model in tree.listed(kind) if (found := trained_record(tree, model))
    )


def trained_record(tree: ArtifactTree, model: Artifact) -> tuple[str, Path] | None:
    """A digest of the training set of a model, and the table whose `group_id` holds it; None for an adopted base.

    Raises:
        ConfigError: when neither the model's own record nor its dataset is there.
    """
    dataset = model.manifest.inputs.get("dpo_dataset")
    if dataset is None:
        return None
    record = model.path / TRAINED_GROUPS
    if TRAINED_GROUPS in model.manifest.files and record.is_file():
        return model.manifest.files[TRAINED_GROUPS].sha256, record
    for told in tree.listed("dpo_dataset"):  # A model from before models kept the record.
        if told.digest == dataset and (told.path / TRAIN_SPLIT).is_file():
            return dataset, told.path / TRAIN_SPLIT
    raise ConfigError(
        f"{model.path} holds a model without a record of the pairs it was trained on, and its dataset "
        f"({dataset[:12]}) is gone: no split could keep those pairs out of the held-out ones. Move the folder out of "
        "the store if the model is not in use, or put the dataset back."
    )


def _bound(tree: ArtifactTree, digest: str, table: Path, fraction: float, seed: int) -> frozenset[str]:
    """Worked out once: a million groups are read and drawn for each model, but not at each refresh.

    What is not what was kept is worked out again: a group that is missing here could be held out.
    """
    known = tree.root / KEPT_SPLITS / f"{digest}-{fraction!r}-{seed}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(known.read_text(encoding="utf-8"))
        if kept["digest"] == groups_digest(kept["groups"]):
            return frozenset(kept["groups"])
    found = bound_to_train(trained_groups(table), fraction, seed)
    known.parent.mkdir(parents=True, exist_ok=True)
    partial = known.with_suffix(f".tmp-{os.getpid()}")
    write_json(partial, {"groups": sorted(found), "digest": groups_digest(found)})
    partial.replace(known)
    return found
