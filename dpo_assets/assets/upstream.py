"""The artefacts that a step reads: verified, past their gates, and made from one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from dpo_assets.artifact import Artifact
from dpo_assets.assets.gates import closed_gates
from dpo_assets.assets.lineage import Conflict, Inputs, Lineage, Read, whole
from dpo_assets.assets.materialisations import Materialisations
from dpo_assets.errors import ConfigError

UNLESS_TRAINED = (
    ", unless a model was trained on another split since: its pairs stay in train, which makes another dataset"
)


@dataclass(frozen=True)
class Upstream:
    """What stands above one node, and whether a step may go on from it."""

    node: str
    lineage: Lineage
    made: Materialisations

    def inputs(self, only_checks: bool) -> Inputs:
        """What `Step.inputs` promises; with `only_checks`, what the node's latest artefact was made from."""
        reads = self.lineage.reads(self.node)
        own = self.made.artifact(self.node) if only_checks and reads else None
        found: dict[str, Artifact] = {}
        for read in reads:
            found[read.node] = self._past_its_gates(read, self._recorded(read, own, found) if own else None)
        if conflicts := self.lineage.conflicts(found, self._with_digest):
            raise ConfigError(self._mixed(conflicts))
        return self.lineage.inputs(self.node, found)

    def _recorded(self, read: Read, own: Artifact, found: Mapping[str, Artifact]) -> str | None:
        """The digest of what the artefact whose checks are evaluated again was made from, as far as it is told.

        Where another node chose what was read, it is what that one read itself: the choice is part of it.
        """
        by = found[read.chosen_by] if read.chosen_by else own
        return by.manifest.inputs.get(read.node)

    def _past_its_gates(self, read: Read, recorded: str | None) -> Artifact:
        """The artefact to read: the one of the digest `recorded`, if one is told, or else that of this run."""
        found = self.made.artifact(read.node)
        if recorded is not None and read.part(found) != recorded:
            found = self._kept(read, recorded)
        if failed := closed_gates(found, self.made.pipeline.recipe.checks.severity):
            raise ConfigError(
                f"`{self._shown(read.node)}` did not pass {', '.join(failed)}; mend it before going on from it."
            )
        return found

    def _kept(self, read: Read, recorded: str) -> Artifact:
        """The verified artefact whose part that is read has this digest."""
        tree = self.made.tree
        for told in tree.listed(read.node):
            if read.part is whole and told.digest != recorded:
                continue
            found = tree.find(read.node, told.path.name)
            with suppress(ConfigError):  # One of an earlier version.
                if found is not None and read.part(found) == recorded:
                    return found
        raise ConfigError(
            f"the `{self._shown(read.node)}` that `{self._shown(self.node)}` was made from is no longer kept, so its "
            f"checks cannot be evaluated again; materialise `{self._shown(self.node)}` again."
        )

    def _with_digest(self, node: str, digest: str) -> list[Artifact]:
        return [told for told in self.made.tree.listed(node) if told.digest == digest]

    def _mixed(self, conflicts: Sequence[Conflict]) -> str:
        """What does not fit, and the way out."""
        readers: dict[str, list[str]] = {}
        for one in conflicts:
            readers.setdefault(one.node, []).append(f"`{self._shown(one.reader)}`")
        told = [
            f"{', '.join(found)}: made from another `{self._shown(node)}` than is there now"
            for node, found in readers.items()
        ]
        again = ", ".join(map(self._shown, self.lineage.to_make_again(self.node, conflicts, self.made.told)))
        roots = " and ".join(f"`{self._shown(node)}`" for node in readers)
        return (
            f"what `{self._shown(self.node)}` reads was not made from one another. {'; '.join(told)}. Materialise "
            f"again, in this order: {again}. Or, to keep what was made, give {roots} its earlier settings and inputs "
            f"back and materialise that: it is reused{UNLESS_TRAINED if 'dpo_dataset' in readers else ''}."
        )

    def _shown(self, node: str) -> str:
        return self.made.pipeline.shown(node)
