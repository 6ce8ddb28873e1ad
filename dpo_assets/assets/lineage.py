"""Which node reads which, and whether the artefacts that a step reads were made from one another.

A manifest holds a digest of everything its artefact was made from (`Manifest.inputs`). Whoever reads two artefacts can
so tell whether both go back to the same dataset, the same adapter, the same plan. It knows no Dagster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dpo_assets.artifact import Artifact


def whole(artifact: Artifact) -> str:
    """The digest of all its content."""
    return artifact.digest


@dataclass(frozen=True)
class Read:
    """That a node reads another one.

    `part` is the digest of what it takes from it. A training stage follows the settings of a plan: a plan with other
    steps or another memory estimate, and the same settings, makes no other adapter.

    `chosen_by` names a node, read as well, that says which artefact of this one is read, an earlier one maybe: what was
    made from it may stand beside a later one for as long as the choice is the same.
    """

    node: str
    part: Callable[[Artifact], str] = whole
    chosen_by: str = ""


class Inputs(Mapping[str, Artifact]):
    """The artefacts that one step reads, by node, and the digests that its own artefact keeps of them."""

    def __init__(self, reader: str, artifacts: Mapping[str, Artifact], digests: Mapping[str, str]) -> None:
        self._reader, self._artifacts, self.digests = reader, dict(artifacts), dict(digests)

    @classmethod
    def of(cls, reader: str, artifacts: Mapping[str, Artifact]) -> Inputs:
        """Artefacts that are read as a whole."""
        return cls(reader, artifacts, {node: whole(artifact) for node, artifact in artifacts.items()})

    def __getitem__(self, node: str) -> Artifact:
        if node not in self._artifacts:
            raise KeyError(f"`{self._reader}` does not declare that it reads `{node}`: add it to the node's `reads`")
        return self._artifacts[node]

    def __iter__(self) -> Iterator[str]:
        return iter(self._artifacts)

    def __len__(self) -> int:
        return len(self._artifacts)

    def only(self, *nodes: str) -> Inputs:
        """Some of them: what a result is made from where it does not depend on all that its step reads."""
        kept = {node: self[node] for node in nodes}
        return Inputs(self._reader, kept, {node: self.digests[node] for node in nodes})

    def using(self, node: str, artifact: Artifact) -> Inputs:
        """The same with this artefact of a node, read as a whole: one that was chosen, or gone on from."""
        artifacts, digests = self._artifacts | {node: artifact}, self.digests | {node: whole(artifact)}
        return Inputs(self._reader, artifacts, digests)


@dataclass(frozen=True)
class Conflict:
    """`reader` was made from another `node` (or other settings in it) than the one that stands beside it now."""

    reader: str
    node: str


class Lineage:
    """The reads of every node, in the order of the graph."""

    def __init__(self, reads: Mapping[str, Sequence[Read]]) -> None:
        self._reads = {node: {read.node: read for read in declared} for node, declared in reads.items()}

    def reads(self, node: str) -> Sequence[Read]:
        """What a node declares to read."""
        return tuple(self._reads[node].values())

    def read(self, reader: str, node: str) -> Read:
        """How `reader` reads `node`."""
        return self._reads.get(reader, {}).get(node, Read(node))

    def inputs(self, node: str, artifacts: Mapping[str, Artifact]) -> Inputs:
        """The artefacts that `node` reads, with the digests to keep."""
        digests = {read.node: read.part(artifacts[read.node]) for read in self.reads(node)}
        return Inputs(node, artifacts, digests)

    def conflicts(
        self, artifacts: Mapping[str, Artifact], made: Callable[[str, str], Sequence[Artifact]]
    ) -> list[Conflict]:
        """Where the recorded inputs of these artefacts, and of what those were made from, name two of one node.

        Args:
            artifacts: what a step reads, by node. Whatever else the chain names is compared with these first.
            made: the kept artefacts of a node with a digest, as their manifests tell them. The chain is followed
                through one of them: equal content can come from different inputs, so one that agrees with the rest.
        """
        found: list[Conflict] = []
        walked, waiting = dict(artifacts), list(artifacts.items())
        further: dict[str, str] = {}
        while waiting:
            reader, artifact = waiting.pop(0)
            for node, recorded in artifact.manifest.inputs.items():
                read = self.read(reader, node)
                if read.chosen_by or node == reader:
                    continue  # By what is compared anyway; or an earlier one of its own kind, that it went on from.
                if node in walked:
                    same = read.part(walked[node]) == recorded
                elif read.part is not whole:
                    continue  # Settings that no other artefact of this chain speaks of.
                else:
                    same = further.setdefault(node, recorded) == recorded
                    if same and (equal := made(node, recorded)):
                        walked[node] = next((one for one in equal if self._agrees(node, one, walked)), equal[0])
                        waiting.append((node, walked[node]))
                if not same:
                    found.append(Conflict(reader, node))
        return found

    def _agrees(self, reader: str, artifact: Artifact, others: Mapping[str, Artifact]) -> bool:
        return all(
            self.read(reader, node).part(others[node]) == recorded
            for node, recorded in artifact.manifest.inputs.items()
            if node in others and node != reader and not self.read(reader, node).chosen_by
        )

    def to_make_again(
        self, node: str, conflicts: Sequence[Conflict], latest: Callable[[str], Artifact | None]
    ) -> list[str]:
        """What must be materialised again before `node`, in order, for its inputs to belong together.

        The latest artefacts of the nodes that the conflicts are about count. Below them, whatever was not made from the
        latest is made again, and then what was made from that.
        """
        touched = {conflict.node for conflict in conflicts}
        again: list[str] = []
        for name in self._before(node):
            reads = [read for read in self.reads(name) if read.node in touched]
            artifact = latest(name)
            if artifact is None:
                stale = bool(reads) or name in touched
            else:
                stale = any(self._outdated(artifact, read, again, latest(read.node)) for read in reads)
            if stale:
                again.append(name)
            if reads:
                touched.add(name)
        return again

    def _outdated(self, artifact: Artifact, read: Read, again: Sequence[str], latest: Artifact | None) -> bool:
        recorded = artifact.manifest.inputs.get(read.node)
        if recorded is None:
            return False
        if read.node in again and read.part is whole:
            return True
        # Settings: those of a plan that is made again for other pairs are the same ones. What it will choose is not
        # known, but that it leaves what was made of the latest.
        other = latest is not None and read.part(latest) != recorded
        return other and (not read.chosen_by or read.chosen_by in again)

    def _before(self, node: str) -> list[str]:
        """Everything further up the chain, in the order of the graph."""
        above: set[str] = set()
        waiting = [node]
        while waiting:
            new = {read.node for read in self.reads(waiting.pop())} - above
            above |= new
            waiting += new
        return [name for name in self._reads if name in above]
