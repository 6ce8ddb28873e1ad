"""`dpo-assets`: the demo, plans for any card, known models, where feedback went, releases, what may go, the recipe."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dpo_assets.errors import ConfigError, DpoAssetsError
from dpo_assets.recipe import (
    DpoSection,
    FeedbackSection,
    HardwareSection,
    LoraSection,
    Recipe,
    SftSection,
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
    _plan_arguments(commands.add_parser("plan", help="what a run would do on a card, and what the checks say of it"))
    models = commands.add_parser("models", help="which models there are engines for, and why not")
    models.add_argument("--markdown", action="store_true", help="print docs/models.md")
    provenance = commands.add_parser("provenance", help="which feedback a release goes back to, and where a row went")
    provenance.add_argument("store", type=Path, help="a pipeline's artefacts: storage/dpo_assets/NAME of the instance")
    asked = provenance.add_mutually_exclusive_group()
    asked.add_argument("--release", metavar="NAME", help="a release's fingerprint, or its beginning: print its rows")
    asked.add_argument("--row", metavar="NAME", help="a pair id, row hash, row or source file: print its releases")
    provenance.add_argument("--json", action="store_true", help="print the answer as JSON")
    retention = commands.add_parser("retention", help="what of a pipeline's store may go, and delete it")
    retention.add_argument("--recipe", type=Path, required=True, metavar="FILE", help="the pipeline's defs.yaml")
    retention.add_argument("--store", metavar="FOLDER", help="`root` of the resource `artifacts`, where it has one")
    retention.add_argument("--delete", action="store_true", help="delete what the list shows")
    releases = commands.add_parser("releases", help="what was decided, released and rolled back, and what is live")
    releases.add_argument("store", type=Path, help="a pipeline's artefacts: storage/dpo_assets/NAME of the instance")
    releases.add_argument("--json", action="store_true", help="print the lines of the ledger as JSON")
    commands.add_parser("recipe", help="print every field of a recipe with its default and meaning, as YAML")
    args = parser.parse_args(argv)
    try:
        does: dict[str, Callable[[argparse.Namespace], int]] = {
            "demo": _demo,
            "plan": _plan,
            "models": _models,
            "provenance": _provenance,
            "releases": _releases,
            "retention": _retention,
            "recipe": _recipe,
        }
        return does[args.command](args)
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


# Option of `plan` -> section and field of the recipe that it sets.
_PLAN_OPTIONS: dict[str, tuple[type[Section], str, str]] = {
    "max_length": (FeedbackSection, "feedback", "tokens of prompt + answer"),
    "rank": (LoraSection, "lora", "LoRA rank"),
    "learning_rate": (DpoSection, "dpo", "peak DPO learning rate"),
    "beta": (DpoSection, "dpo", "DPO's beta"),
    "loss": (DpoSection, "dpo", "DPO loss, or several with commas between them"),
    "epochs": (DpoSection, "dpo", "passes over the pairs"),
    "batch_size": (DpoSection, "dpo", "pairs per optimizer step"),
    "sft_learning_rate": (SftSection, "sft", "peak SFT learning rate"),
    "precision": (HardwareSection, "hardware", "how weights are held; auto says why"),
    "kernels": (HardwareSection, "hardware", "who computes the layers"),
    "memory_gib": (HardwareSection, "hardware", "plan with less memory than the card has"),
}


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpu", required=True, metavar="NAME", help="a card such as t4, rtx4090, a100-80, h200; or cpu, this machine's"
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="SIZE",
        help="a size such as 0.5b, 8b, 70b, qwen3-8b, gemma3-4b, qwen3.5-9b, gpt-oss-20b or qwen3-30b-a3b, or a local "
        "model folder",
    )
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="a defs.yaml to start from; options below change it"
    )
    for option, (section, name, meaning) in _PLAN_OPTIONS.items():
        info = section.model_fields[_field_of(option, name)]
        choices = get_args(info.annotation) if option in ("precision", "kernels") else None
        kind = {"max_length": int, "rank": int, "batch_size": int}.get(option, str if choices else float)
        default = "" if info.default is None else f" (default: {info.default})"
        parser.add_argument(
            f"--{option.replace('_', '-')}",
            type=str if option == "loss" else kind,
            choices=choices,
            help=meaning + default,
        )
    parser.add_argument("--json", action="store_true", help="print plan and checks as JSON")


def _field_of(option: str, section: str) -> str:
    return option.removeprefix(f"{section}_")


def _plan(args: argparse.Namespace) -> int:
    """Exit status 0 for a plan that fits and that no check blocks, else 1; neither Dagster nor torch is imported."""
    from dpo_assets.checks.bands import default_bands
    from dpo_assets.checks.catalog import severity_of, validate_severities
    from dpo_assets.checks.config import plan_verdicts
    from dpo_assets.checks.verdict import with_severity
    from dpo_assets.planning.cards import device_of
    from dpo_assets.planning.describe import plan_json, plan_rows, supposed_pairs
    from dpo_assets.planning.offers import installed_here
    from dpo_assets.planning.plan import make_plan
    from dpo_assets.planning.sizes import find_model
    from dpo_assets.report.verdicts import verdict_json, verdict_rows

    recipe = _recipe_of(_planned_recipe(args))
    validate_severities(recipe.checks.severity)
    bands = default_bands().with_overrides(recipe.checks.bands)
    size = find_model(args.model)
    gpu, device = device_of(args.gpu)
    plan = make_plan(recipe, size.shape, supposed_pairs(recipe.feedback.max_length), device, installed_here())
    verdicts = [
        with_severity(verdict, severity_of(verdict.check, recipe.checks.severity))
        for verdict in plan_verdicts(plan, bands, pairs_known=False)
    ]
    if args.json:
        checks = [verdict_json(verdict, bands.reasons) for verdict in verdicts]
        print(json.dumps(plan_json(plan, size, gpu) | {"checks": checks}, indent=1))
    else:
        from rich.table import Table
        from rich.text import Text

        console = _console()
        for rows in (plan_rows(plan, size, device), verdict_rows(verdicts, bands.reasons)):
            grid = Table.grid(padding=(0, 2))
            grid.add_column(style="bold", no_wrap=True)
            grid.add_column()
            for label, sentence in rows:
                grid.add_row(label, Text(sentence))
            console.print(grid)
    return 1 if not plan.fits or any(verdict.level == "error" for verdict in verdicts) else 0


def _models(args: argparse.Namespace) -> int:
    from rich.table import Table

    from dpo_assets.planning.support import ENGINES, markdown, supported

    if args.markdown:
        sys.stdout.write(markdown())
        return 0
    grid = Table("model type", "models", *ENGINES, "why not")
    for row in supported():
        grid.add_row(row.family, row.models, *row.engines.values(), "; ".join(row.reasons))
    console = _console()
    console.print(grid)
    console.print("`rows`, the model's own forward, computes these and every other causal language model.")
    return 0


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

    console = _console()
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
    values = _declared(args.recipe)
    pipeline = Pipeline(str(values.pop("name", "")), _recipe_of(values))
    with dg.DagsterInstance.get() as instance:
        tree = ArtifactStore(root=args.store).tree(instance, pipeline.name)
        if not tree.root.is_dir():
            raise ConfigError(f"there is no store in {tree.root}; name its root with --store")
        found = retain(instance, pipeline, tree, print, really=args.delete)
    console = _console()
    if args.delete:
        console.print(f"{found.deleted} artefacts deleted, {gib(found.freed)} freed.", markup=False)
        return 0
    grid = Table("kind", "artefact", "size", "why")
    for one, why in found.choice.gone.items():
        grid.add_row(one.kind, one.fingerprint[:12], gib(one.size), why)
    if grid.row_count:
        console.print(grid)
    console.print(
        f"{grid.row_count} artefacts may go, {gib(found.freed)}; {len(found.choice.kept)} stay. --delete deletes them.",
        markup=False,
    )
    return 0


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
    console = _console()
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


def _planned_recipe(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe that `plan` judges: that of a file, or defaults, with what the options say."""
    values = {"base_model": {"source": "builtin:stories260k"}, "feedback": {"sources": [{"path": "builtin:oasst"}]}}
    if args.recipe is not None:
        values = {key: value for key, value in _declared(args.recipe).items() if key != "name"}
    for option, (_, section, _) in _PLAN_OPTIONS.items():
        if (value := getattr(args, option)) is not None:
            # A section that is no mapping is left to the recipe, which says what is wrong with it.
            written = values.get(section) or {}
            if isinstance(written, dict):
                values[section] = {**written, _field_of(option, section): value}
    return values


def _recipe_of(values: dict[str, Any]) -> Recipe:
    """The recipe of these values, whose templates are rendered in the environment. Dagster's own scope is not here.

    Raises:
        ConfigError: one line per fault.
    """
    from dpo_assets.templates import ResolveFaults, SetVariables, resolve, templates_in

    if not templates_in(values):
        return parse_recipe(values)
    try:
        filled = resolve(Recipe, values, {"env": SetVariables(os.environ)})
    except ResolveFaults as error:
        told = (f"{'.'.join(map(str, place))}: {said}" for place, said in error.faults.items())
        raise ConfigError("\n".join(told)) from None
    return parse_recipe(filled.model_dump())


def _declared(path: Path) -> dict[str, Any]:
    """Name and recipe of the one pipeline in a defs.yaml.

    Raises:
        ConfigError: when the file cannot be read, or holds no pipeline or several.
    """
    import yaml

    try:
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--recipe {path}: {error}") from None
    found = [d["attributes"] for d in documents if isinstance(d, dict) and isinstance(d.get("attributes"), dict)]
    if len(found) != 1:
        raise ConfigError(f"--recipe {path}: {len(found)} pipelines; give a file with one, with its `attributes`.")
    return dict(found[0])


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
