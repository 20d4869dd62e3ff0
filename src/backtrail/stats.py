r"""How well predicted effects of removals agree with those found by retraining.

Arrays end in an axis of removals; what comes before, usually queries, is kept: each query is
compared on its own, and `mean_over_queries` averages afterwards. Pooling all queries into one
correlation would reward knowing which query moves most. Signs count: a method with its sign the
wrong way round scores -1, not 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

Effects = Float[np.ndarray, "*query removal"]
PerQuery = Float[np.ndarray, "*query"]
Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]


def pearson(predicted: Effects, actual: Effects) -> PerQuery:
    r"""Correlation of each query, NaN where either side is constant.

    .. math:: r_q = \sum_k \hat p_{qk} \hat a_{qk}, \qquad
        \hat p_{qk} = (p_{qk} - \bar p_q) \Big/ \sqrt{\textstyle\sum_k (p_{qk} - \bar p_q)^2}

    >>> predicted = np.array([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    >>> pearson(predicted, np.array([[2.0, 4.0, 8.0], [4.0, 3.0, 1.0]])).round(12).tolist()
    [1.0, -1.0]
    """
    return np.asarray((_unit(predicted) * _unit(actual)).sum(axis=-1).clip(-1.0, 1.0))


def _unit(effects: Effects) -> Effects:
    """Centre each row and give it length one; NaN where it is constant."""
    largest = np.abs(effects).max(axis=-1, keepdims=True)
    varies = np.ptp(effects, axis=-1, keepdims=True) > 0
    # In units of the largest value no square vanishes, however small the influence.
    scaled = effects / np.where(varies, largest, 1.0)
    centred = scaled - scaled.mean(axis=-1, keepdims=True)
    length = np.sqrt((centred**2).sum(axis=-1, keepdims=True))
    return np.where(varies, centred / np.where(varies, length, 1.0), np.nan)


def spearman(predicted: Effects, actual: Effects) -> PerQuery:
    """Correlation of the ranks of each query; equal values share their mean rank.

    >>> spearman(np.array([1.0, 2.0, 30.0]), np.array([0.1, 0.2, 0.3])).round(12).item()
    1.0
    """
    return pearson(stats.rankdata(predicted, axis=-1), stats.rankdata(actual, axis=-1))


def kendall(predicted: Effects, actual: Effects) -> PerQuery:
    r"""Kendall's :math:`\tau_b` of each query: ordered alike less ordered unlike, over pairs.

    >>> round(kendall(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])).item(), 12)
    0.333333333333
    """
    rows = zip(_rows(predicted), _rows(actual), strict=True)
    found = [stats.kendalltau(p, a).statistic for p, a in rows]
    return np.array(found, dtype=np.float64).reshape(predicted.shape[:-1])


def _rows(effects: Effects) -> Float[np.ndarray, "row removal"]:
    return effects.reshape(-1, effects.shape[-1])


def slope(predicted: Effects, actual: Effects) -> PerQuery:
    r"""Least-squares slope, with intercept, of the actual effects over the predicted.

    .. math:: b_q = \sum_k (p_{qk} - \bar p_q)(a_{qk} - \bar a_q) \Big/ \sum_k (p_{qk} - \bar p_q)^2

    1 = right size; above 1 = removals do more than predicted. NaN where the prediction is constant.

    >>> slope(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])).item()
    2.0
    """
    p = predicted - predicted.mean(axis=-1, keepdims=True)
    varies = np.ptp(predicted, axis=-1) > 0
    square = np.where(varies, (p**2).sum(axis=-1), 1.0)
    return np.where(varies, (p * actual).sum(axis=-1) / square, np.nan)


def mean_over_queries(values: PerQuery) -> float:
    """Average over the queries that have a value; NaN if none has.

    >>> mean_over_queries(np.array([0.5, 1.0, np.nan]))
    0.75
    """
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


@final
@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with a 95 % percentile bootstrap interval, over other draws of the removals.

    >>> print(Interval(0.971, 0.926, 0.993))
    0.97 [0.93, 0.99]

    Attributes:
        estimate: The statistic, in its own unit: a correlation is between -1 and 1.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        """Estimate and interval, like 0.97 [0.93, 0.99]."""
        return f"{self.estimate:.2f} [{self.low:.2f}, {self.high:.2f}]"


def bootstrap(
    statistic: Statistic,
    predicted: Effects,
    actual: Effects,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Give a statistic, averaged over queries, with its percentile bootstrap interval.

    Removals are drawn with replacement, the same ones for all queries: queries share the retrained
    models, so they are no independent evidence. Draws in which the statistic is undefined for
    every query are left out.

    >>> effects = np.arange(12.0)
    >>> print(bootstrap(pearson, effects, 2 * effects))
    1.00 [1.00, 1.00]

    Args:
        statistic: `pearson`, `spearman`, `kendall`, `slope`, or one like them.
        predicted: Predicted effects.
        actual: Effects found by retraining.
        level: Share of the draws inside the interval.
        resamples: How many draws.
        seed: Of the draws.
    """
    removals = predicted.shape[-1]
    draws = np.random.default_rng(seed).integers(removals, size=(resamples, removals))
    found = [mean_over_queries(statistic(predicted[..., d], actual[..., d])) for d in draws]
    known = [value for value in found if np.isfinite(value)] or [float("nan")]
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean_over_queries(statistic(predicted, actual)), float(low), float(high))


def group_sums(
    scores: Float[np.ndarray, "*query sample"], groups: Sequence[Int[np.ndarray, " _"]]
) -> Effects:
    """Predict the effect of removing whole groups: the sum over their members.

    >>> group_sums(np.array([1.0, 2.0, 4.0]), [np.array([0, 2]), np.array([1])]).tolist()
    [5.0, 2.0]
    """
    return np.stack([scores[..., group].sum(axis=-1) for group in groups], axis=-1)


def lds(
    scores: Float[np.ndarray, "*query sample"],
    groups: Sequence[Int[np.ndarray, " _"]],
    actual: Effects,
) -> PerQuery:
    """Linear datamodelling score: rank correlation of group sums with the groups' actual effects.

    >>> groups = [np.array([0, 1]), np.array([2]), np.array([1])]
    >>> lds(np.array([1.0, 2.0, 4.0]), groups, np.array([0.3, 0.5, 0.1])).round(12).item()
    1.0
    """
    return spearman(group_sums(scores, groups), actual)


def precision_at(
    suspicion: Float[np.ndarray, " sample"],
    guilty: Bool[np.ndarray, " sample"],
    k: int | None = None,
) -> float:
    """Share of the truly guilty among the k most suspicious samples, k = their true number if None.

    >>> precision_at(np.array([0.9, 0.1, 0.8, 0.2]), np.array([True, False, False, True]))
    0.5

    Args:
        suspicion: Higher = more suspicious; equals count by row. For harmful = suspicious, give
            minus the influence on a loss.
        guilty: Which samples should be found.
        k: How many to look at.
    """
    first = np.argsort(-suspicion, kind="stable")[: int(guilty.sum()) if k is None else k]
    return float(guilty[first].mean()) if len(first) else float("nan")


def detection_accuracy(
    suspicion: Float[np.ndarray, " sample"], guilty: Bool[np.ndarray, " sample"]
) -> float:
    r"""Share of samples put on the right side when the true number is flagged: 1 - 2 misses / N.

    Every guilty sample that is missed also accuses an innocent one. With few guilty samples this
    is high for any ranking: read it beside `precision_at`.

    >>> detection_accuracy(np.array([0.9, 0.1, 0.8, 0.2]), np.array([True, False, False, True]))
    0.5
    """
    count = int(guilty.sum())
    missed = count - round(precision_at(suspicion, guilty) * count) if count else 0
    return 1.0 - 2.0 * missed / len(guilty)


def average_precision(
    suspicion: Float[np.ndarray, " sample"], guilty: Bool[np.ndarray, " sample"]
) -> float:
    r"""Area under precision over recall, in steps; equal suspicions are flagged together.

    .. math:: \sum_n (R_n - R_{n-1}) P_n

    >>> round(average_precision(np.array([0.9, 0.8, 0.1]), np.array([True, False, True])), 6)
    0.833333
    """
    levels, place = np.unique(-suspicion, return_inverse=True)
    flagged = np.cumsum(np.bincount(place, minlength=len(levels)))
    found = np.cumsum(np.bincount(place, weights=guilty, minlength=len(levels)))
    gained = np.diff(found, prepend=0.0) / found[-1] if found[-1] else np.full(len(found), np.nan)
    return float((gained * found / flagged).sum())


def auc(suspicion: Float[np.ndarray, " sample"], guilty: Bool[np.ndarray, " sample"]) -> float:
    """Chance that a guilty sample is more suspicious than an innocent one; a tie counts half.

    >>> auc(np.array([0.9, 0.8, 0.1]), np.array([True, False, True]))
    0.5
    """
    ours = int(guilty.sum())
    pairs = ours * (len(guilty) - ours)
    above = float(stats.rankdata(suspicion)[guilty].sum()) - ours * (ours + 1) / 2
    return above / pairs if pairs else float("nan")
