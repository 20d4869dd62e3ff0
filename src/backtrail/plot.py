"""Plots of influence: each function draws into `ax`, or a new figure, and returns the axes.

Needs matplotlib. Blue is helpful and red is harmful, as for a loss. Nothing is shown or saved, and
no global setting of matplotlib is changed.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from jaxtyping import Float

from backtrail import arguments
from backtrail.errors import BadSetting, MissingExtra, NeverTrainedOn
from backtrail.influence.analysis.patterns import PATTERNS, shares
from backtrail.influence.analysis.patterns import patterns as find_patterns
from backtrail.influence.analysis.regimes import Regimes
from backtrail.influence.influence import Influence, ObservedState
from backtrail.influence.tables import places
from backtrail.stats import average_precision, mean_over_queries, pearson, spearman

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise MissingExtra("matplotlib", "plot") from error

BLACK = "#2b2b2b"
GREY = "#9a9a9a"
HELPFUL = "#2166ac"
HARMFUL = "#b2182b"
DIVERGING = "RdBu"  # blue at the positive end, as HELPFUL
DASHED = (0, (5, 4))
PATTERN_COLOURS = {
    "early": "#e69f00",
    "late": "#56b4e9",
    "stable": "#009e73",
    "fluctuating": "#cc79a7",
}
MAX_LABELS = 40  # samples of a heatmap that all get a label
MAX_TICKS = 13  # states of a heatmap that all get a tick


def curve(
    influence: Influence, *, sample: int, query: int | str = 0, ax: Axes | None = None
) -> Axes:
    """Plot the total influence of a sample by observed state.

    >>> from backtrail.influence.writer import example
    >>> curve(example(), sample=0).get_xlabel()
    'observed at state'

    Args:
        influence: The influence.
        sample: Row of the training set, or id.
        query: Index or name of the query.
        ax: Where to draw; None makes a new figure.

    Raises:
        UnknownSample: There is no such row.
        UnknownId: There is no such id.
        NeverTrainedOn: A sample was in no batch.
        UnknownQuery: There is no such query.
    """
    _check_influence(influence)
    table = influence.curve(sample=sample, query=query)
    ax = _axes(ax, (6.4, 3.6))
    states = table["observed_at"].to_numpy()
    total = table["influence"].to_numpy()
    for where, colour in ((total >= 0, HELPFUL), (total <= 0, HARMFUL)):
        # Interpolated, so that both colours meet where the curve crosses zero.
        ax.fill_between(
            states, total, 0.0, where=where, interpolate=True, color=colour, alpha=0.2, lw=0.0
        )
    ax.plot(states, total, color=BLACK, lw=1.6, marker="o", markersize=4, clip_on=False, zorder=3)
    ax.set(xlabel="observed at state", xlim=(0, max(states[-1], 1)))
    _set_title(ax, f"Sample {sample}: influence of all its visits")
    _label_signed_axis(ax, influence, query)
    return ax


def visits(
    influence: Influence,
    *,
    sample: int,
    query: int | str = 0,
    observed_at: ObservedState = "end",
    ax: Axes | None = None,
) -> Axes:
    """Plot the influence of each visit of a sample, by the step of the visit.

    >>> from backtrail.influence.writer import example
    >>> visits(example(), sample=0).get_xlabel()
    'step of the visit'

    Args:
        influence: The influence.
        sample: Row of the training set, or id.
        query: Index or name of the query.
        observed_at: State that the query reads; "end" is the last observed one.
        ax: Where to draw; None makes a new figure.

    Raises:
        UnknownSample: There is no such row.
        UnknownId: There is no such id.
        NeverTrainedOn: A sample was in no batch.
        UnknownQuery: There is no such query.
        NotObserved: No query reads that state.
    """
    _check_influence(influence)
    table = influence.visits_curve(sample=sample, query=query, observed_at=observed_at)
    ax = _axes(ax, (6.4, 3.6))
    steps = table["step"].to_numpy()
    values = table["influence"].to_numpy()
    colours = np.where(values >= 0, HELPFUL, HARMFUL).tolist()
    ax.vlines(steps, 0, values, colors=colours, lw=1.4)
    ax.scatter(steps, values, c=colours, s=18, zorder=3)
    state = influence.observed_state(observed_at)
    ax.set(xlabel="step of the visit", xlim=(-0.02 * state, 1.02 * state))
    _set_title(
        ax,
        f"Sample {sample}: influence of each of its {len(table)} visits, observed at state {state}",
    )
    _label_signed_axis(ax, influence, query)
    return ax


def heatmap(
    influence: Influence,
    *,
    samples: Sequence[int],
    query: int | str = 0,
    ax: Axes | None = None,
) -> Axes:
    """Plot the influence of samples on each window between observed states; white is zero.

    The time axis is to scale: a longer window is wider. Of more than 40 samples, only some are
    labelled.

    >>> from backtrail.influence.writer import example
    >>> [text.get_text() for text in heatmap(example(), samples=[2, 0]).get_yticklabels()]
    ['2', '0']

    Args:
        influence: The influence.
        samples: Rows of the training set (or ids), from top to bottom.
        query: Index or name of the query.
        ax: Where to draw; None makes a new figure.

    Raises:
        UnknownSample: There is no such row.
        UnknownId: There is no such id.
        NeverTrainedOn: A sample was in no batch.
        UnknownQuery: There is no such query.
    """
    _check_influence(influence)
    expected = "one or more samples"
    samples = arguments.whole_numbers("samples", samples, least=None, expected=expected)
    columns = places(influence.ids, samples)
    trained = np.unique(influence.sample)
    unseen = np.setdiff1d(samples, trained)
    if len(unseen):
        raise NeverTrainedOn(unseen.tolist(), int((trained >= 0).sum()))
    # State 0, if it was observed, comes first and ends no window.
    states = [state for state in influence.observed_at if state]
    edges = np.array([0, *states])
    totals = influence.total(query=query)[0, -len(states) :]  # [window, sample of the run]
    ax = _axes(ax, (6.8, 1.4 + 0.26 * min(len(samples), MAX_LABELS)))
    chosen = totals[:, columns].T  # [sample, window]
    windows = np.diff(chosen, prepend=0.0, axis=1)
    largest = float(np.abs(windows).max()) or 1.0
    rows = np.arange(len(samples) + 1) - 0.5
    mesh = ax.pcolormesh(edges, rows, windows, cmap=DIVERGING, vmin=-largest, vmax=largest)
    every = -(-len(samples) // MAX_LABELS)  # rounded up
    ax.set_yticks(range(0, len(samples), every), [str(sample) for sample in samples[::every]])
    ax.invert_yaxis()
    if len(edges) <= MAX_TICKS:
        ax.set_xticks(edges)
    ax.vlines(edges[1:-1], -0.5, len(samples) - 0.5, color="white", lw=0.6)
    ax.set(xlabel="step", ylabel="sample")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    _set_title(ax, f"Influence on {_query_name(influence, query)}, by window")
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.03)
    bar.outline.set_visible(False)
    bar.set_label(f"← harmful   ({influence.unit})   helpful →")
    return ax


def patterns(
    found: pl.DataFrame | Influence, *, query: int | str = 0, ax: Axes | None = None
) -> Axes:
    """Plot the share of each pattern, of a table of `backtrail.patterns` or of an influence.

    >>> axes = patterns(pl.DataFrame({"pattern": ["early", "late", "late", "stable"]}))
    >>> [text.get_text() for text in axes.texts]
    ['25.0 %  (1)', '50.0 %  (2)', '25.0 %  (1)', '0.0 %  (0)']

    Args:
        found: A table that `backtrail.patterns` returned, or an influence to call it with.
        query: Index or name of the query, for an influence.
        ax: Where to draw; None makes a new figure.

    Raises:
        TooFewWindows: The influence has fewer than three windows.
        NotFinite: Some influence is NaN or infinite.
        UnknownQuery: There is no such query.
    """
    if isinstance(found, Influence):
        table = find_patterns(found, query=query)
    else:
        table = _table(
            "found", found, ["pattern"], "a table of backtrail.patterns, or an influence"
        )
    ax = _axes(ax, (5.6, 2.4))
    share = shares(table)
    colours = [PATTERN_COLOURS[name] for name in PATTERNS]
    ax.barh(PATTERNS, [share[name] for name in PATTERNS], color=colours)
    for name in PATTERNS:
        count = share[name] * len(table)
        label = f"{100 * share[name]:.1f} %  ({count:.0f})"
        ax.annotate(label, (share[name], name), (6, 0), textcoords="offset points", va="center")
    ax.invert_yaxis()
    # Leaves room for the label of the longest bar.
    ax.set(xlim=(0, 1.25 * max(share.values())), xticks=[])
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
    _set_title(ax, f"When {len(table)} samples matter")
    return ax


def regimes(found: Regimes, *, ax: Axes | None = None) -> Axes:
    """Plot influence ÷ learning rate by step and its three levels.

    The band contains 80 % of all queries and slots. The learning rate is dotted, divided by its
    largest value.

    >>> from backtrail.influence.analysis.regimes import example
    >>> regimes(example()).get_yscale()
    'log'

    Args:
        found: What `backtrail.regimes` returned.
        ax: Where to draw; None makes a new figure.
    """
    arguments.instance("found", found, Regimes, "what backtrail.regimes returned")
    ax = _axes(ax, (6.8, 3.8))
    by_step = found.curve()
    steps = by_step["step"].to_numpy()
    ax.fill_between(steps, by_step["low"], by_step["high"], color=HELPFUL, alpha=0.15, lw=0.0)
    ax.plot(steps, by_step["value"], color=HELPFUL, alpha=0.35, lw=0.8)
    ax.plot(steps, by_step["smooth"], color=HELPFUL, lw=1.6)
    for name, first, stop, _, level, ratio in found.table().rows():
        ax.hlines(level, first, stop, color=BLACK, lw=1.2, ls=(0, (5, 3)))
        label = name if name == "basin" else f"{name}\n{ratio:.3g} x"
        ax.annotate(
            label,
            ((first + stop) / 2, 1.01),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize="small",
        )
    ax.vlines(found.boundaries, 0, 1, transform=ax.get_xaxis_transform(), color=GREY, lw=0.8)
    ax.set(yscale="log", xlim=(0, found.observed_at), xlabel="step")
    ax.set_ylabel(f"|influence| x slots ÷ learning rate\n({found.about})", fontsize="small")
    rate_axes = ax.twinx()
    rate_axes.plot(steps, found.rate / found.rate.max(), color=GREY, lw=1, ls=":")
    rate_axes.set(ylim=(0, 1.05), ylabel="learning rate ÷ its largest")
    ax.spines["top"].set_visible(False)
    rate_axes.spines["top"].set_visible(False)
    return ax


def detection(
    found: pl.DataFrame | Mapping[str, pl.DataFrame],
    *,
    wrong: Sequence[int],
    ax: Axes | None = None,
) -> Axes:
    """Plot precision over recall of finding known wrong labels.

    The dot is at as many samples as there are wrong labels. The dashed line is the precision of a
    random ranking. AP is the average precision.

    >>> table = pl.DataFrame({"sample": [4, 7, 1, 0], "score": [3.0, 2.0, 1.0, 0.0]})
    >>> detection({"loss": table}, wrong=[4, 1]).get_legend().get_texts()[0].get_text()
    'loss: AP 0.83'

    Args:
        found: A table that `backtrail.find_mislabeled` returned, or several by name.
        wrong: Samples whose labels are wrong.
        ax: Where to draw; None makes a new figure.

    Raises:
        BadSetting: There are no wrong labels.
        UnknownSample: One of them is not in a table.
    """
    wrong = arguments.whole_numbers("wrong", wrong, least=None, expected="one or more samples")
    expected = "a table of backtrail.find_mislabeled, or several by name"
    tables = found if isinstance(found, Mapping) and found else {"ranking": found}
    for table in tables.values():
        _table("found", table, ["sample", "score"], expected)
        places(np.sort(table["sample"].to_numpy()), wrong)  # refuses unknown samples
    ax = _axes(ax, (4.8, 4.2))
    for name, table in tables.items():
        samples = table["sample"].to_numpy()
        is_wrong = np.isin(samples, wrong)
        hits = np.cumsum(is_wrong)
        count = np.arange(1, len(is_wrong) + 1)
        total = hits[-1]
        recall = hits / total
        precision = hits / count
        average = average_precision(table["score"].to_numpy(), is_wrong)
        (line,) = ax.plot(recall, precision, lw=1.6, label=f"{name}: AP {average:.2f}")
        # Precision equals recall where as many samples are flagged as are wrong.
        even = total - 1
        ax.plot(recall[even], precision[even], marker="o", color=line.get_color())
        ax.axhline(total / count[-1], color=GREY, lw=1, ls=DASHED, zorder=0)
    ax.legend(frameon=False, fontsize="small")
    ax.set(
        xlabel="recall: share of the wrong labels found",
        ylabel="precision",
        xlim=(0, 1.02),
        ylim=(0, 1.02),
    )
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def scatter(
    predicted: Float[np.ndarray, "*query removal"],
    actual: Float[np.ndarray, "*query removal"],
    *,
    ax: Axes | None = None,
) -> Axes:
    """Plot actual effects of removals over predicted ones; on the dashed line they are equal.

    The correlations in the title are averages over the queries. Colours distinguish up to ten
    queries.

    >>> scatter(np.arange(4.0), 2 * np.arange(4.0)).get_title(loc="left")
    'Pearson 1.00, Spearman 1.00'

    Args:
        predicted: Predicted effects, in the unit of the query.
        actual: Effects found by retraining, in the same unit.
        ax: Where to draw; None makes a new figure.

    Raises:
        BadSetting: The arrays are not finite numbers of one shape.
    """
    predicted = _effects("predicted", predicted)
    actual = _effects("actual", actual)
    if predicted.shape != actual.shape:
        raise BadSetting("actual", actual.shape, f"the shape of predicted, {predicted.shape}")
    ax = _axes(ax, (4.6, 4.4))
    for x, y in zip(np.atleast_2d(predicted), np.atleast_2d(actual), strict=True):
        ax.scatter(x, y, s=22, alpha=0.75, lw=0)
    ends = [min(predicted.min(), actual.min()), max(predicted.max(), actual.max())]
    ax.plot(ends, ends, color=GREY, lw=1, ls=DASHED, zorder=0)
    r = mean_over_queries(pearson(predicted, actual))
    rho = mean_over_queries(spearman(predicted, actual))
    _set_title(ax, f"Pearson {r:.2f}, Spearman {rho:.2f}")
    ax.set(xlabel="predicted effect of the removal", ylabel="actual effect, by retraining")
    # Effects are small numbers with long labels, which would overlap on the x-axis.
    ax.locator_params(axis="x", nbins=4, min_n_ticks=3)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The given axes, or those of a new figure of that size, in inches.

    Raises:
        BadSetting: They are something else.
    """
    if ax is not None:
        return arguments.instance("ax", ax, Axes, "axes of matplotlib, or None")
    _, new = plt.subplots(figsize=size, layout="constrained")
    return new


def _check_influence(influence: object) -> None:
    """Check that an argument is an influence.

    Raises:
        BadSetting: It is something else.
    """
    arguments.instance("influence", influence, Influence, "an influence")


def _table(name: str, found: object, columns: Sequence[str], expected: str) -> pl.DataFrame:
    """A table with some columns.

    Raises:
        BadSetting: It is something else.
    """
    table = arguments.instance(name, found, pl.DataFrame, expected)
    if not set(columns) <= set(table.columns):
        raise BadSetting(name, table, expected)
    return table


def _effects(name: str, effects: object) -> Float[np.ndarray, "*query removal"]:
    """Numbers of at least one removal, all finite.

    Raises:
        BadSetting: They are something else.
    """
    expected = "an array [..., removal] of finite numbers, with two or more removals"
    try:
        found = np.asarray(effects, dtype=np.float64)
    except (TypeError, ValueError):
        raise BadSetting(name, effects, expected) from None
    if found.ndim not in {1, 2} or found.shape[-1] < 2 or not np.isfinite(found).all():
        raise BadSetting(name, effects, expected)
    return found


def _set_title(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", fontsize="medium", pad=8)


def _query_name(influence: Influence, query: int | str) -> str:
    return influence.queries[influence.query_index(query)]


def _label_signed_axis(ax: Axes, influence: Influence, query: int | str) -> None:
    """Draw the zero line, and label the positive side helpful and the negative side harmful."""
    ax.axhline(0, color=GREY, lw=0.8, zorder=1)
    ax.margins(y=0.12)
    ax.set_ylabel(f"influence on {_query_name(influence, query)}\n({influence.unit})")
    for place, word, colour in ((1, "helpful →", HELPFUL), (0, "← harmful", HARMFUL)):
        text = ax.text(1.015, place, word, color=colour, rotation=90, transform=ax.transAxes)
        text.set(fontsize="small", va="top" if place else "bottom")
    ax.spines[["top", "right"]].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
