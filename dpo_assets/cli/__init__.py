"""`dpo-assets`: the demo, plans for any card, known models, where feedback went, releases, what may go, the recipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dpo_assets.cli.commands import Commands
from dpo_assets.cli.console import open_console
from dpo_assets.cli.plan import add_plan
from dpo_assets.cli.recipes import add_recipe
from dpo_assets.cli.stores import add_provenance, add_releases, add_retention
from dpo_assets.errors import DpoAssetsError
from dpo_assets.version import __version__

BREAK_NAMES = ("learning-rate", "beta", "reference", "data")
GUARD_SILENT = 3  # Exit status when a run was broken on purpose and the check that should stop it did not.


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 when everything held, 1 when a run went red, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="dpo-assets", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_demo, add_plan, _add_models, add_provenance, add_retention, add_releases, add_recipe):
        add(commands)
    args = parser.parse_args(argv)
    try:
        status: int = args.does(args)
    except DpoAssetsError as error:
        print(error, file=sys.stderr)
        return 1
    return status


def _add_demo(commands: Commands) -> None:
    demo = commands.add_parser("demo", help="run the whole pipeline on real data on this machine")
    demo.add_argument("--json", action="store_true", help="print the summary as JSON")
    demo.add_argument("--break", dest="fault", choices=BREAK_NAMES, help="break the run, to see which check stops it")
    demo.add_argument(
        "--chat", action="store_true", help="with SmolLM2-135M-Instruct, a real assistant (make demo-chat)"
    )
    demo.set_defaults(does=_demo)


def _add_models(commands: Commands) -> None:
    models = commands.add_parser("models", help="which models there are engines for, and why not")
    models.add_argument("--markdown", action="store_true", help="print docs/models.md")
    models.set_defaults(does=_models)


def _demo(args: argparse.Namespace) -> int:
    # Imported here: `dpo-assets recipe` should not wait for Dagster.
    from dpo_assets.demo.breaks import BREAKS
    from dpo_assets.demo.render import show_break, show_summary
    from dpo_assets.demo.run import prepare_home, run_job
    from dpo_assets.demo.summary import summarise

    # The bar goes to standard error, so that `--json` leaves standard output to the JSON.
    console = open_console(stderr=args.json)
    home = prepare_home()
    pipeline = "chat" if args.chat else "demo"
    fault = BREAKS[args.fault] if args.fault else None
    ops = fault.run_config(pipeline, home) if fault else {}
    instance, run_id = run_job(pipeline, ops, home, console)
    summary = summarise(instance, run_id)
    if args.json:
        print(summary.as_json())
    if fault:
        return 1 if show_break(args.fault, fault, summary, console) else GUARD_SILENT
    show_summary(summary, console, answers=4 if args.chat else 0)
    return 0 if summary.holds else 1


def _models(args: argparse.Namespace) -> int:
    from rich.table import Table

    from dpo_assets.planning.support import ENGINES, markdown, supported

    if args.markdown:
        sys.stdout.write(markdown())
        return 0
    grid = Table("model type", "models", *ENGINES, "why not")
    for row in supported():
        grid.add_row(row.family, row.models, *row.engines.values(), "; ".join(row.reasons))
    console = open_console()
    console.print(grid)
    console.print("`rows`, the model's own forward, computes these and every other causal language model.")
    return 0
