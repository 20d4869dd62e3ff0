"""Sums and orders of plain arrays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backtrail.influence.layout import CHUNK_BYTES, chunk_shape
from backtrail.influence.tables import add_by_sample, ranking


@given(seed=st.integers(0, 10_000), steps=st.integers(1, 5), slots=st.integers(1, 6))
def test_adding_by_sample_is_the_loop(seed: int, steps: int, slots: int) -> None:
    """Sums by sample are those of a loop over slots, added to what was there."""
    draw = np.random.default_rng(seed)
    sample = draw.integers(-1, 7, size=(steps, slots))
    block = draw.normal(size=(2, 3, steps, slots))
    into = draw.normal(size=(2, 3, 7))
    expected = into.copy()
    for t, b in np.ndindex(steps, slots):
        if sample[t, b] >= 0:
            expected[:, :, sample[t, b]] += block[:, :, t, b]
    add_by_sample(into, block, sample)
    np.testing.assert_allclose(into, expected, rtol=1e-12, atol=1e-13)


def test_nothing_but_padding_adds_nothing() -> None:
    """A block of padding does not change the sums."""
    into = np.ones((1, 1, 3))
    add_by_sample(into, np.full((1, 1, 2, 2), np.nan), np.full((2, 2), -1))
    assert (into == 1).all()


def test_samples_without_a_number_come_last() -> None:
    """NaN comes last in every order."""
    scores = np.array([np.nan, 1.0, -1.0])
    assert ranking(scores, "harmful").tolist() == [2, 1, 0]
    assert ranking(scores, "helpful").tolist() == [1, 2, 0]
    assert ranking(scores, "absolute").tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    "shard", [(1, 1, 1, 1), (7, 13, 101, 257), (64, 10, 50, 512), (1, 1, 3, 1_000_003)]
)
def test_chunks_divide_their_shard(shard: tuple[int, ...]) -> None:
    """A chunk's length divides its shard's, and a chunk has at most about 1 MB."""
    chunk = chunk_shape(shard, 4)
    assert all(extent % part == 0 for extent, part in zip(shard, chunk, strict=True))
    assert np.prod(chunk) * 4 <= CHUNK_BYTES
