"""What the checks against collapse are worth.

    python benchmarks/collapse_guard.py cases                    # verdicts before training, on published runs
    python benchmarks/collapse_guard.py cases --cases other.csv  # the same on other ones

A case file has the columns of benchmarks/data/collapse_cases.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.collapse import grid, scoring


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    # A subcommand is a module of benchmarks.collapse with `add_arguments(parser)` and `run(args) -> exit status`.
    for name, module, summary in (
        ("cases", scoring, "verdicts before training, on published runs"),
        ("grid", grid, "all checks, on a fault-injection grid of really trained runs"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
