"""Which feedback a release goes back to, and which releases a row of feedback touched.

Read from the artefacts of a pipeline alone: a manifest names the digest of everything that its artefact was made from,
and a dataset keeps, with every pair, the file and the row that it was read from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_assets.artifact import Artifact, ArtifactTree
from dpo_assets.errors import ConfigError
from dpo_assets.feedback.batches import INDEX, PAIRS
from dpo_assets.feedback.dataset import Split, is_whole, read_split
from dpo_assets.feedback.library import BATCH_KIND, PAIRED_KIND

if TYPE_CHECKING:
    import polars as pl

PUBLISHED, DATASET, RAW = "published_model", "dpo_dataset", "raw_preferences"
TRAINED_ON = "trained on"
USES: dict[str, Split] = {TRAINED_ON: "train", "held out": "eval"}
COLUMNS = ("pair_id", "source", "row", "line", "row_hash")
NAMED_BY = ("pair_id", "row_hash", "row", "source")  # What a row may be asked for by; a source names all its rows.


@dataclass(frozen=True)
class TracedRelease:
    """A release, and the datasets that it and every model it was made from go back to.

    Attributes:
        datasets: by digest.
        own: digest of the one that the release itself is of; the others are of its SFT checkpoint, or of a release
            that it went on from.
        gone: digests of datasets that are not in the store any more, or not with all their batches, so that their rows
            cannot be named.
    """

    artifact: Artifact
    datasets: Mapping[str, Artifact]
    own: str
    gone: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.artifact.fingerprint

    @cached_property
    def rows(self) -> pl.DataFrame:
        """Every pair of its datasets once a use: COLUMNS, and `use`, one of USES."""
        return rows_of(self.datasets, self.own)

    def touched_by(self, name: str) -> pl.DataFrame:
        """Its rows of that pair id, row hash, row or source."""
        import polars as pl

        return self.rows.filter(pl.any_horizontal(pl.col(column) == name for column in NAMED_BY))


def rows_of(datasets: Mapping[str, Artifact], own: str) -> pl.DataFrame:
    """Every pair of some datasets once a use: COLUMNS, and `use`, one of USES.

    Held-out pairs are those of the dataset `own` alone: what an earlier model was once looked at with is in no weight.
    """
    import polars as pl

    empty = pl.DataFrame(schema={name: pl.Int64 if name == "line" else pl.String for name in (*COLUMNS, "use")})
    parts = [
        read_split(dataset.path, split, COLUMNS).with_columns(use=pl.lit(use))
        for digest, dataset in datasets.items()
        for use, split in USES.items()
        if digest == own or use == TRAINED_ON
    ]
    return pl.concat([empty, *parts], how="vertical_relaxed").unique(maintain_order=True)


@dataclass(frozen=True)
class Withdrawn:
    """Rows of an earlier release that a later one was not made from.

    `gone` are no longer in the feedback; `left_out` are, and were rejected, duplicates or left out by the recipe; of
    `unknown` nothing can be told, because feedback that was read is not in the store any more.
    """

    gone: int = 0
    left_out: int = 0
    unknown: int = 0


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
        # Of one content several times, the newest: an older dataset may be of batches that were made again since.
        known = {found.digest: found for kind in kinds for found in reversed([*tree.listed(kind)])}
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

    def withdrawn(self, before: str, inputs: Mapping[str, str]) -> Withdrawn | None:
        """What became of the rows of the staged release of that fingerprint, in one that is made from `inputs`.

        Args:
            inputs: digests by node, as a manifest keeps them.

        Returns:
            None where that release, or a dataset of it, is not in the store any more.
        """
        import polars as pl

        earlier = next((one for one in self.releases if one.name == before), None)
        if earlier is None or earlier.gone:
            return None
        now = self._there(dict.fromkeys(self._behind(inputs)))
        there = rows_of(now, inputs.get(DATASET, ""))["pair_id"]
        missing = earlier.rows.unique("pair_id").filter(~pl.col("pair_id").is_in(there.implode()))
        if not missing.height:
            return Withdrawn()
        newest = self._by_digest.get(inputs.get(DATASET, ""))
        still = self.in_feedback(missing, newest.manifest.inputs.get(RAW, "") if newest is not None else "")
        if still is None:
            return Withdrawn(unknown=missing.height)
        return Withdrawn(gone=missing.height - int(still.sum()), left_out=int(still.sum()))

    def withdrawn_since(self, name: str) -> int | None:
        """Pairs behind the staged release of that fingerprint whose rows the feedback that was read last has no more.

        Returns:
            None where that release, a dataset of it, or that feedback is not in the store any more.
        """
        release = next((one for one in self.releases if one.name == name), None)
        if release is None or release.gone:
            return None
        pairs = release.rows.unique("pair_id")
        there = self.in_feedback(pairs)
        return None if there is None else pairs.height - int(there.sum())

    def in_feedback(self, rows: pl.DataFrame, raw: str | None = None) -> pl.Series | None:
        """Whether each of these rows is in the feedback as it was read last, or in the one of the digest `raw`.

        A row is the same by the bytes that were read, or where it was made of several, by its file and id: what was
        edited was withdrawn.

        Returns:
            None where that feedback, or a batch of it, is not in the store any more.
        """
        import polars as pl

        read = next(self.tree.listed(RAW), None) if raw is None else self._by_digest.get(raw)
        if read is None or not (read.path / INDEX).is_file():
            return None
        index = read.json(INDEX)
        batches = [(BATCH_KIND, one["batch"]) for file in index["files"] for one in file["batches"]]
        if index.get("paired"):
            batches.append((PAIRED_KIND, index["paired"]["batch"]))
        folders = [self.tree.directory(kind, name) for kind, name in batches]
        if not all((folder / PAIRS).is_file() for folder in folders):
            return None
        columns = ["row_hash", "source", "row"]
        there = pl.concat([pl.read_parquet(folder / PAIRS, columns=columns) for folder in folders])
        key = pl.struct("source", "row")
        whole = pl.col("row_hash").is_not_null()
        same = pl.col("row_hash").is_in(there["row_hash"].drop_nulls().implode())
        named = key.is_in(there.select(key.alias("key"))["key"].implode())
        return rows.select(found=pl.when(whole).then(same).otherwise(named))["found"]

    def with_withdrawn(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The rows with a column `withdrawn`: `yes` where the feedback that was read last has them no more, `no`, or
        `unknown`."""
        import polars as pl

        there = self.in_feedback(rows)
        if there is None:
            return rows.with_columns(withdrawn=pl.lit("unknown"))
        return rows.with_columns(withdrawn=pl.when(there).then(pl.lit("no")).otherwise(pl.lit("yes")))

    def _traced(self, release: Artifact) -> TracedRelease:
        digests = dict.fromkeys(self._behind(release.manifest.inputs))
        there = self._there(digests)
        gone = tuple(digest for digest in digests if digest not in there)
        return TracedRelease(release, there, next(iter(digests), ""), gone)

    def _there(self, digests: Iterable[str]) -> dict[str, Artifact]:
        """The datasets of these digests whose rows can be read."""
        found = {digest: self._by_digest[digest] for digest in digests if digest in self._by_digest}
        return {digest: dataset for digest, dataset in found.items() if is_whole(dataset.path)}

    def _behind(self, inputs: Mapping[str, str]) -> Iterator[str]:
        """Digests of datasets behind what was made from `inputs`, its own before others: an SFT checkpoint may be of
        an earlier one than the adapter is, and so is a release that it went on from."""
        waiting, seen = list(inputs.items()), set[str]()
        while waiting:
            kind, digest = waiting.pop(0)
            if digest in seen:
                continue
            seen.add(digest)
            if kind == DATASET:
                yield digest
            elif digest in self._by_digest:  # A part of an artefact has a digest of its own, and no artefact.
                waiting += self._by_digest[digest].manifest.inputs.items()
