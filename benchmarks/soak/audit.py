"""What must be so after a refresh, whatever the feedback did: rows, leftovers, processes, storage, promotions.

Each function returns what is wrong, a sentence each; nothing found is an empty list.
"""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import psutil

from benchmarks.soak.inbox import Expected, Pair
from dpo_assets import score_file
from dpo_assets.artifact import READING, Artifact, ArtifactTree, is_fingerprint
from dpo_assets.assets.kept_models import KEPT_SPLITS, TRAINED_KINDS
from dpo_assets.assets.materialisations import FINGERPRINT
from dpo_assets.assets.retention import SCORED
from dpo_assets.checks.evidence.ledger import Ledger, Released
from dpo_assets.checks.evidence.spending import ALPHA
from dpo_assets.feedback.batches import INDEX
from dpo_assets.feedback.dataset import SPLITS, read_split
from dpo_assets.leftovers import TRASH
from dpo_assets.locks import LOCK, OWNER, if_nobodys
from dpo_assets.recipe import RetentionSection
from dpo_assets.retention import CHECKPOINTS, MAY_GO

if TYPE_CHECKING:
    import polars as pl

ROUNDING = 1e-9
LAST = ("reward_model", "tokens", "gguf_model", "published_model")  # Kinds that nothing kept was made from.
PASSING = (TRASH, READING, CHECKPOINTS)  # Folders whose folders are there while somebody is at work.


@dataclass(frozen=True)
class Refreshed:
    """A run of the refresh job, by the artefacts that it materialised."""

    run: dg.DagsterRun
    made: Mapping[str, Artifact]
    metadata: Mapping[str, Mapping[str, Any]]
    red: tuple[str, ...]  # Blocking checks that failed.

    @classmethod
    def of(cls, instance: dg.DagsterInstance, run: dg.DagsterRun, tree: ArtifactTree) -> Refreshed:
        made, metadata, red = {}, {}, []
        for entry in instance.all_logs(run.run_id):
            event = entry.dagster_event
            if event is None:
                continue
            if event.event_type_value == "ASSET_MATERIALIZATION":
                materialised = event.step_materialization_data.materialization
                node = materialised.asset_key.path[-1]
                metadata[node] = {name: value.value for name, value in materialised.metadata.items()}
                found = tree.find(node, str(metadata[node][FINGERPRINT]))
                if found is None and node == "quarantined_preferences":
                    found = tree.find("dpo_dataset", str(metadata[node][FINGERPRINT]))
                if found is not None:
                    made[node] = found
            if event.event_type_value == "ASSET_CHECK_EVALUATION":
                check = event.asset_check_evaluation_data
                if not check.passed and check.blocking and check.severity == dg.AssetCheckSeverity.ERROR:
                    red.append(check.check_name)
        return cls(run, made, metadata, tuple(red))


def wrong_rows(refresh: Refreshed, expected: Expected) -> Iterator[str]:
    """The ledger of what was dropped, held against what the three assets say and against every row of their tables."""
    import polars as pl

    raw = refresh.made.get("raw_preferences")
    if raw is None:
        yield "raw_preferences was not made"
        return
    read = sum(row["rows"] for row in raw.json(INDEX)["files"])
    if read != expected.rows:
        yield f"{expected.rows} rows were dropped and {read} read"
    dataset = refresh.made.get("dpo_dataset")
    if expected.red:
        if expected.red not in refresh.red:
            yield f"{expected.red} did not go red (red: {refresh.red})"
        if dataset is not None or refresh.run.is_success:
            yield f"the gate {expected.red} let a dataset through"
        return
    if dataset is None:
        yield f"no dataset was made (red: {refresh.red})"
        return
    report = dataset.json("report.json")
    sides = {side: read_split(dataset.path, side) for side in SPLITS}
    pairs = Counter(pair for side in sides.values() for pair in _pairs(side))
    if pairs.keys() != expected.accepted or any(count > 1 for count in pairs.values()):
        more, less = pairs.keys() - expected.accepted, expected.accepted - pairs.keys()
        twice = [pair for pair, count in pairs.items() if count > 1]
        yield f"the dataset holds {len(more)} pairs too many, lacks {len(less)}, holds {len(twice)} twice"
    quarantine = pl.read_parquet(dataset.path / "quarantine.parquet")
    conflicts = quarantine.filter(pl.col("reason") == "conflict").height
    if conflicts != expected.conflicts:
        yield f"{expected.conflicts} pairs contradict one another and {conflicts} are set aside for it"
    others = quarantine.filter(pl.col("reason") != "conflict").select("source", "line").rows()
    broken = Counter((Path(source).name, line) for source, line in others)
    if broken.keys() != expected.broken or any(count > 1 for count in broken.values()):
        yield f"{len(expected.broken)} rows are broken, and {sorted(broken.items())[:9]} are in quarantine"
    if report["duplicates"] != expected.duplicates:
        yield f"{expected.duplicates} rows are duplicates, and {report['duplicates']} were counted"
    told = (report["rows_in"], report["accepted"] + report["quarantined"] + report["duplicates"])
    if told != (expected.rows, expected.rows):
        yield f"of {expected.rows} rows the report tells of {told[0]} read and {told[1]} gone somewhere"
    shown = refresh.metadata["quarantined_preferences"]["dagster/row_count"]
    if shown != len(expected.broken) + expected.conflicts:
        yield f"quarantined_preferences shows {shown} rows"
    if shared := set(sides["train"]["prompt_id"]) & set(sides["eval"]["prompt_id"]):
        yield f"{len(shared)} prompts are trained on and held out"


def _pairs(table: pl.DataFrame) -> Iterator[Pair]:
    for prompt, chosen, rejected in table.select("prompt", "chosen", "rejected").iter_rows():
        yield prompt[-1]["content"], chosen[-1]["content"], rejected[-1]["content"]


def wrong_leftovers(tree: ArtifactTree, temporary: Path) -> Iterator[str]:
    """Half-written files and folders, locks that somebody holds, and temporary files, while nothing runs."""
    for path in sorted(tree.root.rglob("*")):
        place = path.relative_to(tree.root)
        unfinished = ".tmp-" in path.name or path.name.endswith((".screened.parquet", ".part", LOCK + OWNER))
        if unfinished or (path.parent.name in PASSING and path.is_dir() and any(path.iterdir())):
            yield f"{place} was left behind"
        elif path.name.endswith(LOCK) and path.is_file():
            with if_nobodys(path) as free:
                if not free:
                    yield f"the lock {place} is held"
            made = path.with_name(path.name.removesuffix(LOCK))
            if is_fingerprint(made.name) and not made.exists():
                yield f"the lock {place} is of nothing"
    for path in temporary.iterdir():
        yield f"{path.name} was left in the temporary folder"


TRACKER = "multiprocessing.resource_tracker"  # Of the code server, which starts runs; one for as long as it lives.


def strangers(home: Path, known: Collection[int]) -> list[str]:
    """Processes that were started under this home and are none of those that stay: runs, workers, what they started."""
    ours, found = {os.getpid(), *(one.pid for one in psutil.Process().parents()), *known}, []
    for process in psutil.process_iter():
        try:
            told = " ".join(process.cmdline())
            tracks = TRACKER in told and process.ppid() in known
            environment = process.environ()
        except psutil.Error:
            continue
        places = (told, environment.get("DAGSTER_HOME", ""), environment.get("TMPDIR", ""))
        if process.pid not in ours and not tracks and any(str(home) in place for place in places):
            found.append(f"process {process.pid} is still there: {told[:160]}")
    return found


def models_beyond(tree: ArtifactTree, rules: RetentionSection, releases: int) -> Iterator[str]:
    """Kinds of which more is kept, after a retention, than the rules name.

    That is the last few, what was decided on last, and of each release that a rollback may want the model and what it
    was held against. Of a kind that others are made from, what those go back to may come to as many again.
    """
    most = rules.keep_models + 1 + 2 * min(releases, rules.keep_releases + 1)
    for kind in MAY_GO:
        count, limit = sum(1 for _ in tree.listed(kind)), most if kind in LAST else 2 * most
        if count > limit:
            yield f"{count} of {kind} are kept; the rules name {limit} at most"
    scores, splits = tree.root / score_file.FILE, list((tree.root / KEPT_SPLITS).glob("*.json"))
    if len(splits) > (models := sum(1 for kind in TRAINED_KINDS for _ in tree.listed(kind))):
        yield f"splits of {len(splits)} training sets are remembered, and {models} models are there"
    if scores.exists():
        with closing(sqlite3.connect(scores)) as db:
            [(scored,)] = db.execute("select count(distinct key) from scores")
        if scored > SCORED * rules.keep_models:
            yield f"scores of {scored} models are kept, and of the last {SCORED * rules.keep_models} they may be"


def wrong_promotions(ledger: Ledger, hub: Any, repo_id: str, alpha: float = ALPHA) -> Iterator[str]:
    """What the gate promises of its decisions so far, and that the Hub hands out what is live."""
    seen: set[str] = set()
    for one in ledger.decisions:
        if again := seen.intersection(one.saw):
            yield f"decision {one.number} looked at {len(again)} conversations that an earlier one had seen"
        seen.update(one.saw)
        best = min((primary.adjusted for primary in one.primaries.values()), default=1.0)
        if one.found and one.level is not None and best > one.level + ROUNDING:
            yield f"decision {one.number} promotes at p {best}, and its level is {one.level}"
        if one.releases and not one.found:
            yield f"decision {one.number} promotes what was not found"
    spent = sum(one.level for one in ledger.decisions if one.level is not None and not one.found)
    if spent > alpha + ROUNDING or abs(spent - ledger.budget().spent) > ROUNDING:
        yield f"{spent} of an error of {alpha} was spent, the ledger says {ledger.budget().spent}"
    if ledger.waiting:
        yield f"{len(ledger.waiting)} decisions that promote were never released"
    releases = [line for line in ledger.lines if isinstance(line, Released)]
    if ledger.live is None:
        return
    repository = hub.repo(repo_id)
    if len(repository.history()) < len(releases):
        yield f"{len(releases)} releases, and the Hub holds {len(repository.history())} commits"
    if repository.tags.get("champion") != ledger.live.commit:
        yield f"live is {ledger.live.commit}, and the Hub's champion {repository.tags.get('champion')}"


@dataclass(frozen=True)
class Measured:
    """What a process that stays takes, without its children: resident bytes, open handles, threads."""

    resident: int
    handles: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Measured:
        process = psutil.Process(pid)
        return cls(process.memory_info().rss, process.num_fds(), process.num_threads())


def bytes_of(folder: Path) -> int:
    """Of all files, a file with several names once."""
    sizes: dict[int, int] = {}
    for at, _, names in os.walk(folder):
        for name in names:
            status = os.lstat(os.path.join(at, name))
            sizes[status.st_ino] = status.st_size
    return sum(sizes.values())
