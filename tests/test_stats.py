"""Statistics of agreement and detection against SciPy and loops."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from backtrail import stats as ours

draw = np.random.default_rng(0)
PREDICTED = draw.normal(size=(4, 25)).round(1)
ACTUAL = (PREDICTED + 0.5 * draw.normal(size=(4, 25))).round(1)
Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
ONE_BY_ONE: dict[str, tuple[Statistic, Callable[[np.ndarray, np.ndarray], float]]] = {
    "pearson": (ours.pearson, lambda p, a: stats.pearsonr(p, a).statistic),
    "spearman": (ours.spearman, lambda p, a: stats.spearmanr(p, a).statistic),
    "kendall": (ours.kendall, lambda p, a: stats.kendalltau(p, a).statistic),
    "slope": (ours.slope, lambda p, a: stats.linregress(p, a).slope),
}


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_statistics_are_those_of_scipy(name: str) -> None:
    """Every query has the value of SciPy for it alone, with ties."""
    ours, theirs = ONE_BY_ONE[name]
    expected = [theirs(p, a) for p, a in zip(PREDICTED, ACTUAL, strict=True)]
    np.testing.assert_allclose(ours(PREDICTED, ACTUAL), expected, rtol=1e-12)
    np.testing.assert_allclose(ours(PREDICTED[1], ACTUAL[1]), expected[1], rtol=1e-12)


@pytest.mark.parametrize("name", ["pearson", "spearman", "kendall"])
def test_correlations_do_not_depend_on_scale(name: str) -> None:
    """Correlations do not depend on the scale, and change sign with the prediction."""
    ours = ONE_BY_ONE[name][0]
    expected = ours(PREDICTED, ACTUAL)
    np.testing.assert_allclose(ours(1e-200 * PREDICTED, 1e200 * ACTUAL), expected, rtol=1e-12)
    np.testing.assert_allclose(ours(-PREDICTED, ACTUAL), -expected, rtol=1e-12)


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_a_constant_prediction_has_no_value(name: str) -> None:
    """A constant prediction has the value NaN."""
    constant = np.full((1, 25), 0.1)
    assert np.isnan(ONE_BY_ONE[name][0](constant, ACTUAL[:1])).all()


def test_averaging_leaves_out_queries_without_value() -> None:
    """NaN is left out of the mean over queries, which is NaN if nothing is left."""
    assert ours.mean_over_queries(np.array([1.0, np.nan, 0.0])) == 0.5
    assert np.isnan(ours.mean_over_queries(np.array([np.nan])))


def test_the_average_over_queries_is_not_the_pooled_value() -> None:
    """The mean over queries differs from the correlation of all pairs together."""
    predicted = np.array([[1.0, 2.0, 3.0], [101.0, 102.0, 103.0]])
    actual = predicted[:, ::-1]
    assert ours.mean_over_queries(ours.pearson(predicted, actual)) == pytest.approx(-1)
    assert ours.pearson(predicted.ravel(), actual.ravel()).item() > 0.99


def test_bootstrap_is_the_percentile_interval() -> None:
    """The interval has the percentiles of a loop over the same draws."""
    rng = np.random.default_rng(3)
    found = []
    for _ in range(200):
        picked = rng.integers(25, size=25)
        values = [stats.pearsonr(PREDICTED[q, picked], ACTUAL[q, picked])[0] for q in range(4)]
        found.append(np.mean(values))
    options = {"level": 0.9, "resamples": 200, "seed": 3}
    interval = ours.bootstrap(ours.pearson, PREDICTED, ACTUAL, **options)  # type: ignore[arg-type]
    # numpy draws all at once the same integers as row by row.
    assert interval.low == pytest.approx(np.percentile(found, 5))
    assert interval.high == pytest.approx(np.percentile(found, 95))
    assert interval.low < interval.estimate < interval.high
    again = ours.bootstrap(ours.pearson, PREDICTED, ACTUAL, **options)  # type: ignore[arg-type]
    assert interval == again


def test_bootstrap_without_any_value_is_nan() -> None:
    """A constant prediction has the estimate and interval NaN, without a warning."""
    interval = ours.bootstrap(ours.pearson, np.ones(5), np.arange(5.0))
    assert str(interval) == "nan [nan, nan]"


def test_group_sums_and_lds() -> None:
    """The effect of a group is the sum over its members, and LDS its rank correlation."""
    scores = draw.normal(size=(3, 30))
    groups = [draw.choice(30, size=size, replace=False) for size in (3, 5, 8, 4, 6, 7)]
    actual = draw.normal(size=(3, 6))
    expected = np.array([[sum(row[j] for j in group) for group in groups] for row in scores])
    np.testing.assert_allclose(ours.group_sums(scores, groups), expected)
    ranks = [stats.spearmanr(p, a).statistic for p, a in zip(expected, actual, strict=True)]
    np.testing.assert_allclose(ours.lds(scores, groups, actual), ranks)


SUSPICION = draw.normal(size=200).round(1)
GUILTY = draw.random(200) < 0.2


def test_precision_counts_the_guilty_among_the_first() -> None:
    """Precision at k is the share of guilty samples among the k first."""
    order = sorted(range(200), key=lambda j: (-SUSPICION[j], j))
    count = int(GUILTY.sum())
    expected = sum(GUILTY[j] for j in order[:count]) / count
    assert ours.precision_at(SUSPICION, GUILTY) == pytest.approx(expected)
    assert ours.precision_at(SUSPICION, GUILTY, 10) == sum(GUILTY[j] for j in order[:10]) / 10


def test_accuracy_counts_the_right_side() -> None:
    """Accuracy is the share of samples that are flagged correctly."""
    flagged = np.zeros(200, dtype=bool)
    flagged[np.argsort(-SUSPICION, kind="stable")[: GUILTY.sum()]] = True
    expected = float((flagged == GUILTY).mean())
    assert ours.detection_accuracy(SUSPICION, GUILTY) == pytest.approx(expected)


def test_auc_is_the_chance_to_be_ahead() -> None:
    """AUC is the share of guilty and innocent pairs in the right order."""
    guilty = SUSPICION[GUILTY][:, None]
    innocent = SUSPICION[~GUILTY][None]
    expected = ((guilty > innocent) + 0.5 * (guilty == innocent)).mean()
    assert ours.auc(SUSPICION, GUILTY) == pytest.approx(expected)


def test_average_precision_steps_over_the_thresholds() -> None:
    """Average precision is the sum over distinct thresholds, ties together."""
    area = 0.0
    before = 0.0
    for threshold in sorted(set(SUSPICION), reverse=True):
        flagged = threshold <= SUSPICION
        recall = (flagged & GUILTY).sum() / GUILTY.sum()
        area += (recall - before) * (flagged & GUILTY).sum() / flagged.sum()
        before = recall
    assert ours.average_precision(SUSPICION, GUILTY) == pytest.approx(area)


@pytest.mark.parametrize("measure", [ours.precision_at, ours.average_precision, ours.auc])
def test_detection_of_nobody_has_no_value(
    measure: Callable[[np.ndarray, np.ndarray], float],
) -> None:
    """Without guilty samples detection has the value NaN, and accuracy 1."""
    assert np.isnan(measure(SUSPICION, np.zeros(200, dtype=bool)))
    assert ours.detection_accuracy(SUSPICION, np.zeros(200, dtype=bool)) == 1.0


def test_a_perfect_suspicion_finds_all() -> None:
    """All measures are 1 if the guilty samples come first."""
    measures = (
        ours.precision_at,
        ours.average_precision,
        ours.auc,
        ours.detection_accuracy,
    )
    assert [measure(GUILTY.astype(float), GUILTY) for measure in measures] == [1.0] * 4
