"""What a training that is run again has otherwise: weights of samples' losses."""

import abc
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from backtrail.run.run import Run

Steps = tuple[int, int]


class Change(abc.ABC):
    """A change of the weights of slots."""

    @abc.abstractmethod
    def first(self, run: Run) -> int:
        """The first step that differs; the end if none does."""

    @abc.abstractmethod
    def weights(self, run: Run, step: int) -> Float[Tensor, " slot"]:
        """Weights of a step's slots; 1 is as it was."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Nudge(Change):
    """Weights of all slots moved along a direction: 1 + size * direction[step, slot]."""

    direction: Float[Tensor, "step slot"]
    size: float

    def first(self, run: Run) -> int:
        """The first step that differs: from the start."""
        del run
        return 0

    def weights(self, run: Run, step: int) -> Float[Tensor, " slot"]:
        """Weights of a step's slots."""
        width = len(run.step(step).samples)
        return 1 + self.size * self.direction[step, :width].double()


def sharing(kept: Bool[np.ndarray, "step slot"], real: Bool[np.ndarray, "step slot"]) -> Nudge:
    """Weight 0 for all real slots but those kept, which share what was there: a step is as long as it was.

    A step of which nothing is kept has no gradient (but the penalty's).
    """
    share = real.sum(axis=1) / np.maximum(kept.sum(axis=1), 1)
    return Nudge(direction=torch.from_numpy(kept * share[:, None] - real), size=1.0)


@final
@dataclass(frozen=True, slots=True)
class Removal(Change):
    """Samples whose loss term loses its weight at the steps [a, b), or gets another."""

    samples: frozenset[int]
    steps: Steps
    renormalize: bool = False
    weight: float = 0.0

    def first(self, run: Run) -> int:
        """The first step that differs; the end if none does."""
        visits = (t for t in range(*self.steps) if not self.samples.isdisjoint(run.log[t].samples))
        return next(visits, run.steps)

    def weights(self, run: Run, step: int) -> Float[Tensor, " slot"]:
        """Weights of a step's slots: 1 but where removed; with renormalisation the others share what is left."""
        slots = run.step(step).samples
        gone = self.samples if self.steps[0] <= step < self.steps[1] else frozenset()
        weights = torch.tensor(
            [self.weight if sample in gone else 1.0 for sample in slots], dtype=torch.float64
        )
        left = float(weights.sum())
        return weights * (len(slots) / left) if self.renormalize and left > 0 else weights
