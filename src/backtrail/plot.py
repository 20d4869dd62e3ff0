"""Pictures of influence: each function draws into `ax`, or a new figure, and gives the axes back.

Needs matplotlib. Blue is helpful and red is harmful, as for a loss. Nothing is shown or saved, and
no global setting is changed.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from jaxtyping import Float

from backtrail.errors import BadSetting, MissingExtra
from backtrail.influence.analysis.patterns import PATTERNS, shares
from backtrail.influence.analysis.patterns import patterns as find_patterns
from backtrail.influence.analysis.regimes import Regimes
from backtrail.influence.influence import Influence, State
from backtrail.influence.tables import places
from backtrail.stats import average_precision, mean_over_queries, pearson, spearman

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise MissingExtra("matplotlib", "plot") from error

INK, FAINT, HELPFUL, HARMFUL = "#2b2b2b", "#9a9a9a", "#2166ac", "#b2182b"
# Blue at the positive end, as HELPFUL.
DIVERGING = "RdBu"
HUES = {"early": "#e69f00", "late": "#56b4e9", "stable": "#009e73", "fluctuating": "#cc79a7"}


def curve(
    influence: Influence, *, sample: int, query: int | str = 0, ax: Axes | None = None
) -> Axes:
    """Draw the total influence of a sample by observed state.

    >>> from backtrail.influence.writer import example
    >>> curve(example(), sample=0).get_xlabel()
    'observed at state'
    """
    ax = _axes(ax, (6.4, 3.6))
    table = influence.curve(sample=sample, query=query)
    states, total = table["observed_at"].to_numpy(), table["influence"].to_numpy()
    for side, colour in ((total >= 0, HELPFUL), (total <= 0, HARMFUL)):
        ax.fill_between(
            states, total, 0.0, where=side, interpolate=True, color=colour, alpha=0.2, lw=0.0
        )
    ax.plot(states, total, color=INK, lw=1.6, marker="o", markersize=4, clip_on=False, zorder=3)
    ax.set(xlabel="observed at state", xlim=(0, max(states[-1], 1)))
    ax.set_title(
        f"Sample {sample}: influence of all its visits", loc="left", fontsize="medium", pad=8
    )
    _signed(ax, influence, query)
    return ax


def visits(
    influence: Influence,
    *,
    sample: int,
    query: int | str = 0,
    observed_at: State = "end",
    ax: Axes | None = None,
) -> Axes:
    """Draw the influence of each visit of a sample, by the step of the visit.

    >>> from backtrail.influence.writer import example
    >>> visits(example(), sample=0).get_xlabel()
    'step of the visit'
    """
    ax = _axes(ax, (6.4, 3.6))
    table = influence.visits_curve(sample=sample, query=query, observed_at=observed_at)
    steps, values = table["step"].to_numpy(), table["influence"].to_numpy()
    colours = np.where(values >= 0, HELPFUL, HARMFUL).tolist()
    ax.vlines(steps, 0, values, colors=colours, lw=1.4)
    ax.scatter(steps, values, c=colours, s=18, zorder=3)
    state = influence.observed_at[-1] if observed_at == "end" else observed_at
    ax.set(xlabel="step of the visit", xlim=(-0.02 * state, 1.02 * state))
    title = (
        f"Sample {sample}: influence of each of its {len(table)} visits, seen from state {state}"
    )
    ax.set_title(title, loc="left", fontsize="medium", pad=8)
    _signed(ax, influence, query)
    return ax


def heatmap(
    influence: Influence,
    *,
    samples: Sequence[int],
    query: int | str = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw the influence of samples on each window between observed states; white is none.

    The axis of time is true: a longer window is wider. Of more than 40 samples some labels are left
    out.

    >>> from backtrail.influence.writer import example
    >>> [text.get_text() for text in heatmap(example(), samples=[2, 0]).get_yticklabels()]
    ['2', '0']
    """
    ax = _axes(ax, (6.8, 1.4 + 0.26 * min(len(samples), 40)))
    states = [state for state in influence.observed_at if state]
    edges = np.array([0, *states])
    totals = influence.total(query=query)[0, -len(states) :][:, places(influence.ids, samples)].T
    windows = np.diff(totals, prepend=0.0, axis=1)
    most = float(np.abs(windows).max()) or 1.0
    rows = np.arange(len(samples) + 1) - 0.5
    mesh = ax.pcolormesh(edges, rows, windows, cmap=DIVERGING, vmin=-most, vmax=most)
    every = -(-len(samples) // 40)
    ax.set_yticks(range(0, len(samples), every), [str(sample) for sample in samples[::every]])
    ax.invert_yaxis()
    if len(edges) <= 13:
        ax.set_xticks(edges)
    ax.vlines(edges[1:-1], -0.5, len(samples) - 0.5, color="white", lw=0.6)
    ax.set(xlabel="step", ylabel="sample")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(
        f"Influence on {_name(influence, query)}, by window", loc="left", fontsize="medium", pad=8
    )
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.03)
    bar.outline.set_visible(False)
    bar.set_label(f"← harmful   ({influence.unit})   helpful →")
    return ax


def patterns(
    found: pl.DataFrame | Influence, *, query: int | str = 0, ax: Axes | None = None
) -> Axes:
    """Draw the share of each pattern, of a table of `backtrail.patterns` or of an influence.

    >>> axes = patterns(pl.DataFrame({"pattern": ["early", "late", "late", "stable"]}))
    >>> [text.get_text() for text in axes.texts]
    ['25.0 %  (1)', '50.0 %  (2)', '25.0 %  (1)', '0.0 %  (0)']
    """
    table = find_patterns(found, query=query) if isinstance(found, Influence) else found
    ax = _axes(ax, (5.6, 2.4))
    part = shares(table)
    ax.barh(PATTERNS, [part[name] for name in PATTERNS], color=[HUES[name] for name in PATTERNS])
    for name in PATTERNS:
        label = f"{100 * part[name]:.1f} %  ({part[name] * len(table):.0f})"
        ax.annotate(label, (part[name], name), (6, 0), textcoords="offset points", va="center")
    ax.invert_yaxis()
    ax.set(xlim=(0, 1.25 * max(part.values())), xticks=[])
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
    title = f"When {len(table)} samples matter"
    ax.set_title(title, loc="left", fontsize="medium", pad=8)
    return ax


def regimes(found: Regimes, *, ax: Axes | None = None) -> Axes:
    """Draw influence ÷ learning rate by step, as `backtrail.regimes` found it, and the three levels.

    The band holds 80 % of all queries and slots; the learning rate is dotted, in units of its
    largest.

    >>> from backtrail.influence.analysis.regimes import example
    >>> regimes(example()).get_yscale()
    'log'
    """
    ax = _axes(ax, (6.8, 3.8))
    curve = found.curve()
    steps = curve["step"].to_numpy()
    ax.fill_between(steps, curve["low"], curve["high"], color=HELPFUL, alpha=0.15, lw=0.0)
    ax.plot(steps, curve["value"], color=HELPFUL, alpha=0.35, lw=0.8)
    ax.plot(steps, curve["smooth"], color=HELPFUL, lw=1.6)
    for name, first, stop, _, level, times in found.table().rows():
        ax.hlines(level, first, stop, color=INK, lw=1.2, ls=(0, (5, 3)))
        label = f"{name}\n{times:.3g} x" if name != "basin" else name
        place = ((first + stop) / 2, 1.01)
        ax.annotate(
            label,
            place,
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize="small",
        )
    ax.vlines(found.boundaries, 0, 1, transform=ax.get_xaxis_transform(), color=FAINT, lw=0.8)
    ax.set(yscale="log", xlim=(0, found.observed_at), xlabel="step")
    ax.set_ylabel(f"|influence| x slots ÷ learning rate\n({found.about})", fontsize="small")
    beside = ax.twinx()
    beside.plot(steps, found.rate / found.rate.max(), color=FAINT, lw=1, ls=":")
    beside.set(ylim=(0, 1.05), ylabel="learning rate ÷ its largest")
    for axes in (ax, beside):
        axes.spines["top"].set_visible(False)
    return ax


def detection(
    found: pl.DataFrame | Mapping[str, pl.DataFrame],
    *,
    wrong: Sequence[int],
    ax: Axes | None = None,
) -> Axes:
    """Draw how well rankings of `backtrail.find_mislabeled` find labels known to be wrong: precision over recall.

    The dot is at as many samples as there are wrong labels; dashed is a ranking by chance. AP is
    the average precision.

    >>> table = pl.DataFrame({"sample": [4, 7, 1, 0], "score": [3.0, 2.0, 1.0, 0.0]})
    >>> detection({"loss": table}, wrong=[4, 1]).get_legend().get_texts()[0].get_text()
    'loss: AP 0.83'

    Args:
        found: a table, or several by name.
        wrong: samples whose labels are wrong.
        ax: where to draw.

    Raises:
        BadSetting: there are no wrong labels.
        UnknownSample: one of them is not in a table.
    """
    if not len(wrong):
        raise BadSetting("wrong", wrong, "one or more samples")
    ax = _axes(ax, (4.8, 4.2))
    tables = {"ranking": found} if isinstance(found, pl.DataFrame) else found
    for name, table in tables.items():
        samples = table["sample"].to_numpy()
        places(np.sort(samples), wrong)
        guilty = np.isin(samples, wrong)
        hits, count = np.cumsum(guilty), np.arange(1, len(guilty) + 1)
        label = f"{name}: AP {average_precision(table['score'].to_numpy(), guilty):.2f}"
        (curve,) = ax.plot(hits / hits[-1], hits / count, lw=1.6, label=label)
        even = hits[-1] - 1
        ax.plot(
            hits[even] / hits[-1], hits[even] / count[even], marker="o", color=curve.get_color()
        )
        ax.axhline(hits[-1] / count[-1], color=FAINT, lw=1, ls=(0, (5, 4)), zorder=0)
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
    """Draw actual effects of removals over predicted ones; on the dashed line they are equal.

    The correlations are those of each query, averaged; colours tell up to ten queries apart.

    >>> scatter(np.arange(4.0), 2 * np.arange(4.0)).get_title(loc="left")
    'Pearson 1.00, Spearman 1.00'
    """
    ax = _axes(ax, (4.6, 4.4))
    for p, a in zip(np.atleast_2d(predicted), np.atleast_2d(actual), strict=True):
        ax.scatter(p, a, s=22, alpha=0.75, lw=0)
    ends = [min(predicted.min(), actual.min()), max(predicted.max(), actual.max())]
    ax.plot(ends, ends, color=FAINT, lw=1, ls=(0, (5, 4)), zorder=0)
    agreement = {"Pearson": pearson, "Spearman": spearman}
    told = [
        f"{name} {mean_over_queries(f(predicted, actual)):.2f}" for name, f in agreement.items()
    ]
    ax.set_title(", ".join(told), loc="left", fontsize="medium", pad=8)
    ax.set(xlabel="predicted effect of the removal", ylabel="actual effect, by retraining")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Take the given axes, or those of a new figure."""
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _name(influence: Influence, query: int | str) -> str:
    return query if isinstance(query, str) else influence.queries[query]


def _signed(ax: Axes, influence: Influence, query: int | str) -> None:
    """Draw the zero line, and tell what the two directions from it mean."""
    ax.axhline(0, color=FAINT, lw=0.8, zorder=1)
    ax.margins(y=0.12)
    ax.set_ylabel(f"influence on {_name(influence, query)}\n({influence.unit})")
    for place, word, colour in ((1, "helpful →", HELPFUL), (0, "← harmful", HARMFUL)):
        text = ax.text(1.015, place, word, color=colour, rotation=90, transform=ax.transAxes)
        text.set(fontsize="small", va="top" if place else "bottom")
    ax.spines[["top", "right"]].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
