r"""How well predicted effects of removals agree with those found by retraining.

The last axis of an array runs over removals. The axes before it, usually queries, are kept: each
query is compared on its own, and `mean_over_queries` averages afterwards. Pooling all queries into
one correlation would reward knowing which query changes most. Signs count: a method with the wrong
sign scores -1, not 1.
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
    r"""Pearson correlation of each query, NaN where either side is constant.

    .. math:: r_q = \sum_k \hat p_{qk} \hat a_{qk}, \qquad
        \hat p_{qk} = (p_{qk} - \bar p_q) \Big/ \sqrt{\textstyle\sum_k (p_{qk} - \bar p_q)^2}

    >>> predicted = np.array([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    >>> pearson(predicted, np.array([[2.0, 4.0, 8.0], [4.0, 3.0, 1.0]])).round(12).tolist()
    [1.0, -1.0]
    """
    products = _normalise(predicted) * _normalise(actual)
    # Rounding can leave a sum slightly outside of [-1, 1].
    return np.asarray(products.sum(axis=-1).clip(-1.0, 1.0))


def _normalise(effects: Effects) -> Effects:
    """Centre each row and scale it to length one; NaN where it is constant."""
    # Whether a row is constant is read off its values: a mean and a variance would round.
    varies = np.ptp(effects, axis=-1, keepdims=True) > 0
    # In units of the largest value, so that no square underflows, however small the influence.
    largest = np.abs(effects).max(axis=-1, keepdims=True)
    scaled = effects / np.where(varies, largest, 1.0)
    centred = scaled - scaled.mean(axis=-1, keepdims=True)
    length = np.sqrt((centred**2).sum(axis=-1, keepdims=True))
    return np.where(varies, centred / np.where(varies, length, 1.0), np.nan)


def spearman(predicted: Effects, actual: Effects) -> PerQuery:
    """Spearman correlation of each query; equal values share their mean rank.

    >>> spearman(np.array([1.0, 2.0, 30.0]), np.array([0.1, 0.2, 0.3])).round(12).item()
    1.0
    """
    return pearson(stats.rankdata(predicted, axis=-1), stats.rankdata(actual, axis=-1))


def kendall(predicted: Effects, actual: Effects) -> PerQuery:
    r"""Kendall's :math:`\tau_b` of each query: concordant minus discordant pairs, over all pairs.

    >>> round(kendall(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])).item(), 12)
    0.333333333333
    """
    removals = predicted.shape[-1]
    rows = zip(predicted.reshape(-1, removals), actual.reshape(-1, removals), strict=True)
    taus = [stats.kendalltau(p, a).statistic for p, a in rows]
    return np.array(taus, dtype=np.float64).reshape(predicted.shape[:-1])


def slope(predicted: Effects, actual: Effects) -> PerQuery:
    r"""Least-squares slope, with intercept, of the actual effects over the predicted.

    .. math:: b_q = \sum_k (p_{qk} - \bar p_q)(a_{qk} - \bar a_q) \Big/ \sum_k (p_{qk} - \bar p_q)^2

    1 = the predicted size is right; above 1 = removals have a larger effect than predicted. NaN
    where the prediction is constant.

    >>> slope(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])).item()
    2.0
    """
    centred = predicted - predicted.mean(axis=-1, keepdims=True)
    varies = np.ptp(predicted, axis=-1) > 0
    # The centred prediction sums to zero, so the mean of the actual effects drops out.
    covariance = (centred * actual).sum(axis=-1)
    variance = np.where(varies, (centred**2).sum(axis=-1), 1.0)
    return np.where(varies, covariance / variance, np.nan)


def mean_over_queries(values: PerQuery) -> float:
    """Average over the queries with a finite value; NaN if there is none.

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
    """Statistic, averaged over queries, with its percentile bootstrap interval.

    Removals are resampled with replacement, the same ones for all queries: queries share the
    retrained models, so they are not independent. Resamples in which the statistic is undefined for
    every query are left out.

    >>> effects = np.arange(12.0)
    >>> print(bootstrap(pearson, effects, 2 * effects))
    1.00 [1.00, 1.00]

    Args:
        statistic: `pearson`, `spearman`, `kendall`, `slope`, or one like them.
        predicted: Predicted effects.
        actual: Effects found by retraining.
        level: Share of the resamples inside the interval.
        resamples: Number of resamples.
        seed: Seed of the resampling.
    """
    removals = predicted.shape[-1]
    generator = np.random.default_rng(seed)
    estimates: list[float] = []
    for chosen in generator.integers(removals, size=(resamples, removals)):
        per_query = statistic(predicted[..., chosen], actual[..., chosen])
        estimate = mean_over_queries(per_query)
        if np.isfinite(estimate):
            estimates.append(estimate)
    ends = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(estimates or [float("nan")], ends)
    return Interval(mean_over_queries(statistic(predicted, actual)), float(low), float(high))


def group_sums(
    scores: Float[np.ndarray, "*query sample"], groups: Sequence[Int[np.ndarray, " _"]]
) -> Effects:
    """Predicted effect of removing each group of samples: the sum over its members.

    >>> group_sums(np.array([1.0, 2.0, 4.0]), [np.array([0, 2]), np.array([1])]).tolist()
    [5.0, 2.0]
    """
    return np.stack([scores[..., group].sum(axis=-1) for group in groups], axis=-1)


def lds(
    scores: Float[np.ndarray, "*query sample"],
    groups: Sequence[Int[np.ndarray, " _"]],
    actual: Effects,
) -> PerQuery:
    """Linear datamodeling score: rank correlation of group sums with the groups' actual effects.

    Source: Park et al., "TRAK: Attributing Model Behavior at Scale" (2023).

    >>> groups = [np.array([0, 1]), np.array([2]), np.array([1])]
    >>> lds(np.array([1.0, 2.0, 4.0]), groups, np.array([0.3, 0.5, 0.1])).round(12).item()
    1.0

    Args:
        scores: Influence of each sample on each query.
        groups: Samples of each group.
        actual: Effect of removing each group, found by retraining.
    """
    return spearman(group_sums(scores, groups), actual)


def precision_at(
    suspicion: Float[np.ndarray, " sample"],
    guilty: Bool[np.ndarray, " sample"],
    k: int | None = None,
) -> float:
    """Share of positives among the k samples with the highest scores.

    >>> precision_at(np.array([0.9, 0.1, 0.8, 0.2]), np.array([True, False, False, True]))
    0.5

    Args:
        suspicion: Score of each sample; higher = more suspicious, ties are ordered by row. To look
            for harmful samples, give minus the influence on a loss.
        guilty: Which samples should be found.
        k: Number of samples to flag; None flags as many as should be found.
    """
    if k is None:
        k = int(guilty.sum())
    flagged = np.argsort(-suspicion, kind="stable")[:k]
    return float(guilty[flagged].mean()) if len(flagged) else float("nan")


def detection_accuracy(
    suspicion: Float[np.ndarray, " sample"], guilty: Bool[np.ndarray, " sample"]
) -> float:
    r"""Accuracy when as many samples are flagged as should be found: 1 - 2 misses / N.

    Every sample that is missed leads to a false alarm, too. With few samples to find, this is high
    for any ranking: compare `precision_at`.

    >>> detection_accuracy(np.array([0.9, 0.1, 0.8, 0.2]), np.array([True, False, False, True]))
    0.5
    """
    count = int(guilty.sum())
    if not count:
        return 1.0
    missed = count - round(precision_at(suspicion, guilty) * count)
    return 1.0 - 2.0 * missed / len(guilty)


def average_precision(
    suspicion: Float[np.ndarray, " sample"], guilty: Bool[np.ndarray, " sample"]
) -> float:
    r"""Area under the precision-recall curve, as a step function; ties are flagged together.

    .. math:: \sum_n (R_n - R_{n-1}) P_n

    with recall :math:`R_n` and precision :math:`P_n` at the n-th highest distinct score.

    >>> round(average_precision(np.array([0.9, 0.8, 0.1]), np.array([True, False, True])), 6)
    0.833333
    """
    levels, level_of_sample = np.unique(-suspicion, return_inverse=True)
    flagged = np.cumsum(np.bincount(level_of_sample, minlength=len(levels)))
    found = np.cumsum(np.bincount(level_of_sample, weights=guilty, minlength=len(levels)))
    total = found[-1]
    if not total:
        return float("nan")
    recall_gained = np.diff(found, prepend=0.0) / total
    # Precision is found / flagged.
    return float((recall_gained * found / flagged).sum())


def auc(suspicion: Float[np.ndarray, " sample"], guilty: Bool[np.ndarray, " sample"]) -> float:
    """Area under the ROC curve: the chance that a sample to be found scores above another one.

    A tie counts half; NaN where one of the two kinds of sample is missing.

    >>> auc(np.array([0.9, 0.8, 0.1]), np.array([True, False, True]))
    0.5
    """
    positives = int(guilty.sum())
    pairs = positives * (len(guilty) - positives)
    if not pairs:
        return float("nan")
    # Mann-Whitney: the sum of ranks, less what the positives would have among themselves.
    rank_sum = float(stats.rankdata(suspicion)[guilty].sum())
    above = rank_sum - positives * (positives + 1) / 2
    return above / pairs
