"""`dpo-assets`: the demo, and the recipe with all its defaults."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo_assets.errors import DpoAssetsError
from dpo_assets.recipe import Recipe, Section
from dpo_assets.version import __version__

BREAK_NAMES = ("learning-rate", "beta", "reference", "data")
PIPED_WIDTH = 140  # Columns where there is no terminal to ask.
GUARD_SILENT = 3  # Exit status when a run was broken on purpose and the check that should stop it did not.


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 when everything held, 1 when a run went red, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="dpo-assets", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="run the whole pipeline on real data on this machine")
    demo.add_argument("--json", action="store_true", help="print the summary as JSON")
    demo.add_argument("--break", dest="fault", choices=BREAK_NAMES, help="break the run, to see which check stops it")
    demo.add_argument(
        "--chat", action="store_true", help="with SmolLM2-135M-Instruct, a real assistant (make demo-chat)"
    )
    commands.add_parser("recipe", help="print every field of a recipe with its default and meaning, as YAML")
    args = parser.parse_args(argv)
    try:
        return _demo(args) if args.command == "demo" else _recipe()
    except DpoAssetsError as error:
        print(error, file=sys.stderr)
        return 1


def _demo(args: argparse.Namespace) -> int:
    # Imported here: `dpo-assets recipe` should not wait for Dagster.
    from rich.console import Console

    from dpo_assets.demo.breaks import BREAKS
    from dpo_assets.demo.render import show_break, show_summary
    from dpo_assets.demo.run import prepare_home, run_job
    from dpo_assets.demo.summary import summarise

    # The bar goes to standard error, so that `--json` leaves standard output to the JSON.
    console = Console(stderr=args.json)
    if not console.is_terminal:
        console = Console(stderr=args.json, width=PIPED_WIDTH)
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


def _recipe() -> int:
    print("# Every field of a DpoPipeline. Values are defaults; `...` must be given.")
    print("type: dpo_assets.DpoPipeline\n\nattributes:\n  name: ... # Prefix of every asset, job, schedule and sensor.")
    for line in recipe_lines(Recipe):
        print(line)
    return 0


def recipe_lines(section: type[Section], indent: int = 2) -> Iterator[str]:
    """The fields of a section as commented YAML."""
    for name, info in section.model_fields.items():
        pad = " " * indent
        nested = info.annotation if isinstance(info.annotation, type) and issubclass(info.annotation, Section) else None
        if nested is not None:
            yield f"{pad}{name}: # {(nested.__doc__ or '').strip().splitlines()[0]}"
            yield from recipe_lines(nested, indent + 2)
        else:
            yield f"{pad}{name}: {_plain(info.get_default(call_default_factory=True))} # {info.description}"


def _plain(value: Any) -> str:
    from pydantic_core import PydanticUndefined

    if value is PydanticUndefined:
        return "..."
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return str(Path(value)) if isinstance(value, Path) else str(value)


if __name__ == "__main__":
    sys.exit(main())
