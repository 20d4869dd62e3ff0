"""The sweep of C3 as a picture, from what was kept: python -m bench.papers.draw."""

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from bench.papers import c3
from bench.papers.rows import Row

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "papers-c3.png"
LINES = {
    "corrected": "Pearson, corrected",
    "published": "Pearson, published",
    "precision": "precision",
}


def drawn(ax: Axes, row: Row, names: dict[float, str], *, label: str) -> None:
    """Mean and spread over seeds of the three figures, by number of states or by length."""
    seeds = list(row.kept().values())
    for color, (line, figure) in zip(("C0", "C1", "C2"), LINES.items(), strict=True):
        values = np.array(
            [[figures[f"{name}: {figure}"] for name in names.values()] for figures in seeds]
        )
        ax.plot(list(names), values.mean(0), f"{color}o-", label=line)
        ax.fill_between(list(names), values.min(0), values.max(0), color=color, alpha=0.15)
    ax.set(xscale="log", ylim=(-1.05, 1.05), xlabel=label, title=row.about)
    ax.axhline(0, color="grey", linewidth=0.5)


def main() -> None:
    """Draw states, and both kinds of differences, for both speeds."""
    panels = (
        ("states m", {float(m): f"m = {m}" for m in c3.STATES}),
        ("epsilon, one-sided", {e: f"ε = {e:.0e}" for e in c3.LENGTHS}),
        ("epsilon, central", {e: f"ε = {e:.0e}, central" for e in c3.LENGTHS}),
    )
    figure, grid = plt.subplots(
        len(c3.ROWS), len(panels), figsize=(11, 6.5), sharey=True, squeeze=False
    )
    for row, axes in zip(c3.ROWS, grid, strict=True):
        for ax, (label, names) in zip(axes, panels, strict=True):
            drawn(ax, row, names, label=label)
    grid[0, 0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
