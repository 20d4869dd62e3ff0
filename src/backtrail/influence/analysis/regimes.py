"""When data matters at all: the influence of every step ÷ its learning rate, and the three regimes of it.

Wang et al., "Capturing the Temporal Dependence of Training Data Influence" (2024), see a very short
start, in which data counts much, a long basin, and an end in which it counts more and more. Their
regimes are read off a picture; the rule below is ours, and it says when there is nothing of the
kind.
"""

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import polars as pl
from jaxtyping import Float, Float64, Int64

from backtrail.errors import NotFinite, NotObserved, TooFewSteps, UnknownQuery
from backtrail.influence.influence import Influence, State
from backtrail.influence.layout import Description
from backtrail.influence.writer import from_arrays

NAMES = ("start", "basin", "end")
NEEDED = 5  # steps
POINTS = (
    4096  # longer trainings are cut in so many stretches at most: the fit takes the square of it
)
EXPLAINED = 0.5  # share of the variance of log values that three levels must explain
BAND = (0.1, 0.9)  # quantiles


@final
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Regimes:
    r"""Influence ÷ learning rate by step, and the three constant levels that fit its logarithm best.

    Attributes:
        step: the steps that have a value, in order.
        rate: learning rate of each.
        value: :math:`|S_t| \cdot \operatorname{mean}_{q,b} |I[q, \tau, t, b]| \, / \, \eta_t`.
        low: its 10 % quantile over queries and slots.
        high: its 90 % quantile.
        boundaries: first step of the basin, and first step of the end.
        levels: geometric mean of the value in start, basin and end.
        explained: share of the variance of the log value that the three levels explain.
        ratio: how many times the basin's level the other two had to be.
        left_out: how many steps have no value: learning rate 0, or no influence at all.
        observed_at: the state that the queries read.
        about: method, number of queries and unit, in words.
    """

    step: Int64[np.ndarray, " point"]
    rate: Float64[np.ndarray, " point"]
    value: Float64[np.ndarray, " point"]
    low: Float64[np.ndarray, " point"]
    high: Float64[np.ndarray, " point"]
    boundaries: tuple[int, int]
    levels: tuple[float, float, float]
    explained: float
    ratio: float
    left_out: int
    observed_at: int
    about: str

    @property
    def ratios(self) -> tuple[float, float]:
        """Levels of start and end in units of the basin's."""
        start, basin, end = self.levels
        return start / basin, end / basin

    @property
    def found(self) -> bool:
        """Whether there are three regimes: a basin well below both ends, and levels that explain most of the curve."""
        return min(self.ratios) >= self.ratio and self.explained >= EXPLAINED

    @property
    def edges(self) -> tuple[int, int, int, int]:
        """First step of each regime, and the state at which the last one ends."""
        return 0, *self.boundaries, self.observed_at

    def table(self) -> pl.DataFrame:
        """One row per regime: regime, first (step), stop (the step after the last), share (of steps), level, ratio."""
        first, stop = self.edges[:-1], self.edges[1:]
        share = np.diff(self.edges) / self.observed_at
        ratio = np.array(self.levels) / self.levels[1]
        columns = {
            "first": first,
            "stop": stop,
            "share": share,
            "level": self.levels,
            "ratio": ratio,
        }
        return pl.DataFrame({"regime": NAMES, **columns})

    def curve(self) -> pl.DataFrame:
        """One row per step that has a value: step, rate, value, low, high, smooth, regime.

        `smooth` is the geometric mean over a fiftieth of the training around the step.
        """
        columns = {name: getattr(self, name) for name in ("step", "rate", "value", "low", "high")}
        which = np.searchsorted(self.boundaries, self.step, side="right")
        named = pl.Series(NAMES, dtype=pl.String).gather(which)
        return pl.DataFrame({**columns, "smooth": smoothed(self.value), "regime": named})

    @property
    def summary(self) -> str:
        """Whether there are three regimes, by how much, and what was left out."""
        start, end = self.ratios
        verdict = "Three regimes" if self.found else "No three regimes"
        ends = f"start {start:.3g} x and end {end:.3g} x the basin"
        lines = [
            f"{verdict} of influence ÷ learning rate ({self.about}): {ends}.",
            f"Three levels explain {self.explained:.0%} of the variance of its logarithm.",
        ]
        if not self.found:
            lines.append(
                f"Needed: ends {self.ratio:g} x the basin, and {EXPLAINED:.0%}. The best three levels:"
            )
        if self.left_out:
            lines.insert(
                2,
                f"{self.left_out} steps with learning rate 0, or without any influence, are left out.",
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        """Tell whether there are three regimes, and their levels."""
        rows = self.table().rows()
        told = (
            f"  {n:5}  steps {a} to {b - 1} ({part:.1%}), level {level:.3g}"
            for n, a, b, part, level, _ in rows
        )
        return "\n".join([self.summary, *told])


def of_rates(
    influence: Influence,
    rates: Float64[np.ndarray, " step"],
    *,
    observed_at: State = "end",
    query: int | str | None = None,
    ratio: float = 2.0,
) -> Regimes:
    """Find the regimes where the learning rate of every step is known; see `backtrail.regimes`.

    >>> print(example())
    Three regimes of influence ÷ learning rate (made, 1 query, nats): start 9 x and end 4 x the basin.
    Three levels explain 100% of the variance of its logarithm.
      start  steps 0 to 1 (16.7%), level 9
      basin  steps 2 to 8 (58.3%), level 1
      end    steps 9 to 11 (25.0%), level 4

    Raises:
        NotObserved: no query reads that state.
        UnknownQuery: there is no such query.
        TooFewSteps: fewer than five steps have a value.
        NotFinite: some influence is NaN or infinite.
    """
    state = influence.observed_at[-1] if observed_at == "end" else observed_at
    if state not in influence.observed_at:
        raise NotObserved(state, influence.observed_at)
    asked = list(range(len(influence.queries))) if query is None else [_place(influence, query)]
    column, sample = influence.observed_at.index(state), influence.sample
    blocks = [
        _sizes(influence.values(start, stop)[asked, column], sample[start:stop])
        for start, stop in influence.description.shards
    ]
    with np.errstate(divide="ignore", invalid="ignore"):
        curves = np.concatenate(blocks, axis=1)[:, :state] / rates[:state]
    known = np.flatnonzero(np.isfinite(curves[0]) & (curves[0] > 0))
    if len(known) < NEEDED:
        raise TooFewSteps(len(known), NEEDED)
    fit = fitted(np.log(curves[0, known]))
    many = "1 query" if len(asked) == 1 else f"{len(asked)} queries"
    value, low, high = curves[:, known]
    return Regimes(
        known,
        rates[known],
        value,
        low,
        high,
        boundaries=(int(known[fit.first]), int(known[fit.second])),
        levels=fit.levels,
        explained=fit.explained,
        ratio=ratio,
        left_out=state - len(known),
        observed_at=state,
        about=f"{influence.method}, {many}, {influence.unit}",
    )


def _place(influence: Influence, query: int | str) -> int:
    place = influence.queries.index(query) if query in influence.queries else query
    if isinstance(place, str) or not 0 <= place < len(influence.queries):
        raise UnknownQuery(query, influence.queries)
    return place


def _sizes(
    values: Float[np.ndarray, "query step slot"], sample: Int64[np.ndarray, "step slot"]
) -> Float64[np.ndarray, "curve step"]:
    """Mean and quantiles of slots x |influence| over queries and slots, step by step.

    Raises:
        NotFinite: some influence is NaN or infinite.
    """
    size = np.abs(values.astype(np.float64))
    unknown = ~np.isfinite(size).all(axis=0)
    if unknown.any():
        raise NotFinite(np.unique(sample[unknown]).tolist())
    found = np.zeros((3, len(sample)))
    for step, real in enumerate(sample >= 0):
        if real.any():
            # A mean loss has divided every slot by their number.
            row = size[:, step, real] * real.sum()
            found[:, step] = row.mean(), *np.quantile(row, BAND)
    return found


@final
@dataclass(frozen=True, slots=True)
class Fit:
    """The three constant levels that fit a series best: where the second and third begin, and how well they do."""

    first: int
    second: int
    levels: tuple[float, float, float]
    explained: float


def fitted(logs: Float64[np.ndarray, " point"]) -> Fit:
    """Fit three constant levels to log values; the levels come back as values."""
    first, second = pieces(logs)
    parts = np.split(logs, (first, second))
    start, basin, end = (float(np.exp(part.mean())) for part in parts)
    whole = float(((logs - logs.mean()) ** 2).sum())
    left = sum(float(((part - part.mean()) ** 2).sum()) for part in parts)
    # What rounding leaves of a constant is no variance.
    flat = whole <= 1e-20 * max(1.0, float((logs**2).sum()))
    return Fit(first, second, (start, basin, end), 0.0 if flat else 1 - left / whole)


def pieces(series: Float64[np.ndarray, " point"]) -> tuple[int, int]:
    r"""Where the second and the third of three constant pieces begin that fit a series best, by dynamic programming.

    .. math:: \min_{0 < i < j < n} \operatorname{SSE}(0, i) + \operatorname{SSE}(i, j) + \operatorname{SSE}(j, n)

    SSE is the sum of squares around the mean of a piece; of equal fits the earliest boundaries. A
    series of more than 4096 points is cut into that many stretches at most, and boundaries lie
    between them.

    >>> pieces(np.array([5.0, 5.0, 0.0, 0.0, 0.0, 2.0]))
    (2, 5)
    """
    width = -(-len(series) // POINTS)
    starts = np.arange(0, len(series), width)
    ends = np.append(starts[1:], len(series))
    centred = series - series.mean()
    sums, squares = (
        np.concatenate([[0.0], np.cumsum(one)[ends - 1]]) for one in (centred, centred**2)
    )
    at = np.append(0, ends)

    def error(start: Any, stop: Any) -> Any:
        """Sum of squares around the mean of the stretches [start, stop)."""
        return (
            squares[stop]
            - squares[start]
            - (sums[stop] - sums[start]) ** 2 / (at[stop] - at[start])
        )

    last = len(starts)
    thirds, seconds = np.arange(2, last), np.arange(last)
    firsts = np.array(
        [
            1 + (error(0, seconds[1:third]) + error(seconds[1:third], third)).argmin()
            for third in thirds
        ]
    )
    best = int((error(0, firsts) + error(firsts, thirds) + error(thirds, last)).argmin())
    return int(starts[firsts[best]]), int(starts[thirds[best]])


def smoothed(values: Float64[np.ndarray, " point"]) -> Float64[np.ndarray, " point"]:
    """Geometric mean over a fiftieth of all points around each, fewer at the two ends.

    >>> smoothed(np.array([1.0, 1.0, 8.0]))
    array([1., 2., 8.])
    """
    reach = len(values) // 100 + 1
    sums = np.concatenate([[0.0], np.cumsum(np.log(values))])
    place = np.arange(len(values))
    # As far to the left as to the right, so that a slope is not bent at the ends.
    near = np.minimum(np.minimum(place, place[::-1]), reach)
    smooth: np.ndarray = np.exp((sums[place + near + 1] - sums[place - near]) / (2 * near + 1))
    return smooth


def example() -> Regimes:
    """Make three tiny regimes to try things on: 2, 7 and 3 steps, levels 9, 1 and 4.

    >>> example().table()["level"].round(6).to_list()
    [9.0, 1.0, 4.0]
    """
    about = Description(
        method="made",
        unit="nats",
        denominator="keep",
        run="made",
        queries=("loss",),
        observed_at=(12,),
        steps=12,
        slots=1,
        samples=1,
        shard=12,
    )
    values = 0.1 * np.repeat([9.0, 1.0, 4.0], [2, 7, 3]).reshape(1, 1, 12, 1)
    return of_rates(
        from_arrays(about, values, sample=np.zeros((12, 1), np.int64)), np.full(12, 0.1)
    )
