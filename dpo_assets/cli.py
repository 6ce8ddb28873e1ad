"""`dpo-assets`: the demo, the plan for any card, and the recipe with all its defaults."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dpo_assets.errors import DpoAssetsError
from dpo_assets.recipe import (
    DpoSection,
    FeedbackSection,
    HardwareSection,
    LoraSection,
    Recipe,
    parse_recipe,
)
from dpo_assets.section import Section
from dpo_assets.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

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
    _plan_arguments(
        commands.add_parser("plan", help="what a run would do on a card: precision, kernels, memory, and why")
    )
    commands.add_parser("recipe", help="print every field of a recipe with its default and meaning, as YAML")
    args = parser.parse_args(argv)
    try:
        return {"demo": _demo, "plan": _plan, "recipe": _recipe}[args.command](args)
    except DpoAssetsError as error:
        print(error, file=sys.stderr)
        return 1


def _demo(args: argparse.Namespace) -> int:
    # Imported here: `dpo-assets recipe` should not wait for Dagster.
    from dpo_assets.demo.breaks import BREAKS
    from dpo_assets.demo.render import show_break, show_summary
    from dpo_assets.demo.run import prepare_home, run_job
    from dpo_assets.demo.summary import summarise

    # The bar goes to standard error, so that `--json` leaves standard output to the JSON.
    console = _console(stderr=args.json)
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


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=PIPED_WIDTH)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    choices = {name: get_args(HardwareSection.model_fields[name].annotation) for name in ("precision", "kernels")}
    default = {
        "max_length": FeedbackSection.model_fields["max_length"].default,
        "batch_size": DpoSection.model_fields["batch_size"].default,
        "rank": LoraSection.model_fields["rank"].default,
    }
    parser.add_argument(
        "--gpu", required=True, metavar="NAME", help="a card such as t4, rtx4090, a100-80, h200; or cpu, this machine's"
    )
    parser.add_argument(
        "--model", required=True, metavar="SIZE", help="a size such as 0.5b, 8b, 70b, or a local model folder"
    )
    parser.add_argument("--precision", choices=choices["precision"], default="auto", help="default: auto, with reason")
    parser.add_argument("--kernels", choices=choices["kernels"], default="auto", help="who computes the layers")
    parser.add_argument(
        "--max-length", type=int, default=default["max_length"], help="tokens of prompt + answer (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=default["batch_size"], help="pairs per optimizer step (default: %(default)s)"
    )
    parser.add_argument("--rank", type=int, default=default["rank"], help="LoRA rank (default: %(default)s)")
    parser.add_argument("--memory-gib", type=float, help="plan with less memory than the card has")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def _plan(args: argparse.Namespace) -> int:
    """Exit status 0 for a plan that fits, 1 for one that does not; neither Dagster nor torch is imported."""
    from dpo_assets.planning.cards import device_of
    from dpo_assets.planning.describe import plan_json, plan_rows, supposed_pairs
    from dpo_assets.planning.plan import make_plan
    from dpo_assets.planning.sizes import find_model

    hardware = {"precision": args.precision, "kernels": args.kernels, "memory_gib": args.memory_gib}
    recipe = parse_recipe(
        {
            "base_model": {"source": "builtin:stories260k"},
            "feedback": {"sources": [{"path": "builtin:oasst"}], "max_length": args.max_length},
            "lora": {"rank": args.rank},
            "dpo": {"batch_size": args.batch_size},
            "hardware": hardware,
        }
    )
    size = find_model(args.model)
    gpu, device = device_of(args.gpu)
    plan = make_plan(recipe, size.shape, supposed_pairs(recipe.feedback.max_length), device)
    if args.json:
        print(json.dumps(plan_json(plan, size, gpu), indent=1))
    else:
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column()
        for label, sentence in plan_rows(plan, size, device):
            grid.add_row(label, Text(sentence))
        _console().print(grid)
    return 0 if plan.fits else 1


def _recipe(_: argparse.Namespace) -> int:
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
