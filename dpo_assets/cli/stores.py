"""What a pipeline's store tells: where feedback went, what was decided and released, and what may go."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from dpo_assets.cli.commands import Commands
from dpo_assets.cli.console import open_console
from dpo_assets.cli.recipes import declared, recipe_of
from dpo_assets.errors import ConfigError


def add_provenance(commands: Commands) -> None:
    """The command `provenance`."""
    parser = commands.add_parser("provenance", help="which feedback a release goes back to, and where a row went")
    _takes_store(parser)
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--release", metavar="NAME", help="a release's fingerprint, or its beginning: print its rows")
    asked.add_argument("--row", metavar="NAME", help="a pair id, row hash, row or source file: print its releases")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    parser.set_defaults(does=_provenance)


def add_releases(commands: Commands) -> None:
    """The command `releases`."""
    parser = commands.add_parser("releases", help="what was decided, released and rolled back, and what is live")
    _takes_store(parser)
    parser.add_argument("--json", action="store_true", help="print the lines of the ledger as JSON")
    parser.set_defaults(does=_releases)


def add_retention(commands: Commands) -> None:
    """The command `retention`."""
    parser = commands.add_parser("retention", help="what of a pipeline's store may go, and delete it")
    parser.add_argument("--recipe", type=Path, required=True, metavar="FILE", help="the pipeline's defs.yaml")
    parser.add_argument("--store", metavar="FOLDER", help="`root` of the resource `artifacts`, where it has one")
    parser.add_argument("--delete", action="store_true", help="delete what the list shows")
    parser.set_defaults(does=_retention)


def _takes_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, help="a pipeline's artefacts: storage/dpo_assets/NAME of the instance")


def _provenance(args: argparse.Namespace) -> int:
    """Exit status 1 where a dataset is gone, so that rows may be missing from the answer."""
    from rich.table import Table

    from dpo_assets.checks.evidence.ledger_file import LedgerFile
    from dpo_assets.publishing.trace import COLUMNS, Trace

    trace, ledger = Trace.of(args.store), LedgerFile.of(args.store).read()
    releases = trace.releases if args.release is None else [trace.release(args.release)]
    rows = {
        one.name: trace.with_withdrawn(one.rows if args.row is None else one.touched_by(args.row)) for one in releases
    }
    numbers = {one.artefact: one.release for one in ledger.releases}
    live = ledger.live.artefact if ledger.live is not None else None
    gone = {one.name: one.gone for one in releases if one.gone}
    if args.json:
        answer = [
            {
                "release": one.name,
                "number": numbers.get(one.name),
                "live": one.name == live,
                "rows": rows[one.name].to_dicts(),
                "gone": list(one.gone),
            }
            for one in releases
            if args.row is None or rows[one.name].height
        ]
        print(json.dumps(answer, indent=1, ensure_ascii=False))
        return 1 if gone else 0

    def stands(name: str) -> str:
        """Its number among those that were sent, and whether it is live."""
        return f"{numbers[name]}{', live' if name == live else ''}" if name in numbers else "staged only"

    console = open_console()
    if args.release is None and args.row is None:
        grid = Table("release", "number", "trained on", "held out", "withdrawn since")
        for name, table in rows.items():
            uses, left = table["use"].to_list(), table.filter(table["withdrawn"] == "yes")["pair_id"].n_unique()
            grid.add_row(name, stands(name), str(uses.count("trained on")), str(uses.count("held out")), str(left))
    else:
        grid = Table()
        for heading in ("release", "number", "use", "withdrawn", *COLUMNS):
            grid.add_column(heading, overflow="fold")  # Whatever is copied from here must be whole.
        for name, table in rows.items():
            for row in table.select("use", "withdrawn", *COLUMNS).iter_rows():
                grid.add_row(name, stands(name), *map(str, row))
    if grid.row_count:
        console.print(grid)
    elif args.row is not None:
        console.print(f"{args.row} touched no release of {args.store}.", markup=False)
    else:
        console.print(f"{args.store} holds no release.", markup=False)
    for name, digests in gone.items():
        missing = ", ".join(digest[:12] for digest in digests)
        console.print(
            f"{name}: of dataset {missing} nothing can be told: it is not in the store any more.", markup=False
        )
    return 1 if gone else 0


def _releases(args: argparse.Namespace) -> int:
    """Every decision, release and rollback of a pipeline, newest first."""
    from rich.markup import escape
    from rich.table import Table

    from dpo_assets.artifact import without_nan
    from dpo_assets.checks.evidence.ledger_file import LedgerFile
    from dpo_assets.report.history import HISTORY, history_rows

    if not args.store.is_dir():
        raise ConfigError(f"{args.store} is no folder; name a pipeline's artefacts: storage/dpo_assets/NAME")
    ledger = LedgerFile.of(args.store).read()
    if args.json:
        lines = [line.model_dump(mode="json") | {"live": line is ledger.live} for line in reversed(ledger.lines)]
        print(json.dumps(without_nan(lines), indent=1, ensure_ascii=False))
        return 0
    console = open_console()
    if not ledger.lines:
        console.print(f"{args.store} holds no decision on a release.", markup=False)
        return 0
    grid = Table()
    for heading in HISTORY:
        grid.add_column(heading, overflow="fold")
    for row in history_rows(ledger):
        grid.add_row(*map(escape, row))
    console.print(grid)
    return 0


def _retention(args: argparse.Namespace) -> int:
    """What it deletes is what it shows without `--delete`. The Dagster instance is that of DAGSTER_HOME."""
    import dagster as dg
    from rich.table import Table

    from dpo_assets.assets.pipeline import Pipeline
    from dpo_assets.assets.retention import retain
    from dpo_assets.disk import gib
    from dpo_assets.resources.artifacts import ArtifactStore

    if "DAGSTER_HOME" not in os.environ:
        raise ConfigError("set DAGSTER_HOME: the event log of the instance says which artefacts are in use")
    values = declared(args.recipe)
    pipeline = Pipeline(str(values.pop("name", "")), recipe_of(values))
    with dg.DagsterInstance.get() as instance:
        tree = ArtifactStore(root=args.store).tree(instance, pipeline.name)
        if not tree.root.is_dir():
            raise ConfigError(f"there is no store in {tree.root}; name its root with --store")
        found = retain(instance, pipeline, tree, print, really=args.delete)
    console = open_console()
    if args.delete:
        console.print(f"{found.deleted} artefacts{found.also} deleted, {gib(found.freed)} freed.", markup=False)
        return 0
    grid = Table("kind", "artefact", "size", "why")
    for kind, name, size, why in found.rows:
        grid.add_row(kind, name, gib(size), why)
    if grid.row_count:
        console.print(grid)
    console.print(
        f"{len(found.choice.gone)} artefacts{found.also} may go, {gib(found.freed)}; {len(found.choice.kept)} stay. "
        "--delete deletes them.",
        markup=False,
    )
    return 0
