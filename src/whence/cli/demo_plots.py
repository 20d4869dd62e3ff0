"""The pictures of `whence demo`."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from whence import plot
from whence.apply.trust import RemovalCheck
from whence.cli.demo_task import digits
from whence.influence.influence import Influence


def draw(folder: Path, influence: Influence, removal: RemovalCheck) -> None:
    """Draw the most harmful sample over time, ten of them by epoch, the patterns, and prediction against truth."""
    harmful = influence.top(10)["sample"].to_list()
    _save(folder / "curve.png", (6.8, 3.6), lambda ax: _curve(influence, harmful[0], ax))
    _save(folder / "heatmap.png", (6.8, 4.0), lambda ax: plot.heatmap(influence, samples=harmful, ax=ax))
    _save(folder / "patterns.png", (5.6, 2.4), lambda ax: plot.patterns(influence, ax=ax))
    _save(folder / "removals.png", (4.8, 4.6), lambda ax: plot.scatter(removal.predicted, removal.actual, ax=ax))


def _curve(influence: Influence, sample: int, ax: Axes) -> None:
    """The curve of a sample, with the digit itself in a corner."""
    plot.curve(influence, sample=sample, ax=ax)
    pixels, label = digits().training[sample]
    corner = ax.inset_axes((0.02, 0.04, 0.3, 0.34))
    corner.imshow(pixels.view(8, 8).numpy(), cmap="gray_r")
    corner.set(xticks=[], yticks=[])
    corner.set_title(f"labelled {label}, is a {digits().truth[sample]}", fontsize="small", pad=4)


def _save(path: Path, size: tuple[float, float], onto: Callable[[Axes], object]) -> None:
    """Draw onto the axes of a figure of its own: no window, no global state of matplotlib."""
    figure = Figure(figsize=size, layout="constrained")
    onto(figure.subplots())
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
