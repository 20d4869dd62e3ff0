"""The plots of `backtrail demo`."""

from pathlib import Path

from matplotlib.figure import Figure

from backtrail import plot
from backtrail.apply.trust import RemovalCheck
from backtrail.cli.demo_task import digits
from backtrail.influence.influence import Influence


def draw(folder: Path, influence: Influence, removal: RemovalCheck) -> None:
    """Draw and save four plots.

    The most harmful sample over time, the ten most harmful by epoch, the patterns, and predicted
    against actual changes after a removal.

    Args:
        folder: Where to save them; created if needed.
        influence: Influence on one query, observed at the end of every epoch.
        removal: The removal check of `backtrail.trust`.
    """
    folder.mkdir(exist_ok=True)
    harmful = influence.top(10)["sample"].to_list()

    figure = _figure(7.4, 3.6)
    _draw_curve(influence, harmful[0], figure)
    figure.savefig(folder / "curve.png", dpi=150)

    figure = _figure(6.8, 4.0)
    plot.heatmap(influence, samples=harmful, ax=figure.subplots())
    figure.savefig(folder / "heatmap.png", dpi=150)

    figure = _figure(5.6, 2.4)
    plot.patterns(influence, ax=figure.subplots())
    figure.savefig(folder / "patterns.png", dpi=150)

    figure = _figure(4.8, 4.6)
    plot.scatter(removal.predicted, removal.actual, ax=figure.subplots())
    figure.savefig(folder / "removals.png", dpi=150)


def _figure(width: float, height: float) -> Figure:
    # Without pyplot: no window, and no global state of matplotlib is changed.
    return Figure(figsize=(width, height), layout="constrained")


def _draw_curve(influence: Influence, sample: int, figure: Figure) -> None:
    """Draw the curve of a sample, and the digit itself next to it."""
    over_time, digit = figure.subplots(1, 2, width_ratios=(5, 1))
    plot.curve(influence, sample=sample, ax=over_time)
    pixels, label = digits().training[sample]
    digit.imshow(pixels.view(8, 8).numpy(), cmap="gray_r")
    digit.set(xticks=[], yticks=[], xlabel=f"labelled {label}\nis a {digits().truth[sample]}")
