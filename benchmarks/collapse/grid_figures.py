"""The grid's two figures: what became of runs and what was stopped, and which check stopped them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.collapse import grid_faults as faults
from benchmarks.collapse import grid_labels as labels
from benchmarks.collapse import grid_runs as runs
from benchmarks.collapse.grid_scoring import Scored

DAMAGED, SOUND, CAUGHT = "#c44e52", "#55a868", "#8172b2"


def draw(scored: Sequence[Scored], folder: Path) -> None:
    """Writes `collapse-grid.png` and `collapse-checks.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes(scored, folder / "collapse-grid.png")
    checks(scored, folder / "collapse-checks.png")


def outcomes(scored: Sequence[Scored], path: Path) -> None:
    """A square a kind of data and rate: red as far as its runs are damaged; below, how many were blocked."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.2), dpi=100)
    for y, fault in enumerate(faults.FAULTS):
        for x, times in enumerate(runs.RATES):
            here = [one for one in scored if one.fault == fault and one.row["times"] == times]
            if not here:
                continue
            damaged = sum(one.label == "damaged" for one in here)
            by_construction = fault in labels.MUST_BE_CAUGHT
            colour = CAUGHT if by_construction else DAMAGED if damaged else SOUND
            shade = 0.55 if by_construction else 0.25 + 0.6 * damaged / len(here) if damaged else 0.55
            axes.add_patch(plt.Rectangle((x, y), 0.96, 0.94, color=colour, alpha=shade, linewidth=0))
            state = "broken data" if by_construction else f"{damaged}/{len(here)} damaged"
            blocked = sum(one.caught for one in here)
            axes.text(x + 0.48, y + 0.32, state, ha="center", va="center", fontsize=7)
            axes.text(x + 0.48, y + 0.68, f"{blocked}/{len(here)} blocked", ha="center", va="center", fontsize=7)
    axes.set_xlim(0, len(runs.RATES))
    axes.set_ylim(len(faults.FAULTS), 0)
    axes.set_xticks([n + 0.48 for n in range(len(runs.RATES))], [f"x{times:g}" for times in runs.RATES])
    axes.set_yticks([n + 0.48 for n in range(len(faults.FAULTS))], [name.replace("_", " ") for name in faults.FAULTS])
    axes.set_xlabel("learning rate, times a good one")
    axes.tick_params(length=0, labelsize=8)
    axes.set_frame_on(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def checks(scored: Sequence[Scored], path: Path) -> None:
    """A bar a check: damaged runs that it blocks, and undamaged ones."""
    from matplotlib import pyplot as plt

    count: dict[str, list[int]] = {}
    for one in scored:
        for name in {name for names in one.blocked.values() for name in names}:
            found = count.setdefault(name, [0, 0, 0])
            found[0 if one.label == "damaged" else 2 if one.label == "must_be_caught" else 1] += 1
    names = sorted(count, key=lambda name: count[name])
    figure, axes = plt.subplots(figsize=(7.2, 0.5 + 0.28 * max(4, len(names))), dpi=100)
    left = [0] * len(names)
    for n, (label, colour) in enumerate((("damaged", DAMAGED), ("undamaged", SOUND), ("must be caught", CAUGHT))):
        values = [count[name][n] for name in names]
        axes.barh(names, values, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_xlabel("runs that the check blocks")
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
