"""The command line of a benchmark that prints tables of simulated trials."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from importlib.metadata import version

Tables = dict[str, Callable[[], str]]


def print_tables(what: str, tables: Callable[[float], Tables]) -> None:
    """Prints the tables that are asked for, and what they cost.

    Args:
        what: what they show.
        tables: every table by its name, of a part of the trials.
    """
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--scale", type=float, default=1.0, help="part of the trials")
    parser.add_argument("--only", nargs="+", choices=list(tables(1.0)), help="tables to make; without it, all")
    given = parser.parse_args()
    started = time.process_time()
    print(f"Python {platform.python_version()}, numpy {version('numpy')}, {platform.machine()}.\n")
    for name, made in tables(given.scale).items():
        if not given.only or name in given.only:
            print(f"{made()}\n", flush=True)
    print(f"{time.process_time() - started:.0f} s of one core.")
