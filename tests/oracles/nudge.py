"""The influence of every slot by brute force: change its weight, train again, evaluate the query.

I[q, tau, t, b] = - d q(theta_tau) / d w_{t,b}, for query q, observed state tau, step t and slot b.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tests.cases import Case, Weights, rows, train

# Half widths h of the differences. `derivative` needs each to be a quarter of the one before.
SIZES = (4e-3, 1e-3, 2.5e-4, 6.25e-5, 1.5625e-5)
Read = Callable[[nn.Module], Tensor]  # from a model to its queries, [query]
# From the weights of all slots to the queries of the trained model, [query, observed_at].
Training = Callable[[Weights], np.ndarray]


def nudge_every_weight(case: Case, read: Read, observed_at: Sequence[int]) -> np.ndarray:
    """Return the influence of every slot of a case, `[query, observed_at, step, slot]`."""

    def training(weights: Weights) -> np.ndarray:
        return observe(case, read, observed_at, weights)

    counts = []
    for group in case.groups:
        counts.append(sum(len(batch) for batch in group))
    return nudge(training, counts)


def nudge(training: Training, counts: Sequence[int], sizes: Sequence[float] = SIZES) -> np.ndarray:
    """Return the influence of every slot of any training, `[query, observed_at, step, slot]`.

    Args:
        training: Trains with given weights of the slots, and evaluates the queries.
        counts: The number of slots of every step.
        sizes: Half widths of the differences, each a quarter of the one before.
    """
    queries, states = training(all_ones(counts)).shape
    influence = np.zeros((queries, states, len(counts), max(counts)))
    for step, count in enumerate(counts):
        for slot in range(count):
            influence[:, :, step, slot] = -derivative(training, counts, step, slot, sizes=sizes)
    return influence


def all_ones(counts: Sequence[int]) -> Weights:
    """Return the weights of the training as it was: 1 for every slot."""
    return lambda step: torch.ones(counts[step], dtype=torch.float64)


def derivative(
    training: Training, counts: Sequence[int], step: int, slot: int, *, sizes: Sequence[float]
) -> np.ndarray:
    """Return the derivative of the queries by one slot's weight, `[query, observed_at]`.

    Central differences D(h) = (q(1 + h) - q(1 - h)) / 2h have an error of order h**2. Two sizes, of
    which one is a quarter of the other, give Richardson's value (16 D(h/4) - D(h)) / 15, whose
    error is of order h**4. For every entry we take the value that differs least from the one
    before: with a larger h truncation dominates, with a smaller one rounding.
    """

    def queries_at(weight: float) -> np.ndarray:
        def weights(number: int) -> Tensor:
            found = torch.ones(counts[number], dtype=torch.float64)
            if number == step:
                found[slot] = weight
            return found

        return training(weights)

    central = []
    for size in sizes:
        difference = queries_at(1 + size) - queries_at(1 - size)
        central.append(difference / (2 * size))
    richardson = []
    for coarse, fine in itertools.pairwise(central):
        richardson.append((16 * fine - coarse) / 15)
    best = richardson[1].copy()
    smallest_gap = np.abs(richardson[1] - richardson[0])
    for before, value in itertools.pairwise(richardson):
        gap = np.abs(value - before)
        is_better = gap < smallest_gap
        best[is_better] = value[is_better]
        smallest_gap[is_better] = gap[is_better]
    return best


def observe(
    case: Case, read: Read, observed_at: Sequence[int], weights: Weights | None = None
) -> np.ndarray:
    """Train a case and evaluate the queries at the observed states, `[query, observed_at]`."""
    model = case.built()
    model.train()
    queries = {}
    for state in train(case, model, rows(), weights):
        if state in observed_at:
            model.eval()
            with torch.no_grad():
                queries[state] = read(model).numpy()
            model.train()
    return np.stack([queries[state] for state in observed_at], axis=1)


def assert_exact(found: np.ndarray, truth: np.ndarray) -> None:
    """Assert that influence is within 1e-6 of the largest, for every query and observed state."""
    scale = np.abs(truth).max(axis=(2, 3))
    assert (scale > 0).all()
    error = np.abs(found - truth).max(axis=(2, 3)) / scale
    assert error.max() <= 1e-6, error
