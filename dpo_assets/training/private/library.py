"""A library that private names are taken of: how they are looked for, and what is said where they are not there."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_assets.errors import ConfigError


@dataclass(frozen=True)
class Library:
    """An installed package.

    Attributes:
        package: its name as a distribution.
        known: versions that the names were read of, or were tried with.
        way_out: how such a version is installed, or what does without the library.
        since, below: where what is relied on cannot be seen in the names, the releases that have it.
    """

    package: str
    known: str
    way_out: str
    since: tuple[int, ...] = ()
    below: tuple[int, ...] = ()

    @property
    def installed(self) -> str:
        """The installed version."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return "(of no known version)"

    def refused(self, fault: str) -> ConfigError:
        """The error for a version that is not as it was read."""
        return ConfigError(
            f"{self.package} {self.installed} {fault}. Known to work: {self.package} {self.known}. {self.way_out}"
        )

    def check_version(self, relied_on: str) -> None:
        """Raises:
        ConfigError: for a release outside of the bounds.
        """
        release = tuple(int(part) for part in re.findall(r"\d+", self.installed.partition("+")[0])[:3])
        if not self.since <= release < self.below:
            raise self.refused(f"may differ in {relied_on}")

    def find(self, module: str, path: str) -> Any:
        """What stands under a dotted path in a module.

        Raises:
            ConfigError: when it is not there, or the module cannot be imported.
        """
        try:
            found: Any = importlib.import_module(module)
            for part in path.split("."):
                found = getattr(found, part)
        except ImportError as error:
            raise self.refused(f"does not let {module} be imported ({error})") from error
        except AttributeError as error:
            raise self.refused(f"has no {module}.{path}") from error
        return found

    def check_call(
        self,
        name: str,
        function: Callable[..., Any],
        positional: Sequence[str],
        keywords: Collection[str] = (),
        *,
        passes_on: bool = False,
    ) -> None:
        """Holds a function to how it will be called.

        Args:
            positional: names of the parameters that are given by their places.
            keywords: parameters that are given by name; one that `**kwargs` would swallow is not there.
            passes_on: whether it must have `**kwargs`.

        Raises:
            ConfigError: when it has other parameters, or needs more of them.
        """
        parameters = inspect.signature(function).parameters.values()
        by_place = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        variable = [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        needed = {p.name for p in parameters if p.default is p.empty and p not in variable}
        fits = (
            by_place[: len(positional)] == list(positional)
            and by_name.issuperset(keywords)
            and needed.issubset((*positional, *keywords))
            and (not passes_on or any(p.kind is p.VAR_KEYWORD for p in variable))
        )
        if not fits:
            given = ", ".join((*positional, *(f"{key}=" for key in keywords), *(["**"] if passes_on else [])))
            taken = ", ".join(str(p).partition(":")[0].partition("=")[0] for p in parameters)
            raise self.refused(f"has {name}({taken}), which is called as ({given}) here")

    def made(self, name: str, make: Callable[[], Any]) -> Any:
        """An instance that is made to be looked at.

        Raises:
            ConfigError: when it cannot be made as it is here.
        """
        try:
            return make()
        except Exception as error:  # Whatever another version minds.
            raise self.refused(f"has a {name} that is made otherwise ({error})") from error

    def check_has(self, name: str, thing: Any, attributes: Collection[str]) -> None:
        """Raises:
        ConfigError: when a thing lacks one of these attributes.
        """
        if missing := [attribute for attribute in attributes if not hasattr(thing, attribute)]:
            raise self.refused(f"has no {', '.join(missing)} on {name}")
