"""The champion of a pipeline: what its ledger says is live, with everything that scores it again."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_assets.artifact import Artifact, ArtifactTree
from dpo_assets.assets.step import Step
from dpo_assets.checks.evidence.ledger_file import LedgerFile
from dpo_assets.errors import ConfigError


@dataclass(frozen=True)
class Champion:
    """A released policy and what it was made from, each a verified artefact.

    `name` is what the ledger calls it: the digest of `merged`. `start` is the SFT checkpoint that it is scored against.
    """

    name: str
    base: Artifact
    start: Artifact
    adapter: Artifact
    merged: Artifact


def champion_of(step: Step, challenger: str) -> Champion | None:
    """The champion that a challenger (the digest of its merged model) is held against, or None: nothing is live yet.

    The champion itself is held against the one that it was held against when it was released: a refresh in which
    nothing changed finds the scores of then.

    Raises:
        ConfigError: an artefact of the champion is gone from the store or damaged; the ledger does not hold.
    """
    name = LedgerFile.of(step.tree.root).read().opponent(challenger)
    return None if name is None else find_champion(step.tree, name)


def find_champion(tree: ArtifactTree, name: str) -> Champion:
    """The champion of that name, found by the digests that manifests keep of what their artefact was made from.

    Raises:
        ConfigError: an artefact of it is gone from the store or damaged.
    """
    merged = _found(tree, "merged_model", name)
    adapter = _found(tree, "dpo_adapter", merged.manifest.inputs["dpo_adapter"])
    start = _found(tree, "sft_checkpoint", adapter.manifest.inputs["sft_checkpoint"])
    base = _found(tree, "base_model", adapter.manifest.inputs["base_model"])
    return Champion(name, base, start, adapter, merged)


def _found(tree: ArtifactTree, node: str, digest: str) -> Artifact:
    why = f"is gone from {tree.root}"
    for told in tree.listed(node):
        if told.digest == digest:
            if (found := tree.find(node, told.path.name)) is not None:
                return found
            why = tree.missing(node, told.path.name)
    raise ConfigError(
        f"the champion's `{node}` ({digest[:12]}) {why}, so the champion cannot be scored on the held-out "
        "pairs of now. Put the folder back from a backup; or go back to a release whose artefacts are there, "
        "with the rollback job"
    )
