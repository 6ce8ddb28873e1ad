"""`dpo-assets plan`: what a run would do on a card, and what the checks say of it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, get_args

from dpo_assets.cli.commands import Commands
from dpo_assets.cli.console import open_console
from dpo_assets.cli.recipes import declared, recipe_of
from dpo_assets.recipe import DpoSection, FeedbackSection, HardwareSection, LoraSection, SftSection
from dpo_assets.section import Section


def add_plan(commands: Commands) -> None:
    """The command `plan`."""
    parser = commands.add_parser("plan", help="what a run would do on a card, and what the checks say of it")
    plan_arguments(parser)
    parser.set_defaults(does=_plan)


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


def plan_arguments(parser: argparse.ArgumentParser) -> None:
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

    recipe = recipe_of(planned_recipe(args))
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

        console = open_console()
        for rows in (plan_rows(plan, size, device), verdict_rows(verdicts, bands.reasons)):
            grid = Table.grid(padding=(0, 2))
            grid.add_column(style="bold", no_wrap=True)
            grid.add_column()
            for label, sentence in rows:
                grid.add_row(label, Text(sentence))
            console.print(grid)
    return 1 if not plan.fits or any(verdict.level == "error" for verdict in verdicts) else 0


def planned_recipe(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe that `plan` judges: that of a file, or defaults, with what the options say."""
    values = {"base_model": {"source": "builtin:stories260k"}, "feedback": {"sources": [{"path": "builtin:oasst"}]}}
    if args.recipe is not None:
        values = {key: value for key, value in declared(args.recipe).items() if key != "name"}
    for option, (_, section, _) in _PLAN_OPTIONS.items():
        if (value := getattr(args, option)) is not None:
            # A section that is no mapping is left to the recipe, which says what is wrong with it.
            written = values.get(section) or {}
            if isinstance(written, dict):
                values[section] = {**written, _field_of(option, section): value}
    return values
