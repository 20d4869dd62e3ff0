"""Patterns over time of series whose pattern is obvious."""

import numpy as np
import polars as pl
import pytest

from backtrail import errors
from backtrail.influence.analysis.patterns import PATTERNS, classify, patterns, shares
from backtrail.influence.influence import Influence
from backtrail.influence.layout import Description
from backtrail.influence.writer import from_arrays

WINDOWS = 9
time = np.linspace(0, 1, WINDOWS)
OBVIOUS = {
    "fading": (np.exp(-6 * time), "early"),
    "fading, harmful": (-np.exp(-6 * time), "early"),
    "only at first": (np.eye(WINDOWS)[0], "early"),
    "growing": (np.exp(6 * time - 6), "late"),
    "only at last": (-np.eye(WINDOWS)[-1], "late"),
    "even": (np.ones(WINDOWS), "stable"),
    "gently rising": (1 + 0.3 * time, "stable"),
    "a little unsteady": (1 + 0.3 * np.cos(40 * time), "stable"),
    "there and back": ((-1.0) ** np.arange(WINDOWS), "fluctuating"),
    "one burst": (np.eye(WINDOWS)[4], "fluctuating"),
    "waves": (np.sin(4 * np.pi * (time + 0.03)), "fluctuating"),
    "helpful, then harmful": (np.sign(0.5 - time), "fluctuating"),
}


@pytest.mark.parametrize("scale", [1e-200, 1.0, -1e200])
@pytest.mark.parametrize("name", OBVIOUS)
def test_plain_series_get_their_class(name: str, scale: float) -> None:
    """The pattern is the obvious one, whatever the scale and sign."""
    series, pattern = OBVIOUS[name]
    assert classify(scale * series[None])["pattern"].to_list() == [pattern]


def one_sample_per_slot(series: np.ndarray, edges: list[int]) -> Influence:
    """Make an influence in which sample j, visited once, has the given influence by window."""
    samples, windows = series.shape
    about = Description(
        method="made",
        unit="nats",
        denominator="keep",
        run="run",
        queries=("zero", "loss"),
        observed_at=tuple(edges),
        steps=edges[-1],
        slots=samples,
        samples=samples + 2,
        shard=2,
    )
    sample = np.full((edges[-1], samples), -1)
    sample[0] = np.arange(samples)
    values = np.zeros((2, windows, edges[-1], samples))
    values[1, :, 0] = series.cumsum(axis=1).T
    return from_arrays(about, values, sample=sample)


def test_patterns_reads_the_windows_of_an_influence() -> None:
    """Windows are differences of totals, and samples without influence are left out."""
    series = np.stack([series for series, _ in OBVIOUS.values()])
    series = np.insert(series, 1, 0.0, axis=0)
    influence = one_sample_per_slot(series, list(range(1, WINDOWS + 1)))
    table = patterns(influence, query="loss")
    assert table["sample"].to_list() == [0, *range(2, len(series))]
    assert table["pattern"].to_list() == [pattern for _, pattern in OBVIOUS.values()]
    np.testing.assert_allclose(table["total"], np.delete(series, 1, axis=0).sum(axis=1), atol=1e-12)
    assert patterns(influence, query="zero").height == 0


def test_columns_are_what_they_say() -> None:
    """Early, late, slope and spread are those of NumPy, series by series."""
    series = np.random.default_rng(1).normal(size=(20, 8)) + 0.5
    table = classify(series)
    for row, x in zip(table.iter_rows(named=True), series, strict=True):
        size = np.abs(x)
        assert row["early"] == pytest.approx(size[:2].mean())
        assert row["late"] == pytest.approx(size[-2:].mean())
        slope = np.polyfit(np.linspace(0, 1, 8), size, 1)[0] / size.mean()
        assert row["slope"] == pytest.approx(slope)
        assert row["spread"] == pytest.approx(x.std(ddof=1) / size.mean())


def test_influence_is_taken_per_step() -> None:
    """A series that is constant per step is stable, however uneven the windows."""
    edges = [2, 4, 8, 16]
    per_step = np.diff([0, *edges])[None] * 0.5
    table = patterns(one_sample_per_slot(per_step, edges), query="loss")
    assert table["pattern"].to_list() == ["stable"]
    assert table["early"][0] == table["late"][0] == 0.5


def test_thresholds_are_the_users() -> None:
    """A larger ratio or spread makes a series stable."""
    series = np.array([[3.0, 2.0, 1.0], [1.0, -1.0, 1.0]])
    assert classify(series)["pattern"].to_list() == ["early", "fluctuating"]
    calm = classify(series, ratio=4.0, spread=3.0)
    assert calm["pattern"].to_list() == ["stable", "stable"]


def test_state_0_observed_makes_no_window() -> None:
    """Observing state 0, where influence is zero, changes nothing."""
    series = np.array([[1.0, 2.0, 3.0]])
    plain = one_sample_per_slot(series, [1, 2, 3])
    padded = one_sample_per_slot(np.insert(series, 0, 0.0, axis=1), [0, 1, 2, 3])
    assert patterns(padded, query="loss").equals(patterns(plain, query="loss"))


def test_two_windows_are_too_few() -> None:
    """Fewer than three windows are refused, with how to get more."""
    influence = one_sample_per_slot(np.ones((1, 2)), [1, 2])
    with pytest.raises(errors.TooFewWindows, match=r'at least 3 .* has 2.*observed_at="epochs"'):
        patterns(influence)


def test_overflow_is_named() -> None:
    """Infinite influence is refused, and the sample is named."""
    influence = one_sample_per_slot(np.array([[1.0, 1.0, 1.0], [1.0, np.inf, 1.0]]), [1, 2, 3])
    with pytest.raises(errors.NotFinite, match="1 sample is NaN or infinite: 1"):
        patterns(influence, query="loss")


def test_shares_add_up_to_one() -> None:
    """Every pattern has a share, zero if no sample has it."""
    table = pl.DataFrame({"pattern": ["late"] * 3 + ["stable"]})
    assert shares(table) == {"early": 0.0, "late": 0.75, "stable": 0.25, "fluctuating": 0.0}
    assert tuple(shares(table)) == PATTERNS
    assert sum(shares(table.clear()).values()) == 0.0
