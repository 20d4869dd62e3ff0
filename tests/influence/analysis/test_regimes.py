"""Regimes of influence divided by learning rate, on curves whose regimes are obvious."""

from itertools import combinations

import numpy as np
import pytest

from backtrail import errors
from backtrail.influence.analysis import regimes
from backtrail.influence.analysis.regimes import best_boundaries, regimes_from_rates, smooth
from backtrail.influence.influence import Influence
from backtrail.influence.layout import Description
from backtrail.influence.writer import from_arrays

PLANTED = np.repeat([50.0, 1.0, 8.0], [5, 70, 25])


def made(
    level: np.ndarray, rates: np.ndarray, *, slots: int = 4, queries: int = 2, noise: float = 0.0
) -> Influence:
    """Make an influence of level * rate / slots in every slot, half of it negative."""
    draw = np.random.default_rng(0)
    steps = len(level)
    sign = np.where(np.arange(slots) % 2, -1.0, 1.0)
    values = (
        (level * rates)[:, None]
        * sign
        / slots
        * np.exp(noise * draw.normal(size=(queries, 1, steps, slots)))
    )
    about = Description(
        method="made",
        unit="nats",
        denominator="keep",
        run="run",
        queries=tuple(f"loss {number}" for number in range(queries)),
        observed_at=(steps,),
        steps=steps,
        slots=slots,
        samples=slots,
        shard=7,
    )
    return from_arrays(about, values, sample=np.tile(np.arange(slots), (steps, 1)))


def brute(series: np.ndarray) -> tuple[int, int]:
    """Find the best two boundaries by trying all pairs."""
    tried = {
        ends: sum(((part - part.mean()) ** 2).sum() for part in np.split(series, ends))
        for ends in combinations(range(1, len(series)), 2)
    }
    return min(tried, key=lambda ends: tried[ends])


@pytest.mark.parametrize("seed", range(8))
def test_the_fit_is_the_best_of_all(seed: int) -> None:
    """Dynamic programming finds the boundaries that brute force finds."""
    series = np.random.default_rng(seed).normal(size=40).cumsum()
    assert best_boundaries(series) == brute(series)


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("slots", [1, 16])
def test_planted_regimes_are_found(slots: int, noise: float) -> None:
    """Boundaries and levels are found for every batch size, with noise or without."""
    rates = 1e-3 * np.linspace(1.0, 0.01, 100)
    found = regimes_from_rates(made(PLANTED, rates, slots=slots, noise=noise), rates)
    assert found.found
    assert found.boundaries == (5, 75)
    assert found.edges == (0, 5, 75, 100)
    # The mean of what the noise multiplies by.
    np.testing.assert_allclose(
        found.levels, np.exp(noise**2 / 2) * np.array([50, 1, 8]), rtol=1e-9 + 0.35 * noise
    )
    assert str(found).startswith("Three regimes")


def test_the_table_and_the_curve_say_what_was_found() -> None:
    """The table has a row for each regime, and the curve one for each step with its regime."""
    rates = np.full(100, 0.1)
    found = regimes_from_rates(made(PLANTED, rates), rates)
    table = found.table()
    curve = found.curve()
    assert table["regime"].to_list() == ["start", "basin", "end"]
    assert table["share"].to_list() == [0.05, 0.7, 0.25]
    np.testing.assert_allclose(table["ratio"], [50, 1, 8])
    assert curve["regime"].value_counts().sort("regime")["count"].to_list() == [70, 25, 5]
    np.testing.assert_allclose(curve["value"], PLANTED)
    np.testing.assert_allclose(curve["low"], PLANTED)
    np.testing.assert_allclose(curve["smooth"], smooth(PLANTED))


@pytest.mark.parametrize(
    "level",
    [
        np.ones(100),
        np.exp(-np.arange(100) / 20),
        np.exp(np.arange(100) / 20),
        2 + np.sin(np.arange(100)),
    ],
    ids=["constant", "falling", "rising", "waves"],
)
def test_other_curves_have_no_three_regimes(level: np.ndarray) -> None:
    """A constant, a monotonic curve and waves have no three regimes, and the text says so."""
    rates = np.full(100, 1e-2)
    for noise in (0.0, 0.3):
        found = regimes_from_rates(made(level, rates, noise=noise), rates)
        assert not found.found
        assert str(found).startswith("No three regimes")


def test_a_constant_explains_nothing() -> None:
    """Three levels explain nothing of a constant with rounding errors."""
    rates = np.geomspace(1e-4, 1e-2, 100)
    assert regimes_from_rates(made(np.ones(100), rates), rates).explained == 0.0


def test_steps_without_a_learning_rate_are_left_out_and_counted() -> None:
    """Steps with rate 0 are left out, and boundaries are still numbers of steps."""
    rates = np.full(100, 0.1)
    rates[[0, 1, 40]] = 0.0
    found = regimes_from_rates(made(PLANTED, rates), rates)
    assert found.left_out == 3
    assert found.boundaries == (5, 75)
    assert len(found.curve()) == 97
    assert "3 steps with learning rate 0" in str(found)


def test_a_short_batch_counts_like_a_whole_one() -> None:
    """The value of a step does not depend on the size of its batch."""
    values = np.ones((1, 1, 8, 2)) / 2
    values[0, 0, 3] = 1.0, 0.0
    sample = np.tile([0, 1], (8, 1))
    sample[3, 1] = -1
    about = Description(
        method="made",
        unit="nats",
        denominator="keep",
        run="run",
        queries=("loss",),
        observed_at=(8,),
        steps=8,
        slots=2,
        samples=2,
        shard=8,
    )
    np.testing.assert_array_equal(
        regimes_from_rates(from_arrays(about, values, sample=sample), np.ones(8)).value, np.ones(8)
    )


def test_one_query_can_be_asked_for() -> None:
    """A query is given by number or name; unknown queries and states are refused."""
    rates = np.full(100, 0.1)
    influence = made(PLANTED, rates, noise=0.2)
    by_name, by_number = (
        regimes_from_rates(influence, rates, query=query) for query in ("loss 1", 1)
    )
    np.testing.assert_array_equal(by_name.value, by_number.value)
    both = (regimes_from_rates(influence, rates, query=0).value + by_name.value) / 2
    np.testing.assert_allclose(regimes_from_rates(influence, rates).value, both)
    with pytest.raises(errors.UnknownQuery, match="loss 7"):
        regimes_from_rates(influence, rates, query="loss 7")
    with pytest.raises(errors.NotObserved):
        regimes_from_rates(influence, rates, observed_at=3)


def test_what_cannot_be_fitted_is_refused() -> None:
    """Too few steps, and infinite influence, are refused."""
    with pytest.raises(errors.TooFewSteps, match=r"at least 5 steps .* there are 4"):
        regimes_from_rates(made(np.ones(4), np.ones(4)), np.ones(4))
    level = np.ones(9)
    level[4] = np.inf
    with pytest.raises(errors.NotFinite):
        regimes_from_rates(made(level, np.ones(9)), np.ones(9))


def test_long_trainings_are_fitted_in_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The boundaries of a long training are right up to the length of a block of steps."""
    monkeypatch.setattr(regimes, "MAX_POINTS", 30)
    assert best_boundaries(np.log(PLANTED)) == (4, 76)
