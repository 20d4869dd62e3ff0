"""Plots show the numbers of the tables, in the axes given, without side effects."""

import itertools
import subprocess
import sys
from collections.abc import Iterator

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection, QuadMesh
from matplotlib.colors import to_rgba

from backtrail import errors, plot
from backtrail.influence.analysis.patterns import patterns
from backtrail.influence.analysis.regimes import example
from backtrail.influence.influence import Influence
from tests.influence.made import OBSERVED, made

RANKED = pl.DataFrame({"sample": [4, 7, 0, 1, 2], "score": [5.0, 4.0, 3.0, 2.0, 1.0]})
DRAWINGS = {
    "curve": lambda i, ax: plot.curve(i, sample=5, ax=ax),
    "visits": lambda i, ax: plot.visits(i, sample=5, ax=ax),
    "heatmap": lambda i, ax: plot.heatmap(i, samples=[5, 0, 2], ax=ax),
    "patterns": lambda i, ax: plot.patterns(i, ax=ax),
    "regimes": lambda _, ax: plot.regimes(example(), ax=ax),
    "detection": lambda _, ax: plot.detection(RANKED, wrong=[4, 0], ax=ax),
    "scatter": lambda i, ax: plot.scatter(i.total()[:, 1], i.total()[:, 2], ax=ax),
}


@pytest.fixture(autouse=True)
def agg() -> Iterator[None]:
    """Draw without a screen, with no figure open before or after."""
    before = mpl.get_backend()
    plt.close("all")
    plt.switch_backend("agg")
    yield
    plt.close("all")
    plt.switch_backend(before)


@pytest.fixture(scope="module")
def influence() -> Influence:
    """Return the random influence of the tests of sums."""
    return made()


@pytest.mark.parametrize("name", DRAWINGS)
def test_draws_into_the_axes_given(influence: Influence, name: str) -> None:
    """Axes that are given are used and returned, and Matplotlib's settings do not change."""
    settings = dict(mpl.rcParams)
    ax = plt.figure().subplots()
    assert DRAWINGS[name](influence, ax) is ax
    assert len(plt.get_fignums()) == 1
    assert dict(mpl.rcParams) == settings
    ax.figure.canvas.draw()


@pytest.mark.parametrize("name", DRAWINGS)
def test_makes_a_figure_of_its_own(influence: Influence, name: str) -> None:
    """Without axes every plot makes one figure, which can be drawn without a warning."""
    ax = DRAWINGS[name](influence, None)
    assert isinstance(ax, Axes)
    ax.figure.canvas.draw()
    assert len(plt.get_fignums()) == 1


def words(ax: Axes) -> str:
    """Return all text of a figure."""
    ax.figure.canvas.draw()
    texts = ax.figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return " ".join(text.get_text() for text in texts)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["curve", "visits", "heatmap"])
def test_directions_have_names(influence: Influence, name: str) -> None:
    """Plots of influence name the helpful and the harmful direction, query and unit."""
    written = words(DRAWINGS[name](influence, None))
    for word in ("helpful →", "← harmful", "loss a", "nats"):
        assert word in written


def test_curve_draws_its_table(influence: Influence) -> None:
    """The line has the points of the table, and the axis names the query."""
    ax = plot.curve(influence, sample=5, query="loss b")
    table = influence.curve(sample=5, query="loss b")
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), table.to_numpy())
    assert "loss b" in ax.get_ylabel()


def test_visits_are_coloured_by_sign(influence: Influence) -> None:
    """Every visit is a line from zero, coloured by its sign."""
    ax = plot.visits(influence, sample=5, observed_at=7)
    table = influence.visits_curve(sample=5, observed_at=7)
    stems = next(c for c in ax.collections if isinstance(c, LineCollection))
    ends = [(segment[1, 0], segment[1, 1]) for segment in stems.get_segments()]
    assert ends == list(zip(table["step"], table["influence"], strict=True))
    signs = [plot.HELPFUL if y >= 0 else plot.HARMFUL for _, y in ends]
    np.testing.assert_array_equal(stems.get_color(), [to_rgba(c) for c in signs])
    assert f"{table.height} visits, observed at state 7" in ax.get_title(loc="left")


def test_heatmap_is_centred_at_zero(influence: Influence) -> None:
    """Cells are windows, rows are in the order given, and the colours are symmetric about zero."""
    ax = plot.heatmap(influence, samples=[5, 0, 2], query=1)
    mesh = next(c for c in ax.collections if isinstance(c, QuadMesh))
    windows = [influence.window(a, b)[1, [5, 0, 2]] for a, b in ((0, 3), (3, 7), (7, 10))]
    np.testing.assert_allclose(np.asarray(mesh.get_array()), np.stack(windows, axis=1), atol=1e-15)
    low, high = mesh.get_clim()
    assert low == -high == -np.abs(windows).max()
    assert [text.get_text() for text in ax.get_yticklabels()] == ["5", "0", "2"]
    assert ax.get_xticks().tolist() == list(OBSERVED)


def test_heatmap_of_many_samples_stays_readable() -> None:
    """Of many samples at most 40 are labelled, and an unknown sample is refused."""
    influence = made()
    ax = plot.heatmap(influence, samples=[*range(7)] * 10)
    assert len(ax.get_yticklabels()) <= 40
    with pytest.raises(errors.NeverTrainedOn, match="Sample 8 was never trained on"):
        plot.heatmap(influence, samples=[8])
    with pytest.raises(errors.UnknownSample, match="no sample -1"):
        plot.heatmap(influence, samples=[-1])


def test_patterns_takes_a_table_too(influence: Influence) -> None:
    """A table of patterns gives the plot of its influence."""
    table = patterns(influence, query=1)
    texts = [
        [text.get_text() for text in ax.texts]
        for ax in (plot.patterns(table), plot.patterns(influence, query=1))
    ]
    assert texts[0] == texts[1]
    assert sum(int(text.split("(")[1].rstrip(")")) for text in texts[0]) == table.height


def test_scatter_tells_the_mean_correlation() -> None:
    """Queries have a colour each, and the title has the mean correlations over queries."""
    predicted = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    ax = plot.scatter(predicted, np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))
    assert len([c for c in ax.collections if isinstance(c, PathCollection)]) == 2
    assert ax.get_title(loc="left") == "Pearson 0.00, Spearman 0.00"
    np.testing.assert_array_equal(np.asarray(ax.lines[0].get_xydata()), [[1.0, 1.0], [3.0, 3.0]])


def test_scatter_labels_do_not_overlap() -> None:
    """Effects of removals are small numbers, which have long labels."""
    effects = np.array([-2.83e-3, 1.1e-3])
    ax = plot.scatter(effects, effects)
    ax.figure.canvas.draw()
    low, high = ax.get_xlim()
    ticks = [tick for tick in ax.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [tick.label1.get_window_extent() for tick in ticks]
    assert len(boxes) >= 3
    for left, right in itertools.pairwise(boxes):
        assert left.x1 < right.x0


def test_missing_matplotlib_says_how_to_get_it() -> None:
    """Without Matplotlib the error names the extra to install."""
    code = "import sys; sys.modules['matplotlib.pyplot'] = None; import backtrail.plot"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingExtra: Module 'matplotlib' is not installed" in done.stderr


def test_regimes_have_their_levels_and_boundaries() -> None:
    """The three levels are those of the table, with name and multiple of the basin."""
    ax = plot.regimes(example())
    levels = [
        line.get_segments()[0] for line in ax.collections if isinstance(line, LineCollection)
    ][:3]
    drawn = [[*segment[:, 0], segment[0, 1]] for segment in levels]
    np.testing.assert_allclose(drawn, [[0, 2, 9], [2, 9, 1], [9, 12, 4]])
    assert [text.get_text() for text in ax.texts] == ["start\n9 x", "basin", "end\n4 x"]


def test_detection_goes_through_every_rank() -> None:
    """The curve has precision and recall of every rank, and a dot at the number of wrong ones."""
    ax = plot.detection({"one": RANKED, "other": RANKED.reverse()}, wrong=[4, 0])
    curves = {
        str(line.get_label()): line.get_xydata()
        for line in ax.lines
        if str(line.get_label())[0] != "_"
    }
    assert list(curves) == ["one: AP 0.83", "other: AP 0.83"]
    np.testing.assert_allclose(
        np.asarray(curves["one: AP 0.83"]), [[0.5, 1], [0.5, 0.5], [1, 2 / 3], [1, 0.5], [1, 0.4]]
    )
    dots = [np.asarray(line.get_xydata()).tolist() for line in ax.lines if line.get_marker() == "o"]
    assert dots == [[[0.5, 0.5]], [[0.0, 0.0]]]


@pytest.mark.parametrize(("wrong", "error"), [([], errors.BadSetting), ([9], errors.UnknownId)])
def test_detection_needs_wrong_labels_that_are_there(
    wrong: list[int], error: type[errors.BacktrailError]
) -> None:
    """No wrong samples, and one that is in no table, are refused."""
    with pytest.raises(error):
        plot.detection(pl.DataFrame({"sample": [3, 5], "score": [1.0, 0.0]}), wrong=wrong)
