"""The influence of every slot by brute force: nudge its weight, train again with plain PyTorch, look at the query."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tests.cases import Case, rows, train

SIZES = (4e-3, 1e-3, 2.5e-4, 6.25e-5, 1.5625e-5)  # each a quarter of the last
Read = Callable[[nn.Module], Tensor]  # the queries of a model, [query]


def nudge_every_weight(case: Case, read: Read, observed_at: Sequence[int]) -> np.ndarray:
    """Minus the derivative of every query by every slot's weight, [query, observed_at, step, slot].

    Central differences, of which neighbouring sizes give Richardson values; for every entry the pair of sizes that
    agrees best is taken.
    """
    counts = [sum(len(batch) for batch in group) for group in case.groups]
    found = np.zeros((len(observe(case, read, observed_at)), len(observed_at), len(counts), max(counts)))
    for step, count in enumerate(counts):
        for slot in range(count):
            found[:, :, step, slot] = -derivative(case, read, observed_at, (step, slot))
    return found


def derivative(case: Case, read: Read, observed_at: Sequence[int], place: tuple[int, int]) -> np.ndarray:
    """Derivative of every query at every observed state by one slot's weight."""

    def at(size: float) -> np.ndarray:
        def weights(step: int) -> Tensor:
            ones = torch.ones(sum(len(batch) for batch in case.groups[step]), dtype=torch.float64)
            if step == place[0]:
                ones[place[1]] += size
            return ones

        return observe(case, read, observed_at, weights)

    central = np.stack([(at(size) - at(-size)) / (2 * size) for size in SIZES])
    richardson = (16 * central[1:] - central[:-1]) / 15
    gaps = np.abs(np.diff(richardson, axis=0))
    best: np.ndarray = np.take_along_axis(richardson, gaps.argmin(0)[None] + 1, 0)[0]
    return best


def observe(
    case: Case, read: Read, observed_at: Sequence[int], weights: Callable[[int], Tensor] | None = None
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
