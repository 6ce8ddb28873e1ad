"""Which feedback a release goes back to, and which releases a row of feedback touched.

Read from the artefacts of a pipeline alone: a manifest names the digest of everything that its artefact was made from,
and a dataset keeps, with every pair, the file and the row that it was read from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_assets.artifact import Artifact, ArtifactTree
from dpo_assets.errors import ConfigError

if TYPE_CHECKING:
    import polars as pl

PUBLISHED, DATASET = "published_model", "dpo_dataset"
SPLITS = {"trained on": "train.parquet", "held out": "eval.parquet"}
COLUMNS = ("pair_id", "source", "row", "line", "row_hash")
NAMED_BY = ("pair_id", "row_hash", "row", "source")  # What a row may be asked for by; a source names all its rows.


@dataclass(frozen=True)
class TracedRelease:
    """A release, and the datasets that it and every model it was made from go back to.

    Attributes:
        datasets: by digest.
        gone: digests of datasets that are not in the store any more, so that their rows cannot be named.
    """

    artifact: Artifact
    datasets: Mapping[str, Artifact]
    gone: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.artifact.fingerprint

    @cached_property
    def rows(self) -> pl.DataFrame:
        """Every pair of its datasets once a use: COLUMNS, and `use`, one of SPLITS."""
        import polars as pl

        empty = pl.DataFrame(schema={name: pl.Int64 if name == "line" else pl.String for name in (*COLUMNS, "use")})
        parts = [
            pl.read_parquet(dataset.path / file, columns=list(COLUMNS)).with_columns(use=pl.lit(use))
            for dataset in self.datasets.values()
            for use, file in SPLITS.items()
        ]
        return pl.concat([empty, *parts], how="vertical_relaxed").unique(maintain_order=True)

    def touched_by(self, name: str) -> pl.DataFrame:
        """Its rows of that pair id, row hash, row or source."""
        import polars as pl

        return self.rows.filter(pl.any_horizontal(pl.col(column) == name for column in NAMED_BY))


@dataclass(frozen=True)
class Trace:
    """What the store of one pipeline tells."""

    tree: ArtifactTree
    _by_digest: dict[str, Artifact] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, folder: Path) -> Trace:
        """Of a pipeline's folder of artefacts: `storage/dpo_assets/<pipeline>` of the Dagster instance.

        Raises:
            ConfigError: no artefact lies there.
        """
        tree = ArtifactTree(folder)
        kinds = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        known = {found.digest: found for kind in kinds for found in tree.listed(kind)}
        if not known:
            raise ConfigError(
                f"{folder} holds no artefact of a pipeline; name the folder of one: storage/dpo_assets/<pipeline> in "
                "the folder of the Dagster instance."
            )
        return cls(tree, known)

    @property
    def releases(self) -> list[TracedRelease]:
        """Every release that was staged, newest first."""
        return [self._traced(artifact) for artifact in self.tree.listed(PUBLISHED)]

    def release(self, name: str) -> TracedRelease:
        """The release of a fingerprint, or of its beginning.

        Raises:
            ConfigError: none or several are called that.
        """
        found = [one for one in self.releases if one.name.startswith(name)]
        if len(found) == 1:
            return found[0]
        known = ", ".join(one.name for one in found or self.releases) or "none"
        raise ConfigError(f"{len(found)} releases are called {name}; there are: {known}.")

    def _traced(self, release: Artifact) -> TracedRelease:
        digests = dict.fromkeys(self._datasets(release, set()))
        there = {digest: self._by_digest[digest] for digest in digests if digest in self._by_digest}
        return TracedRelease(release, there, tuple(digest for digest in digests if digest not in there))

    def _datasets(self, artifact: Artifact, seen: set[str]) -> Iterator[str]:
        """Digests of datasets behind an artefact: an SFT checkpoint may be of an earlier one than the adapter is."""
        for kind, digest in artifact.manifest.inputs.items():
            if digest in seen:
                continue
            seen.add(digest)
            if kind == DATASET:
                yield digest
            elif digest in self._by_digest:  # A part of an artefact has a digest of its own, and no artefact.
                yield from self._datasets(self._by_digest[digest], seen)
