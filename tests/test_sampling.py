"""Random numbers that depend on a seed alone.

The numbers written out here are what every version of torch must give: embeddings and their queries
may be made under different ones.
"""

import numpy as np
import pytest
import torch
from scipy import stats

from backtrail import sampling
from backtrail.sampling import (
    sample_classes,
    sample_normal,
    sample_subset,
    uniforms,
    uniforms_from,
)

LOGITS = [0.3, -0.2, 0.9]


def seeded(seed: int) -> torch.Generator:
    """A generator of the CPU."""
    return torch.Generator().manual_seed(seed)


def test_a_seed_gives_these_numbers() -> None:
    """Uniform numbers, labels, normal numbers and subsets, on every version of torch."""
    assert uniforms(2, seed=-5).tolist() == [0.26762773651979044, 0.6294493113687732]
    assert uniforms_from(seeded(7), 2).tolist() == [0.6499724578593874, 0.8344131404778291]
    labels = sample_classes(torch.tensor([LOGITS] * 16), seeded(7))
    assert labels.tolist() == [2, 2, 2, 0, 0, 2, 0, 2, 2, 0, 2, 0, 2, 2, 2, 1]
    # The quantile function is scipy's, which promises no last digit.
    normal = sample_normal(torch.zeros(2, 2, dtype=torch.float64), seeded(7))
    wanted = [0.3852461094418247, 0.9717524450682501, 0.544168899669563, -2.294426757505177]
    assert normal.flatten().tolist() == pytest.approx(wanted, rel=1e-14)
    assert sample_subset(12, 4, seed=9).tolist() == [1, 6, 7, 10]


def test_labels_are_the_inverse_of_the_cumulative_distribution() -> None:
    """Row by row, by comparing a uniform number with sums of probabilities in a loop."""
    logits = torch.randn(200, 7, dtype=torch.float64)
    uniform = uniforms_from(seeded(3), 200)
    wanted = []
    for row, number in zip(logits.softmax(1).numpy(), uniform, strict=True):
        label = 0
        while number >= row[: label + 1].sum():
            label += 1
        wanted.append(label)
    assert sample_classes(logits, seeded(3)).tolist() == wanted


def test_labels_have_the_probabilities_of_their_logits() -> None:
    """By a chi-squared test; a class without probability never occurs, wherever it stands."""
    probabilities = torch.tensor([0.0, 0.5, 0.25, 0.0, 0.2, 0.05, 0.0])
    labels = sample_classes(probabilities.log().repeat(40_000, 1), seeded(0))
    counts = np.bincount(labels.numpy(), minlength=7)
    possible = probabilities.numpy() > 0
    assert not counts[~possible].any()
    expected = probabilities.double().numpy()[possible]
    assert stats.chisquare(counts[possible], expected / expected.sum() * 40_000).pvalue > 0.01


def test_normal_numbers_are_normal() -> None:
    """By a Kolmogorov-Smirnov test; shape and type are those of the tensor that they are like."""
    like = torch.zeros(500, 40, dtype=torch.float32)
    found = sample_normal(like, seeded(0))
    assert found.shape == like.shape
    assert found.dtype == like.dtype
    assert stats.kstest(found.flatten().double().numpy(), "norm").pvalue > 0.01


def test_subsets_take_every_number_equally_often() -> None:
    """Different numbers, in order, by a chi-squared test over seeds."""
    found = torch.stack([sample_subset(10, 3, seed) for seed in range(4000)])
    assert (found.diff(dim=1) > 0).all()
    counts = np.bincount(found.flatten().numpy(), minlength=10)
    assert stats.chisquare(counts).pvalue > 0.01


def test_uniform_numbers_stay_inside() -> None:
    """The smallest and largest random bits give neither 0 nor 1, and always a possible label."""
    steps = np.array([0, 2**64 - 1], dtype=np.uint64) >> np.uint64(64 - sampling.BITS)
    lowest, highest = (steps + 0.5) * 2.0**-sampling.BITS
    assert lowest > 0
    assert highest < 1
    last = torch.tensor([[-torch.inf, 0.0], [0.0, -torch.inf]])
    for number in (lowest, highest):
        uniform = torch.full((2,), number, dtype=torch.float64)
        assert sampling._inverse_cumulative(last, uniform).tolist() == [1, 0]


def test_a_generator_moves_on() -> None:
    """Drawn twice from one generator, labels differ, and numbers after it do."""
    generator = seeded(0)
    logits = torch.zeros(50, 4)
    first = sample_classes(logits, generator)
    assert not torch.equal(first, sample_classes(logits, generator))


def test_labels_do_not_depend_on_chunks_or_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are worked on in chunks; logits of float32 are made float64 first."""
    logits = torch.randn(50, 7)
    whole = sample_classes(logits, seeded(1))
    assert torch.equal(sample_classes(logits.double(), seeded(1)), whole)
    monkeypatch.setattr(sampling, "ENTRIES_PER_CHUNK", 20)
    assert torch.equal(sample_classes(logits, seeded(1)), whole)
    assert sample_classes(logits[:0], seeded(1)).shape == (0,)


def test_logits_that_are_not_finite_have_some_label() -> None:
    """The loss is then NaN, which is noticed; a label out of range would be an index error."""
    logits = torch.tensor([[0.0, torch.nan, 1.0], [0.0, torch.inf, 1.0]])
    labels = sample_classes(logits, seeded(0))
    assert ((labels >= 0) & (labels < 3)).all()
