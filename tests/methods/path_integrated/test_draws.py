"""Random weights: balanced over re-runs, and stratified over the weights of each sample."""

import numpy as np
import pytest

from backtrail.errors import BadSetting
from backtrail.methods.path_integrated.draws import Draws, check_share, draw_weights

FLOOR = 1e-3
each_design = pytest.mark.parametrize(
    ("runs", "share"), [(4, 1.0), (1, 1.0), (4, 0.5), (5, 0.5), (10, 0.3), (7, 0.9), (4, 0.25)]
)


def draws(runs: int, share: float, seed: int = 0, samples: int = 500) -> Draws:
    """Draw the weights of some samples."""
    return draw_weights(samples, runs=runs, floor=FLOOR, share=share, seed=seed)


@each_design
def test_every_sample_is_drawn_about_as_often(runs: int, share: float) -> None:
    """Every sample is drawn in runs * share of the re-runs, rounded; the mean is that number."""
    counts = draws(runs, share).counts
    assert set(counts.tolist()) <= {int(runs * share + 1e-9), int(np.ceil(runs * share - 1e-9))}
    assert counts.min() >= 1
    assert abs(counts.mean() - runs * share) <= 0.5 / 500


@each_design
def test_the_weights_of_a_sample_fill_its_strata(runs: int, share: float) -> None:
    """With n draws of a sample, one exponent u lies in each of n equal parts of (0, 1)."""
    found = draws(runs, share)
    u = np.log(found.weights) / np.log(FLOOR)
    for sample, count in enumerate(found.counts):
        own = u[found.drawn[:, sample], sample]
        assert sorted((own * count).astype(int)) == list(range(count))


def test_what_is_not_drawn_keeps_the_weight_1() -> None:
    """Weights are 1 exactly where nothing is drawn, and between the floor and 1 elsewhere."""
    found = draws(5, 0.5)
    assert (found.weights[~found.drawn] == 1).all()
    assert (found.weights[found.drawn] < 1).all()
    assert (found.weights > FLOOR).all()


def test_strata_and_places_in_them_are_random() -> None:
    """Every re-run has every stratum about as often, and u is uniform within its stratum."""
    found = draws(4, 1.0, samples=20_000)
    u = np.log(found.weights) / np.log(FLOOR)
    for of_run in u:
        counts = np.bincount((of_run * 4).astype(int), minlength=4)
        assert np.abs(counts - 5000).max() < 5 * np.sqrt(5000)
    within = (u * 4) % 1
    assert abs(within.mean() - 0.5) < 0.01
    assert abs(within.std() - 12**-0.5) < 0.01
    assert np.abs(np.corrcoef(found.weights) - np.eye(4)).max() < 0.5
    assert np.abs(np.corrcoef(within) - np.eye(4)).max() < 0.03


def test_every_re_run_draws_its_share() -> None:
    """Re-runs draw about equally many samples, and pairs of samples meet independently."""
    found = draws(4, 0.5, samples=20_000)
    assert np.abs(found.drawn.mean(axis=1) - 0.5).max() < 0.02
    together = (found.drawn[:, 0::2] & found.drawn[:, 1::2]).mean()
    assert abs(together - 0.25) < 0.01


def test_draws_follow_the_seed_alone() -> None:
    """The same seed gives the same weights, another one gives others."""
    np.testing.assert_array_equal(draws(4, 0.5).weights, draws(4, 0.5).weights)
    assert (draws(4, 0.5, seed=1).weights != draws(4, 0.5).weights).any()
    # On every version of torch and numpy.
    np.testing.assert_allclose(draws(2, 1.0, samples=2).weights, FIXED, rtol=1e-12)


FIXED = [[0.001194928198013703, 0.016153444154312385], [0.4112765715755401, 0.47815708195525075]]


def test_too_few_re_runs_are_refused() -> None:
    """Where a sample would not be drawn at all, the message says how many re-runs it takes."""
    check_share(10, 0.1)
    with pytest.raises(BadSetting, match=r"runs=4: expected at least 5 with share=0\.2"):
        check_share(4, 0.2)
    with pytest.raises(BadSetting, match="at least 10 with"):
        check_share(9, 0.1)
