"""The influence of every slot by brute force: nudge its weight, train again with plain PyTorch, look at the query."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tests.cases import Case, rows, train

SIZES = (4e-3, 1e-3, 2.5e-4, 6.25e-5, 1.5625e-5)  # each a quarter of the last
Read = Callable[[nn.Module], Tensor]  # the queries of a model, [query]
Weights = Callable[[int], Tensor]  # the weights of a step's slots
Training = Callable[
    [Weights], np.ndarray
]  # from the weights of all slots to the queries, [query, observed_at]


def nudge_every_weight(case: Case, read: Read, observed_at: Sequence[int]) -> np.ndarray:
    """Minus the derivative of every query by every slot's weight, [query, observed_at, step, slot]."""
    counts = [sum(len(batch) for batch in group) for group in case.groups]
    return nudge(lambda weights: observe(case, read, observed_at, weights), counts)


def nudge(training: Training, counts: Sequence[int], sizes: Sequence[float] = SIZES) -> np.ndarray:
    """Minus the derivative of a training's queries by the weight of each of the steps' slots.

    Central differences, of which neighbouring sizes give Richardson values; for every entry the
    pair of sizes that agrees best is taken.
    """
    found = {
        (step, slot): -derivative(training, counts, (step, slot), sizes=sizes)
        for step, count in enumerate(counts)
        for slot in range(count)
    }
    whole = np.zeros((*found[0, 0].shape, len(counts), max(counts)))
    for (step, slot), entry in found.items():
        whole[:, :, step, slot] = entry
    return whole


def derivative(
    training: Training, counts: Sequence[int], place: tuple[int, int], *, sizes: Sequence[float]
) -> np.ndarray:
    """Derivative of every query at every observed state by one slot's weight."""

    def at(size: float) -> np.ndarray:
        def weights(step: int) -> Tensor:
            ones = torch.ones(counts[step], dtype=torch.float64)
            if step == place[0]:
                ones[place[1]] += size
            return ones

        return training(weights)

    central = np.stack([(at(size) - at(-size)) / (2 * size) for size in sizes])
    richardson = (16 * central[1:] - central[:-1]) / 15
    gaps = np.abs(np.diff(richardson, axis=0))
    best: np.ndarray = np.take_along_axis(richardson, gaps.argmin(0)[None] + 1, 0)[0]
    return best


def observe(
    case: Case, read: Read, observed_at: Sequence[int], weights: Weights | None = None
) -> np.ndarray:
    """Train and read the queries at the observed states, [query, observed_at]."""
    model = case.built()
    model.train()
    found = {}
    for number in train(case, model, rows(), weights):
        if number in observed_at:
            model.eval()
            with torch.no_grad():
                found[number] = read(model).numpy()
            model.train()
    return np.stack([found[number] for number in observed_at], axis=1)


def assert_exact(found: np.ndarray, truth: np.ndarray) -> None:
    """Within 1e-6 of the largest derivative, for every query and observed state."""
    scale = np.abs(truth).max(axis=(2, 3))
    assert (scale > 0).all()
    error = np.abs(found - truth).max(axis=(2, 3)) / scale
    assert error.max() <= 1e-6, error
