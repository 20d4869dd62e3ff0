"""Path-integrated influence by brute force: trainings of a plain loop with weighted losses.

With weights w of the samples in each of several trainings, the influence of a slot is the mean,
over the trainings in which its sample's weight was drawn, of ln(1/floor) times minus the derivative
of the query by a factor of that slot's weighted loss, at 1.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tests.cases import Case, Weights
from tests.oracles.nudge import nudge

# From a case and the weights of all slots to the queries of the trained model.
Observe = Callable[[Case, Weights], np.ndarray]


def rows_of_slots(case: Case) -> list[list[int]]:
    """Return the row in every slot of every step."""
    found = []
    for group in case.groups:
        found.append([row for batch in group for row in batch])
    return found


def path_integrated(
    case: Case, observe: Observe, weights: np.ndarray, drawn: np.ndarray, floor: float
) -> np.ndarray:
    """Return the influence of every slot, `[query, observed_at, step, slot]`.

    Args:
        case: The training.
        observe: Trains with weights of the slots, and evaluates the queries.
        weights: Of the rows, `[training, row]`.
        drawn: Whether the row's weight was drawn, `[training, row]`.
        floor: The smallest weight.
    """
    slots = rows_of_slots(case)
    counts = [len(rows) for rows in slots]
    total = np.zeros(())
    for of_training, drawn_there in zip(weights, drawn, strict=True):
        swept = nudge(weighted(case, observe, of_training), counts)
        for step, rows in enumerate(slots):
            for slot, row in enumerate(rows):
                swept[:, :, step, slot] *= drawn_there[row] / drawn[:, row].sum()
        total = total + math.log(1 / floor) * swept
    return total


def weighted(
    case: Case, observe: Observe, weights: Sequence[float]
) -> Callable[[Weights], np.ndarray]:
    """Return the training whose losses are multiplied by the weights of their rows."""
    slots = rows_of_slots(case)

    def training(factors: Weights) -> np.ndarray:
        def both(step: int) -> Tensor:
            of_rows = torch.tensor([float(weights[row]) for row in slots[step]])
            return factors(step) * of_rows.double()

        return observe(case, both)

    return training
