"""When a sample matters: early, late, all along, or now one way and now the other.

The four patterns are those of Xu & Wu, "Dynamic Influence Tracker" (2025). Their rule is not
printed; ours is below, free of scale and of chance.
"""

import numpy as np
import polars as pl
from jaxtyping import Float, Float64

from backtrail.errors import NotFinite, TooFewWindows
from backtrail.influence.influence import Influence

PATTERNS = ("early", "late", "stable", "fluctuating")
NEEDED = 3


def patterns(
    influence: Influence, *, query: int | str = 0, ratio: float = 2.0, spread: float = 1.0
) -> pl.DataFrame:
    r"""Classify every sample by how its influence per window runs over the training.

    With the observed states :math:`0 = e_0 < e_1 < \dots < e_W` (state 0 counts as observed) and
    A the total influence, the series of a sample is its windowed influence per step,

    .. math:: x_w = (A_{e_w} - A_{e_{w-1}}) / (e_w - e_{w-1}), \qquad w = 1 \dots W, \; W \ge 3.

    Let early and late be the means of :math:`|x_w|` over the first and the last third of the
    windows (W // 3 of them). A sample is

    * **early** if early > ratio * late,
    * **late** if late > ratio * early,
    * else **fluctuating** if std(x) >= spread * mean(abs(x)), with the standard deviation of a
      sample of size W: the influence strays from its mean by at least its own size, so it changes
      sign, or comes in bursts. A series that alternates between -1 and 1 is above 1, noise around
      zero at 1.25, a positive one that varies by a half at 0.5,
    * else **stable**.

    Samples whose whole series is zero, such as those never visited, are left out.

    Args:
        influence: With at least three windows.
        query: Which query, by index or name.
        ratio: How many times larger one end must be to call a sample early or late; above 1.
        spread: From which relative spread on a sample fluctuates.

    Returns:
        One row per sample: sample, pattern, early, late (means of abs(x), in the unit of the query
        per step), slope (least squares, of abs(x) over the windows from 0 = first to 1 = last,
        divided by its mean), spread (std(x) / mean(abs(x))), total (at the last state).

    Raises:
        TooFewWindows: If there are fewer than three.
        NotFinite: If some influence is NaN or infinite.
    """
    edges = np.array([0, *(state for state in influence.observed_at if state)])
    if len(edges) <= NEEDED:
        raise TooFewWindows(len(edges) - 1, NEEDED)
    totals = influence.total(query=query)[0, -(len(edges) - 1) :]
    unknown = np.flatnonzero(~np.isfinite(totals).all(axis=0))
    if len(unknown):
        raise NotFinite(influence.ids[unknown].tolist())
    series = np.diff(totals, prepend=0.0, axis=0).T / np.diff(edges)
    moved = np.flatnonzero((series != 0).any(axis=1))
    table = classify(series[moved], ratio=ratio, spread=spread)
    known = {"sample": influence.ids[moved], "total": totals[-1, moved]}
    return table.with_columns(**{name: pl.Series(column) for name, column in known.items()}).select(
        "sample", *table.columns, "total"
    )


def classify(
    series: Float[np.ndarray, "sample window"], *, ratio: float = 2.0, spread: float = 1.0
) -> pl.DataFrame:
    """Apply the rule of `patterns` to series that are not all zero.

    >>> classify(np.array([[4.0, 1, 1], [1, 1, 3], [1, 1, 1], [1, -1, 1]]))["pattern"].to_list()
    ['early', 'late', 'stable', 'fluctuating']
    """
    # In units of each series' largest value, no square overflows and none vanishes.
    largest = np.abs(series).max(axis=1, keepdims=True)
    sizes = np.abs(series) / largest
    third = series.shape[1] // 3
    early, late = sizes[:, :third].mean(axis=1), sizes[:, -third:].mean(axis=1)
    mean = sizes.mean(axis=1)
    strays = (series / largest).std(axis=1, ddof=1) / mean
    cases = [early > ratio * late, late > ratio * early, strays >= spread]
    return pl.DataFrame(
        {
            "pattern": np.select(cases, ["early", "late", "fluctuating"], "stable"),
            "early": early * largest[:, 0],
            "late": late * largest[:, 0],
            "slope": _slope(sizes) / mean,
            "spread": strays,
        }
    )


def _slope(sizes: Float64[np.ndarray, "sample window"]) -> Float64[np.ndarray, " sample"]:
    """Fit a line over the windows, from 0 at the first to 1 at the last."""
    time = np.linspace(-0.5, 0.5, sizes.shape[1])
    return (sizes @ time) / (time @ time)


def shares(table: pl.DataFrame) -> dict[str, float]:
    """Give the share of each pattern among the samples of a table of `patterns`.

    >>> shares(pl.DataFrame({"pattern": ["late", "late", "stable", "early"]}))
    {'early': 0.25, 'late': 0.5, 'stable': 0.25, 'fluctuating': 0.0}
    """
    found = table["pattern"].to_list()
    return {name: found.count(name) / max(len(found), 1) for name in PATTERNS}
