"""When a sample matters: early, late, throughout, or fluctuating.

The four patterns are those of Xu & Wu, "Dynamic Influence Tracker" (2025). The paper does not
state the rule by which it assigns them. The rule below is ours; it does not depend on the scale of
the influence, and draws no random numbers.
"""

import numpy as np
import polars as pl
from jaxtyping import Float, Float64

from backtrail import arguments
from backtrail.errors import NotFinite, TooFewWindows
from backtrail.influence.influence import Influence

PATTERNS = ("early", "late", "stable", "fluctuating")
MIN_WINDOWS = 3


def patterns(
    influence: Influence, *, query: int | str = 0, ratio: float = 2.0, spread: float = 1.0
) -> pl.DataFrame:
    r"""Classify every sample by how its influence changes over the training.

    With the observed states :math:`0 = e_0 < e_1 < \dots < e_W` (state 0 counts as observed) and
    A the total influence, the series of a sample is its windowed influence per step,

    .. math:: x_w = (A_{e_w} - A_{e_{w-1}}) / (e_w - e_{w-1}), \qquad w = 1 \dots W, \; W \ge 3.

    Let early and late be the means of :math:`|x_w|` over the first and the last third of the
    windows (W // 3 of them). A sample is

    * **early** if early > ratio * late,
    * **late** if late > ratio * early,
    * else **fluctuating** if std(x) >= spread * mean(abs(x)), with the standard deviation of a
      sample of size W: the influence deviates from its mean by at least its own size, so it changes
      sign, or comes in bursts. For orientation, std / mean(abs) is above 1 for a series that
      alternates between -1 and 1, 1.25 for noise around zero, and 0.5 for a positive series that
      varies by half of its mean,
    * else **stable**.

    Samples whose whole series is zero, such as those never visited, are left out.

    Args:
        influence: An influence with at least three windows.
        query: Index or name of the query.
        ratio: Factor by which one end must exceed the other to call a sample early or late; > 1.
        spread: Relative spread from which on a sample fluctuates.

    Returns:
        One row per sample: sample, pattern, early, late (means of abs(x), in the unit of the query
        per step), slope (least squares, of abs(x) over the windows from 0 = first to 1 = last,
        divided by its mean), spread (std(x) / mean(abs(x))), total (at the last state).

    Raises:
        BadSetting: An argument has an invalid value.
        TooFewWindows: There are fewer than three windows.
        NotFinite: Some influence is NaN or infinite.
        UnknownQuery: There is no such query.
    """
    arguments.instance("influence", influence, Influence, "an influence")
    ratio = arguments.real("ratio", ratio, "a number above 1", lambda number: number > 1)
    spread = arguments.positive("spread", spread)
    states = [state for state in influence.observed_at if state]
    edges = np.array([0, *states])
    windows = len(states)
    if windows < MIN_WINDOWS:
        raise TooFewWindows(windows, MIN_WINDOWS)
    # State 0 may have been observed; its totals, all zero, come first and are no window.
    totals = influence.total(query=query)[0, -windows:]  # [window, sample]
    not_finite = np.flatnonzero(~np.isfinite(totals).all(axis=0))
    if len(not_finite):
        raise NotFinite(influence.ids[not_finite].tolist())
    series = np.diff(totals, prepend=0.0, axis=0).T / np.diff(edges)  # [sample, window]
    nonzero = np.flatnonzero((series != 0).any(axis=1))
    table = classify(series[nonzero], ratio=ratio, spread=spread)
    sample = pl.Series("sample", influence.ids[nonzero])
    total = pl.Series("total", totals[-1, nonzero])
    return table.select(sample, *table.columns, total)


def classify(
    series: Float[np.ndarray, "sample window"], *, ratio: float = 2.0, spread: float = 1.0
) -> pl.DataFrame:
    """Apply the rule of `patterns` to series that are not all zero.

    >>> classify(np.array([[4.0, 1, 1], [1, 1, 3], [1, 1, 1], [1, -1, 1]]))["pattern"].to_list()
    ['early', 'late', 'stable', 'fluctuating']

    Args:
        series: Influence per step, of each window.
        ratio: As in `patterns`.
        spread: As in `patterns`.

    Returns:
        One row per series: pattern, early, late, slope, spread.
    """
    # In units of each series' largest value, so that no square overflows or underflows.
    largest = np.abs(series).max(axis=1, keepdims=True)
    scaled = series / largest
    sizes = np.abs(scaled)
    third = series.shape[1] // 3
    early = sizes[:, :third].mean(axis=1)
    late = sizes[:, -third:].mean(axis=1)
    mean = sizes.mean(axis=1)
    relative_spread = scaled.std(axis=1, ddof=1) / mean
    # The first condition that holds decides.
    conditions = [early > ratio * late, late > ratio * early, relative_spread >= spread]
    pattern = np.select(conditions, ["early", "late", "fluctuating"], "stable")
    return pl.DataFrame(
        {
            "pattern": pattern,
            "early": early * largest[:, 0],
            "late": late * largest[:, 0],
            "slope": _fit_slope(sizes) / mean,
            "spread": relative_spread,
        }
    )


def _fit_slope(sizes: Float64[np.ndarray, "sample window"]) -> Float64[np.ndarray, " sample"]:
    """Least-squares slope over the windows, from 0 at the first to 1 at the last."""
    # Centred, so that the intercept drops out.
    time = np.linspace(-0.5, 0.5, sizes.shape[1])
    return (sizes @ time) / (time @ time)


def shares(table: pl.DataFrame) -> dict[str, float]:
    """Share of each pattern among the samples of a table that `patterns` returned.

    >>> shares(pl.DataFrame({"pattern": ["late", "late", "stable", "early"]}))
    {'early': 0.25, 'late': 0.5, 'stable': 0.25, 'fluctuating': 0.0}
    """
    found = table["pattern"].to_list()
    samples = max(len(found), 1)  # of an empty table every share is 0
    return {name: found.count(name) / samples for name in PATTERNS}
