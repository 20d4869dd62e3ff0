"""Changes of the weights of samples' losses, under which a training is run again."""

import abc
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from backtrail.run.run import Run

Steps = tuple[int, int]  # [first step, step after the last)


class WeightChange(abc.ABC):
    """Weights w of the slots of each step; 1 is as it was recorded."""

    @abc.abstractmethod
    def first(self, run: Run) -> int:
        """The first step with a weight other than 1; `run.steps` if there is none."""

    @abc.abstractmethod
    def weights(self, run: Run, step: int) -> Float[Tensor, " slot"]:
        """Weights of a step's slots, in float64."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Perturbation(WeightChange):
    """All weights moved along one direction d: `w[t, b] = 1 + size * d[t, b]`."""

    direction: Float[Tensor, "step slot"]
    size: float

    def first(self, run: Run) -> int:
        """Step 0."""
        del run
        return 0

    def weights(self, run: Run, step: int) -> Float[Tensor, " slot"]:
        """Weights of a step's slots; the direction's entries for padding are dropped."""
        width = len(run.step(step).samples)
        return 1 + self.size * self.direction[step, :width].double()


def keep_only(
    kept: Bool[np.ndarray, "step slot"], real: Bool[np.ndarray, "step slot"]
) -> Perturbation:
    r"""Weight 0 for all slots but those kept, which share the weight of the whole batch.

    .. math:: w_{t,b} = n_t / k_t \text{ for the } k_t \text{ kept of } n_t \text{ slots, else } 0

    So a step stays as long as it was. A step of which nothing is kept has no gradient but the
    penalty's.

    Args:
        kept: the slots that are kept.
        real: the slots that hold a sample; the others pad short batches.
    """
    share = real.sum(axis=1) / np.maximum(kept.sum(axis=1), 1)
    weights = kept * share[:, None]
    return Perturbation(direction=torch.from_numpy(weights - real), size=1.0)


@final
@dataclass(frozen=True, slots=True)
class Removal(WeightChange):
    """Samples whose loss has another weight, usually 0, in the steps [a, b).

    Attributes:
        samples: the samples.
        steps: (a, b).
        renormalize: whether the weights of a step are scaled so that their mean stays 1.
        weight: the samples' weight.
    """

    samples: frozenset[int]
    steps: Steps
    renormalize: bool = False
    weight: float = 0.0

    def first(self, run: Run) -> int:
        """The first step in [a, b) with one of the samples; `run.steps` if there is none."""
        for step in range(*self.steps):
            if not self.samples.isdisjoint(run.log[step].samples):
                return step
        return run.steps

    def weights(self, run: Run, step: int) -> Float[Tensor, " slot"]:
        """Weights of a step's slots."""
        slots = run.step(step).samples
        start, stop = self.steps
        removed = self.samples if start <= step < stop else frozenset()
        weights = torch.tensor(
            [self.weight if sample in removed else 1.0 for sample in slots], dtype=torch.float64
        )
        total = float(weights.sum())
        # A batch of which nothing is left cannot be renormalised: it has no gradient.
        if self.renormalize and total > 0:
            return weights * (len(slots) / total)
        return weights
