"""The pictures of `backtrail demo`."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from backtrail import plot
from backtrail.apply.trust import RemovalCheck
from backtrail.cli.demo_task import digits
from backtrail.influence.influence import Influence


def draw(folder: Path, influence: Influence, removal: RemovalCheck) -> None:
    """Draw the most harmful sample over time, ten of them by epoch, the patterns, and prediction against truth."""
    harmful = influence.top(10)["sample"].to_list()
    _save(folder / "curve.png", (7.4, 3.6), lambda figure: _curve(influence, harmful[0], figure))
    _save(
        folder / "heatmap.png",
        (6.8, 4.0),
        lambda f: plot.heatmap(influence, samples=harmful, ax=f.subplots()),
    )
    _save(folder / "patterns.png", (5.6, 2.4), lambda f: plot.patterns(influence, ax=f.subplots()))
    _save(
        folder / "removals.png",
        (4.8, 4.6),
        lambda f: plot.scatter(removal.predicted, removal.actual, ax=f.subplots()),
    )


def _curve(influence: Influence, sample: int, figure: Figure) -> None:
    """The curve of a sample, and the digit itself beside it."""
    over_time, digit = figure.subplots(1, 2, width_ratios=(5, 1))
    plot.curve(influence, sample=sample, ax=over_time)
    pixels, label = digits().training[sample]
    digit.imshow(pixels.view(8, 8).numpy(), cmap="gray_r")
    digit.set(xticks=[], yticks=[], xlabel=f"labelled {label}\nis a {digits().truth[sample]}")


def _save(path: Path, size: tuple[float, float], onto: Callable[[Figure], object]) -> None:
    """Draw onto a figure of its own: no window, no global state of matplotlib."""
    figure = Figure(figsize=size, layout="constrained")
    onto(figure)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
