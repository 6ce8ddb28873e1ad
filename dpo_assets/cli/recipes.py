"""Recipes by name: that of a file, and `dpo-assets recipe`, which prints every field."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_assets.cli.commands import Commands
from dpo_assets.errors import ConfigError
from dpo_assets.recipe import Recipe, parse_recipe
from dpo_assets.section import Section


def add_recipe(commands: Commands) -> None:
    """The command `recipe`."""
    commands.add_parser(
        "recipe", help="print every field of a recipe with its default and meaning, as YAML"
    ).set_defaults(does=_recipe)


def recipe_of(values: dict[str, Any]) -> Recipe:
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


def declared(path: Path) -> dict[str, Any]:
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
