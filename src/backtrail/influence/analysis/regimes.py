"""When data matters: influence divided by the learning rate, by step, and its three regimes.

Wang et al., "Capturing the Temporal Dependence of Training Data Influence" (2024), describe a very
short start in which data matters much, a long basin, and an end in which it matters more and more.
They read these regimes off a plot. The rule below is ours; it also detects that a training has no
such regimes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import polars as pl
from jaxtyping import Float, Float64, Int64

from backtrail import arguments
from backtrail.errors import NotFinite, TooFewSteps
from backtrail.influence.influence import Influence, ObservedState
from backtrail.influence.layout import Description
from backtrail.influence.writer import from_arrays

REGIMES = ("start", "basin", "end")
MIN_STEPS = 5
# The fit takes time and memory with the square of the number of points. A longer training is cut
# into this many ranges of steps.
MAX_POINTS = 4096
MIN_EXPLAINED = 0.5  # share of the variance of the log values that three levels must explain
QUANTILES = (0.1, 0.9)


@final
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Regimes:
    r"""Influence divided by the learning rate, by step, and the three levels that fit its log best.

    :func:`backtrail.regimes` returns it; `print(result)` shows the levels and their steps. The
    three regimes are those of Wang et al., arXiv 2412.09538; the rule that finds them is ours.

    Attributes:
        step: The steps that have a value, ascending.
        rate: Learning rate of each.
        value: :math:`|S_t| \cdot \operatorname{mean}_{q,b} |I[q, \tau, t, b]| \, / \, \eta_t`.
        low: Its 10 % quantile over queries and slots.
        high: Its 90 % quantile.
        boundaries: First step of the basin, and first step of the end.
        levels: Geometric mean of the value in start, basin and end.
        explained: Share of the variance of the log value that the three levels explain.
        ratio: Factor by which start and end must exceed the basin.
        left_out: Number of steps without a value: their learning rate or influence is 0.
        observed_at: The state that the queries read.
        about: Method, number of queries and unit, as text.
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
        """Levels of start and end, divided by the basin's."""
        start, basin, end = self.levels
        return start / basin, end / basin

    @property
    def found(self) -> bool:
        """Whether there are three regimes.

        The basin must be well below both ends, and the levels must explain most of the curve.
        """
        return min(self.ratios) >= self.ratio and self.explained >= MIN_EXPLAINED

    @property
    def edges(self) -> tuple[int, int, int, int]:
        """First step of each regime, and the state at which the last one ends."""
        basin, end = self.boundaries
        return 0, basin, end, self.observed_at

    def table(self) -> pl.DataFrame:
        """One row per regime: regime, first, stop, share, level, ratio.

        `first` is its first step, `stop` the step after its last, `share` its share of all steps,
        and `ratio` its level divided by the basin's.
        """
        levels = np.array(self.levels)
        return pl.DataFrame(
            {
                "regime": REGIMES,
                "first": self.edges[:-1],
                "stop": self.edges[1:],
                "share": np.diff(self.edges) / self.observed_at,
                "level": self.levels,
                "ratio": levels / levels[1],
            }
        )

    def curve(self) -> pl.DataFrame:
        """One row per step that has a value: step, rate, value, low, high, smooth, regime.

        `smooth` is the geometric mean over a fiftieth of the training around the step.
        """
        number = np.searchsorted(self.boundaries, self.step, side="right")
        return pl.DataFrame(
            {
                "step": self.step,
                "rate": self.rate,
                "value": self.value,
                "low": self.low,
                "high": self.high,
                "smooth": smooth(self.value),
                "regime": pl.Series(REGIMES, dtype=pl.String).gather(number),
            }
        )

    @property
    def summary(self) -> str:
        """Whether there are three regimes, their ratios, and what was left out."""
        start, end = self.ratios
        verdict = "Three regimes" if self.found else "No three regimes"
        lines = [
            f"{verdict} of influence ÷ learning rate ({self.about}): "
            f"start {start:.3g} x and end {end:.3g} x the basin.",
            f"Three levels explain {self.explained:.0%} of the variance of its logarithm.",
        ]
        if self.left_out:
            lines.append(
                f"{self.left_out} steps with learning rate 0, or without any influence, "
                "are left out."
            )
        if not self.found:
            lines.append(
                f"Required: both ends at least {self.ratio:g} x the basin, and at least "
                f"{MIN_EXPLAINED:.0%} explained. The best three levels:"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        """Summary, and one line per regime."""
        lines = [self.summary]
        for name, first, stop, share, level, _ in self.table().rows():
            lines.append(
                f"  {name:5}  steps {first} to {stop - 1} ({share:.1%}), level {level:.3g}"
            )
        return "\n".join(lines)


def regimes_from_rates(
    influence: Influence,
    rates: Float64[np.ndarray, " step"],
    *,
    observed_at: ObservedState = "end",
    query: int | str | None = None,
    ratio: float = 2.0,
) -> Regimes:
    """Find the regimes, given the learning rate of every step; see `backtrail.regimes`.

    >>> print(example())  # doctest: +NORMALIZE_WHITESPACE
    Three regimes of influence ÷ learning rate (example, 1 query, nats):
    start 9 x and end 4 x the basin.
    Three levels explain 100% of the variance of its logarithm.
      start  steps 0 to 1 (16.7%), level 9
      basin  steps 2 to 8 (58.3%), level 1
      end    steps 9 to 11 (25.0%), level 4

    Args:
        influence: The influence of every step.
        rates: Learning rate of every step.
        observed_at: State that the queries read; "end" is the last observed one.
        query: Index or name of one query; None averages over all.
        ratio: Factor by which start and end must exceed the basin.

    Raises:
        BadSetting: An argument has an invalid value.
        NotObserved: No query reads that state.
        UnknownQuery: There is no such query.
        TooFewSteps: Fewer than five steps have a value.
        NotFinite: Some influence is NaN or infinite.
    """
    ratio = arguments.positive("ratio", ratio)
    state = influence.observed_state(observed_at)
    if state == 0:
        raise TooFewSteps(0, MIN_STEPS)
    column = influence.observed_at.index(state)
    queries = list(range(len(influence.queries)))
    if query is not None:
        queries = [influence.query_index(query)]
    sample = influence.sample
    blocks: list[np.ndarray] = []
    for start, stop in influence.description.shards:
        block = influence.values(start, stop)[queries, column]
        blocks.append(_mean_and_quantiles(block, sample[start:stop]))
    # A step with learning rate 0 gives infinity or NaN, and is left out below.
    with np.errstate(divide="ignore", invalid="ignore"):
        curves = np.concatenate(blocks, axis=1)[:, :state] / rates[:state]
    mean = curves[0]
    known = np.flatnonzero(np.isfinite(mean) & (mean > 0))
    if len(known) < MIN_STEPS:
        raise TooFewSteps(len(known), MIN_STEPS)
    fit = fit_levels(np.log(mean[known]))
    value, low, high = curves[:, known]
    count = "1 query" if len(queries) == 1 else f"{len(queries)} queries"
    return Regimes(
        step=known,
        rate=rates[known],
        value=value,
        low=low,
        high=high,
        boundaries=(int(known[fit.first]), int(known[fit.second])),
        levels=fit.levels,
        explained=fit.explained,
        ratio=ratio,
        left_out=state - len(known),
        observed_at=state,
        about=f"{influence.method}, {count}, {influence.unit}",
    )


def _mean_and_quantiles(
    values: Float[np.ndarray, "query step slot"], sample: Int64[np.ndarray, "step slot"]
) -> Float64[np.ndarray, "curve step"]:
    """Mean and quantiles of slots x |influence| over queries and slots, step by step.

    Raises:
        NotFinite: some influence is NaN or infinite.
    """
    size = np.abs(values.astype(np.float64))
    not_finite = ~np.isfinite(size).all(axis=0)
    if not_finite.any():
        raise NotFinite(np.unique(sample[not_finite]).tolist())
    curves = np.zeros((3, len(sample)))
    for step, is_real in enumerate(sample >= 0):
        if not is_real.any():
            continue
        # A mean loss has divided every slot by their number; this takes that back, so that steps
        # with batches of different sizes compare.
        row = size[:, step, is_real] * is_real.sum()
        curves[0, step] = row.mean()
        curves[1:, step] = np.quantile(row, QUANTILES)
    return curves


@final
@dataclass(frozen=True, slots=True)
class LevelFit:
    """The three constant levels that fit a series best.

    Attributes:
        first: Position at which the second level begins.
        second: Position at which the third level begins.
        levels: Geometric mean of the values at each level.
        explained: Share of the variance of the log values that the levels explain.
    """

    first: int
    second: int
    levels: tuple[float, float, float]
    explained: float


def fit_levels(logs: Float64[np.ndarray, " point"]) -> LevelFit:
    """Fit three constant levels to log values; the levels are returned as values."""
    first, second = best_boundaries(logs)
    parts = np.split(logs, (first, second))
    start, basin, end = (float(np.exp(part.mean())) for part in parts)
    total = float(((logs - logs.mean()) ** 2).sum())
    residual = 0.0
    for part in parts:
        residual += float(((part - part.mean()) ** 2).sum())
    # The rounding of a constant series is not variance that could be explained.
    is_constant = total <= 1e-20 * max(1.0, float((logs**2).sum()))
    explained = 0.0 if is_constant else 1 - residual / total
    return LevelFit(first, second, (start, basin, end), explained)


def best_boundaries(series: Float64[np.ndarray, " point"]) -> tuple[int, int]:
    r"""Positions at which the second and third of the three best constant pieces begin.

    .. math:: \min_{0 < i < j < n}
        \operatorname{SSE}(0, i) + \operatorname{SSE}(i, j) + \operatorname{SSE}(j, n)

    SSE is the sum of squares around the mean of a piece. Of equal fits, the earliest boundaries are
    taken. A series of more than 4096 points is cut into that many ranges at most, and boundaries
    lie between them.

    >>> best_boundaries(np.array([5.0, 5.0, 0.0, 0.0, 0.0, 2.0]))
    (2, 5)
    """
    n = len(series)
    width = -(-n // MAX_POINTS)  # rounded up
    starts = np.arange(0, n, width)
    ends = np.append(starts[1:], n)
    squared_error = _squared_error_of_ranges(series, ends)
    last = len(starts)
    # Dynamic programming: for every j the best i before it, then the best j. Range 0 belongs to the
    # first piece and each piece has at least one, so i >= 1 and j >= 2.
    all_j = np.arange(2, last)
    best_i: list[int] = []
    for j in all_j:
        all_i = np.arange(1, j)
        sse = squared_error(0, all_i) + squared_error(all_i, j)
        best_i.append(1 + int(sse.argmin()))
    i_of_j = np.array(best_i)
    sse = squared_error(0, i_of_j) + squared_error(i_of_j, all_j) + squared_error(all_j, last)
    best = int(sse.argmin())
    return int(starts[i_of_j[best]]), int(starts[all_j[best]])


def _squared_error_of_ranges(
    series: Float64[np.ndarray, " point"], ends: Int64[np.ndarray, " range"]
) -> Callable[[Any, Any], Any]:
    """Function of (start, stop): sum of squares around the mean of the ranges [start, stop)."""
    # Centred first: the difference of two large sums below would lose digits.
    centred = series - series.mean()
    counts = np.append(0, ends)
    sums = np.append(0.0, np.cumsum(centred)[ends - 1])
    squares = np.append(0.0, np.cumsum(centred**2)[ends - 1])

    def squared_error(start: Any, stop: Any) -> Any:
        square = squares[stop] - squares[start]
        mean_part = (sums[stop] - sums[start]) ** 2 / (counts[stop] - counts[start])
        return square - mean_part

    return squared_error


def smooth(values: Float64[np.ndarray, " point"]) -> Float64[np.ndarray, " point"]:
    """Geometric mean over a fiftieth of all points around each, fewer at the two ends.

    >>> smooth(np.array([1.0, 1.0, 8.0]))
    array([1., 2., 8.])
    """
    reach = len(values) // 100 + 1
    sums = np.concatenate([[0.0], np.cumsum(np.log(values))])
    place = np.arange(len(values))
    # As far to the left as to the right, so that a slope is not bent at the ends.
    near = np.minimum(np.minimum(place, place[::-1]), reach)
    log_mean = (sums[place + near + 1] - sums[place - near]) / (2 * near + 1)
    return np.asarray(np.exp(log_mean))


def example() -> Regimes:
    """Tiny example of three regimes: 2, 7 and 3 steps at levels 9, 1 and 4.

    >>> example().table()["level"].round(6).to_list()
    [9.0, 1.0, 4.0]
    """
    about = Description(
        method="example",
        unit="nats",
        denominator="keep",
        run="example",
        queries=("loss",),
        observed_at=(12,),
        steps=12,
        slots=1,
        samples=1,
        shard=12,
    )
    rate = 0.1
    levels = np.repeat([9.0, 1.0, 4.0], [2, 7, 3])
    values = (rate * levels).reshape(1, 1, 12, 1)
    influence = from_arrays(about, values, sample=np.zeros((12, 1), np.int64))
    return regimes_from_rates(influence, np.full(12, rate))
